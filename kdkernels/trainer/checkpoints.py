"""Checkpoints that are whole or not taken, and the settings that a resumed training shares with the one that it goes on with.

``checkpoint.json`` is written twice: first, as the mark of a folder that this package makes and may remove; last, with the size and a
digest of every other file, once all of them are on disk. A folder without the second is not a checkpoint.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import shutil
from array import array
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from ..data.collator import Item
from ..support.errors import UserError
from ..support.files import sample_digest, sync_folder, write_whole
from ..teachers.live import LiveTeacher
from .arguments import DistillationArguments

__all__ = [
    "BEFORE", "FREE", "CheckpointError", "begin", "check_same", "best_of",
    "checkpoints", "data_digest", "differences", "finish", "flaw", "is_unfinished", "last_whole",
    "read_manifest", "settings_of", "step_of", "surplus", "teacher_digest",
]  # fmt: skip

MANIFEST, FORMAT, VERSION = "checkpoint.json", "kdkernels-checkpoint", 1

FREE = frozenset({
    "max_steps", "num_train_epochs",
    "output_dir", "run_name", "project", "report_to", "disable_tqdm", "log_level", "log_level_replica", "log_on_each_node",
    "logging_strategy", "logging_steps", "logging_first_step", "logging_nan_inf_filter", "include_num_input_tokens_seen",
    "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id",
    "save_strategy", "save_steps", "save_total_limit", "save_only_model", "save_on_each_node", "enable_jit_checkpoint",
    "push_to_hub", "hub_model_id", "hub_strategy", "hub_token", "hub_private_repo", "hub_always_push", "hub_revision",
    "eval_strategy", "eval_steps", "eval_delay", "eval_on_start", "per_device_eval_batch_size", "eval_accumulation_steps",
    "prediction_loss_only", "eval_do_concat_batches", "eval_use_gather_object", "include_for_metrics", "batch_eval_metrics",
    "metric_for_best_model", "greater_is_better",
    "dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers", "dataloader_prefetch_factor",
    "dataloader_multiprocessing_context",
    "do_train", "do_eval", "do_predict", "local_rank", "ddp_timeout", "debug", "skip_memory_metrics", "torch_empty_cache_steps",
    "label_names", "length_column_name", "resume_from_checkpoint", "restore_callback_states_from_checkpoint",
    "memory_budget", "use_cpu",
})  # fmt: skip
"""Arguments that may change when a training is resumed; every other decides what is trained. docs/trainer.md lists them."""

BEFORE = {**{f.name: f.default for f in dataclasses.fields(DistillationArguments)}, "learn": "last"}
"""The values of arguments that a checkpoint or record does not know: those of the time before they were there."""

OF_THE_BEST = frozenset({
    "save_strategy", "save_steps", "eval_strategy", "eval_steps", "eval_delay", "metric_for_best_model", "greater_is_better",
})  # fmt: skip
"""Of those, what decides where an evaluation does: the best checkpoint is loaded at the end, or the learning rate follows a metric."""


class CheckpointError(UserError, ValueError):
    """A checkpoint that is not whole, or of another training; the message names what differs and the way out."""


def settings_of(args: Any) -> dict[str, Any]:
    """The arguments that decide what is trained, as JSON; of a field that names a file of settings its content."""
    fields = json.loads(args.to_json_string())
    evaluation_decides = args.load_best_model_at_end or fields["lr_scheduler_type"] in ("reduce_lr_on_plateau", "greedy")
    free = FREE - OF_THE_BEST if evaluation_decides else FREE
    decisive = {name: value for name, value in fields.items() if name not in free}
    for name in ("deepspeed", "fsdp_config", "accelerator_config"):
        if isinstance(decisive.get(name), str) and Path(decisive[name]).is_file():
            decisive[name] = json.loads(Path(decisive[name]).read_text(encoding="utf-8"))
    return {**decisive, "mixed_precision": args.mixed_precision, "processes": args.world_size}


def differences(then: Mapping[str, Any], now: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Settings with unlike values, by name. One that only a newer or older release knows counts as its default."""
    names = [*now, *(name for name in then if name not in now)]
    values = {name: (then.get(name, defaults.get(name)), now.get(name, defaults.get(name))) for name in names}
    return {name: pair for name, pair in values.items() if pair[0] != pair[1]}


def data_digest(items: Iterable[Item]) -> str:
    """sha256 of the tokens, scored positions and weights of all items and their turns, in order."""
    digest = hashlib.sha256()
    for item in items:
        digest.update(f"{len(item)}\0".encode())
        for example in item:
            for part in (example.student_ids, example.student_scored, example.teacher_ids, example.teacher_scored):
                digest.update(f"{len(part)}\0".encode())
                digest.update(f"{part}\0".encode() if isinstance(part, range) else array("q", part).tobytes())
            digest.update(f"{example.weight!r}\0".encode())
            if any(weight != 1 for _, weight in example.turns):
                digest.update(f"{example.turns!r}\0".encode())
    return digest.hexdigest()


def teacher_digest(teacher: Any) -> str:
    """sha256 of a cache's salt, or over a sample of 64 values of each weight of the models; of None of nothing."""
    digest = hashlib.sha256(str(getattr(teacher, "salt", "")).encode())
    for model in teacher.models if isinstance(teacher, LiveTeacher) else []:
        for name, weight in model.state_dict().items():
            digest.update(f"{name}\0{tuple(weight.shape)}\0{weight.dtype}\0".encode())
            if weight.device.type != "meta" and weight.numel():
                flat = weight.detach().flatten()
                digest.update(flat[:: -(-flat.numel() // 64)].contiguous().view(torch.uint8).cpu().numpy().tobytes())
    return digest.hexdigest()


def check_same(folder: Path, now: Mapping[str, Any]) -> None:
    """
    Args:
        now: settings, data and teacher of the training that would go on from ``folder``.

    Raises:
        CheckpointError: ``folder`` is not a whole checkpoint, or of another training.
    """
    then = read_manifest(folder)
    changed = differences(then["settings"], now["settings"], BEFORE)
    unlike = [f"{name} ({one!r} then, {two!r} now)" for name, (one, two) in changed.items()]
    unlike += [name for name, what in (("train_dataset", "data"), ("teacher", "teacher")) if then[what] != now[what]]
    if unlike:
        raise CheckpointError(
            f"{folder} is of another training, with another {', another '.join(unlike)}: go on with the same, or train anew in another "
            "folder"
        )


def checkpoints(out: Path) -> list[Path]:
    """The folders ``checkpoint-STEP`` that this package has made in ``out``, newest step first."""
    named = [path for path in out.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted((path for path in named if not path.is_symlink() and _manifest(path)), key=step_of, reverse=True)


def step_of(folder: Path) -> int:
    """The number in ``checkpoint-STEP``."""
    return int(folder.name.rpartition("-")[2])


def begin(folder: Path) -> None:
    """Makes the folder of a checkpoint, with its mark.

    Raises:
        CheckpointError: something else is there.
    """
    if folder.exists() or folder.is_symlink():
        if folder.is_symlink() or not _manifest(folder):
            raise CheckpointError(f"{folder} was not made by kdkernels: move it away, or choose another output folder")
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    _write(folder, {})


def finish(folder: Path, **facts: Any) -> None:
    """Declares the checkpoint whole, once every file of it is on disk."""
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST):
        with path.open("rb") as file:
            os.fsync(file.fileno())
        files[path.relative_to(folder).as_posix()] = [path.stat().st_size, sample_digest(path)]
    for sub in {path.parent for path in folder.rglob("*")} | {folder.parent}:
        sync_folder(sub)
    _write(folder, {**facts, "files": files})


def read_manifest(folder: Path) -> dict[str, Any]:
    """What ``finish`` has written.

    Raises:
        CheckpointError: the folder is not a whole checkpoint; the message says why.
    """
    if reason := flaw(folder):
        raise CheckpointError(f"{folder} is not a whole checkpoint: {reason}")
    return _manifest(folder) or {}


def flaw(folder: Path) -> str | None:
    """The reason why ``folder`` can't be resumed from; None for a whole checkpoint, whose best checkpoint is whole too."""
    if not folder.is_dir():
        return "no such folder"
    manifest = _manifest(folder)
    if manifest is None:
        return f"it has no {MANIFEST}, which this release writes into each"
    if "files" not in manifest:
        return "its writing was cut off"
    if not manifest["resumable"]:
        return "it holds the model only (save_only_model)"
    return _damage(folder, manifest) or _flaw_of_best(folder, manifest)


def is_unfinished(folder: Path) -> bool:
    """True for a checkpoint whose writing was cut off."""
    return "files" not in (_manifest(folder) or {"files": {}})


def _damage(folder: Path, manifest: Mapping[str, Any]) -> str | None:
    for name, (size, fingerprint) in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size or sample_digest(path) != fingerprint:
            return f"{name} is not as it was written"
    return None


def _flaw_of_best(folder: Path, manifest: Mapping[str, Any]) -> str | None:
    best = best_of(folder, manifest)
    if best is None or best == folder:
        return None
    other = _manifest(best)
    damage = "it is missing" if other is None or "files" not in other else _damage(best, other)
    return f"the best checkpoint, {best.name}, is not whole ({damage})" if damage else None


def best_of(folder: Path, manifest: Mapping[str, Any]) -> Path | None:
    """The best checkpoint so far, beside ``folder``."""
    return None if manifest["best"] is None else folder.with_name(manifest["best"])


def last_whole(out: Path) -> Path | None:
    """The newest checkpoint in ``out`` that can be resumed from."""
    return next((path for path in checkpoints(out) if flaw(path) is None), None)


def surplus(out: Path, limit: int | None, keep: Collection[str]) -> list[Path]:
    """Return the oldest checkpoints beyond ``limit``, without those whose name is in ``keep``."""
    if limit is None or limit <= 0:
        return []
    others = [path for path in checkpoints(out) if path.name not in keep]
    return others[max(limit - len(keep), 0) :]


def _manifest(folder: Path) -> dict[str, Any] | None:
    try:
        value = json.loads((folder / MANIFEST).read_bytes())
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) and (value.get("format"), value.get("version")) == (FORMAT, VERSION) else None


def _write(folder: Path, facts: Mapping[str, Any]) -> None:
    text = json.dumps({"format": FORMAT, "version": VERSION, **facts}, indent=1) + "\n"
    write_whole(folder / MANIFEST, lambda path: path.write_text(text, encoding="utf-8"))
