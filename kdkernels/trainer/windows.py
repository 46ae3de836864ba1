"""Losses and time since the last log, also across a resume; and actions at the end of an epoch."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch
from transformers.trainer_callback import DefaultFlowCallback

__all__ = ["EpochEnd", "LogWindow"]


class LogWindow:
    """The steps since the last log: sum of losses and training time.

    Args:
        device: device of the losses.
        step: step of the last log.
    """

    def __init__(self, device: torch.device, step: int = 0) -> None:
        self.step = step
        self.loss = torch.zeros((), dtype=torch.float64, device=device)
        self._passed = 0.0
        self._since: float | None = None

    @classmethod
    def restored(cls, state: Mapping[str, Any], device: torch.device) -> LogWindow:
        """Return the window that :meth:`state` saved."""
        window = cls(device, state["step"])
        window.loss += state["loss"]
        window._passed = state["seconds"]
        return window

    def state(self, accelerator: Any) -> dict[str, Any]:
        """Return the window as JSON, with the mean loss over all ranks. Every rank must call this."""
        return {"step": self.step, "loss": accelerator.reduce(self.loss, "mean").item(), "seconds": self._passed}

    def begin(self) -> None:
        """Start the clock if it is not running."""
        if self._since is None:
            self._since = time.perf_counter()

    def pause(self) -> None:
        if self._since is not None:
            self._passed += time.perf_counter() - self._since
            self._since = None

    def resume(self) -> None:
        self.begin()

    def seconds(self) -> float:
        return self._passed


class EpochEnd(DefaultFlowCallback):  # type: ignore[misc]
    """Run the end-of-epoch actions at the epoch's last step, before the checkpoint of that step.

    transformers evaluates after the epoch, so a run resumed from that checkpoint would skip the evaluation.
    """

    def __init__(self) -> None:
        self._done = 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        if float(state.epoch).is_integer():
            self._done = state.global_step
            return super().on_epoch_end(args, state, control, **kwargs)
        return control

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        if self._done == state.global_step:
            control.should_log = control.should_evaluate = control.should_save = False
        return control
