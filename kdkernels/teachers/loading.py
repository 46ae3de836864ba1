"""Load models and tokenizers from the folder or hub id in a command's option."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .adapters import Adapter, adapted, check_fits, find_adapter
from .quantization import check_quantization, quantization_config

__all__ = ["TOKENIZER_FILES", "has_tokenizer", "load", "skeleton_of"]

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")


def load(cls: Any, role: str, path: str, *, trainable: bool = False, quantization: str | None = None, **options: Any) -> Any:
    """Load a config, tokenizer or model with ``cls.from_pretrained``. Code in a model's repository is never run.

    For an adapter, the config is that of its base model, the tokenizer is its own if it has one, and the model is the combination.

    Args:
        trainable: load an adapter for training.
        quantization: a name of ``QUANTIZATIONS``, for a model. An adapter's weights are not quantised.

    Raises:
        ValueError: it does not exist or cannot be loaded, or weights are missing. The message names the option ``--role``.
    """
    if not Path(path).exists() and (path.startswith((".", "/", "~")) or path.count("/") > 1):
        raise ValueError(f"--{role} {path}: no such folder")
    if quantization is not None:
        check_quantization(f"--{role}-quantization", quantization)
        options["quantization_config"] = quantization_config(quantization)
    adapter = find_adapter(role, path, options.get("revision"))
    if adapter is None or (cls.__name__ == "AutoTokenizer" and has_tokenizer(path)):
        return _load(cls, role, path, **options)
    options = {**options, "revision": adapter.revision}
    if not cls.__name__.startswith("AutoModel"):
        return _load_base(cls, role, adapter, **options)
    _adapted_skeleton(role, adapter)  # before weights are read
    return adapted(adapter, _load_base(cls, role, adapter, **options), trainable)


def skeleton_of(role: str, path: str) -> Any:
    """Return a causal language model on the meta device, without weights; with its adapter if ``path`` has one.

    Raises:
        ValueError: same as ``load``, or the adapter is for another model.
    """
    from transformers import AutoConfig

    adapter = find_adapter(role, path) if Path(path).exists() or path.count("/") <= 1 else None
    return _skeleton(load(AutoConfig, role, path)) if adapter is None else _adapted_skeleton(role, adapter)


def has_tokenizer(path: str) -> bool:
    """Return whether a folder has a tokenizer's files. A hub id is assumed to have them."""
    return not Path(path).is_dir() or any(Path(path, name).is_file() for name in TOKENIZER_FILES)


def _skeleton(config: Any) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False)


def _adapted_skeleton(role: str, adapter: Adapter) -> Any:
    from transformers import AutoConfig

    return check_fits(role, adapter, _skeleton(_load_base(AutoConfig, role, adapter, revision=adapter.revision)))


def _load_base(cls: Any, role: str, adapter: Adapter, **options: Any) -> Any:
    try:
        return load(cls, role, adapter.base, **options)
    except ValueError as error:
        reason = str(error).removeprefix(f"--{role} ")
        raise ValueError(f"--{role} {adapter.path} is an adapter, and its base model can't be loaded: {reason}") from error


def _load(cls: Any, role: str, path: str, **options: Any) -> Any:
    of_model = cls.__name__.startswith("AutoModel")
    if of_model:  # transformers initialises missing weights at random
        options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    try:
        loaded = cls.from_pretrained(path, trust_remote_code=False, **options)
    except MemoryError:
        raise
    except Exception as error:  # transformers raises errors of any type for broken files
        raise ValueError(f"--{role} {path}: can't be loaded by {cls.__name__}: {' '.join(str(error).split())[:300]}") from error
    if not of_model:
        return loaded
    model, report = loaded
    if absent := sorted({*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])}):
        more = f" and {len(absent) - 3} more" if len(absent) > 3 else ""
        raise ValueError(
            f"--{role} {path}: the weights {', '.join(absent[:3])}{more} are missing or not of the shape in config.json, and would be "
            "drawn at random: give the folder of a whole model, as save_pretrained writes it"
        )
    return model
