"""Checks before a training begins: vocabularies, tokenizers, teachers, caches."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..data.agreement import check_templates, check_tokenizers
from ..data.example import Example
from ..tap.patching import unwrap
from ..tap.weights import logit_columns
from ..teachers.live import LiveTeacher
from ..teachers.source import TeacherSource
from .arguments import DistillationArguments

__all__ = [
    "SavedConfig", "Untaught", "check_kept", "check_teacher_tokenizers", "seeded", "teacher_source", "warn_of_missing", "warn_of_student",
]  # fmt: skip

PADDING = 1024
"""Largest number of logit columns beyond the tokenizer's tokens that counts as padding. Most heads have a few hundred, Phi-2's has 905."""


def teacher_source(student: nn.Module, teacher: Any, args: DistillationArguments, tokenizer: Any) -> tuple[TeacherSource | None, int]:
    """Return the teacher as a source, and the real size of the vocabulary.

    If the heads are padded to different sizes, the tokenizer's size is used, with a warning.

    Raises:
        TypeError: the teacher has an unsupported type.
        ValueError: the teacher is missing, the vocabularies cannot be cut to one size, or the teacher does not support the options.
    """
    _check_causal("model", student)
    if teacher is None:
        if args.kd_weight > 0 or args.feature_weight > 0:
            raise ValueError(f"teacher is missing: it is needed with kd_weight={args.kd_weight}, feature_weight={args.feature_weight}")
        return None, args.vocab_size or logit_columns(student)
    models = teacher.models if isinstance(teacher, LiveTeacher) else [teacher] if isinstance(teacher, nn.Module) else teacher
    live = isinstance(models, (list, tuple)) and bool(models) and all(isinstance(model, nn.Module) for model in models)
    if live:
        _check_models(models, student, args)
    else:
        _check_source(teacher, args)
    columns = list(map(logit_columns, models)) if live else [int(teacher.vocab_size)]
    size = _vocabulary(logit_columns(student), columns, args.vocab_size, tokenizer, fixed=not live)
    if live and not isinstance(teacher, LiveTeacher):
        return LiveTeacher(models, args.ensemble_mode if len(models) > 1 else None, vocab_size=size), size
    if teacher.vocab_size != size:
        raise ValueError(
            f"the teacher gives {teacher.vocab_size} columns and the student's real vocabulary is {size}: "
            f"LiveTeacher(..., vocab_size={size})"
        )
    return teacher, size


def _check_causal(role: str, model: nn.Module) -> None:
    base: Any = unwrap(model)
    if getattr(getattr(base, "config", None), "is_encoder_decoder", False) or not getattr(base, "can_generate", lambda: True)():
        raise TypeError(f"{role} is a {type(base).__name__}, not a causal language model: load one with AutoModelForCausalLM")


def _check_models(models: Sequence[nn.Module], student: nn.Module, args: DistillationArguments) -> None:
    for model in models:
        _check_causal("teacher", model)
    if any(unwrap(model) is unwrap(student) for model in models):
        raise ValueError("teacher is the student itself, which would be frozen: pass a copy of it")
    if len(models) > 1 and args.feature_weight > 0:
        raise ValueError("feature_weight > 0 needs one teacher: features of several teachers cannot be averaged")


def _check_source(source: Any, args: DistillationArguments) -> None:
    kind = type(source).__name__
    if not callable(getattr(source, "targets", None)):
        raise TypeError(f"teacher must be a model, a list of models or a teacher source (with targets and vocab_size), got {kind}")
    for name in ("on_policy_fraction", "feature_weight"):
        if getattr(args, name) > 0:
            raise ValueError(f"{name}={getattr(args, name)} needs a teacher that runs, but the teacher is a {kind}: pass a model")
    if args.kd_on_prompt and hasattr(source, "salt"):
        raise ValueError("kd_on_prompt=True: a cache has targets for responses only; pass a model as the teacher")
    if hasattr(source, "check_loss") and args.kd_weight > 0:
        source.check_loss(args.divergence, args.temperature)


def _vocabulary(student: int, teachers: Sequence[int], wanted: int | None, tokenizer: Any, fixed: bool) -> int:
    narrowest = min(student, *teachers)
    if wanted is not None:
        if wanted > narrowest:
            raise ValueError(f"vocab_size={wanted}, but the narrowest of the models has {narrowest} columns of logits: use that or less")
        if fixed and wanted != teachers[0]:
            raise ValueError(f"vocab_size={wanted}, but the teacher's targets are over {teachers[0]} tokens: omit vocab_size")
        return wanted
    if len({student, *teachers}) == 1:
        return student
    size, what = (teachers[0], "teacher's targets have") if fixed else (len(tokenizer), "tokenizer has")
    widths = ", ".join(map(str, teachers))
    if fixed and len(tokenizer) <= narrowest < size:
        raise ValueError(
            f"the teacher's targets are over {size} columns, the student has {student} of logits, the tokenizer {len(tokenizer)} tokens: "
            f"make the targets again without the padding of the teacher's head (kdkernels cache --vocab-size {len(tokenizer)})"
        )
    if size > narrowest:
        raise ValueError(
            f"the student has {student} columns of logits, the teacher {widths}, and the real vocabulary is {size}: a model lacks tokens "
            "of the other; distillation across vocabularies is not supported"
        )
    if (excess := max(student, *teachers) - size) > PADDING:
        raise ValueError(
            f"the student has {student} columns of logits, the teacher {widths}, and the {what} {size} tokens: {excess} more are not "
            "padding, so the two seem to have different tokenizers. Take models of one tokenizer; if the first ids of both do mean the "
            "same, give vocab_size"
        )
    warnings.warn(
        f"student and teacher pad their vocabulary differently ({student} and {widths} columns): cut to the real {size}",
        stacklevel=4,
    )
    return size


def check_teacher_tokenizers(student: Any, teachers: Any) -> None:
    """Check that the teachers' tokenizers agree with the student's.

    Args:
        teachers: the tokenizer of the teacher, or a list for several teachers; None if not given.

    Raises:
        ValueError: a tokenizer assigns other ids than the student's, or formats a conversation differently.
    """
    tokenizers = teachers if isinstance(teachers, (list, tuple)) else [teachers]
    conversation = [{"messages": [{"role": "user", "content": "One"}, {"role": "assistant", "content": "Two"}]}]
    for teacher in tokenizers:
        if teacher is not None:
            check_tokenizers(student, teacher)
            check_templates(student, teacher, conversation)


def warn_of_student(student: nn.Module, tokenizer: Any, sharded: bool) -> None:
    """Warn about trainable 16-bit weights and a tokenizer without an end-of-text token, with which a student learns badly.

    Args:
        sharded: DeepSpeed keeps float32 copies of 16-bit weights.
    """
    narrow = {str(p.dtype).removeprefix("torch.") for p in student.parameters() if p.requires_grad and p.dtype.itemsize == 2}
    if narrow and not sharded:
        warnings.warn(
            f"the student's trainable weights are {' and '.join(sorted(narrow))}, in which most updates round to nothing: load it with "
            "dtype=torch.float32, and set bf16=True to compute in bfloat16",
            stacklevel=4,
        )
    if tokenizer.eos_token_id is None:
        warnings.warn(
            "the tokenizer has no end-of-text token, so the student never learns to end a response: set tokenizer.eos_token to the token "
            "that ends a turn",
            stacklevel=4,
        )


def check_kept(teacher: Any, examples: Sequence[Example], **options: Any) -> None:
    """Check that a cache has targets for all examples.

    Raises:
        ValueError: targets are missing; the message names the rows.
    """
    if hasattr(teacher, "require"):
        teacher.require(examples, **options)


def _missing(teacher: Any, examples: Sequence[Example]) -> int:
    """Return the number of examples that are missing in a cache; 0 for any other teacher."""
    if not hasattr(teacher, "salt") or not hasattr(teacher, "__contains__"):
        return 0
    return sum(example.key(teacher.salt) not in teacher for example in examples)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Run a block with random state ``seed``, and restore the random state afterwards."""
    devices = range(torch.cuda.device_count())
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        yield


class Untaught(list[Any]):
    """Items of held-out rows without targets in the cache. Only their cross-entropy can be evaluated."""


def warn_of_missing(teacher: Any, examples: Sequence[Example]) -> bool:
    """Return True if the teacher has targets for all held-out examples. Otherwise warn and return False."""
    missing = _missing(teacher, examples)
    if missing:
        warnings.warn(
            f"{missing:,} of {len(examples):,} held-out examples are not in the cache, so evaluations report the cross-entropy alone. For "
            "the divergence, cache them too: kdkernels cache takes --data several times",
            stacklevel=4,
        )
    return not missing


class SavedConfig:
    """A context in which a model is saved with its original config and generation config.

    For the training, transformers turns ``use_cache`` off and copies special tokens from the tokenizer.
    """

    def __init__(self, model: nn.Module) -> None:
        self._base: Any = unwrap(model)
        self._given = {name: copy.deepcopy(getattr(self._base, name, None)) for name in ("config", "generation_config")}

    def __enter__(self) -> None:
        self._training = {name: getattr(self._base, name) for name, value in self._given.items() if value is not None}
        for name in self._training:
            setattr(self._base, name, copy.deepcopy(self._given[name]))

    def __exit__(self, *error: object) -> None:
        for name, value in self._training.items():
            setattr(self._base, name, value)
