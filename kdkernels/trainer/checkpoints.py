"""Complete checkpoints, and the comparison of a resumed training with its checkpoint.

``checkpoint.json`` is written twice. The first version marks a folder that kdkernels created and may remove. The second, written after all
other files are on disk, has the size and digest of each. A folder without the second version is not a complete checkpoint.
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
"""Arguments that may change when a training is resumed. All others affect the result. docs/trainer.md lists them."""

BEFORE = {**{f.name: f.default for f in dataclasses.fields(DistillationArguments)}, "learn": "last"}
"""Values of arguments that are missing in a checkpoint or record because they were added later."""

OF_THE_BEST = frozenset({
    "save_strategy", "save_steps", "eval_strategy", "eval_steps", "eval_delay", "metric_for_best_model", "greater_is_better",
})  # fmt: skip
"""Arguments among these that do affect the result if evaluations do: with the best checkpoint loaded at the end, or with a learning rate
that follows a metric."""


class CheckpointError(UserError, ValueError):
    """The checkpoint is incomplete or belongs to another training. The message says what differs and what to do."""


def settings_of(args: Any) -> dict[str, Any]:
    """Return the arguments that affect the result, as JSON. A field that names a settings file is replaced by the file's content."""
    fields = json.loads(args.to_json_string())
    evaluation_decides = args.load_best_model_at_end or fields["lr_scheduler_type"] in ("reduce_lr_on_plateau", "greedy")
    free = FREE - OF_THE_BEST if evaluation_decides else FREE
    decisive = {name: value for name, value in fields.items() if name not in free}
    for name in ("deepspeed", "fsdp_config", "accelerator_config"):
        if isinstance(decisive.get(name), str) and Path(decisive[name]).is_file():
            decisive[name] = json.loads(Path(decisive[name]).read_text(encoding="utf-8"))
    return {**decisive, "mixed_precision": args.mixed_precision, "processes": args.world_size}


def differences(then: Mapping[str, Any], now: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the settings with different values, by name. A setting that is missing on one side counts as its default."""
    names = [*now, *(name for name in then if name not in now)]
    values = {name: (then.get(name, defaults.get(name)), now.get(name, defaults.get(name))) for name in names}
    return {name: pair for name, pair in values.items() if pair[0] != pair[1]}


def data_digest(items: Iterable[Item]) -> str:
    """Return the sha256 of tokens, scored positions and weights of all items and their turns, in order."""
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
    """Return a sha256 for the teacher: of a cache's salt, of 64 sampled values of each weight of a model, or of nothing for None."""
    digest = hashlib.sha256(str(getattr(teacher, "salt", "")).encode())
    for model in teacher.models if isinstance(teacher, LiveTeacher) else []:
        for name, weight in model.state_dict().items():
            digest.update(f"{name}\0{tuple(weight.shape)}\0{weight.dtype}\0".encode())
            if weight.device.type != "meta" and weight.numel():
                flat = weight.detach().flatten()
                digest.update(flat[:: -(-flat.numel() // 64)].contiguous().view(torch.uint8).cpu().numpy().tobytes())
    return digest.hexdigest()


def check_same(folder: Path, now: Mapping[str, Any]) -> None:
    """Check that a training can resume from a checkpoint.

    Args:
        now: settings, data and teacher of the resumed training.

    Raises:
        CheckpointError: ``folder`` is not a complete checkpoint, or belongs to another training.
    """
    then = read_manifest(folder)
    changed = differences(then["settings"], now["settings"], BEFORE)
    unlike = [f"{name} ({one!r} then, {two!r} now)" for name, (one, two) in changed.items()]
    unlike += [name for name, what in (("train_dataset", "data"), ("teacher", "teacher")) if then[what] != now[what]]
    if unlike:
        raise CheckpointError(
            f"{folder} belongs to another training, with another {', another '.join(unlike)}: use the same settings, or train in another "
            "folder"
        )


def checkpoints(out: Path) -> list[Path]:
    """Return the folders ``checkpoint-STEP`` in ``out`` that kdkernels created, newest step first."""
    named = [path for path in out.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted((path for path in named if not path.is_symlink() and _manifest(path)), key=step_of, reverse=True)


def step_of(folder: Path) -> int:
    """Return the step of a folder ``checkpoint-STEP``."""
    return int(folder.name.rpartition("-")[2])


def begin(folder: Path) -> None:
    """Create the folder of a checkpoint, with its mark.

    Raises:
        CheckpointError: the path exists and was not created by kdkernels.
    """
    if folder.exists() or folder.is_symlink():
        if folder.is_symlink() or not _manifest(folder):
            raise CheckpointError(f"{folder} was not made by kdkernels: move it away, or choose another output folder")
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    _write(folder, {})


def finish(folder: Path, **facts: Any) -> None:
    """Mark the checkpoint as complete. All its files must be on disk."""
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST):
        with path.open("rb") as file:
            os.fsync(file.fileno())
        files[path.relative_to(folder).as_posix()] = [path.stat().st_size, sample_digest(path)]
    for sub in {path.parent for path in folder.rglob("*")} | {folder.parent}:
        sync_folder(sub)
    _write(folder, {**facts, "files": files})


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read the manifest that ``finish`` wrote.

    Raises:
        CheckpointError: the folder is not a complete checkpoint; the message gives the reason.
    """
    if reason := flaw(folder):
        raise CheckpointError(f"{folder} is not a whole checkpoint: {reason}")
    return _manifest(folder) or {}


def flaw(folder: Path) -> str | None:
    """Return the reason why training cannot resume from ``folder``; None if it and its best checkpoint are complete."""
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
    """Return True for a checkpoint whose writing was interrupted."""
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
    """Return the best checkpoint so far, in the same folder as ``folder``."""
    return None if manifest["best"] is None else folder.with_name(manifest["best"])


def last_whole(out: Path) -> Path | None:
    """Return the newest checkpoint in ``out`` that training can resume from."""
    return next((path for path in checkpoints(out) if flaw(path) is None), None)


def surplus(out: Path, limit: int | None, keep: Collection[str]) -> list[Path]:
    """Return the oldest checkpoints beyond ``limit``, except those named in ``keep``."""
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
