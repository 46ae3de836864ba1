"""The ``kdkernels:`` section of another trainer's YAML file."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..divergences import parse
from .patches import Patch
from .transformers import distill

__all__ = ["SECTION", "Settings"]

SECTION = "kdkernels"


@dataclass(frozen=True)
class Settings:
    """The keys of the section.

    Attributes:
        teacher: folder or hub name of the teacher.
        dtype: dtype of the loaded teacher; "auto" is the dtype of its files.
        divergence: a name, ``jsd(beta=0.3)``, or a mapping with ``name`` and parameters.
        temperature, t_squared, kd_weight, ce_weight, memory_budget: as in ``kd.distillation_loss``.
        vocab_size: the real vocabulary size, if a head is padded.
    """

    teacher: str
    dtype: str = "auto"
    divergence: Any = "forward_kl"
    temperature: float = 1.0
    t_squared: bool = True
    kd_weight: float = 1.0
    ce_weight: float = 0.0
    vocab_size: int | None = None
    memory_budget: int | None = None

    @classmethod
    def read(cls, section: object) -> Settings:
        """Check a section.

        Raises:
            ValueError: the section is not a mapping, has an unknown key or divergence, or lacks a teacher.
        """
        keys = [entry.name for entry in dataclasses.fields(cls)]
        if not isinstance(section, Mapping):
            raise ValueError(f"{SECTION} must be a mapping with the keys {', '.join(keys)}; got {section!r}")
        if unknown := [key for key in section if key not in keys]:
            raise ValueError(f"{SECTION}.{unknown[0]} is unknown; the keys are {', '.join(keys)}")
        if not section.get("teacher"):
            raise ValueError(f"{SECTION}.teacher is missing: give the folder or hub name of the teacher")
        settings = cls(**{str(key): value for key, value in section.items()})
        return dataclasses.replace(settings, divergence=parse(settings.divergence))

    def load_teacher(self) -> nn.Module:
        from transformers import AutoModelForCausalLM

        model: nn.Module = AutoModelForCausalLM.from_pretrained(self.teacher, dtype=self.dtype, trust_remote_code=False)
        return model

    def apply(self, trainer: Any, force: bool = False) -> Patch:
        """Load the teacher and give the trainer its loss."""
        options = {entry.name: getattr(self, entry.name) for entry in dataclasses.fields(self) if entry.name not in ("teacher", "dtype")}
        return distill(trainer, self.load_teacher(), force=force, **options)
