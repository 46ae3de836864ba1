"""The settings of a demo run. demo.json contains them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

from ...support.errors import UserError

__all__ = ["DemoError", "LossShape", "ModelSize", "Settings"]


class DemoError(UserError):
    """The demo cannot continue. The message names the option or package, its value, and what to do."""


@dataclass(frozen=True)
class ModelSize:
    """Size of a Llama model. ``head_dim`` is the width of an attention head."""

    hidden: int
    layers: int
    head_dim: int = 32

    @property
    def heads(self) -> int:
        return self.hidden // self.head_dim


@dataclass(frozen=True)
class LossShape:
    """Shape of the comparison of fused and dense losses: ``[rows, vocab]`` logits on both sides, and the number of processes per loss."""

    rows: int = 2048
    vocab: int = 32768
    student_hidden: int = 512
    teacher_hidden: int = 1024
    samples: int = 3


@dataclass(frozen=True)
class Settings:
    """Settings of a run. The defaults take about four minutes on two CPU cores."""

    seed: int = 0
    device: str = "cpu"
    backend: str = "auto"
    divergence: str = "forward_kl"
    temperature: float = 1.0
    kd_weight: float = 0.5
    ce_weight: float = 0.5

    max_bytes: int = 8_000_000  # of text
    vocab_size: int = 2048  # of the tokenizer, at most

    teacher: ModelSize = field(default_factory=lambda: ModelSize(hidden=256, layers=4))
    student: ModelSize = field(default_factory=lambda: ModelSize(hidden=128, layers=2))
    teacher_steps: int = 600
    steps: int = 400  # of each student
    batch: int = 8  # windows
    window: int = 128  # tokens
    teacher_lr: float = 2e-3
    student_lr: float = 4e-3
    held_out_windows: int = 64
    evaluations: int = 10  # points of each curve after the start

    loss_shape: LossShape = field(default_factory=LossShape)

    @classmethod
    def quick(cls) -> Settings:
        """Return settings for a run of a few seconds, which shows that everything runs. The training is too short to learn much."""
        return cls(
            max_bytes=400_000,
            vocab_size=512,
            teacher=ModelSize(hidden=96, layers=2),
            student=ModelSize(hidden=32, layers=1),
            teacher_steps=40,
            steps=20,
            batch=8,
            window=64,
            held_out_windows=16,
            evaluations=4,
            loss_shape=LossShape(rows=256, student_hidden=64, teacher_hidden=128, samples=1),
        )

    def changed(self, *, steps: int | None = None, vocab_size: int | None = None, **others: Any) -> Settings:
        """Return settings with other values. None keeps a value; the teacher's steps keep their ratio to the students'."""
        if steps is not None:
            others |= {"steps": steps, "teacher_steps": math.ceil(self.teacher_steps * steps / self.steps)}
        if vocab_size is not None:
            others["vocab_size"] = vocab_size
        return replace(self, **others)
