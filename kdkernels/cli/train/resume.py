"""Resuming: find the record that a run must match, the checkpoint it starts from, and whether steps remain."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ...data.templates import writes_date
from ...teachers.adapters import CONFIG
from ...trainer.checkpoints import best_of, checkpoints, flaw, is_unfinished, read_manifest, step_of
from .output import RECORD, SUMMARY
from .record import Record
from .settings import Settings, TrainError

__all__ = ["choose_learn", "finished_summary", "is_last", "known_record", "model_folder", "requested", "starting_point"]


def known_record(settings: Settings, tokenizer: Any) -> tuple[Record, Record | None]:
    """Return the record of the requested run, and the record of the run that it continues (None for a new run).

    Raises:
        TrainError: the run differs from the one in its folder, or in the folder of ``--resume-from-checkpoint``.
    """
    out = Path(settings.args.output_dir)
    old = Record.read(out)
    origin = requested(settings.args)
    if isinstance(origin, Path) and (reason := flaw(origin)):
        raise TrainError(f"--resume-from-checkpoint {origin}: it is not a whole checkpoint: {reason}")
    if origin is True and old is None:
        raise TrainError(f"--resume-from-checkpoint true, but {out} holds no whole checkpoint")
    other = Record.read(origin.parent) if isinstance(origin, Path) and origin.parent.resolve() != out.resolve() else None
    args = settings.args
    dates = [args.template_date, *(record.settings.get("template_date") for record in (old, other) if record is not None)]
    args.template_date = next(filter(None, dates), None) if writes_date(tokenizer) else None
    now = Record.of(settings, tokenizer, {} if old is None else old.files)
    for record, where in ((old, f"--output-dir {out} holds"), (other, f"--resume-from-checkpoint {origin} is from")):
        differing = [] if record is None else record.unlike(now)
        if differing and record is old and not (out / SUMMARY).is_file() and not checkpoints(out):
            old = None  # it has no checkpoint, so nothing is lost
        elif differing:
            raise TrainError(f"{where} a run with another {', another '.join(differing)}: go on with the same, or choose another folder")
    if old is None and any(out.glob("checkpoint-*")):
        raise TrainError(f"--output-dir {out} holds checkpoints but no {RECORD}: choose another folder")
    if isinstance(origin, Path) and origin.parent.resolve() != out.resolve() and other is None:
        raise TrainError(f"--resume-from-checkpoint {origin}: its folder has no {RECORD}: choose a checkpoint of kdkernels train")
    return now, old or other


def choose_learn(args: Any, cache: Any) -> None:
    """Set the default of ``--learn``: the cache's value, or "last" for a resumed run that is older than this option."""
    if args.learn is not None:
        return
    origin = requested(args)
    folders = [Path(args.output_dir), *([origin.parent] if isinstance(origin, Path) else [])]
    records = [record for folder in folders if (record := Record.read(folder)) is not None]
    if cache is not None:
        args.learn = cache.learn
    elif any("learn" not in record.settings for record in records):
        args.learn = "last"


def requested(args: Any) -> Path | bool | None:
    """Return ``--resume-from-checkpoint`` as a folder, True (the newest checkpoint), False (no checkpoint), or None."""
    value = args.resume_from_checkpoint
    if value is None or str(value).lower() in ("true", "false"):
        return None if value is None else str(value).lower() == "true"
    return Path(value)


def starting_point(args: Any, total: int) -> Path | None:
    """Return the checkpoint that a run of ``total`` steps continues from; None for a new run.

    Raises:
        TrainError: the requested checkpoint is incomplete, it has more than ``total`` steps, or no checkpoint is complete.
    """
    out, origin = Path(args.output_dir), requested(args)
    if isinstance(origin, Path):
        return _not_beyond(origin, total)
    candidates = checkpoints(out)
    if origin is False:
        if candidates:
            raise TrainError(f"--resume-from-checkpoint false, but {out} holds checkpoints: choose another --output-dir to begin anew")
        return None
    flaws = {path: flaw(path) for path in candidates}
    whole = next((path for path in candidates if flaws[path] is None and _can_start(_not_beyond(path, total), total)), None)
    if whole is None and origin is True:
        raise TrainError(f"--resume-from-checkpoint true, but {out} holds no whole checkpoint")
    damaged = [path for path in candidates if flaws[path] and not is_unfinished(path)]
    if whole is None and damaged:
        raise TrainError(
            f"--output-dir {out}: no checkpoint is whole. {damaged[0].name}: {flaws[damaged[0]]}. Put it back, or choose another folder"
        )
    return whole


def _not_beyond(checkpoint: Path, total: int) -> Path:
    step = step_of(checkpoint)
    if step > total:
        raise TrainError(
            f"{checkpoint.parent} holds a run of {step:,} steps already, and {total:,} are asked for: ask for at least as many, choose "
            "another --output-dir, or name an earlier checkpoint with --resume-from-checkpoint"
        )
    return checkpoint


def _can_start(checkpoint: Path, total: int) -> bool:
    """Return whether the finished student can be loaded like any model. FSDP's sharded state cannot; then the last step is repeated."""
    return step_of(checkpoint) < total or any((checkpoint / name).is_file() for name in ("config.json", CONFIG))


def is_last(checkpoint: Path | None, total: int) -> bool:
    """Return True if no steps remain after ``checkpoint``."""
    return checkpoint is not None and step_of(checkpoint) >= total


def model_folder(checkpoint: Path, args: Any) -> Path:
    """Return the folder of the trained model, given the last checkpoint: the best checkpoint with ``load_best_model_at_end``."""
    best = best_of(checkpoint, read_manifest(checkpoint)) if args.load_best_model_at_end else None
    return best or checkpoint


def finished_summary(args: Any, total: int) -> dict[str, Any] | None:
    """Return the summary of a finished run of ``total`` steps whose model still exists."""
    out = Path(args.output_dir)
    if not (out / SUMMARY).is_file() or args.resume_from_checkpoint is not None:
        return None
    summary: dict[str, Any] = json.loads((out / SUMMARY).read_bytes())
    saved = summary.get("files", {})
    whole = all((out / file).is_file() and (out / file).stat().st_size == size for file, size in saved.items())
    return summary if saved and whole and summary.get("asked") == total else None
