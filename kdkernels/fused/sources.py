"""Where the rows of a call come from: which ones, their hidden states or logits, and their logits chunk by chunk. Knows no loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch._C._functorch import get_unwrapped, is_batchedtensor, is_functorch_wrapped_tensor

from .. import reference
from ..backends import native
from ..support import memory
from . import chunking, gemm, pages
from .chunking import Chunks
from .problem import Problem


@dataclass
class Inputs:
    """The tensors of a call. Leading shapes agree; heads are whole, ``problem.vocab`` of their rows are used."""

    student: Tensor  # [..., Ds] hidden states, or [..., V] logits
    student_weight: Tensor | None  # [>= V, Ds]
    student_bias: Tensor | None  # [>= V]
    teacher: Tensor | None  # [..., Dt] or [..., V]; None for a quantity of one side
    teacher_weight: Tensor | None
    teacher_bias: Tensor | None
    labels: Tensor | None  # [...] int, or ids [..., K]
    token_weights: Tensor | None  # [...] float
    teacher_ids: Tensor | None = None  # [..., K] int: those of a sparse teacher, whose values [..., K] are ``teacher`` then
    members: Sequence[Tensor] = ()  # of an ensemble: of each teacher what there is of hidden states or logits, weight and bias

    @property
    def ids_per_row(self) -> int | None:
        """K where ids are ``[..., K]``."""
        return None if self.labels is None or self.labels.dim() < self.student.dim() else self.labels.shape[-1]


class Rows:
    """Selected rows of a ``[..., D]`` tensor, read and written a chunk at a time without flattening a copy of it."""

    def __init__(self, tensor: Tensor, index: Tensor | None) -> None:
        self.tensor, self.index = tensor, index
        self.flat: Tensor | None
        try:
            self.flat = tensor.view(-1, tensor.shape[-1]) if tensor.shape[-1] else tensor.reshape(0, 0)
        except RuntimeError:  # leading strides that no single row stride expresses, as of logits[:, :-1]
            self.flat = None

    @property
    def sliceable(self) -> bool:
        return self.flat is not None and self.index is None and self.flat.stride(-1) == 1

    def take(self, start: int, stop: int) -> Tensor:
        """``[stop - start, D]``, unit stride along D: a view where there is one."""
        if self.sliceable and self.flat is not None:
            return self.flat[start:stop]
        index = self.index[start:stop] if self.index is not None else torch.arange(start, stop, device=self.tensor.device)
        if self.flat is not None:
            return self.flat.index_select(0, index).contiguous()
        return self.tensor[torch.unravel_index(index, self.tensor.shape[:-1])].contiguous()

    def put(self, start: int, stop: int, values: Tensor) -> None:
        if self.flat is None:
            raise ValueError("only a contiguous tensor can be written to")
        if self.index is None:
            self.flat[start:stop] = values
        else:
            self.flat.index_copy_(0, self.index[start:stop], values.to(self.flat.dtype))


class SideRows:
    """One side's logits, chunk by chunk: multiplied into a buffer, or read where they are."""

    def __init__(
        self,
        source: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        dtype: torch.dtype,
        index: Tensor | None,
        problem: Problem,
    ) -> None:
        self.rows = Rows(source, index)
        self.is_head = weight is not None
        self.dtype = dtype
        self._weight, self._bias, self._bias_dtype = weight, bias, problem.compute_dtype
        self.storage = problem.storage(dtype) if self.is_head else source.dtype
        self.product = native.product if has_own_product(problem, weight, dtype) else gemm.logits
        self.vocab = problem.vocab
        self.buffer = source.new_empty(0)

    # Cast when they are used: whoever only asks for sizes copies no head.

    @cached_property
    def weight(self) -> Tensor | None:
        """``[V, D]`` in the dtype of the matrix products."""
        return None if self._weight is None else self._weight[: self.vocab].to(self.dtype)

    @cached_property
    def bias(self) -> Tensor | None:
        return None if self._bias is None else self._bias[: self.vocab].to(self._bias_dtype)

    @property
    def bytes_per_row(self) -> int:
        if not self.is_head and self.rows.sliceable:
            return 0
        return chunking.padded_vocab(self.vocab, self.storage.itemsize) * self.storage.itemsize

    def allocate(self, rows: int, name: str) -> None:
        """The buffer of a head's logits, ``[rows, V]`` with padded rows."""
        if not self.is_head:
            return
        width = chunking.padded_vocab(self.vocab, self.storage.itemsize)
        self.buffer = _buffer(name, rows, width, self.storage, self.rows.tensor.device)

    def hidden(self, start: int, stop: int) -> Tensor:
        return self.rows.take(start, stop).to(self.dtype)

    def logits(self, start: int, stop: int) -> Tensor:
        """``[C, V]`` before bias and transform."""
        if self.weight is None:
            return self.rows.take(start, stop)
        out = self.buffer[: stop - start, : self.vocab]
        self.product(self.hidden(start, stop), self.weight, out)
        return out

    def over_logits(self, rows: int) -> Tensor:
        """``[rows, V]`` over the buffer for logit gradients, each row starting where its logits do.

        In the dtype of the matrix products, where the next ones are made of it; else (see gemm.py) as wide as the logits.
        """
        narrow = self.dtype if self.buffer.is_cuda or self.product is native.product else self.storage
        return self.buffer.view(narrow)[:rows, : self.vocab]


def has_own_product(problem: Problem, weight: Tensor | None, dtype: torch.dtype) -> bool:
    """Whether the backend multiplies a head of this weight in ``dtype`` itself, since the CPU's BLAS can't without widening it."""
    if weight is None or problem.backend != "native" or weight.shape[1] % 2 or weight.stride(1) != 1:
        return False
    return native.has_product(dtype, problem.storage(dtype))


class EnsembleRows:
    """Several teachers' logits as one's, chunk by chunk: each is multiplied into the same buffer, and averaged into another."""

    bias = None

    def __init__(self, problem: Problem, inputs: Inputs, index: Tensor | None) -> None:
        self.problem, self.device = problem, inputs.student.device
        self.members = []
        tensors = iter(inputs.members)
        for m in problem.members:
            source = next(tensors)
            weight, bias = (next(tensors) if has else None for has in (m.has_weight, m.has_bias))
            self.members.append(SideRows(source, weight, bias, m.dtype, index, problem))
        self.buffer = inputs.student.new_empty(0)

    @property
    def _width(self) -> int:
        return chunking.padded_vocab(self.problem.vocab, self.problem.compute_dtype.itemsize)

    @property
    def bytes_per_row(self) -> int:
        return self._width * self.problem.compute_dtype.itemsize + max(m.bytes_per_row for m in self.members)

    def allocate(self, rows: int, name: str) -> None:
        self.buffer = _buffer(name, rows, self._width, self.problem.compute_dtype, self.device)

    def logits(self, start: int, stop: int) -> Tensor:
        """``[C, V]``: the average logits, or T times the logarithm of the average probabilities."""
        problem = self.problem
        average = self.buffer[: stop - start, : problem.vocab]
        average.fill_(-math.inf if problem.ensemble == "probs" else 0.0)
        step = max(1, (_TILE if average.device.type == "cpu" else BLOCK_ELEMENTS) // problem.vocab)
        for m, rows in zip(problem.members, self.members, strict=True):
            rows.allocate(stop - start, "logits of an ensemble's member")
            given = rows.logits(start, stop)
            for first in range(0, len(given), step):
                z, out = given[first : first + step].to(problem.compute_dtype), average[first : first + step]
                z = reference.transform(z if rows.bias is None else z + rows.bias, m.transform)
                if problem.ensemble == "logits":
                    out.add_(z, alpha=m.share)
                    continue
                log_p = torch.log_softmax(reference.over_temperature(z, problem), -1).add_(math.log(m.share))
                torch.logaddexp(out, log_p, out=out)
            rows.buffer = rows.buffer.new_empty(0)
        return average.mul_(problem.temperature) if problem.ensemble == "probs" else average


BLOCK_ELEMENTS = 1 << 21  # of a block that stays in cache
_TILE = 1 << 18  # with a few temporaries of it, in a core's own


def _buffer(name: str, rows: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """``[rows, width]``; on a CPU the same memory again for the same name."""
    if device.type == "cpu":
        return pages.scratch(name, rows * width * dtype.itemsize).view(dtype).view(rows, width)
    return torch.empty(rows, width, dtype=dtype, device=device)


def row_bytes(problem: Problem, inputs: Inputs) -> int:
    """Bytes that one row takes in the chunk buffers of both sides."""
    return sum(side.bytes_per_row for side in both_sides(problem, inputs, None) if side is not None)


def plan(problem: Problem, num_rows: int, bytes_per_row: int, device: torch.device) -> Chunks:
    """The chunks of a call with ``num_rows`` valid rows."""
    enough = chunking.useful_rows(device.type, bytes_per_row)
    budget = chunking.default_budget(memory.total_bytes(device)) if problem.memory_budget is None else problem.memory_budget
    return chunking.plan_chunks(num_rows, bytes_per_row, budget, problem.chunk_rows, enough)


def both_sides(problem: Problem, inputs: Inputs, index: Tensor | None) -> tuple[SideRows, SideRows | EnsembleRows | None]:
    student = SideRows(inputs.student, inputs.student_weight, inputs.student_bias, problem.student_dtype, index, problem)
    if problem.ensemble is not None:
        return student, EnsembleRows(problem, inputs, index)
    if inputs.teacher is None or inputs.teacher_ids is not None:
        return student, None
    teacher = SideRows(inputs.teacher, inputs.teacher_weight, inputs.teacher_bias, problem.teacher_dtype, index, problem)
    return student, teacher


def check_and_select(problem: Problem, inputs: Inputs, check: bool = True) -> tuple[Tensor | None, int]:
    """Flat indices of the valid rows (None: all of them) and their number.

    The one point where the host waits for the device, and only if there are labels or token weights to look at: the flags
    of bad values are computed before ``nonzero`` and read after it.

    Raises:
        ValueError: a label or id outside the vocabulary that is not ``ignore_index``; a negative or non-finite token weight.
    """
    num_rows = inputs.student.numel() // inputs.student.shape[-1] if inputs.student.shape[-1] else 0
    capturing = inputs.student.is_cuda and torch.cuda.is_current_stream_capturing()
    labels, weights = inputs.labels, inputs.token_weights
    bad_labels = bad_weights = bad_teacher = index = None
    valid = None if labels is None else labels != problem.ignore_index
    if inputs.teacher_ids is not None and check and not capturing:
        bad_teacher = _bad_rows(problem, inputs)
        bad_teacher = bad_teacher if valid is None else bad_teacher & valid
        any_bad_teacher = bad_teacher.any()
    if weights is not None and check and not capturing:
        bad_weights = ~(torch.isfinite(weights) & (weights >= 0))
        bad_weights = bad_weights if valid is None else bad_weights & valid
        any_bad_weight = bad_weights.any()
    if labels is not None and valid is not None:
        if check:
            bad_labels = valid & ((labels < 0) | (labels >= problem.vocab))
            any_bad_label = bad_labels.any()
        selected = valid if inputs.ids_per_row is None else valid.any(-1)
        index = selected.reshape(-1).nonzero().squeeze(-1)
    if bad_labels is not None and labels is not None and bool(any_bad_label):
        wrong = labels[bad_labels]
        if problem.quantity == "logprobs":
            raise ValueError(
                f"ids contain {int(wrong[0])} ({wrong.numel()} such entries), outside the vocabulary [0, {problem.vocab}) and not -1: "
                "-1 asks for nothing and gives 0"
            )
        raise ValueError(
            f"labels contain {int(wrong[0])} ({wrong.numel()} such entries), outside the vocabulary [0, {problem.vocab}) and not "
            f"ignore_index={problem.ignore_index}: mask those positions with ignore_index, or correct vocab_size"
        )
    if bad_teacher is not None and inputs.teacher_ids is not None and bool(any_bad_teacher):
        raise ValueError(_what_is_wrong(problem, inputs, bad_teacher))
    if bad_weights is not None and weights is not None and bool(any_bad_weight):
        wrong = weights[bad_weights]
        raise ValueError(
            f"token_weights contain {float(wrong[0])} ({wrong.numel()} such entries): weights must be finite and not negative; "
            "mask tokens with ignore_index instead"
        )
    if index is None:
        return None, num_rows
    count = int(index.shape[0])
    return (None if count == num_rows else index), count


def check_values(problem: Problem, inputs: Inputs) -> None:
    """The checks of ``check_and_select`` alone. Inside ``torch.func.vmap`` over labels, weights or a sparse teacher nothing can depend on
    their values: there they are left to torch's own bounds checks."""
    sparse = (inputs.teacher, inputs.teacher_ids) if inputs.teacher_ids is not None else ()
    if not any(_is_mapped(t) for t in (inputs.labels, inputs.token_weights, *sparse)):
        check_and_select(problem, inputs)


def _is_mapped(tensor: Tensor | None) -> bool:
    """Return whether ``torch.func.vmap`` maps over it, at any level of torch.func."""
    if tensor is None or torch.compiler.is_compiling():
        return False
    while is_functorch_wrapped_tensor(tensor):
        if is_batchedtensor(tensor):
            return True
        tensor = get_unwrapped(tensor)
    return False


LARGEST_LOGPROB = 0.01
"""The largest log-probability of a ``TopK`` that is taken as it stands: rounding makes no more of 0."""


def largest_mass(dtype: torch.dtype) -> float:
    """The largest sum of such probabilities: 1, rounded to a few decimals or to ``dtype``."""
    return 1.0 + LARGEST_LOGPROB + 4 * torch.finfo(dtype).eps


def _bad_rows(problem: Problem, inputs: Inputs) -> Tensor:
    """``[...]``: rows of a sparse teacher with ids out of range, or (of the most likely tokens, which are a set) there twice, or with
    counts or log-probabilities that cannot be."""
    teacher_ids, values = inputs.teacher_ids, inputs.teacher
    assert teacher_ids is not None
    assert values is not None
    ids, values = (t.reshape(-1, t.shape[-1]) for t in (teacher_ids, values))
    bad = torch.empty(len(ids), dtype=torch.bool, device=ids.device)
    step = max(1, BLOCK_ELEMENTS // ids.shape[1])  # sorting takes more memory than what is sorted
    for start in range(0, len(ids), step):
        some = ids[start : start + step]
        wrong = (some < -1) | (some >= problem.vocab)
        wrong |= _impossible(problem, values[start : start + step]) & (some >= 0)
        if problem.tail != "sampled" and ids.shape[1] > 1:
            wrong[:, 1:] |= _repeated(some.sort(-1).values)
        bad[start : start + step] = wrong.any(-1) | _above_one(problem, values[start : start + step], some)
    return bad.view(teacher_ids.shape[:-1])


def _impossible(problem: Problem, values: Tensor) -> Tensor:
    """``[n, K]``: negative or infinite counts; log-probabilities that are NaN, +inf, or positive where nothing normalises them."""
    if problem.tail == "sampled":
        return ~((values >= 0) & (values < math.inf))
    return ~(values <= LARGEST_LOGPROB) if problem.tail in ("bucket", "zero") else ~(values < math.inf)


def _above_one(problem: Problem, values: Tensor, ids: Tensor) -> Tensor:
    """``[n]``: rows whose probabilities add up to more than 1, where nothing normalises them."""
    if problem.tail not in ("bucket", "zero"):
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    return _mass(values, ids) > largest_mass(values.dtype)


def _mass(values: Tensor, ids: Tensor) -> Tensor:
    """``[n]``: the probabilities at the ids, added up."""
    return values.masked_fill(ids < 0, -math.inf).to(torch.promote_types(values.dtype, torch.float32)).exp().sum(-1)


def _repeated(ordered: Tensor) -> Tensor:
    """``[n, K - 1]``, of ids in order ``[n, K]``."""
    return (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)


def _what_is_wrong(problem: Problem, inputs: Inputs, bad: Tensor) -> str:
    assert inputs.teacher_ids is not None
    assert inputs.teacher is not None
    ids, name = inputs.teacher_ids[bad], "Sampled" if problem.tail == "sampled" else "TopK"
    outside = ids[(ids < -1) | (ids >= problem.vocab)]
    if outside.numel():
        return (
            f"teacher {name}.ids contain {int(outside[0])} ({outside.numel()} such entries), outside the vocabulary [0, {problem.vocab}) "
            "and not -1, which is padding: are they of the student's tokenizer?"
        )
    values = inputs.teacher[bad]
    wrong = values[(ids >= 0) & _impossible(problem, values)]
    if problem.tail == "sampled":
        return f"teacher Sampled.counts contain {wrong[0].item()} ({wrong.numel()} such entries): they must be finite and not negative"
    if wrong.numel():
        return (
            f"teacher TopK.logprobs contain {wrong[0].item():g} ({wrong.numel()} such entries), and log-probabilities are at most 0: of "
            "probabilities take .log(), of logits log_softmax over the vocabulary, or tail='renorm'"
        )
    if (above := _above_one(problem, values, ids)).any():
        return (
            f"teacher TopK.logprobs of a position add up to a probability of {_mass(values, ids)[above][0].item():.4g} "
            f"({int(above.sum())} such positions), and probabilities to at most 1: take them all from one softmax over the vocabulary, "
            "before any top-p or top-k renormalises them, or tail='renorm'"
        )
    ordered = ids.sort(-1).values
    repeated = ordered[:, 1:][_repeated(ordered)][0]
    return f"teacher TopK.ids name token {int(repeated)} twice at one position: add the probabilities up and keep one, the other -1"


def select(values: Tensor | None, index: Tensor | None, dtype: torch.dtype, per_row: int | None = None) -> Tensor | None:
    """``[n]`` values of the selected rows, or ``[n, per_row]``."""
    if values is None:
        return None
    flat = values.reshape(-1) if per_row is None else values.reshape(-1, per_row)
    return (flat if index is None else flat.index_select(0, index)).to(dtype).contiguous()  # an upstream gradient may be expanded
