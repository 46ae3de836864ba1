"""``DistillationArguments``: ``transformers.TrainingArguments`` plus arguments of the loss, the data and the rollouts."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import nn
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.integrations import get_reporting_integration_callbacks

from ..data.forms import Learn, Reasoning
from ..data.layouts import Columns
from ..divergences import REGISTRY, parse, spelled
from ..fused.checks import Options
from ..sides import check_number
from .features import FeatureLoss

__all__ = ["METRICS", "DistillationArguments", "metric_name"]

Overlong = Literal["error", "drop", "truncate", "split"]
EnsembleMode = Literal["probs", "logits"]

METRICS = {
    "loss": False, "divergence": False, "cross_entropy": False, "student_entropy": False, "teacher_entropy": False,
    "top1_agreement": True, "feature_loss": False,
}  # fmt: skip
"""Metrics of an evaluation; True if greater is better."""


def metric_name(metric: str) -> str | None:
    """Return the entry of ``METRICS`` for a name such as ``divergence``, ``eval_divergence`` or ``eval_chats_divergence`` (of the data set
    ``chats``); None for any other metric."""
    return max((name for name in METRICS if f"_{metric}".endswith(f"_{name}")), key=len, default=None)


LEAST = {
    "max_new_tokens": 1, "max_length": 1, "vocab_size": 1, "per_device_train_batch_size": 1, "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1, "eval_accumulation_steps": 1, "torch_empty_cache_steps": 1, "dataloader_prefetch_factor": 1,
    "dataloader_num_workers": 0, "seed": 0, "data_seed": 0,
}  # fmt: skip
"""Minimum of each integer argument."""
FINITE = (
    "kd_weight", "ce_weight", "ce_weight_last", "feature_weight", "sample_temperature", "learning_rate", "weight_decay", "max_grad_norm",
    "neftune_noise_alpha", "adam_epsilon", "eval_delay",
)  # fmt: skip
"""Arguments that must be finite and >= 0."""
BELOW_1 = ("adam_beta1", "adam_beta2")
"""Arguments that must be >= 0 and < 1."""
MAX_SEED = 2**32 - 1


def _pairs(layers: Any) -> str:
    """Return pairs of layers as text, which JSON can represent."""
    if isinstance(layers, str):
        return layers
    try:
        return ",".join(f"{int(s)}:{int(t)}" for s, t in (layers.items() if isinstance(layers, Mapping) else layers))
    except (TypeError, ValueError):
        raise ValueError(f"feature_layers={layers!r}: give (student, teacher) pairs, text such as '2:4,5:11', 'all' or 'last'") from None


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_count(value: float) -> bool:
    return 1 <= value < math.inf and value == int(value)


@dataclass
class DistillationArguments(TrainingArguments):  # type: ignore[misc]
    """``transformers.TrainingArguments`` plus the arguments of a distillation. The loss per scored token is

    ``kd_weight * T^2 * D(teacher, student; T) + ce_weight * CE(labels) + feature_weight * (feature loss)``.

    With ``ce_weight_last``, ``ce_weight`` changes linearly and reaches ``ce_weight_last`` at the last step.

    Raises:
        ValueError: an invalid value; the message gives the argument, its value and what to do.
    """

    divergence: str = field(
        default="forward_kl",
        metadata={"help": f"A name, or a name with parameters such as jsd(beta=0.3). Names: {', '.join(REGISTRY)}."},
    )
    temperature: float = field(default=1.0, metadata={"help": "T > 0 of the divergence; divides both models' logits."})
    t_squared: bool = field(default=True, metadata={"help": "Multiply the divergence and its gradient by T^2 (Hinton et al. 2015)."})
    kd_weight: float = field(default=1.0, metadata={"help": "Weight of the divergence."})
    ce_weight: float = field(default=0.0, metadata={"help": "Weight of the cross-entropy of the data's own tokens, at T = 1."})
    ce_weight_last: float | None = field(
        default=None,
        metadata={"help": "ce_weight changes linearly to this value at the last step. Default: constant. Evaluations use ce_weight."},
    )
    feature_weight: float = field(default=0.0, metadata={"help": "Weight of the feature loss between mapped layers."})
    feature_layers: str = field(
        default="all",
        metadata={"help": "Mapped layers: student:teacher pairs such as 2:4,5:11, counted from 0; all; or last."},
    )
    feature_loss: FeatureLoss = field(default="mse", metadata={"help": "Distance between the mapped layers."})
    on_policy_fraction: float = field(
        default=0.0, metadata={"help": "Share of the batches whose responses the student writes itself (GKD's lambda)."}
    )
    sample_temperature: float = field(default=1.0, metadata={"help": "Temperature of the student's own responses; 0 is greedy."})
    max_new_tokens: int = field(default=128, metadata={"help": "Maximum length of the student's own responses."})
    max_length: int | None = field(
        default=None, metadata={"help": "Maximum tokens of prompt and response, in either view. Default: the models' limit."}
    )
    overlong: Overlong = field(
        default="error",
        metadata={"help": "Rows over max_length: raise an error, drop them, cut off the end, or split rows of text into blocks."},
    )
    reasoning: Reasoning = field(
        default="learn",
        metadata={
            "help": "Reasoning of a row: learn it, as the chat template writes reasoning_content or else between <think> and </think>, or "
            "drop it and learn only the response."
        },
    )
    learn: Learn | None = field(
        default=None,
        metadata={
            "help": "Of a conversation that ends with the assistant: learn all of its turns, or the last. Default: what a cache was made "
            "with; else all, and the last where the chat template writes earlier turns otherwise."
        },
    )
    columns: str | None = field(
        default=None,
        metadata={
            "help": "Names of columns for the fields of a row, as prompt=question,response=answer. Other fields that would make a row "
            "another form are then not read."
        },
    )
    packing: bool = field(
        default=False, metadata={"help": "Pack several examples into a row of max_length, without attention between them."}
    )
    vocab_size: int | None = field(
        default=None,
        metadata={"help": "Real vocabulary size; columns beyond it are cut off. Default: the tokenizer's, if the models differ."},
    )
    template_date: str | None = field(
        default=None,
        metadata={"help": "Date for chat templates that write it, such as 2026-11-28. Default: the cache's; else the day the run began."},
    )
    kd_on_prompt: bool = field(default=False, metadata={"help": "The divergence scores prompts too; the cross-entropy never does."})
    memory_budget: int | None = field(default=None, metadata={"help": "Bytes for the loss's chunk buffers. Default: see docs/memory.md."})

    ensemble_mode: EnsembleMode = field(
        default="probs", metadata={"help": "Several teachers: average their probabilities or their logits."}
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "Must be False: the collator returns only what the models need."})
    logging_steps: float = field(default=10, metadata={"help": "Steps between two logs."})
    greater_is_better: bool | None = field(default=None, metadata={"help": "Direction of metric_for_best_model. Default: the metric's."})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Not needed: a loss that is not finite ends the training."})

    def __getstate__(self) -> dict[str, Any]:
        """Return the fields without the hub's token, because transformers saves them with the model as ``training_args.bin``."""
        return {**self.__dict__, "hub_token": None}

    def __post_init__(self) -> None:
        self.divergence = spelled(parse(self.divergence))
        self._check_numbers()
        if getattr(self, "data_seed", None) is None:  # otherwise the order of the data would depend on torch's last seed
            self.data_seed = self.seed
        self.feature_layers = _pairs(self.feature_layers)
        self.columns = None if self.columns is None else str(Columns(self.columns))
        if self.remove_unused_columns:
            raise ValueError("remove_unused_columns=True would remove the teacher's view from each batch: leave it False")
        if self.label_smoothing_factor:
            raise ValueError(f"label_smoothing_factor={self.label_smoothing_factor}: the loss has no label smoothing; leave it 0")
        strategy = getattr(self, "train_sampling_strategy", "random")
        if strategy not in ("random", "sequential"):
            raise ValueError(
                f"train_sampling_strategy={strategy!r} is not supported: packing=True leaves no padding at all; choose random or sequential"
            )
        if self.ignore_data_skip:
            raise ValueError("ignore_data_skip=True would train a resumed run on other rows than an uninterrupted one: leave it False")
        self._choose_direction()
        super().__post_init__()
        self._check_parts()

    def _choose_direction(self) -> None:
        """Set ``greater_is_better``. transformers sets it for every metric whose name does not end in "loss"."""
        name = metric_name(self.metric_for_best_model or "")
        if name is not None and self.greater_is_better is None:
            self.greater_is_better = METRICS[name]

    def _check_numbers(self) -> None:
        check_number("temperature", self.temperature)
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature must be finite and > 0, got {self.temperature}")
        optional = {f.name for f in dataclasses.fields(self) if f.default is None}
        values: dict[str, Any] = {name: getattr(self, name, None) for name in (*LEAST, *FINITE, *BELOW_1)}
        for name, value in values.items():
            if value is None and name in optional:
                continue
            if name in LEAST:
                if not _is_int(value) or value < LEAST[name]:
                    raise ValueError(f"{name} must be an integer >= {LEAST[name]}, got {value!r}")
                continue
            check_number(name, value)
            if not 0 <= value < (1 if name in BELOW_1 else math.inf):
                raise ValueError(f"{name} must be {'>= 0 and < 1' if name in BELOW_1 else 'finite and >= 0'}, got {value}")
        for name in ("seed", "data_seed"):
            if (values[name] or 0) > MAX_SEED:
                raise ValueError(f"{name} must be at most {MAX_SEED}, got {values[name]}")
        self._check_terms()
        for name, valid in (
            ("overlong", Overlong),
            ("reasoning", Reasoning),
            ("learn", Learn),
            ("ensemble_mode", EnsembleMode),
            ("feature_loss", FeatureLoss),
        ):
            if getattr(self, name) not in get_args(valid) and not (name == "learn" and self.learn is None):
                raise ValueError(f"{name} must be one of {', '.join(get_args(valid))}, got {getattr(self, name)!r}")
        for name in ("t_squared", "packing", "kd_on_prompt"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}")
        Options(memory_budget=self.memory_budget).check()
        self._check_lengths()

    def _check_terms(self) -> None:
        """Check the weights of the loss.

        Raises:
            ValueError: nothing can be learnt with these weights.
        """
        if self.kd_weight == self.ce_weight == self.feature_weight == 0 and not self.ce_weight_last:
            raise ValueError("kd_weight, ce_weight and feature_weight are all 0: there is nothing to learn from; give one a weight")
        check_number("on_policy_fraction", self.on_policy_fraction)
        if not 0 <= self.on_policy_fraction <= 1:
            raise ValueError(f"on_policy_fraction is a share, from 0 to 1, got {self.on_policy_fraction}")
        if self.on_policy_fraction > 0 and self.kd_weight == 0:
            raise ValueError(
                f"on_policy_fraction={self.on_policy_fraction} with kd_weight=0: "
                "on its own samples the student learns from the divergence only"
            )

    def _check_lengths(self) -> None:
        """Check the numbers of steps and epochs.

        Raises:
            ValueError: an invalid number of steps or epochs.
        """
        if self.max_steps != -1 and (not _is_int(self.max_steps) or self.max_steps < 1):
            raise ValueError(f"max_steps must be an integer >= 1, or -1 for the steps of num_train_epochs, got {self.max_steps}")
        if not 0 < self.num_train_epochs < math.inf:
            raise ValueError(f"num_train_epochs must be finite and > 0, got {self.num_train_epochs}")
        for kind in ("save", "eval", "logging"):
            steps, strategy = getattr(self, f"{kind}_steps"), getattr(self, f"{kind}_strategy")
            if getattr(strategy, "value", strategy) == "steps" and steps is not None and not (0 < steps < 1 or _is_count(steps)):
                raise ValueError(
                    f"{kind}_steps must be an integer >= 1, or a share of all steps between 0 and 1, got {steps}; "
                    f"for none, {kind}_strategy='no'"
                )
        if not (0 <= self.warmup_steps < 1 or _is_count(self.warmup_steps)):
            raise ValueError(f"warmup_steps must be an integer >= 0, or a share of all steps between 0 and 1, got {self.warmup_steps}")

    def _check_parts(self) -> None:
        """Build reports, optimizer and schedule once with a dummy parameter, to detect errors before a model is loaded.

        Raises:
            ValueError: an unknown name, a package that is not installed, or incompatible settings.
        """
        with _naming(f"report_to={','.join(self.report_to or [])}"):
            for callback in get_reporting_integration_callbacks(self.report_to):
                callback()
        if not self.optim_target_modules:  # with it, the optimizer searches the model
            with _naming(f"optim={getattr(self.optim, 'value', self.optim)}, optim_args={self.optim_args!r}"):
                Trainer.get_optimizer_cls_and_kwargs(self, nn.Linear(1, 1))
        schedule = getattr(self.lr_scheduler_type, "value", self.lr_scheduler_type)
        if schedule not in ("reduce_lr_on_plateau", "greedy"):  # these follow the metrics of evaluations
            with _naming(f"lr_scheduler_type={schedule}, lr_scheduler_kwargs={self.lr_scheduler_kwargs}"):
                optimizer = torch.optim.SGD([torch.zeros(1)], lr=self.learning_rate)
                get_scheduler(schedule, optimizer, 0, 2, self.lr_scheduler_kwargs)


@contextmanager
def _naming(arguments: str) -> Iterator[None]:
    """Add the names of the arguments to errors of transformers."""
    try:
        yield
    except (ImportError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{arguments}: {error}") from error
