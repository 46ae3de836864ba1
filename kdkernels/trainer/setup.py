"""What has to be known, and to fit, before a training begins: vocabularies, lengths, teachers."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..data.example import Example
from ..tap.head import HeadTap, Tapped
from ..tap.patching import measuring, unwrap
from ..teachers.live import LiveTeacher, vocabulary
from .arguments import DistillationArguments

__all__ = ["check_kept", "check_packing", "longest", "place", "teacher_source"]


def teacher_source(student: nn.Module, teacher: Any, args: DistillationArguments, tokenizer: Any) -> tuple[Any, int]:
    """The teacher as a source, and the real size of the vocabulary.

    Where heads are padded to different sizes, the tokenizer's size is taken, with a warning that says so.

    Raises:
        TypeError: a teacher that is none.
        ValueError: no teacher where one is needed; vocabularies that can't be cut to one size; options that this teacher can't serve.
    """
    models = [teacher] if isinstance(teacher, nn.Module) else teacher
    live = isinstance(models, (list, tuple)) and all(isinstance(m, nn.Module) for m in models) and bool(models)
    if isinstance(teacher, LiveTeacher):
        live, models = True, teacher.models
    if live and any(unwrap(m) is unwrap(student) for m in models):
        raise ValueError("teacher is the student itself, which would be frozen: give a copy of it")
    if teacher is None:
        if args.kd_weight > 0 or args.feature_weight > 0:
            raise ValueError(f"teacher is missing: it is needed with kd_weight={args.kd_weight}, feature_weight={args.feature_weight}")
        return None, args.vocab_size or vocabulary(student)
    if not live and not callable(getattr(teacher, "targets", None)):
        raise TypeError(
            f"teacher must be a model, a list of models or a teacher source (with targets and vocab_size), got {type(teacher).__name__}"
        )
    if not live:
        for name, used in (("on_policy_fraction", args.on_policy_fraction > 0), ("feature_weight", args.feature_weight > 0)):
            if used:
                raise ValueError(
                    f"{name}={getattr(args, name)} needs a teacher that runs, and this one is a {type(teacher).__name__}: give a model"
                )
        if args.kd_on_prompt and hasattr(teacher, "salt"):
            raise ValueError("kd_on_prompt=True: a cache holds targets of responses only; give a model as the teacher")
        if getattr(teacher, "kind", None) == "sampled" and teacher.temperature != args.temperature:
            raise ValueError(
                f"temperature={args.temperature}, but the cache was drawn at {teacher.temperature}, and draws say nothing of another: "
                f"train with temperature={teacher.temperature}, or draw again"
            )
    if live and len(models) > 1 and args.feature_weight > 0:
        raise ValueError("feature_weight > 0 needs one teacher: the features of several have no average")
    given = [vocabulary(m) for m in models] if live else [int(teacher.vocab_size)]
    size = _vocabulary(vocabulary(student), given, args.vocab_size, tokenizer, fixed=not live)
    if isinstance(teacher, LiveTeacher) and teacher.vocab_size != size:
        raise ValueError(
            f"the teacher gives {teacher.vocab_size} columns and the student's real vocabulary is {size}: "
            f"LiveTeacher(..., vocab_size={size})"
        )
    if live and not isinstance(teacher, LiveTeacher):
        return LiveTeacher(models, args.ensemble_mode if len(models) > 1 else None, vocab_size=size), size
    return teacher, size


def _vocabulary(student: int, teachers: Sequence[int], wanted: int | None, tokenizer: Any, fixed: bool) -> int:
    narrowest = min(student, *teachers)
    if wanted is not None:
        if wanted > narrowest:
            raise ValueError(f"vocab_size={wanted}, but the narrowest of the models has {narrowest} columns of logits: give that or less")
        if fixed and wanted != teachers[0]:
            raise ValueError(f"vocab_size={wanted}, but the teacher's targets are over {teachers[0]} tokens: leave it out")
        return wanted
    if len({student, *teachers}) == 1:
        return student
    size = teachers[0] if fixed else len(tokenizer)
    theirs = ", ".join(map(str, teachers))
    if size > narrowest:
        raise ValueError(
            f"the student has {student} columns of logits, the teacher {theirs}, and the real vocabulary is {size}: a model lacks tokens "
            "of the other; distillation across vocabularies is not supported"
        )
    warnings.warn(
        f"student and teacher pad their vocabulary differently ({student} and {theirs} columns): cut to the real {size}", stacklevel=4
    )
    return size


def longest(max_length: int | None, packing: bool, models: Sequence[nn.Module]) -> int | None:
    """Tokens of a row: what was asked for, or what every model can take.

    Raises:
        ValueError: more than a model can take, or packing into rows of no given length.
    """
    limits = [getattr(unwrap(m).config.get_text_config(), "max_position_embeddings", None) for m in models]  # type: ignore[union-attr, operator]
    limit = min((int(n) for n in limits if isinstance(n, int) and n > 0), default=None)
    if max_length is not None and limit is not None and max_length > limit:
        raise ValueError(f"max_length={max_length}, but a model takes {limit} tokens (its max_position_embeddings): give that or less")
    if packing and max_length is None and limit is None:
        raise ValueError("packing=True needs max_length, since no model names a limit of its own")
    return max_length or limit


def check_kept(teacher: Any, examples: Sequence[Example]) -> None:
    """
    Raises:
        ValueError: a cache that holds none or not all of the examples, with how many are missing.
    """
    if not hasattr(teacher, "salt") or not hasattr(teacher, "__contains__"):
        return
    missing = sum(example.key(teacher.salt) not in teacher for example in examples)
    if missing:
        raise ValueError(
            f"{missing:,} of {len(examples):,} examples are not in the cache: it was made from other data, or with another max_length or "
            "overlong. Make it from the same data; held-out rows too (a cache can be made of a folder that holds both files)"
        )


def place(teacher: LiveTeacher, device: torch.device) -> None:
    """Moves models that were left on the CPU to the device of the training; who has put them elsewhere, or quantised them, has decided."""
    for model in teacher.models:
        if device.type != "cpu" and not hasattr(model, "hf_device_map") and {p.device.type for p in model.parameters()} == {"cpu"}:
            model.to(device)


def check_packing(tap: HeadTap, model: nn.Module, device: torch.device) -> None:
    """
    Raises:
        ValueError: two examples in one row change each other's hidden states, measured.
    """
    problem = "its forward pass takes no position_ids" if not _takes_positions(tap) else None
    if problem is None:
        ids = torch.arange(1, 9, device=device)[None] % (tap.vocab_size or 9)
        positions = torch.arange(4, device=device).repeat(2)[None]
        with measuring(tap.base):
            alone = _states(tap(model, input_ids=ids[:, 4:], position_ids=positions[:, 4:]))
            packed = _states(tap(model, input_ids=ids, position_ids=positions))[:, 4:]
        error, scale = (packed - alone).abs().max().item(), alone.abs().max().item()
        if not error <= 256 * torch.finfo(alone.dtype).eps * scale:
            problem = f"an example sees the one before it in its row (hidden states differ by {error:.2g} of {scale:.2g})"
    if problem is not None:
        raise ValueError(f"packing=True does not work with {tap.family}: {problem}; set packing=False")


def _takes_positions(tap: HeadTap) -> bool:
    parameters = inspect.signature(type(tap.base).forward).parameters
    return "position_ids" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def _states(tapped: Tapped) -> torch.Tensor:
    states = tapped.output.logits if tapped.hidden is None else tapped.hidden
    return states.float() if states.dtype != torch.float64 else states
