"""The arguments of one call: everything except tensors (``Call``), the tensors by name (``Tensors``), and the flat form of both.

The custom ops take a list of tensors, a tensor of numbers, symbolic sizes and a text. ``flatten`` converts a call to these four
arguments, ``restore`` converts them back.
"""

from __future__ import annotations

import ast
import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from .. import divergences
from ..backends import selection
from ..divergences import Divergence
from .work import Form

DTYPE_NAMES = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32", torch.float64: "float64"}
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}

SMALLEST_TEMPERATURE = 2.0**-100
"""Smaller temperatures are raised to this one. Here all logits below the largest already have probability 0, and 1 / T fits in float32."""

_FORMAT = 5
"""Version of the ops' results, which begins the structure in every text. Increment it when a result's shape or dtype changes: torch.compile
caches graphs on disk under this text and must not reuse a graph of an older version of the package."""

Quantity = Literal["distillation", "cross_entropy", "logprobs", "logsumexp", "entropy", "topk", "sample", "softmax", "log_softmax"]
"""The quantity computed for each row: a loss between student and teacher, or a quantity of the student alone."""

_CLASSES: dict[str, type[Any]] = {}
_FIELDS: dict[type[Any], tuple[tuple[str, str], ...]] = {}
_T = TypeVar("_T")


def flat(cls: type[_T]) -> type[_T]:
    """Register a frozen dataclass that can be part of a ``Call``. Its flat form is derived from its fields and their types."""
    _CLASSES[cls.__name__] = cls
    # f.type is a string such as "float | None": annotations are not evaluated.
    _FIELDS[cls] = tuple((f.name, str(f.type).partition(" ")[0]) for f in dataclasses.fields(cls))  # type: ignore[arg-type]
    return cls


flat(Form)


@flat
@dataclass(frozen=True)
class Call:
    """All arguments of a call except its tensors."""

    divergence: Divergence
    """Used only for distillation, like ``teacher``, ``t_squared``, ``kd_weight`` and ``ce_weight``."""
    vocab: int
    quantity: Quantity = "distillation"
    temperature: float = 1.0
    t_squared: bool = True
    kd_weight: float = 1.0
    ce_weight: float = 0.0
    ignore_index: int = -100
    student: Form = field(default_factory=Form)
    teacher: Form = field(default_factory=Form)
    logits_dtype: torch.dtype | None = None
    count: int = 0
    """Number of ids per row that ``topk`` or ``sample`` returns."""
    per_token: bool = False
    """``reduction="none"``: one loss and one upstream gradient per token."""
    wants_input: bool = False
    """The student's hidden states or logits require grad. The next two fields are for its head."""
    wants_weight: bool = False
    wants_bias: bool = False
    return_stats: bool = False
    has_labels: bool = False
    memory_budget: int | None = None
    chunk_rows: int | None = None
    backend: str = "torch"

    @property
    def is_distillation(self) -> bool:
        """Return whether the call has a teacher."""
        return self.quantity == "distillation"

    @property
    def is_dense(self) -> bool:
        """Return whether the dense reference computes the call."""
        return self.backend == selection.REFERENCE

    @property
    def wants_grad(self) -> bool:
        """Return whether any of the student's tensors requires grad."""
        return self.wants_input or self.wants_weight or self.wants_bias

    @property
    def compute_dtype(self) -> torch.dtype:
        """Dtype of statistics, losses and accumulators: float64 if either side is float64, else float32."""
        return torch.float64 if torch.float64 in (self.student.dtype, self.teacher.dtype) else torch.float32

    @property
    def inv_temperature(self) -> float:
        return 1.0 / self.temperature

    @property
    def value_scale(self) -> float:
        """Factor of the divergence in the loss."""
        return self.kd_weight * (self.temperature**2 if self.t_squared else 1.0)

    @property
    def slope_scale(self) -> float:
        """Factor of ``g - q * sum(g)`` in the gradient by the student's logits."""
        return self.value_scale * self.inv_temperature

    @property
    def needs_ce(self) -> bool:
        return self.has_labels and (self.ce_weight != 0 or self.return_stats)

    @property
    def needs_ids(self) -> bool:
        """Return whether the quantity needs the label's column or the columns of given ids."""
        return self.quantity in ("cross_entropy", "logprobs")

    def head_storage(self, dtype: torch.dtype) -> torch.dtype:
        """Return the dtype of a chunk's logits that come from matrix products in ``dtype``."""
        return dtype if self.logits_dtype == dtype else self.compute_dtype

    @property
    def storages(self) -> tuple[torch.dtype, torch.dtype]:
        """Dtypes of the logits that a row kernel reads: the student's, then the teacher's."""
        student = self.student.storage(self)
        return student, self.teacher.storage(self) if self.kernels == "rows" else student

    @property
    def kernels(self) -> str:
        """Row kernels for this call: ``"rows"`` (two sides), ``"head_rows"`` (one side) or ``"softmax_rows"``."""
        if self.quantity in ("softmax", "log_softmax"):
            return "softmax_rows"
        return "rows" if self.is_distillation and not self.teacher.is_sparse else "head_rows"

    @property
    def recomputes(self) -> bool:
        """Return whether backward processes the rows again. Otherwise it only scales the gradients that forward computed."""
        if self.student.is_head:
            return self.per_token and (self.wants_weight or self.wants_bias)
        return self.wants_input and (not (self.is_distillation and self.teacher.is_head) or self.student.dtype == torch.float16)

    @property
    def dz_scale(self) -> float:
        """Power of two that multiplies logit gradients stored in float16, so that they neither underflow nor overflow.

        A row of weight 1 then has gradients of at most 256 if the divergence's slopes are bounded (by a few T), else about 1: the
        quadratic and power families need the headroom. 1 for other dtypes.
        """
        if self.student.dtype != torch.float16:
            return 1.0
        unbounded, per_slope = False, self.inv_temperature
        if self.is_distillation:
            unbounded = self.divergence.unbounded_slopes
            per_slope = abs(self.slope_scale) + (abs(self.ce_weight) if self.has_labels else 0.0)
        size = per_slope * abs(self.student.scale)
        exponent = math.ceil(math.log2(size)) if 0.0 < size < math.inf else 0
        return 2.0 ** ((0 if unbounded else 8) - max(-100, min(100, exponent)))


@dataclass(frozen=True, eq=False)
class Tensors:
    """The tensors of a call by name. Leading shapes agree. Heads are not cut: only their first ``vocab`` rows are used.

    - ``student.input``: ``[..., D]`` hidden states or ``[..., V]`` logits; ``student.weight``: ``[>= V, D]``; ``student.bias``: ``[>= V]``
    - ``teacher.*``: names chosen by the kind of teacher
    - ``labels``: ``[...]`` int64, or ids ``[..., K]``; ``token_weights``: ``[...]``; ``seed``: ``[]`` int64
    - ``saved.*``: for backward, the results of forward (``engine.Outputs``); ``upstream``: the upstream gradient of the loss
    """

    named: dict[str, Tensor]

    def __getitem__(self, name: str) -> Tensor:
        return self.named[name]

    def get(self, name: str) -> Tensor | None:
        """Return the tensor with this name, or None."""
        return self.named.get(name)

    def of(self, owner: str) -> Tensors:
        """Return the tensors named ``owner.*``, with the prefix removed from their names."""
        begin = owner + "."
        return Tensors({name[len(begin) :]: tensor for name, tensor in self.named.items() if name.startswith(begin)})

    @property
    def student(self) -> Tensor:
        """The student's hidden states ``[..., D]`` or logits ``[..., V]``."""
        return self.named["student.input"]

    @property
    def leading(self) -> torch.Size:
        """The leading shape ``[...]``: one element per token."""
        return self.student.shape[:-1]

    @property
    def num_rows(self) -> int:
        """Number of tokens, including ignored ones."""
        return math.prod(self.leading) if self.student.shape[-1] else 0

    @property
    def ids_per_row(self) -> int | None:
        """K if ids are ``[..., K]``, else None."""
        labels = self.get("labels")
        return None if labels is None or labels.dim() < self.student.dim() else labels.shape[-1]


Flat = tuple[list[Tensor], Tensor, list[int], str]
"""Tensors, float64 numbers on the host, sizes, and a text: the tensor names in order, a line break, ``_FORMAT``, and the structure of the
call without numbers and sizes."""


def flatten(call: Call, tensors: Tensors) -> Flat:
    """Convert a call to the arguments of a custom op.

    Numbers and sizes can change at every step. They are not part of the text, so a change does not trigger recompilation.
    """
    numbers: list[float] = []
    sizes: list[int] = []
    text = f"{_FORMAT} {_stripped(call, '', numbers, sizes)!r}"
    return list(tensors.named.values()), _on_host(numbers), sizes, rename(tensors, text)


def rename(tensors: Tensors, text: str) -> str:
    """Return the text for the same call with other tensors."""
    return " ".join(tensors.named) + "\n" + text.rpartition("\n")[2]


def restore(tensors: Sequence[Tensor], numbers: Tensor | None, sizes: Sequence[int], text: str) -> tuple[Call, Tensors]:
    """Convert the arguments of a custom op back to a call. ``numbers=None`` (while compiling) fills in arbitrary numbers."""
    structure = text.partition("\n")[2]
    if numbers is None:
        call: Call = _filled(_template(structure), None, iter(sizes))
    else:
        call = _call(structure, tuple(numbers.tolist()), tuple(sizes))
    return call, Tensors(dict(zip(names_of(text), tensors, strict=True)))


@lru_cache(maxsize=256)
def _call(structure: str, numbers: tuple[float, ...], sizes: tuple[int, ...]) -> Call:
    call: Call = _filled(_template(structure), iter(numbers), iter(sizes))
    return call


def names_of(text: str) -> list[str]:
    """Return the names of the tensors, in the order of the list."""
    return text.partition("\n")[0].split()


def _on_host(values: list[float]) -> Tensor:
    if not torch.compiler.is_compiling():
        return torch.tensor(values, dtype=torch.float64, device="cpu")
    one = torch.ones((), dtype=torch.float64, device="cpu")
    return torch.stack([one * value for value in values])  # torch.tensor(values) would bake the values into the graph


def _stripped(value: Any, kind: str, numbers: list[float], sizes: list[int]) -> Any:
    """Return the structure of a value as nested tuples. Numbers and sizes move to their lists; a zero of their type replaces them."""
    if value is None:
        return None
    if kind == "float":
        numbers.append(value)
        return 0.0
    if kind == "int":
        sizes.append(value)
        return 0
    if isinstance(value, torch.dtype):
        return "dtype", DTYPE_NAMES[value]
    if isinstance(value, tuple):
        return "tuple", *[_stripped(item, "", numbers, sizes) for item in value]
    if isinstance(value, Divergence):
        numbers.extend(value.parameters)
        return "divergence", value.name, value.flags, tuple(0.0 for _ in value.parameters)
    if type(value) in _FIELDS:
        return type(value).__name__, *[_stripped(getattr(value, name), of, numbers, sizes) for name, of in _FIELDS[type(value)]]
    return value


@lru_cache(maxsize=256)
def _template(structure: str) -> Any:
    return ast.literal_eval(structure.partition(" ")[2])  # without _FORMAT


def _filled(template: Any, numbers: Iterator[float] | None, sizes: Iterator[int]) -> Any:
    """Rebuild a value from its structure: the inverse of ``_stripped``."""
    if isinstance(template, float):
        return 1.0 if numbers is None else next(numbers)
    if isinstance(template, int) and not isinstance(template, bool):
        return next(sizes)
    if not isinstance(template, tuple):
        return template
    kind, *parts = template
    if kind == "dtype":
        return DTYPES[parts[0]]
    if kind == "tuple":
        return tuple(_filled(part, numbers, sizes) for part in parts)
    if kind == "divergence":
        name, flags, parameters = parts
        cls = divergences.REGISTRY[name]
        return cls(**flags) if numbers is None else cls(*[next(numbers) for _ in parameters], **flags)
    return _CLASSES[kind](*[_filled(part, numbers, sizes) for part in parts])
