"""``kdkernels train``, step by step: models and data, a plan, the training (begun or resumed), and a summary."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import transformers
from rich.console import Console

from ..files import Output
from .callbacks import Bar, Interrupt
from .loading import cache_of, check_data, model_of, tokenizer_of
from .output import RECORD, SUMMARY, OwnedTrainer, begun_checkpoints, check_output, open_output, save_model, step_of
from .settings import Settings, TrainError
from .summary import figure_of, finite, show, training_log

__all__ = ["last_checkpoint", "run"]


def run(settings: Settings, console: Console) -> int:
    """Train, or go on where an interrupted run of the same settings stopped. Returns the exit status: 0, or 130 when interrupted.

    Raises:
        TrainError: what can't be trained with, before anything is written.
        FileError: another process trains into the folder.
    """
    with open_output(settings) if settings.args.process_index == 0 else nullcontext() as output:
        if output is not None:
            check_output(output, settings)
        return _run(settings, console, output)


def _run(settings: Settings, console: Console, output: Output | None) -> int:
    """Train into the folder that the first process holds; ``output`` is None in the others."""
    args = settings.args
    args._n_gpu = min(args.n_gpu, 1)  # several are for torchrun: one process each
    args.dataloader_pin_memory = args.dataloader_pin_memory and args.device.type != "cpu"
    console = console if args.process_index == 0 else Console(quiet=True)
    transformers.logging.set_verbosity(transformers.logging.ERROR if args.log_level == "passive" else args.get_process_log_level())
    transformers.logging.disable_progress_bar()
    out = Path(args.output_dir)
    record = _record(out, settings)
    if record is not None:
        args.template_date = args.template_date or record.get("template_date")
    if output is not None:
        for name in begun_checkpoints(output):
            output.remove(name)
    checkpoint = next((path for path in _checkpoints(out) if _whole(path, args.world_size) and _can_go_on(path, args)), None)
    if record is not None and (out / SUMMARY).is_file():
        summary = json.loads((out / SUMMARY).read_text())
        if summary["asked"] == _asked(args):
            console.print("This run is finished; its summary again. Give a larger --max-steps to train on, or another --output-dir.")
            show(summary, console)
            return 0
    if checkpoint is None and (models := [path for path in _checkpoints(out) if not any(path.glob("rng_state*.pth"))]):
        raise TrainError(
            f"--output-dir {out}: {models[0].name} holds a model without the states of optimizer and random numbers (--save-only-model); "
            "a run can't go on from it. Give another folder"
        )
    tokenizer = tokenizer_of(settings)
    check_data(settings)
    cache = cache_of(settings, tokenizer) if settings.cache else None
    trained = checkpoint is not None and _is_last(checkpoint, args)  # transformers would train one step more
    (role, path, dtype), *of_teachers = settings.models
    student = model_of(role, str(checkpoint) if trained else path, dtype)
    teachers = [model_of(*model) for model in of_teachers]
    progress, interrupt = Bar(console), Interrupt()
    trainer = OwnedTrainer(
        model=student, teacher=teachers or None if cache is None else cache, args=args, train_dataset=settings.data,
        eval_dataset=settings.eval_data or None, processing_class=tokenizer, callbacks=[progress, interrupt],
    )  # fmt: skip
    trainer.own(output)
    for callback in (transformers.PrinterCallback, *([transformers.ProgressCallback] if args.disable_tqdm else [])):
        trainer.remove_callback(callback)
    if record is None:
        before = trainer.evaluate() if settings.eval_data else None
        record = {"settings": settings.identity(), "template_date": args.template_date, "before": before and finite(before)}
        _write(output, RECORD, record)
    elif checkpoint is not None:
        console.print(f"Resuming at {checkpoint.name} of {out}")
    transformers.set_seed(args.seed)  # the first evaluation has drawn
    if trained:
        if trainer.objective.features is not None:
            trainer.objective.features.load(str(checkpoint))
        trainer.state = transformers.TrainerState.load_from_json(f"{checkpoint}/trainer_state.json")
    else:
        with interrupt, progress:
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    if interrupt.stopped:
        step = trainer.state.global_step
        console.print(f"Interrupted at step {step}; {out / f'checkpoint-{step}'} is whole. The same command goes on from there.")
        return 130
    after = trainer.evaluate() if settings.eval_data else None
    save_model(trainer, output, out)
    last = last_checkpoint(out, args.world_size)
    summary = {
        "asked": _asked(args), "steps": trainer.state.global_step, "before": record["before"], "after": after and finite(after),
        "model": str(out), "checkpoint": None if last is None else str(last),
        "figure": None if output is None else figure_of(output, trainer.state.log_history, record["before"], after),
        "log": training_log(trainer.state.log_history),
    }  # fmt: skip
    _write(output, SUMMARY, summary)
    show(summary, console)
    return 0


def _record(out: Path, settings: Settings) -> dict[str, Any] | None:
    """The record of the run in ``out``, once it is known to be this run; None for a fresh folder, or a run that never made a checkpoint.

    Raises:
        TrainError: the folder holds another run, or checkpoints of unknown origin.
    """
    if not (out / RECORD).is_file():
        if out.is_dir() and any(out.glob("checkpoint-*")):
            raise TrainError(f"--output-dir {out} holds checkpoints but no {RECORD}: they are of another program; choose another folder")
        return None
    record: dict[str, Any] = json.loads((out / RECORD).read_text())
    now = settings.identity()
    differing = [name for name in now if record["settings"].get(name) != now[name]]
    if differing and not (out / SUMMARY).is_file() and not _checkpoints(out):
        return None
    if differing:
        name = differing[0]
        what = "number of processes" if name == "ranks" else f"--{name.replace('_', '-')}"
        values = "its content changed" if name == "data" else f"{record['settings'].get(name)!r} then, {now[name]!r} now"
        raise TrainError(f"--output-dir {out} holds a run with another {what} ({values}): go on with the same, or choose another folder")
    return record


def _checkpoints(out: Path) -> list[Path]:
    """Newest first."""
    found = {step: path for path in out.glob("checkpoint-*") if (step := step_of(path.name)) is not None}
    return [found[step] for step in sorted(found, reverse=True)]


def last_checkpoint(out: Path, ranks: int) -> Path | None:
    """The newest that every one of ``ranks`` processes has written whole."""
    return next((path for path in _checkpoints(out) if _whole(path, ranks)), None)


def _whole(path: Path, ranks: int) -> bool:
    """trainer_state.json is what is written last; the random states of other ranks may come later."""
    try:
        state = json.loads((path / "trainer_state.json").read_text())
    except (OSError, ValueError):
        return False
    return state.get("global_step") == int(path.name.rpartition("-")[2]) and len(list(path.glob("rng_state*.pth"))) >= ranks


def _is_last(checkpoint: Path, args: Any) -> bool:
    """Whether nothing is left to train after it."""
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    steps = args.max_steps if args.max_steps > 0 else state["max_steps"] * args.num_train_epochs / state["num_train_epochs"]
    return bool(state["global_step"] >= steps)


def _can_go_on(checkpoint: Path, args: Any) -> bool:
    """A finished student is loaded like any model, which FSDP's sharded state has none of: the training's end is repeated."""
    return not _is_last(checkpoint, args) or (checkpoint / "config.json").is_file()


def _asked(args: Any) -> dict[str, Any]:
    return {"max_steps": args.max_steps, "num_train_epochs": args.num_train_epochs}


def _write(output: Output | None, name: str, value: dict[str, Any]) -> None:
    """Write a JSON file, whole or not at all, in the first process."""
    if output is not None:
        output.write(name, lambda temporary: temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8"))
