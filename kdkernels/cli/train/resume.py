"""Where a run goes on: the record it must agree with, the checkpoint it starts from, and whether anything remains to be trained."""

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
    """The record of the run that is asked for, and that of the run which it goes on with: None for a new one.

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
    for record, where in ((old, f"--output-dir {out} holds"), (other, f"--resume-from-checkpoint {origin} is of")):
        differing = [] if record is None else record.unlike(now)
        if differing and record is old and not (out / SUMMARY).is_file() and not checkpoints(out):
            old = None  # it never came to a checkpoint, so nothing of it is lost
        elif differing:
            raise TrainError(f"{where} a run with another {', another '.join(differing)}: go on with the same, or choose another folder")
    if old is None and any(out.glob("checkpoint-*")):
        raise TrainError(f"--output-dir {out} holds checkpoints but no {RECORD}: choose another folder")
    if isinstance(origin, Path) and origin.parent.resolve() != out.resolve() and other is None:
        raise TrainError(f"--resume-from-checkpoint {origin}: there is no {RECORD} beside it, so it can't be known what it was trained on")
    return now, old or other


def choose_learn(args: Any, cache: Any) -> None:
    """Set which turns of a conversation are learnt where ``--learn`` is not given: those of the cache, or the last where a run goes on that
    was begun before there was a choice."""
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
    """What ``--resume-from-checkpoint`` asks for: a folder, True (the newest checkpoint), False (none), or nothing."""
    given = args.resume_from_checkpoint
    if given is None or str(given).lower() in ("true", "false"):
        return None if given is None else str(given).lower() == "true"
    return Path(given)


def starting_point(args: Any, total: int) -> Path | None:
    """The checkpoint that a run of ``total`` steps goes on from; None where it begins.

    Raises:
        TrainError: a requested checkpoint that is not whole; more steps than are asked for; checkpoints of which none is whole.
    """
    out, origin = Path(args.output_dir), requested(args)
    if isinstance(origin, Path):
        return _not_beyond(origin, total)
    found = checkpoints(out)
    if origin is False:
        if found:
            raise TrainError(f"--resume-from-checkpoint false, but {out} holds checkpoints: choose another --output-dir to begin anew")
        return None
    flaws = {path: flaw(path) for path in found}
    whole = next((path for path in found if flaws[path] is None and _can_start(_not_beyond(path, total), total)), None)
    if whole is None and origin is True:
        raise TrainError(f"--resume-from-checkpoint true, but {out} holds no whole checkpoint")
    damaged = [path for path in found if flaws[path] and not is_unfinished(path)]
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
    """A finished student is loaded like any model, which FSDP's sharded state does not hold: then the training's end is repeated."""
    return step_of(checkpoint) < total or any((checkpoint / name).is_file() for name in ("config.json", CONFIG))


def is_last(checkpoint: Path | None, total: int) -> bool:
    """True if nothing remains to be trained after ``checkpoint``."""
    return checkpoint is not None and step_of(checkpoint) >= total


def model_folder(checkpoint: Path, args: Any) -> Path:
    """The folder of the trained model, once ``checkpoint`` is the last: that of the best one where it is asked for."""
    best = best_of(checkpoint, read_manifest(checkpoint)) if args.load_best_model_at_end else None
    return best or checkpoint


def finished_summary(args: Any, total: int) -> dict[str, Any] | None:
    """The summary of a run that has come to ``total`` steps and whose model is still there."""
    out = Path(args.output_dir)
    if not (out / SUMMARY).is_file() or args.resume_from_checkpoint is not None:
        return None
    summary: dict[str, Any] = json.loads((out / SUMMARY).read_bytes())
    saved = summary.get("files", {})
    whole = all((out / file).is_file() and (out / file).stat().st_size == size for file, size in saved.items())
    return summary if saved and whole and summary.get("asked") == total else None
