"""What ``kdkernels train`` adds to the training loop: an end at the user's wish, and a progress bar."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback

__all__ = ["Bar", "Interrupt"]


class Interrupt(TrainerCallback):  # type: ignore[misc]
    """Ctrl-C or SIGTERM once: the step ends, a checkpoint is saved, and the training with it. Twice: at once."""

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
        # Of several ranks any may have been told.
        if args.world_size > 1:
            told = torch.tensor(float(self._caught), device=args.device)
            torch.distributed.all_reduce(told)
            self._caught = bool(told > 0)
        if self._caught:
            self.stopped = True
            control.should_save = control.should_training_stop = True
        return control


class Bar(TrainerCallback):  # type: ignore[misc]
    """A progress bar on a terminal, and nothing elsewhere; a context that takes it away at its end."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[loss]}"), TimeRemainingColumn(),
            console=console, disable=not console.is_terminal, transient=True,
        )  # fmt: skip
        self._task: Any = None

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._progress.start()
        self._task = self._progress.add_task("", total=state.max_steps, completed=state.global_step, loss="")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._progress.update(self._task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self._task is not None and logs and "loss" in logs:
            self._progress.update(self._task, loss=f"loss {logs['loss']:.4f}")
