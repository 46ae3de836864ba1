"""Detect NaN and infinity in the loss, the gradient norm and the weights, and end the training."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..support.errors import UserError

__all__ = ["NotFiniteError", "check_numbers", "not_finite"]


class NotFiniteError(UserError):
    """The training reached NaN or infinity. Nothing is saved after that.

    Attributes:
        step: number of steps at the time of detection.
        values: the values that are not finite, by name.
    """

    def __init__(self, step: int, values: Mapping[str, float | str]) -> None:
        self.step, self.values = step, dict(values)
        named = ", ".join(f"{name} {value}" for name, value in self.values.items())
        advice = "Try a smaller learning rate, a longer warm-up or a smaller max_grad_norm, in another output folder"
        if step == 0:
            advice = "Look at the student's weights, the teacher's and the data"
        super().__init__(
            f"the training is not finite at step {step}: {named}. Nothing was saved since the last checkpoint, which is kept. {advice}"
        )


def check_numbers(step: int, values: Mapping[str, float]) -> None:
    """Check that all values are finite.

    Raises:
        NotFiniteError: one of ``values`` is NaN or infinite.
    """
    bad = {name: value for name, value in values.items() if not math.isfinite(value)}
    if bad:
        raise NotFiniteError(step, bad)


def not_finite(model: nn.Module) -> Tensor:
    """Return the number of trainable tensors with NaN or infinity, 0-dim on the model's device. Of shards, only this rank's count."""
    flags = [~torch.isfinite(_local(p)).all() for p in model.parameters() if p.requires_grad]
    return torch.stack([flag.to(flags[0].device) for flag in flags]).sum() if flags else torch.zeros((), dtype=torch.int64)


def _local(parameter: Tensor) -> Tensor:
    """Return the values on this rank: the local shard of a DTensor (FSDP) or a ZeRO-3 parameter."""
    value = getattr(parameter, "ds_tensor", parameter).detach()
    return value.to_local() if hasattr(value, "to_local") else value
