"""Options of ``kdkernels train`` that are not in DistillationArguments, one dataclass per subject. They are parsed in the same way."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields
from typing import Any

from ...teachers.quantization import QUANTIZATIONS, check_quantization

__all__ = ["GROUPS", "UNDECISIVE", "AdapterOptions", "MemoryOptions", "ReportOptions", "RowOptions", "default_of"]

DEVICE_MAPS = ("auto", "balanced", "sequential")


@dataclass(frozen=True)
class AdapterOptions:
    """Options of a LoRA that is trained instead of the student's weights (Hu et al. 2021, https://arxiv.org/abs/2106.09685).

    Raises:
        ValueError: an invalid value, or LoRA options without ``lora_r``.
    """

    lora_r: int | None = field(default=None, metadata={"help": "Rank of a LoRA. Default: all weights of the student are trained."})
    lora_alpha: float | None = field(default=None, metadata={"help": "The LoRA is scaled by alpha / r. Default: 2 r."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout before the LoRA, from 0 to 1."})
    lora_target_modules: list[str] = field(
        default_factory=lambda: ["all-linear"],
        metadata={"help": "Names of the layers with a LoRA. Default: every linear layer except the head."},
    )
    use_rslora: bool = field(default=False, metadata={"help": "Scale by alpha / sqrt(r) (Kalajdzievski 2023)."})
    use_dora: bool = field(default=False, metadata={"help": "Also train the norms of the columns (DoRA, Liu et al. 2024)."})
    merge: bool = field(default=False, metadata={"help": "Also write the merged model to OUTPUT_DIR/merged."})

    def __post_init__(self) -> None:
        object.__setattr__(self, "lora_target_modules", [part for text in self.lora_target_modules for part in text.split(",") if part])
        if self.lora_r is None:
            used = [f.name for f in fields(self) if f.name not in ("lora_r", "merge") and getattr(self, f.name) != default_of(f)]
            if used:
                raise ValueError(f"--{used[0].replace('_', '-')} without --lora-r: give the rank of the LoRA, such as --lora-r 16")
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
        """Return peft's ``LoraConfig``."""
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
    """Quantisation and placement of the models.

    Raises:
        ValueError: the quantisation is unknown or not available here, or the device map is invalid.
    """

    student_quantization: str | None = field(
        default=None, metadata={"help": f"Quantisation of the frozen weights under an adapter: {', '.join(QUANTIZATIONS)}."}
    )
    teacher_quantization: str | None = field(default=None, metadata={"help": f"Quantisation of the teachers: {', '.join(QUANTIZATIONS)}."})
    teacher_device: str | None = field(default=None, metadata={"help": "Device of the teachers, such as cuda:1. Default: the student's."})
    teacher_device_map: str | None = field(
        default=None, metadata={"help": "Distribution of a teacher over devices: auto, balanced, sequential, or JSON of layers to devices."}
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
        """Return the ``device_map`` of the teachers; None if they run on the student's device."""
        if self.teacher_device is not None:
            return {"": self.teacher_device}
        device_map = self.teacher_device_map
        if device_map is None or device_map in DEVICE_MAPS:
            return device_map
        try:
            value = json.loads(device_map)
        except ValueError:
            value = None
        if not isinstance(value, dict):
            raise ValueError(
                f'--teacher-device-map {device_map}: give {", ".join(DEVICE_MAPS)}, or JSON such as {{"model.layers.0": 0, "": "cpu"}}'
            )
        return value


@dataclass(frozen=True)
class ReportOptions:
    """Options for samples of the student during the training.

    Raises:
        ValueError: an invalid number.
    """

    sample_every: int | None = field(
        default=None, metadata={"help": "Steps between two samples: the student's greedy answers to a few held-out prompts, in log.jsonl."}
    )
    sample_prompts: int = field(default=3, metadata={"help": "With --sample-every: number of prompts, from the first held-out rows."})

    def __post_init__(self) -> None:
        for name in ("sample_every", "sample_prompts"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} {value}: it must be an integer >= 1")


@dataclass(frozen=True)
class RowOptions:
    """Options for the selection of rows.

    Raises:
        ValueError: an invalid value.
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
    """Return the default of a dataclass field."""
    return field.default_factory() if callable(field.default_factory) else field.default


GROUPS: dict[str, type] = {"adapter": AdapterOptions, "memory": MemoryOptions, "reports": ReportOptions, "rows": RowOptions}
"""The dataclasses, by the field of ``Settings`` that holds one."""
UNDECISIVE = frozenset({"merge", "sample_every", "sample_prompts", "teacher_device", "teacher_device_map"})
"""Options of ``GROUPS`` that may change when a training is resumed."""
