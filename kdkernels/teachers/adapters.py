"""Adapters of peft: find an adapter's base model, check that they match, and combine them."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..support.files import digest, sample_digest

__all__ = ["BASE", "CONFIG", "Adapter", "adapted", "base_content", "check_fits", "describe_base", "find_adapter", "quiet"]

CONFIG, BASE = "adapter_config.json", "base_model.json"
"""The config that peft writes, and the file with which kdkernels identifies the base model's content."""


@dataclass(frozen=True)
class Adapter:
    """An adapter in a folder or on the hub.

    Attributes:
        path: its folder or hub id.
        base: folder or hub id of the model that it changes.
        revision: revision of a base model on the hub; None for the newest.
        commit: commit of an adapter on the hub.
        content: ``base_content`` of the base when the adapter was trained; None if not recorded.
    """

    path: str
    base: str
    revision: str | None = None
    commit: str | None = None
    content: str | None = None


def find_adapter(role: str, path: str, revision: str | None = None) -> Adapter | None:
    """Return the adapter in a folder or hub repository; None for a whole model.

    Raises:
        ValueError: the adapter's config is damaged or does not name a base model.
    """
    commit = None
    folder = Path(path)
    if not folder.is_dir():
        from transformers.utils.hub import cached_file, extract_commit_hash

        quiet = {f"_raise_exceptions_for_{what}": False for what in ("gated_repo", "missing_entries", "connection_errors")}
        try:
            config = cached_file(path, CONFIG, revision=revision, **quiet)
        except OSError:  # no such model: loading it raises the error
            return None
        if config is None:
            return None
        folder, commit = Path(config).parent, extract_commit_hash(config, None)
    if not (folder / CONFIG).is_file():
        return None
    try:
        values = json.loads((folder / CONFIG).read_bytes())
        base = values["base_model_name_or_path"]
        content = json.loads((folder / BASE).read_bytes())["content"] if (folder / BASE).is_file() else None
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"--{role} {path}: {CONFIG} or {BASE} is damaged: save the adapter again with save_pretrained") from None
    if not isinstance(base, str) or not base:
        raise ValueError(f"--{role} {path}: {CONFIG} names no base model: write its folder or hub id into base_model_name_or_path")
    return Adapter(path, base, values.get("revision"), commit, content)


def base_content(adapter: Adapter) -> str:
    """Return an identity of the base model's content: a digest of a folder's config and samples of its weights, or a hub commit."""
    from .cache.manifest import model_files

    if not Path(adapter.base).is_dir():
        from transformers import AutoConfig

        from .loading import load

        return str(load(AutoConfig, "student", adapter.base, revision=adapter.revision)._commit_hash)
    return digest({file.name: sample_digest(file) for file in model_files(Path(adapter.base))})


def describe_base(adapter: Adapter) -> str:
    """Return the text of ``base_model.json``."""
    return json.dumps({"base": adapter.base, "content": base_content(adapter)}, indent=1) + "\n"


def check_fits(role: str, adapter: Adapter, skeleton: Any) -> Any:
    """Add the adapter to a model on the meta device, and compare its saved weights with those that the model needs.

    Returns:
        The model with the adapter.

    Raises:
        ValueError: the adapter is for another model.
    """
    import peft

    def refuse(reason: str) -> ValueError:
        return ValueError(
            f"--{role} {adapter.path}: the adapter is for another model than {adapter.base}: {reason}. Write the model that it was "
            f"trained on into base_model_name_or_path of its {CONFIG}"
        )

    if adapter.content is not None and adapter.content != base_content(adapter):
        raise refuse("the config or weights there are not those that it was trained on")
    try:
        saved = peft.load_peft_weights(adapter.path, device="cpu")
        with quiet():
            config = peft.PeftConfig.from_pretrained(adapter.path, trust_remote_code=False)
            model = peft.get_peft_model(skeleton, config, autocast_adapter_dtype=False)
    except (ValueError, OSError, KeyError, TypeError, RuntimeError) as error:
        raise refuse(" ".join(str(error).split())[:300]) from None
    needed = {name: tuple(t.shape) for name, t in peft.get_peft_model_state_dict(model, save_embedding_layers=False).items()}
    allowed = needed | {name: tuple(t.shape) for name, t in model.state_dict().items()}
    for name, tensor in saved.items():
        if allowed.get(name) != tuple(tensor.shape):
            there = f"is {allowed[name]} there" if name in allowed else "has no place there"
            raise refuse(f"{name} of shape {tuple(tensor.shape)} {there}")
    if absent := sorted(needed.keys() - saved.keys()):
        raise refuse(f"it has no weights for {absent[0]}" + (f" and {len(absent) - 1} more" if len(absent) > 1 else ""))
    return model


def adapted(adapter: Adapter, model: Any, trainable: bool) -> Any:
    """Return the base ``model`` with the adapter. Call ``check_fits`` first."""
    import peft

    with quiet():
        return peft.PeftModel.from_pretrained(model, adapter.path, is_trainable=trainable, trust_remote_code=False)


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress FutureWarnings that peft and transformers raise about each other."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield
