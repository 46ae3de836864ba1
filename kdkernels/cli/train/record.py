"""The record of a run, ``run.json``: its settings, and digests of its models, cache and data. A run can continue only if they match."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from rich.console import Console
from transformers import AutoConfig

from ...backends import selection
from ...data.hub import identity_of, is_hub_name
from ...support.files import digest, digest_file
from ...teachers.adapters import base_content, find_adapter
from ...teachers.cache.manifest import MANIFEST, Manifest, model_files, template_hash, tokenizer_hash
from ...teachers.loading import load
from ...trainer.checkpoints import BEFORE, differences, settings_of
from .options import GROUPS, UNDECISIVE, default_of
from .output import RECORD
from .settings import BLOCK, Settings, TrainError

__all__ = ["Record", "check_expected", "resolved"]

FORMAT, VERSION = "kdkernels-run", 2
SECOND = 10**9  # nanoseconds
THREADS = 8
CONTENT = {
    "student": "the --student's weights or config", "teacher": "the --teacher's weights or config", "cache": "the --cache",
    "tokenizer": "the tokenizer", "chat_template": "the chat template", "data": "--data (its content changed)",
    "eval_data": "--eval-data (its content changed)",
}  # fmt: skip


@dataclass
class Record:
    """The settings and inputs of a run.

    Attributes:
        settings: the arguments that affect the result, and the dtypes of the models.
        content: digests of models, cache, tokenizer and data.
        files: sha256 and file status of each file of models and data when it was read.
        machine: properties that affect only the last bits of a result.
        an_epoch: steps per epoch.
        before: metrics of the evaluation before the first step.
    """

    settings: dict[str, Any]
    content: dict[str, Any]
    files: dict[str, list[Any]]
    machine: dict[str, Any]
    an_epoch: int = 0
    before: dict[str, Any] | None = None

    @classmethod
    def of(cls, settings: Settings, tokenizer: Any, cached: Mapping[str, list[Any]]) -> Record:
        """Return the record of a run with these settings. The first process reads the files for all processes.

        Args:
            cached: ``files`` of an earlier record. Files whose status has not changed are not read again.
        """
        args = settings.args
        result: list[Any] = [None]
        error: list[Any] = [None]
        if args.process_index == 0:
            try:
                result[0] = _content(settings, tokenizer, cached)
            except Exception as raised:
                if args.world_size == 1:
                    raise
                error[0] = f"{type(raised).__name__}: {raised}"  # otherwise the other processes would wait forever
        if args.world_size > 1:
            broadcast_object_list(result)
            broadcast_object_list(error)
            if error[0] is not None:
                raise TrainError(error[0])
        content, files = result[0]
        models = {name: getattr(settings, name) for name in ("student_dtype", "teacher_dtype")} | {"data_shares": settings.shares}
        groups = {name: value for group in GROUPS for name, value in dataclasses.asdict(getattr(settings, group)).items()}
        decisive = {name: value for name, value in groups.items() if name not in UNDECISIVE}
        return cls({**models, **decisive, **settings_of(args)}, content, files, _machine(args))

    @classmethod
    def read(cls, folder: Path) -> Record | None:
        """Return the record in ``folder``, or None.

        Raises:
            TrainError: this version cannot read the record.
        """
        path = folder / RECORD
        if not path.is_file():
            return None
        try:
            value = json.loads(path.read_bytes())
            version = value.pop("format", None), value.pop("version", None)
            if version == (FORMAT, VERSION):
                return cls(**value)
        except (ValueError, TypeError, AttributeError):
            raise TrainError(f"{path} is damaged: choose another --output-dir, or remove the run") from None
        raise TrainError(
            f"{path} was written by another version of kdkernels, which did not record the content of its models: finish the run with "
            "that version, or choose another --output-dir"
        )

    def to_json(self) -> dict[str, Any]:
        return {"format": FORMAT, "version": VERSION, **dataclasses.asdict(self)}

    def unlike(self, now: Record) -> list[str]:
        """Return descriptions of the differences between this run and ``now``, the requested run."""
        defaults = {f.name: default_of(f) for group in GROUPS.values() for f in dataclasses.fields(group)} | BEFORE
        changed = differences(self.settings, now.settings, defaults)
        words = [
            f"number of processes ({one} then, {two} now)" if name == "processes" else f"{_option(name)} ({one!r} then, {two!r} now)"
            for name, (one, two) in changed.items()
        ]
        return words + [
            words_of for name, words_of in CONTENT.items() if not same_content(name, self.content.get(name), now.content.get(name))
        ]

    def notes(self, now: Record) -> list[str]:
        """Return descriptions of the differences that affect only the last bits of a result."""
        changed = differences(self.machine, now.machine, {})
        return [f"{name.replace('_', ' ')} ({one} then, {two} now)" for name, (one, two) in changed.items()]


def check_expected(settings: Settings, now: Record, console: Console) -> None:
    """Compare this run with the block ``record`` of its config, and warn about other versions.

    Raises:
        TrainError: the content of models, tokenizer, cache or data differs.
    """
    expected = settings.expected
    if expected is None:
        return
    if other := other_content({**now.content, **expected.get("content", {})}, now.content):
        raise TrainError(
            f"--config: its block {BLOCK} is from a run with another {', another '.join(other)}: use what that run used, or leave the "
            "block out for a new run"
        )
    for name, (then, current) in differences(expected.get("machine", {}), _described(now), {}).items():
        if name in expected.get("machine", {}):
            named = f"{name.replace('_', ' ')} ({then} in the config, {current} now)"
            console.print(f"Warning: another {named}: the last bits may be others", markup=False)


def resolved(settings: Settings, record: Record) -> str:
    """Return the text of ``resolved.yaml``: every option of the run except secrets, and the block ``record``."""
    import yaml

    options = {**settings.options, "template_date": settings.args.template_date, "resume_from_checkpoint": None}
    options = {name.replace("_", "-"): value for name, value in options.items()}
    block = {BLOCK: {"content": record.content, "machine": _described(record)}}
    head = "# Every option of this run, defaults too. `kdkernels train --config THIS --output-dir OTHER` repeats it.\n"
    why = f"# What it was made with: other content is an error, another version a warning. Leave {BLOCK} out for another run.\n"
    return f"{head}{yaml.safe_dump(options, sort_keys=False, allow_unicode=True)}{why}{yaml.safe_dump(block, sort_keys=False)}"


def _described(record: Record) -> dict[str, Any]:
    return {name: value for name, value in record.machine.items() if name != "memory_budget"}


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _content(settings: Settings, tokenizer: Any, cached: Mapping[str, list[Any]]) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """Return digests by role, and the ``files`` of a record."""
    files: dict[str, list[Any]] = {}
    models = [_model(role, path, cached, files) for role, path, _ in settings.models]
    content = {
        "student": models[0],
        "teacher": models[1:],
        "cache": None if settings.cache is None else cache_content(Path(settings.cache)),
        "tokenizer": tokenizer_hash(tokenizer),
        "chat_template": template_hash(tokenizer),
        "data": data_content(settings.sources, cached, files, settings.rows.streaming),
        "eval_data": data_content(settings.eval_data, cached, files),
    }
    return content, files


def cache_content(folder: Path) -> dict[str, Any]:
    """Return the identity of a cache, and the sha256 of its manifest and of each shard."""
    manifest = Manifest.read(folder)
    return {
        "manifest": digest_file(folder / MANIFEST), "identity": manifest.identity.hash(),
        "head": None if manifest.head is None else manifest.head.sha256, "shards": [shard.sha256 for shard in manifest.shards],
    }  # fmt: skip


def other_content(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return the names of the roles whose content differs."""
    return [words for name, words in CONTENT.items() if not same_content(name, then.get(name), now.get(name))]


def same_content(name: str, then: Any, now: Any) -> bool:
    """Return whether content of two records is the same.

    A cache with added shards counts as the same: `train` has checked that it has all rows of the run.
    """
    if name != "cache" or then is None or now is None or then == now:
        return bool(then == now)
    if isinstance(then, str):  # of an earlier version
        return bool(then == now["manifest"])
    common = min(len(then["shards"]), len(now["shards"]))
    return all(then[part] == now[part] for part in ("identity", "head")) and bool(then["shards"][:common] == now["shards"][:common])


def data_content(
    paths: Iterable[str], cached: Mapping[str, list[Any]] | None = None, files: dict[str, list[Any]] | None = None, streamed: bool = False
) -> list[str]:
    """Return the sha256 of each file, or of all files and names in a folder; for a hub data set, split, configuration and commit.

    Args:
        cached: ``files`` of an earlier record: a file whose status has not changed since is not read again.
        files: gets an entry for each file.
    """
    cached, files = cached or {}, {} if files is None else files
    return [identity_of(path, streamed) if is_hub_name(path) else _of_path(Path(path), cached, files) for path in paths]


def _of_path(path: Path, cached: Mapping[str, list[Any]], files: dict[str, list[Any]]) -> str:
    if not path.exists():
        raise TrainError(f"{path}: no such file or folder")
    paths = sorted(f for f in path.iterdir() if f.is_file()) if path.is_dir() else [path]
    hashes = _read(paths, cached, files)
    return digest(hashes) if path.is_dir() else hashes[path.name]


def _model(role: str, path: str, cached: Mapping[str, list[Any]], files: dict[str, list[Any]]) -> str:
    """Return the commit of a hub model, or a digest of a folder's config and weights. An adapter includes its base model."""
    adapter = find_adapter(role, path)
    if adapter is not None:
        adapter_digest = adapter.commit or _files(path, cached, files)
        return digest([adapter_digest, _files(adapter.base, cached, files) if Path(adapter.base).is_dir() else base_content(adapter)])
    if not Path(path).is_dir():
        return str(load(AutoConfig, role, path)._commit_hash)
    return _files(path, cached, files)


def _files(path: str, cached: Mapping[str, list[Any]], files: dict[str, list[Any]]) -> str:
    return digest(_read(model_files(Path(path)), cached, files))


def _read(paths: Sequence[Path], cached: Mapping[str, list[Any]], files: dict[str, list[Any]]) -> dict[str, str]:
    """Return the sha256 of each file by name, and add an entry for each to ``files``."""
    with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as pool:
        entries = dict(zip(paths, pool.map(lambda file: _sha256(file, cached.get(str(file.resolve()))), paths), strict=True))
    files.update({str(file.resolve()): entry for file, entry in entries.items()})
    return {file.name: entry[0] for file, entry in entries.items()}


def _sha256(path: Path, cached: list[Any] | None) -> list[Any]:
    """Return the sha256, and the file status: size, inode, times of the last changes, and whether these are old enough to be trusted.

    The time of a status change (ctime) cannot be set back. But a file that was changed less than a second before it was read may change
    again without a new time, so such a file is read again.
    """
    stat = path.stat()
    status = [stat.st_size, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns]
    if cached is not None and cached[1:] == [*status, True]:
        return cached
    now = time.time_ns()
    return [digest_file(path), *status, now - max(stat.st_ctime_ns, stat.st_mtime_ns) > SECOND]


def _machine(args: Any) -> dict[str, Any]:
    device = args.device.type
    return {
        "memory_budget": args.memory_budget,
        "device": torch.cuda.get_device_name(args.device) if device == "cuda" else f"{device} ({platform.machine()})",
        "threads": torch.get_num_threads(),
        "backend": selection.select("auto", device, (torch.float32, torch.float32)),
        **{f"version_of_{name}": metadata.version(name) for name in ("torch", "transformers", "kdkernels")},
    }
