"""A weight of the loss that changes while a student trains."""

from __future__ import annotations

import dataclasses
from typing import Any

from transformers import TrainerCallback

from ..trainer import DistillationTrainer
from .in_context import hard_weight

__all__ = ["HardWeight"]


class HardWeight(TrainerCallback):  # type: ignore[misc]
    """Moves a trainer's ``ce_weight`` from ``first`` to ``last`` on a line: the hard term of in-context learning distillation.

    Add it with ``trainer.add_callback(HardWeight(trainer))``. A run that is resumed takes the weight of its step.
    """

    def __init__(self, trainer: DistillationTrainer, first: float = 1.0, last: float = 0.0) -> None:
        if not all(0 <= weight < float("inf") for weight in (first, last)):
            raise ValueError(f"first={first}, last={last}: both weights must be finite and >= 0")
        self._trainer, self._first, self._last = trainer, first, last

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Before each step, of the ``state.max_steps``."""
        weight = hard_weight(state.global_step / max(1, state.max_steps - 1), self._first, self._last)
        self._trainer.objective = dataclasses.replace(self._trainer.objective, ce_weight=weight)
