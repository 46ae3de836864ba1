"""``kdkernels train``, step by step: models and data, a plan, the training (begun or resumed), and a summary."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from transformers import TrainerCallback

from .loading import cache_of, model_of, tokenizer_of
from .settings import Settings, TrainError

__all__ = ["last_checkpoint", "run"]

RECORD, SUMMARY, FIGURE = "run.json", "summary.json", "training.png"
SHOWN = {
    "eval_loss": "loss", "eval_divergence": "divergence", "eval_cross_entropy": "cross-entropy", "eval_feature_loss": "feature loss",
    "eval_top1_agreement": "same top token",
}  # fmt: skip


def run(settings: Settings, console: Console) -> int:
    """Trains, or goes on where an interrupted run of the same settings stopped. Returns the exit status: 0, or 130 when interrupted.

    Raises:
        TrainError: what can't be trained with, before anything is written.
    """
    from ..trainer.trainer import DistillationTrainer

    args = settings.args
    args._n_gpu = min(args.n_gpu, 1)  # several are for torchrun: one process each
    args.dataloader_pin_memory = args.dataloader_pin_memory and args.device.type != "cpu"
    console = console if args.process_index == 0 else Console(quiet=True)
    transformers.logging.set_verbosity(transformers.logging.ERROR if args.log_level == "passive" else args.get_process_log_level())
    transformers.logging.disable_progress_bar()
    out = Path(args.output_dir)
    record = _record(out, settings)
    checkpoint = last_checkpoint(out, args.world_size)
    if record is not None and (out / SUMMARY).is_file():
        summary = json.loads((out / SUMMARY).read_text())
        if summary["asked"] == _asked(args):
            console.print("This run is finished; its summary again. Give a larger --max-steps to train on, or another --output-dir.")
            _show(summary, console)
            return 0
    tokenizer = tokenizer_of(settings)
    teacher = cache_of(settings, tokenizer) if settings.cache else None
    # Autocast wants float32 to update, whatever the checkpoint was saved in.
    dtype = "float32" if settings.student_dtype == "auto" and (args.bf16 or args.fp16) else settings.student_dtype
    student = model_of(settings.student, "student", dtype)
    if settings.teacher:
        teacher = [model_of(path, "teacher", settings.teacher_dtype) for path in settings.teacher]
    progress = Bar(console)
    interrupt = Interrupt()
    trainer = DistillationTrainer(
        model=student, teacher=teacher, args=args, train_dataset=settings.data, eval_dataset=settings.eval_data, processing_class=tokenizer,
        callbacks=[progress, interrupt],
    )  # fmt: skip
    for callback in (transformers.PrinterCallback, *([transformers.ProgressCallback] if args.disable_tqdm else [])):
        trainer.remove_callback(callback)
    if record is None:
        before = trainer.evaluate() if settings.eval_data else None
        record = {"settings": settings.identity(), "before": before and _finite(before)}
        _write(out / RECORD, record, args)
    elif checkpoint is not None:
        console.print(f"Resuming at {checkpoint.name} of {out}")
    transformers.set_seed(args.seed)  # the first evaluation has drawn
    if checkpoint is not None and _is_last(checkpoint, args):  # transformers would train one step more
        trainer._load_from_checkpoint(str(checkpoint))
        trainer.state = transformers.TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    else:
        with interrupt:
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    progress.stop()
    if interrupt.caught:
        step = trainer.state.global_step
        console.print(f"Interrupted at step {step}; {out / f'checkpoint-{step}'} is whole. The same command goes on from there.")
        return 130
    after = trainer.evaluate() if settings.eval_data else None
    trainer.save_model()
    last = last_checkpoint(out, args.world_size)
    summary = {
        "asked": _asked(args), "steps": trainer.state.global_step, "before": record["before"], "after": after and _finite(after),
        "model": str(out), "checkpoint": None if last is None else str(last),
        "figure": _figure(out, trainer.state.log_history, record["before"], after) if args.process_index == 0 else None,
        "log": _training_log(trainer.state.log_history),
    }  # fmt: skip
    _write(out / SUMMARY, summary, args)
    _show(summary, console)
    return 0


def _record(out: Path, settings: Settings) -> dict[str, Any] | None:
    """The record of the run in ``out``, once it is known to be this run; None for a fresh folder.

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
    if differing:
        name = differing[0]
        values = "its content changed" if name == "data" else f"{record['settings'].get(name)!r} then, {now[name]!r} now"
        raise TrainError(
            f"--output-dir {out} holds a run with another --{name.replace('_', '-')} ({values}): "
            "go on with the same, or choose another folder"
        )
    return record


def last_checkpoint(out: Path, ranks: int = 1) -> Path | None:
    """The newest whole checkpoint; those that a killed process left half-written are removed."""
    found = sorted(
        (p for p in out.glob("checkpoint-*") if p.name.rpartition("-")[2].isdigit()), key=lambda p: int(p.name.rpartition("-")[2])
    )
    for path in reversed(found):
        if _whole(path, ranks):
            return path
        if int(os.environ.get("RANK", 0)) == 0:
            shutil.rmtree(path)
    return None


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


def _asked(args: Any) -> dict[str, Any]:
    return {"max_steps": args.max_steps, "num_train_epochs": args.num_train_epochs}


def _write(path: Path, value: dict[str, Any], args: Any) -> None:
    """Whole or not at all, by the first process."""
    if args.process_index == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
        temporary.replace(path)


def _finite(metrics: dict[str, float]) -> dict[str, Any]:
    """JSON has no infinities."""
    return {
        name: value if math.isfinite(value) else str(value) for name, value in metrics.items() if name in SHOWN or name == "eval_tokens"
    }


def _training_log(history: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    logs = [{"step": entry["step"], "loss": entry["loss"]} for entry in history if "loss" in entry]
    return {"first": logs[0], "last": logs[-1]} if logs else None


def _show(summary: dict[str, Any], console: Console) -> None:
    before, after, log = summary["before"], summary["after"], summary["log"]
    console.print(f"Trained {summary['steps']:,} steps.")
    if before is not None and after is not None:
        table = Table("held-out data", "before", "after", box=None)
        for name, label in SHOWN.items():
            if name in before and name in after:
                table.add_row(label, *(f"{v:.4f}" if isinstance(v, float) else str(v) for v in (before[name], after[name])))
        console.print(table)
        console.print(f"Per token, over {after['eval_tokens']:,.0f} held-out tokens.")
    else:
        ends = [] if log is None else [f"{log[which]['loss']:.4f} at step {log[which]['step']}" for which in ("first", "last")]
        console.print("No held-out loss: no --eval-data was given." + (f" Training loss {', '.join(ends)}." if ends else ""))
    for name in ("model", "checkpoint", "figure"):
        if summary[name]:
            console.print(f"{name}: {summary[name]}", soft_wrap=True)


def _figure(out: Path, history: Sequence[dict[str, Any]], before: Any, after: Any) -> str | None:
    """Losses over steps, if matplotlib is there."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    training = [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
    held_out = {entry["step"]: entry["eval_loss"] for entry in history if "eval_loss" in entry}
    if before is not None and isinstance(before.get("eval_loss"), float):
        held_out = {0: before["eval_loss"], **held_out}
    if training:
        axes.plot(*zip(*training, strict=True), label="training")
    if held_out:
        axes.plot(*zip(*sorted(held_out.items()), strict=True), "o-", label="held-out")
    axes.set(xlabel="step", ylabel="loss per token")
    axes.grid(alpha=0.3)
    if training or held_out:
        axes.legend()
    figure.savefig(out / FIGURE, dpi=120)
    return str(out / FIGURE)


class Interrupt(TrainerCallback):  # type: ignore[misc]
    """Ctrl-C or SIGTERM once: the step ends, a checkpoint is saved, and the training with it. Twice: at once."""

    def __init__(self) -> None:
        self.caught = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Interrupt:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.caught:
            raise KeyboardInterrupt
        self.caught = True

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        # Of several ranks any may have been told.
        if args.world_size > 1:
            told = torch.tensor(float(self.caught), device=args.device)
            torch.distributed.all_reduce(told)
            self.caught = bool(told > 0)
        if self.caught:
            control.should_save = control.should_training_stop = True
        return control


class Bar(TrainerCallback):  # type: ignore[misc]
    """A progress bar on a terminal, and nothing elsewhere."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[loss]}"), TimeRemainingColumn(),
            console=console, disable=not console.is_terminal, transient=True,
        )  # fmt: skip
        self._task: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._progress.start()
        self._task = self._progress.add_task("", total=state.max_steps, completed=state.global_step, loss="")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._progress.update(self._task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self._task is not None and logs and "loss" in logs:
            self._progress.update(self._task, loss=f"loss {logs['loss']:.4f}")

    def stop(self) -> None:
        self._progress.stop()
