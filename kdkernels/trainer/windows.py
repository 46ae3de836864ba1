"""Between two logs: the losses and the time since the last one, also across a resume; and where an epoch ends."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch
from transformers.trainer_callback import DefaultFlowCallback

__all__ = ["EpochEnd", "LogWindow"]


class LogWindow:
    """The steps since a log: the sum of their losses and their time.

    Args:
        device: of the losses.
        step: of the last log.
    """

    def __init__(self, device: torch.device, step: int = 0) -> None:
        self.step = step
        self.loss = torch.zeros((), dtype=torch.float64, device=device)
        self._passed = 0.0
        self._since: float | None = None

    @classmethod
    def restored(cls, state: Mapping[str, Any], device: torch.device) -> LogWindow:
        """What :meth:`state` has described."""
        window = cls(device, state["step"])
        window.loss += state["loss"]
        window._passed = state["seconds"]
        return window

    def state(self, accelerator: Any) -> dict[str, Any]:
        """As JSON; the loss is the mean over all ranks, each of which calls this."""
        return {"step": self.step, "loss": accelerator.reduce(self.loss, "mean").item(), "seconds": self._passed}

    def begin(self) -> None:
        """Starts the clock, unless it runs."""
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
    """Does what is due at the end of an epoch at its last step, so that a checkpoint of that step comes after it.

    transformers evaluates once the epoch is over, and a run that is resumed at that checkpoint would never do it.
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
