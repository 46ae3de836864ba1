"""Callbacks of ``kdkernels train``: interruption, progress bar, log file, samples."""

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback

from ...support.files import Output, line_of, write_jsonl
from ...teachers.local import generate
from ...trainer.arguments import METRICS, metric_name

__all__ = ["Bar", "Interrupt", "LogFile", "Samples", "log_line", "number", "reporting_under"]


class Interrupt(TrainerCallback):  # type: ignore[misc]
    """End the training on Ctrl-C or SIGTERM: the first signal finishes the step and saves a checkpoint, the second ends at once."""

    def __init__(self) -> None:
        self.stopped = False
        self._caught = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Interrupt:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._caught:
            raise KeyboardInterrupt
        self._caught = True

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        if args.world_size > 1:  # any of the ranks may have received the signal
            caught = torch.tensor(float(self._caught), device=args.device)
            torch.distributed.all_reduce(caught)
            self._caught = bool(caught > 0)
        if self._caught:
            self.stopped = True
            control.should_save = control.should_training_stop = True
        return control

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        if self.stopped:  # in the middle of an epoch; the resumed run reaches its end
            control.should_log = control.should_evaluate = control.should_save = False
        return control


class Bar(TrainerCallback):  # type: ignore[misc]
    """Show a progress bar on a terminal, else one line per log and evaluation. Leaving the context removes the bar."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = Progress(
            TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[loss]}"), TimeRemainingColumn(),
            console=console, disable=not console.is_terminal, transient=True,
        )  # fmt: skip
        self._task: Any = None

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()
        self._task = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._progress.start()
        self._task = self._progress.add_task("", total=state.max_steps, completed=state.global_step, loss="")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._progress.update(self._task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self._task is not None and logs and "loss" in logs:
            self._progress.update(self._task, loss=f"loss {logs['loss']:.4f}")
        if logs and not self._console.is_terminal and (self._task is not None or state.global_step == 0):
            line = log_line(logs, state)
            if line is not None:
                self._console.print(line, markup=False)


def log_line(logs: Mapping[str, Any], state: Any) -> str | None:
    """Return a training log or an evaluation as one line; None for other logs."""
    where = f"step {state.global_step} of {state.max_steps}" if state.global_step else "before training"
    if "loss" in logs:
        shown = [name for name in (*METRICS, "grad_norm", "learning_rate") if name in logs]
        speed = f", {logs['tokens_per_second']:,.0f} tokens/s" if "tokens_per_second" in logs else ""
        return f"{where}: {', '.join(f'{name} {logs[name]:.4g}' for name in shown)}{speed}"
    held_out = {name.removeprefix("eval_"): value for name, value in logs.items() if name.startswith("eval_")}
    shown = [name for name in held_out if metric_name(name)]
    return f"{where}, held-out data: {', '.join(f'{name} {held_out[name]:.4g}' for name in shown)}" if shown else None


class LogFile(TrainerCallback):  # type: ignore[misc]
    """Append each log and evaluation with its step to a JSONL file in the output folder. NaN and infinity are written as text.

    A resumed run first removes the lines that it will write again.
    """

    def __init__(self, output: Output | None, name: str) -> None:
        self._output, self._name = output, name

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._keep(lambda row: row["step"] <= state.global_step)

    def clear(self) -> None:
        """Remove the lines of an earlier run that has not left a record."""
        if self._output is not None and self._name in self._output:
            self._keep(lambda row: False)

    def drop_final_evaluation(self, state: Any) -> None:
        """Remove the evaluation after the last step. ``state`` is that of the last checkpoint, which was saved before it."""
        history = [{name: number(value) for name, value in entry.items()} for entry in state.log_history]
        self._keep(lambda row: row["step"] < state.global_step or not any(name.startswith("eval_") for name in row) or row in history)

    def _keep(self, wanted: Callable[[dict[str, Any]], bool]) -> None:
        """Remove all other lines."""
        if self._output is None:
            return
        rows = []
        path = self._output.claim(self._name)
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
            with suppress(ValueError):  # the last line of a killed run may be half a line
                rows.append(json.loads(line))
        write_jsonl(path, (row for row in rows if wanted(row)))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs:
            self.append({"step": state.global_step, **{name: number(value) for name, value in logs.items()}})

    def append(self, row: Mapping[str, Any]) -> None:
        """Write one line, only in the first process."""
        if self._output is not None:
            with self._output.claim(self._name).open("a", encoding="utf-8") as file:
                file.write(line_of(row) + "\n")


class Samples(TrainerCallback):  # type: ignore[misc]
    """Generate the student's greedy answers to a few prompts every few steps, for the log and the console.

    Args:
        every: steps between two samples.
        prompts: token ids of each prompt.
        log: receives one line per sampling step.
    """

    def __init__(
        self, every: int, prompts: Sequence[Sequence[int]], tokenizer: Any, max_tokens: int, log: LogFile, console: Console
    ) -> None:
        self._every, self._prompts, self._tokenizer, self._max_tokens = every, prompts, tokenizer, max_tokens
        self._log, self._console = log, console

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step % self._every:
            return
        device = args.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):  # samples must not affect the training
            texts = generate(model, self._tokenizer, self._prompts, [0] * len(self._prompts), max_tokens=self._max_tokens)
        samples = [
            {"prompt": self._tokenizer.decode(prompt, skip_special_tokens=True), "text": text.text}
            for prompt, text in zip(self._prompts, texts, strict=True)
        ]
        self._log.append({"step": state.global_step, "samples": samples})
        for sample in samples:
            self._console.print(f"step {state.global_step}, sample: {sample['prompt']} -> {sample['text']}", markup=False)


def number(value: Any) -> Any:
    """Return a value that JSON can represent, with NaN and infinity as text."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def reporting_under(out: Path) -> Iterator[None]:
    """Make TensorBoard, Weights & Biases, MLflow and SwanLab write to ``out``, unless their environment variables are set."""
    places = {"TENSORBOARD_LOGGING_DIR": "runs", "WANDB_DIR": "", "MLFLOW_TRACKING_URI": "mlruns", "SWANLAB_LOG_DIR": "swanlog"}
    added = {name: str((out / place).absolute()) for name, place in places.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)
