"""Options of ``kdkernels train`` beside DistillationArguments, a dataclass for each subject. They are read in the same way."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields
from typing import Any

from ...teachers.quantization import QUANTIZATIONS, check_quantization

__all__ = ["GROUPS", "UNDECISIVE", "AdapterOptions", "MemoryOptions", "ReportOptions", "RowOptions", "default_of"]

DEVICE_MAPS = ("auto", "balanced", "sequential")


@dataclass(frozen=True)
class AdapterOptions:
    """The LoRA that is trained in place of the student's own weights (Hu et al. 2021, https://arxiv.org/abs/2106.09685).

    Raises:
        ValueError: a value that makes no sense, or options of a LoRA without ``lora_r``.
    """

    lora_r: int | None = field(default=None, metadata={"help": "Rank of a LoRA. Default: all weights of the student are trained."})
    lora_alpha: float | None = field(default=None, metadata={"help": "The LoRA is scaled by alpha / r. Default: 2 r."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout before the LoRA, from 0 to 1."})
    lora_target_modules: list[str] = field(
        default_factory=lambda: ["all-linear"],
        metadata={"help": "Names of the layers that get one. Default: every linear layer but the head."},
    )
    use_rslora: bool = field(default=False, metadata={"help": "Scale by alpha / sqrt(r) (Kalajdzievski 2023)."})
    use_dora: bool = field(default=False, metadata={"help": "Train the lengths of the columns too (DoRA, Liu et al. 2024)."})
    merge: bool = field(default=False, metadata={"help": "Also write the whole model, the adapter merged into it, to OUTPUT_DIR/merged."})

    def __post_init__(self) -> None:
        object.__setattr__(self, "lora_target_modules", [part for text in self.lora_target_modules for part in text.split(",") if part])
        if self.lora_r is None:
            given = [f.name for f in fields(self) if f.name not in ("lora_r", "merge") and getattr(self, f.name) != default_of(f)]
            if given:
                raise ValueError(f"--{given[0].replace('_', '-')} without --lora-r: give the rank of the LoRA, such as --lora-r 16")
            return
        if self.lora_r < 1:
            raise ValueError(f"--lora-r {self.lora_r}: it must be an integer >= 1, such as 16")
        if self.lora_alpha is not None and not 0 < self.lora_alpha < float("inf"):
            raise ValueError(f"--lora-alpha {self.lora_alpha:g}: it must be finite and > 0, such as {2 * self.lora_r}")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"--lora-dropout {self.lora_dropout:g}: it must be from 0 to below 1, such as 0.05")
        if not self.lora_target_modules:
            raise ValueError("--lora-target-modules is empty: give names of layers, such as q_proj v_proj, or all-linear")

    def config(self) -> Any:
        """The LoRA as peft's ``LoraConfig``."""
        from peft import LoraConfig

        assert self.lora_r is not None
        targets = self.lora_target_modules
        return LoraConfig(
            task_type="CAUSAL_LM", r=self.lora_r, lora_alpha=2 * self.lora_r if self.lora_alpha is None else _whole(self.lora_alpha),
            lora_dropout=self.lora_dropout, target_modules=targets[0] if targets == ["all-linear"] else targets,
            use_rslora=self.use_rslora, use_dora=self.use_dora,
        )  # fmt: skip


@dataclass(frozen=True)
class MemoryOptions:
    """How the models lie in memory.

    Raises:
        ValueError: a quantisation that is unknown or that this machine lacks, a device map that is not one.
    """

    student_quantization: str | None = field(
        default=None, metadata={"help": f"Of the frozen weights under an adapter: {', '.join(QUANTIZATIONS)}."}
    )
    teacher_quantization: str | None = field(default=None, metadata={"help": f"Of the teachers' weights: {', '.join(QUANTIZATIONS)}."})
    teacher_device: str | None = field(default=None, metadata={"help": "Where the teachers run, as cuda:1. Default: with the student."})
    teacher_device_map: str | None = field(
        default=None, metadata={"help": "How a teacher is spread over devices: auto, balanced, sequential, or JSON of layers to devices."}
    )

    def __post_init__(self) -> None:
        for name in ("student_quantization", "teacher_quantization"):
            value = getattr(self, name)
            if value is not None:
                check_quantization(f"--{name.replace('_', '-')}", value)
        if self.teacher_device is not None and self.teacher_device_map is not None:
            raise ValueError("--teacher-device and --teacher-device-map: give one of them")
        self.placement()

    def placement(self) -> Any:
        """The ``device_map`` of the teachers; None where they stay with the student."""
        if self.teacher_device is not None:
            return {"": self.teacher_device}
        given = self.teacher_device_map
        if given is None or given in DEVICE_MAPS:
            return given
        try:
            value = json.loads(given)
        except ValueError:
            value = None
        if not isinstance(value, dict):
            raise ValueError(
                f'--teacher-device-map {given}: give {", ".join(DEVICE_MAPS)}, or JSON such as {{"model.layers.0": 0, "": "cpu"}}'
            )
        return value


@dataclass(frozen=True)
class ReportOptions:
    """What a training shows of its student while it runs.

    Raises:
        ValueError: a number that makes no sense.
    """

    sample_every: int | None = field(
        default=None, metadata={"help": "Steps between two samples: the student's greedy answers to a few held-out prompts, in log.jsonl."}
    )
    sample_prompts: int = field(default=3, metadata={"help": "With --sample-every: how many prompts, the first of the held-out rows."})

    def __post_init__(self) -> None:
        for name in ("sample_every", "sample_prompts"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} {value}: it must be an integer >= 1")


@dataclass(frozen=True)
class RowOptions:
    """The choice of rows.

    Raises:
        ValueError: a value that makes no sense.
    """

    eval_fraction: float | None = field(
        default=None,
        metadata={"help": "Share of the rows to hold out for evaluations, chosen by a hash of each row's key or prompt."},
    )
    streaming: bool = field(
        default=False, metadata={"help": "Read --data as it is needed, for data that does not fit in memory. Needs --max-steps."}
    )
    shuffle_buffer: int = field(
        default=10_000,
        metadata={"help": "With --streaming: examples in memory that the next one is drawn from; 1 keeps the order of the rows."},
    )

    def __post_init__(self) -> None:
        if self.shuffle_buffer < 1:
            raise ValueError(f"--shuffle-buffer {self.shuffle_buffer}: it must be an integer >= 1")
        if not self.streaming and self.shuffle_buffer != RowOptions.shuffle_buffer:
            raise ValueError("--shuffle-buffer without --streaming: rows in memory are shuffled as a whole. Leave it out")
        if self.eval_fraction is not None and not 0 < self.eval_fraction < 1:
            raise ValueError(f"--eval-fraction {self.eval_fraction:g}: it must be above 0 and below 1, such as 0.05")


def _whole(number: float) -> float:
    return int(number) if number == int(number) else number


def default_of(field: Any) -> Any:
    """The default of a dataclass's field."""
    return field.default_factory() if callable(field.default_factory) else field.default


GROUPS: dict[str, type] = {"adapter": AdapterOptions, "memory": MemoryOptions, "reports": ReportOptions, "rows": RowOptions}
"""The dataclasses, by the field of ``Settings`` that holds one."""
UNDECISIVE = frozenset({"merge", "sample_every", "sample_prompts", "teacher_device", "teacher_device_map"})
"""Options of ``GROUPS`` that may change when a training is resumed."""
