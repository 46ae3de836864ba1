"""Arguments, checked and turned into a problem and its tensors. Nothing is computed before everything has been looked at."""

from __future__ import annotations

import math
import numbers
import warnings
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch._subclasses.fake_tensor import FakeTensor

from .. import divergences
from ..backends import selection
from ..backends.rows import Transform
from ..divergences import Divergence
from ..reference import row_top
from ..sides import Ensemble, LMHead, Sampled, Side, Teacher, TopK, check_number
from .ops import refuse_tangents
from .problem import DTYPE_NAMES, SMALLEST_TEMPERATURE, Member, Problem, Quantity
from .sources import Inputs


def prepare(
    student: Side,
    teacher: Teacher | None,
    divergence: Divergence | str,
    temperature: float,
    t_squared: bool,
    labels: Tensor | None,
    ignore_index: int,
    kd_weight: float,
    ce_weight: float,
    token_weights: Tensor | None,
    reduction: str,
    num_items: int | Tensor | None,
    memory_budget: int | None,
    chunk_rows: int | None,
    logits_dtype: torch.dtype | None,
    backend: str,
    return_stats: bool,
    quantity: Quantity = "distillation",
) -> tuple[Problem, Inputs]:
    """Checks every argument and turns it into what the engine takes. The cross-entropy of the student alone has no teacher."""
    resolved = divergences.resolve(divergence)
    check_numbers(temperature=temperature, kd_weight=kd_weight, ce_weight=ce_weight)
    check_choices(reduction, memory_budget, chunk_rows, ignore_index, t_squared, return_stats)
    student_side = _check_side("student", student)
    leading, device = student_side.leading, student_side.input.device
    teachers: dict[str, _Checked] = {}  # those with logits
    if isinstance(teacher, Ensemble):
        teachers = {f"teacher.teachers[{i}]": _check_side(f"teacher.teachers[{i}]", side) for i, side in enumerate(teacher.teachers)}
    elif quantity == "distillation" and not isinstance(teacher, (TopK, Sampled)):
        teachers = {"teacher": _check_side("teacher", teacher)}
    for name, side in teachers.items():
        if side.leading != leading:
            raise ValueError(
                f"{name} has leading shape {list(side.leading)}, student {list(leading)}: both sides need one row per token, "
                "so pass the same positions of the same batch"
            )
        if side.vocab != student_side.vocab:
            raise ValueError(
                f"the vocabularies differ: student {student_side.vocab}, {name} {side.vocab}. If one is padded, cut both to the real "
                "size with LMHead(..., vocab_size=...) or logits[..., :size]; different tokenizers cannot be compared column by column"
            )
        if side.input.device != device:
            raise ValueError(f"{name} is on {side.input.device}, student on {device}: move one with .to(device)")
    tail, teacher_values = (None, None)
    if isinstance(teacher, (TopK, Sampled)):
        tail, teacher_values = _check_sparse(teacher, resolved, temperature, leading, device)
    _check_per_token("labels", labels, leading, device)
    _check_per_token("token_weights", token_weights, leading, device)
    if labels is not None and (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool):
        raise TypeError(f"labels must be integers, got {labels.dtype}")
    if token_weights is not None:
        if not token_weights.is_floating_point():
            raise TypeError(f"token_weights must be floating point, got {token_weights.dtype}: convert with .float()")
        if token_weights.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                "token_weights require grad, but are constants here: detach them, or take reduction='none' and multiply by them"
            )
        refuse_tangents(
            "token_weights have a forward-mode tangent, but are constants here: detach them, or take reduction='none' and multiply by them",
            token_weights,
        )
    if isinstance(ce_weight, (int, float)) and ce_weight != 0 and labels is None:
        raise ValueError(f"ce_weight={ce_weight} needs labels: pass labels=[...], or ce_weight=0")
    check_num_items(num_items)
    _check_logits_dtype(logits_dtype, student_side, *teachers.values())
    grad = torch.is_grad_enabled()
    of_teachers = [t for side in teachers.values() for t in side.tensors if t is not None]
    if grad and any(t.requires_grad for t in of_teachers) and not torch.compiler.is_compiling():
        warnings.warn(
            "the teacher requires grad: it is detached, no gradient reaches it (compute it under torch.no_grad() to save memory)",
            stacklevel=3,
        )
    wants = [grad and t is not None and t.requires_grad for t in student_side.tensors]
    single = teachers.get("teacher")
    members: tuple[Member, ...] = ()
    if isinstance(teacher, Ensemble):
        members = tuple(
            Member(share, side.transform, side.dtype, side.weight is not None, side.bias is not None)
            for share, side in zip(teacher.shares, teachers.values(), strict=True)
        )
    wide = torch.float64 if any(side.dtype == torch.float64 for side in teachers.values()) else torch.float32
    problem = Problem(
        divergence=resolved,
        vocab=student_side.vocab,
        quantity=quantity,
        temperature=max(temperature, SMALLEST_TEMPERATURE),
        t_squared=t_squared,
        kd_weight=kd_weight,
        ce_weight=ce_weight,
        ignore_index=ignore_index,
        student=student_side.transform,
        teacher=Transform() if single is None else single.transform,
        student_dtype=student_side.dtype,
        teacher_dtype=single.dtype if single is not None else wide if members else student_side.dtype,
        logits_dtype=logits_dtype,
        ensemble=teacher.mode if isinstance(teacher, Ensemble) else None,
        members=members,
        tail=tail,
        per_token=reduction == "none",
        wants_input=wants[0],
        wants_weight=wants[1],
        wants_bias=wants[2],
        return_stats=return_stats,
        has_labels=labels is not None,
        memory_budget=memory_budget,
        chunk_rows=chunk_rows,
    )
    dtypes = storages(problem, student_side.is_head, student_side.is_head if not teachers else single is not None and single.is_head)
    chosen = selection.select(backend, device_of(student_side.input), dtypes, "rows" if teachers else "head_rows")
    teacher_input, teacher_weight, teacher_bias = (None, None, None) if single is None else single.tensors
    inputs = Inputs(
        student=student_side.input,
        student_weight=student_side.weight,
        student_bias=student_side.bias,
        teacher=teacher_values if teacher_input is None else teacher_input.detach(),
        teacher_weight=None if teacher_weight is None else teacher_weight.detach(),
        teacher_bias=None if teacher_bias is None else teacher_bias.detach(),
        labels=None if labels is None else labels.detach().to(torch.int64),  # an ignore_index of -100 is no uint8
        token_weights=None if token_weights is None else token_weights.detach(),
        teacher_ids=teacher.ids.detach() if isinstance(teacher, (TopK, Sampled)) else None,
        members=[t.detach() for t in of_teachers] if members else (),
    )
    return replace(problem, backend=chosen), inputs


_UNDEFINED = {
    "renorm": "the teacher gives nothing to the tokens that TopK leaves out, and the student does, so it is infinite",
    "zero": "what TopK names is less than a distribution, and only the forward KL has a part for each token alone",
    "sampled": "only the forward KL is linear in the teacher's probabilities, so that draws estimate it without bias",
    "bucket": "it is not among those with a part for all other tokens together",
}


def _check_sparse(
    teacher: TopK | Sampled, divergence: Divergence, temperature: float, leading: torch.Size, device: torch.device
) -> tuple[str, Tensor]:
    """``Problem.tail``, and the log-probabilities at the loss's temperature or the counts, ``[..., K]``."""
    name, tail = ("Sampled", "sampled") if isinstance(teacher, Sampled) else (f"TopK with tail={teacher.tail!r}", str(teacher.tail))
    if teacher.ids.shape[:-1] != leading:
        raise ValueError(
            f"teacher {name.partition(' ')[0]}.ids have leading shape {list(teacher.ids.shape[:-1])}, student {list(leading)}: both need "
            "one row per token, so pass the same positions of the same batch"
        )
    if teacher.ids.device != device:
        raise ValueError(f"teacher is on {teacher.ids.device}, student on {device}: move its ids and values with .to(device)")
    if tail not in divergence.tails:
        ways = ", ".join(divergences.defined_for(tail))
        others = [other for other in divergence.tails if other != "sampled"]
        out = f", or tail={others[0]!r}" if others and tail != "sampled" else ""
        raise ValueError(f"{divergence.name} is not defined against a teacher of {name}: {_UNDEFINED[tail]}. Take {ways}{out}")
    if isinstance(teacher, Sampled):
        return tail, teacher.counts.detach()
    values = teacher.logprobs.detach()
    if teacher.temperature == temperature:
        return tail, values
    if tail != "renorm":
        raise ValueError(
            f"temperature={temperature}, but the teacher's log-probabilities were taken at {teacher.temperature}, and nobody knows its "
            f"tail at another: take them at {temperature} (kd.topk_logprobs(..., temperature={temperature})), or tail='renorm', which "
            "stays exact"
        )
    # Less the largest first: a product as large as 1 / T is rounded to more than exp can take.
    wide = (values if values.dtype == torch.float64 else values.float()).masked_fill(teacher.ids.detach() < 0, -math.inf)
    return tail, (wide - row_top(wide)) * (teacher.temperature / max(temperature, SMALLEST_TEMPERATURE))


def prepare_head(
    side: Side,
    quantity: Quantity,
    temperature: float,
    memory_budget: int | None,
    chunk_rows: int | None,
    backend: str,
    ids: Tensor | None = None,
    differentiable: bool = True,
) -> tuple[Problem, Inputs]:
    """The same for a quantity of one side, per token; ``ids`` are ``[...]`` or ``[..., K]``."""
    check_numbers(temperature=temperature)
    check_choices(memory_budget=memory_budget, chunk_rows=chunk_rows)
    checked = _check_side("side", side)
    if ids is not None:
        if not isinstance(ids, Tensor):
            raise TypeError(f"ids must be a tensor, got {type(ids).__name__}")
        if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise TypeError(f"ids must be integers, got {ids.dtype}")
        if ids.shape != checked.leading and (ids.shape[:-1] != checked.leading or ids.shape[-1:] == (0,)):
            raise ValueError(
                f"ids must have the leading shape {list(checked.leading)} of the side, or one dimension more for K >= 1 ids each, "
                f"got {list(ids.shape)}"
            )
        if ids.device != checked.input.device:
            raise ValueError(f"ids are on {ids.device}, the side on {checked.input.device}: move one with .to(device)")
    grad = torch.is_grad_enabled() and differentiable
    wants = [grad and t is not None and t.requires_grad for t in checked.tensors]
    problem = Problem(
        divergence=divergences.ForwardKL(),
        vocab=checked.vocab,
        quantity=quantity,
        temperature=max(temperature, SMALLEST_TEMPERATURE),
        ignore_index=-1,
        student=checked.transform,
        teacher=Transform(),
        student_dtype=checked.dtype,
        teacher_dtype=checked.dtype,
        per_token=True,
        wants_input=wants[0],
        wants_weight=wants[1],
        wants_bias=wants[2],
        has_labels=ids is not None,
        memory_budget=memory_budget,
        chunk_rows=chunk_rows,
    )
    dtypes = storages(problem, checked.is_head, checked.is_head)
    chosen = selection.select(backend, device_of(checked.input), dtypes, "head_rows")
    ids = None if ids is None else ids.detach().to(torch.int64)  # -1 is no uint8, and a vocabulary no int8
    inputs = Inputs(checked.input, checked.weight, checked.bias, None, None, None, ids, None)
    return replace(problem, backend=chosen), inputs


def check_count(name: str, value: int, largest: int | None = None) -> None:
    """An int of at least 1 and, if there is a largest, at most that."""
    bounds = ">= 1" if largest is None else f"in [1, {largest}] (the vocabulary)"
    if isinstance(value, bool) or not isinstance(value, int) or value < 1 or (largest is not None and value > largest):
        raise ValueError(f"{name} must be an int {bounds}, got {value!r}")


def check_generator(generator: torch.Generator | None, device: torch.device) -> None:
    if generator is None:
        return
    if not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator, got {type(generator).__name__}")
    if generator.device.type != device.type or (device.index is not None and generator.device.index not in (None, device.index)):
        raise ValueError(f"generator is on {generator.device}, the side on {device}: make one with torch.Generator({str(device)!r})")


def check_softmax(logits: Tensor, out: Tensor | None) -> None:
    """Logits ``[..., V]``, and a place for the result that fits."""
    _check_floating("logits", logits)
    if logits.dim() < 1 or logits.shape[-1] == 0:
        raise ValueError(f"logits must be [..., V] with V > 0, got shape {list(logits.shape)}")
    if out is None:
        return
    if not isinstance(out, Tensor):
        raise TypeError(f"out must be a tensor, got {type(out).__name__}")
    if out.shape != logits.shape or out.dtype != logits.dtype or out.device != logits.device:
        raise ValueError(
            f"out must be {logits.dtype} of shape {list(logits.shape)} on {logits.device} like the logits, "
            f"got {out.dtype} {list(out.shape)} on {out.device}"
        )
    if torch.is_grad_enabled() and (logits.requires_grad or out.requires_grad):
        raise ValueError("out= records no gradient: call it under torch.no_grad(), or leave out= away")
    refuse_tangents("out= records no forward-mode derivative: leave out= away", logits, out)
    if out.stride(-1) != 1 and out.shape[-1] > 1:
        raise ValueError(f"out must have unit stride in its last dimension, got strides {out.stride()}")
    try:
        rows = out.view(-1, out.shape[-1])
    except RuntimeError:
        raise ValueError(f"out must have one stride between all its rows, got strides {out.stride()} for {list(out.shape)}") from None
    if rows.shape[0] > 1 and rows.stride(0) < rows.shape[1]:
        raise ValueError(f"out must have memory of its own for every row, got strides {out.stride()} for {list(out.shape)}")
    if out is logits or torch.compiler.is_compiling() or not out.numel():
        return
    same = out.data_ptr() == logits.data_ptr() and out.stride() == logits.stride()
    (a, b), (c, d) = _extent(out), _extent(logits)
    if not same and a < d and c < b:
        raise ValueError("out shares a part of its memory with the logits: pass out=logits itself, or a tensor of its own")


def _extent(tensor: Tensor) -> tuple[int, int]:
    """Address of the first byte, and of one beyond the last: tensors of different storages can share memory (NumPy, DLPack)."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (int(last) + 1) * tensor.element_size()


@dataclass(frozen=True)
class _Checked:
    """A side whose shapes and dtypes make sense."""

    input: Tensor
    weight: Tensor | None
    bias: Tensor | None
    vocab: int
    dtype: torch.dtype
    transform: Transform

    @property
    def is_head(self) -> bool:
        return self.weight is not None

    @property
    def leading(self) -> torch.Size:
        return self.input.shape[:-1]

    @property
    def tensors(self) -> list[Tensor | None]:
        return [self.input, self.weight, self.bias]


def _check_side(name: str, side: Side | None) -> _Checked:
    if not isinstance(side, (LMHead, Tensor)):
        raise TypeError(f"{name} must be an LMHead or a tensor of logits [..., V], got {type(side).__name__}")
    x = side.hidden if isinstance(side, LMHead) else side
    what = f"{name}.hidden" if isinstance(side, LMHead) else name
    _check_floating(what, x)
    if x.dim() < 2:
        raise ValueError(
            f"{what} must have two or more dimensions [..., {'D' if what != name else 'V'}], got shape {list(x.shape)}: add one with [None]"
        )
    if isinstance(side, Tensor):
        if x.shape[-1] == 0:
            raise ValueError(f"{name} has an empty vocabulary: shape {list(x.shape)}")
        return _Checked(x, None, None, x.shape[-1], x.dtype, Transform())
    weight, bias = side.weight, side.bias
    _check_floating(f"{name}.weight", weight)
    if weight.dim() != 2 or weight.shape[0] == 0:
        raise ValueError(f"{name}.weight must be [V, D] with V > 0, got shape {list(weight.shape)}")
    if x.shape[-1] == 0:
        raise ValueError(f"{what} has hidden size 0: shape {list(x.shape)}")
    if weight.shape[1] != x.shape[-1]:
        raise ValueError(
            f"{name}.hidden has size {x.shape[-1]}, {name}.weight {list(weight.shape)} needs {weight.shape[1]}: the head is [V, D], "
            "as nn.Linear keeps it"
        )
    if bias is not None:
        _check_floating(f"{name}.bias", bias)
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"{name}.bias must be [{weight.shape[0]}] like the head's rows, got {list(bias.shape)}")
    for part, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name}.{part} is on {tensor.device}, {name}.hidden on {x.device}: move one with .to(device)")
    vocab = weight.shape[0]
    if side.vocab_size is not None:
        size = side.vocab_size
        if isinstance(size, bool) or not isinstance(size, (int, torch.SymInt)) or not 0 < size <= vocab:
            raise ValueError(f"{name}.vocab_size must be an int in [1, {vocab}] (the head's rows), got {size!r}")
        vocab = size
    check_number(f"{name}.scale", side.scale)
    if not -math.inf < side.scale < math.inf or side.scale == 0:
        raise ValueError(f"{name}.scale must be finite and not 0, got {side.scale!r}")
    if side.softcap is not None:
        check_number(f"{name}.softcap", side.softcap)
        if not 0 < side.softcap < math.inf:
            raise ValueError(f"{name}.softcap must be finite and > 0, or None for no cap, got {side.softcap!r}")
    device_type = x.device.type
    if device_type != "meta" and torch.is_autocast_enabled(device_type) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device_type)
    elif weight.dtype != x.dtype:
        raise TypeError(
            f"{name}.hidden is {x.dtype}, {name}.weight {weight.dtype}: convert one with .to(dtype), or run under torch.autocast"
        )
    else:
        dtype = x.dtype
    softcap = None if side.softcap is None else float(side.softcap)
    return _Checked(x, weight, bias, vocab, dtype, Transform(float(side.scale), softcap))


def _check_floating(name: str, tensor: object) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in DTYPE_NAMES:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}: convert with .float()")


def _check_per_token(name: str, tensor: Tensor | None, leading: torch.Size, device: torch.device) -> None:
    if tensor is None:
        return
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.shape != leading:
        raise ValueError(f"{name} must have the leading shape {list(leading)} of the student, got {list(tensor.shape)}")
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, student on {device}: move one with .to(device)")


def check_numbers(temperature: float = 1.0, kd_weight: float = 1.0, ce_weight: float = 0.0) -> None:
    for name, value in (("temperature", temperature), ("kd_weight", kd_weight), ("ce_weight", ce_weight)):
        check_number(name, value)
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be finite and > 0, got {temperature}; for hard targets use labels and ce_weight")
    for name, value in (("kd_weight", kd_weight), ("ce_weight", ce_weight)):
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} must be finite and >= 0, got {value}")


def check_choices(
    reduction: str = "mean",
    memory_budget: int | None = None,
    chunk_rows: int | None = None,
    ignore_index: int = -100,
    t_squared: bool = True,
    return_stats: bool = False,
) -> None:
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
    for name, value, unit in (("memory_budget", memory_budget, "bytes"), ("chunk_rows", chunk_rows, "rows")):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value <= 0):
            raise ValueError(f"{name} must be a positive int ({unit}) or None, got {value!r}")
        if value is not None and value >= 2**63:
            raise ValueError(f"{name}={value} is more than 64 bits hold: give a number of {unit} below 2**63, or None")
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, (int, torch.SymInt)):
        raise TypeError(f"ignore_index must be an int, got {ignore_index!r}; without labels to ignore leave it at -100")
    for name, flag in (("t_squared", t_squared), ("return_stats", return_stats)):
        if not isinstance(flag, bool):
            raise TypeError(f"{name} must be True or False, got {flag!r}")


def check_num_items(num_items: Any) -> None:
    """A number, or a tensor of one, finite and >= 0. The value of a tensor is read only if that needs no wait."""
    if num_items is None:
        return
    if isinstance(num_items, Tensor):
        if num_items.numel() != 1:
            raise ValueError(f"num_items must be one number, got a tensor of shape {list(num_items.shape)}")
        if num_items.dtype == torch.bool or num_items.is_complex():
            raise TypeError(f"num_items must be a real number, got a tensor of {num_items.dtype}")
        if num_items.device.type != "cpu" or not has_value(num_items):
            return
        num_items = num_items.item()
    is_number = isinstance(num_items, (numbers.Real, torch.SymFloat, torch.SymInt)) and not isinstance(num_items, bool)
    if not is_number:
        raise TypeError(f"num_items must be a number or a tensor of one, got {type(num_items).__name__}")
    if not 0 <= num_items < math.inf:
        raise ValueError(f"num_items must be finite and >= 0, got {num_items}")


def has_value(tensor: Tensor) -> bool:
    """Return whether the host can read the numbers of ``tensor``: not in torch.compile, of a fake tensor, or inside torch.func."""
    wrapped = not torch.compiler.is_compiling() and is_functorch_wrapped_tensor(tensor)
    return not (wrapped or torch.compiler.is_compiling() or isinstance(tensor, FakeTensor) or tensor.is_meta)


def _check_logits_dtype(logits_dtype: torch.dtype | None, *sides: _Checked) -> None:
    if logits_dtype is None:
        return
    heads = [side.dtype for side in sides if side.is_head]
    wide = torch.float64 if any(side.dtype == torch.float64 for side in sides) else torch.float32
    if logits_dtype not in (torch.float32, torch.bfloat16, torch.float64) or (logits_dtype != wide and heads and logits_dtype not in heads):
        raise ValueError(
            f"logits_dtype={logits_dtype} fits neither head ({', '.join(map(str, heads)) or 'there is none'}): use None, {wide}, "
            "or torch.bfloat16 with bfloat16 heads (or under bfloat16 autocast)"
        )


def storages(problem: Problem, student_is_head: bool, teacher_is_head: bool) -> tuple[torch.dtype, torch.dtype]:
    """Dtypes of the logits that a backend will read."""
    return (
        problem.storage(problem.student_dtype) if student_is_head else problem.student_dtype,
        problem.storage(problem.teacher_dtype) if teacher_is_head else problem.teacher_dtype,
    )


def device_of(tensor: Tensor) -> torch.device:
    """Where it would be computed: ``meta`` plans as ``cpu``."""
    return torch.device("cpu") if tensor.device.type == "meta" else tensor.device
