"""The rows of a call: selecting the valid ones, reading and writing them, and processing one chunk."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor
from torch._C._functorch import get_unwrapped, is_batchedtensor, is_functorch_wrapped_tensor

from ..backends import selection
from ..backends.rows import RowBatch, Stage, Transform
from ..backends.selection import capturing, traits
from ..support import memory
from . import chunking, pages
from .chunking import Chunks

if TYPE_CHECKING:
    from .call import Call, Tensors

Complaint = tuple[Tensor, Callable[[], str]]
"""A flag ``[]`` on the device, and a function that returns the error message if the flag is True."""


class Rows:
    """Selected rows of a ``[..., D]`` tensor, read and written chunk by chunk without copying the whole tensor."""

    def __init__(self, tensor: Tensor, index: Tensor | None) -> None:
        self.tensor, self.index = tensor, index
        self.flat: Tensor | None
        try:
            self.flat = tensor.view(-1, tensor.shape[-1]) if tensor.shape[-1] else tensor.reshape(0, 0)
        except RuntimeError:  # the leading strides do not merge into one row stride, for example logits[:, :-1]
            self.flat = None

    @property
    def sliceable(self) -> bool:
        """Return whether a chunk is a view."""
        return self.flat is not None and self.index is None and self.flat.stride(-1) == 1

    def take(self, start: int, stop: int) -> Tensor:
        """Return rows ``[stop - start, D]`` with unit stride along D, as a view if possible."""
        if self.sliceable and self.flat is not None:
            return self.flat[start:stop]
        index = self.index[start:stop] if self.index is not None else torch.arange(start, stop, device=self.tensor.device)
        if self.flat is not None:
            return self.flat.index_select(0, index).contiguous()
        return self.tensor[torch.unravel_index(index, self.tensor.shape[:-1])].contiguous()

    def put(self, start: int, stop: int, values: Tensor) -> None:
        """Write rows ``[stop - start, D]``."""
        if self.flat is None:
            raise ValueError("only a contiguous tensor can be written to")
        if self.index is None:
            self.flat[start:stop] = values
        else:
            self.flat.index_copy_(0, self.index[start:stop], values.to(self.flat.dtype))


@dataclass(frozen=True)
class Selected:
    """The valid rows: their flat indices (None if all rows are valid) and their number."""

    index: Tensor | None
    count: int

    def take(self, values: Tensor | None, dtype: torch.dtype, per_row: int | None = None) -> Tensor | None:
        """Return the values of the valid rows, ``[count]`` or ``[count, per_row]``."""
        if values is None:
            return None
        flat = values.reshape(-1) if per_row is None else values.reshape(-1, per_row)
        # contiguous(): an upstream gradient may be an expanded tensor.
        return (flat if self.index is None else flat.index_select(0, self.index)).to(dtype).contiguous()

    def scatter(self, values: Tensor, out: Tensor) -> None:
        """Write ``[count]`` or ``[count, K]`` values into the leading shape; 0 elsewhere."""
        flat = out.view(-1) if values.dim() == 1 else out.view(-1, values.shape[1])
        if self.index is None:
            flat.copy_(values)
        else:
            flat.zero_()
            flat.index_copy_(0, self.index, values)


def select_rows(call: Call, tensors: Tensors) -> Selected:
    """Select the rows with a label (all rows without labels), and check labels, token weights and sparse teachers.

    Only here does the host wait for the device, and only if there are values to check: the flags of bad values are computed before
    ``nonzero`` and read after it.

    Raises:
        ValueError: a label or id is outside the vocabulary and not ``ignore_index``; a token weight is negative or not finite; the
            values of a sparse teacher are not a distribution.
    """
    labels, weights = tensors.get("labels"), tensors.get("token_weights")
    valid = None if labels is None else labels != call.ignore_index
    complaints: list[Complaint] = []
    index = None
    if labels is not None and valid is not None:
        complaints.append(_check_labels(call, labels, valid))
    if not capturing(tensors.student.device):
        if call.is_distillation:
            complaints += call.teacher.complaints(call, tensors.of("teacher"), valid)
        if weights is not None:
            complaints.append(_check_weights(weights, valid))
    if valid is not None:
        selected = valid if tensors.ids_per_row is None else valid.any(-1)
        index = selected.reshape(-1).nonzero().squeeze(-1)
    for flag, message in complaints:
        if bool(flag):
            raise ValueError(message())
    if index is None or len(index) == tensors.num_rows:
        return Selected(None, tensors.num_rows)
    return Selected(index, len(index))


def _check_labels(call: Call, labels: Tensor, valid: Tensor) -> Complaint:
    bad = valid & ((labels < 0) | (labels >= call.vocab))

    def message() -> str:
        wrong = labels[bad]
        problem = f"contain {int(wrong[0])} ({wrong.numel()} such entries), outside the vocabulary [0, {call.vocab}) and not"
        if call.quantity == "logprobs":
            return f"ids {problem} -1: use -1 for padding, whose log-probability is 0"
        return f"labels {problem} ignore_index={call.ignore_index}: mask those positions with ignore_index, or correct vocab_size"

    return bad.any(), message


def _check_weights(weights: Tensor, valid: Tensor | None) -> Complaint:
    bad = ~(torch.isfinite(weights) & (weights >= 0))
    if valid is not None:
        bad &= valid

    def message() -> str:
        wrong = weights[bad]
        return (
            f"token_weights contain {float(wrong[0])} ({wrong.numel()} such entries): weights must be finite and not negative; "
            "mask tokens with ignore_index instead"
        )

    return bad.any(), message


def check_values(call: Call, tensors: Tensors) -> None:
    """Run only the checks of ``select_rows``.

    They are skipped inside ``torch.func.vmap`` over labels, weights or a sparse teacher, where control flow cannot depend on values. Only
    torch's bounds checks apply there.
    """
    read = [tensors.get("labels"), tensors.get("token_weights")]
    if call.is_distillation and call.teacher.is_sparse:
        read += tensors.of("teacher").named.values()
    if not any(_is_mapped(tensor) for tensor in read):
        select_rows(call, tensors)


def _is_mapped(tensor: Tensor | None) -> bool:
    """Return whether ``torch.func.vmap`` maps over the tensor, at any level of torch.func."""
    if tensor is None or torch.compiler.is_compiling():
        return False
    while is_functorch_wrapped_tensor(tensor):
        if is_batchedtensor(tensor):
            return True
        tensor = get_unwrapped(tensor)
    return False


def plan(call: Call, num_rows: int, bytes_per_row: int, device: torch.device) -> Chunks:
    """Return the chunks of a call with ``num_rows`` valid rows."""
    enough = chunking.useful_rows(traits(device).enough_rows, traits(device).cheap_bytes, bytes_per_row)
    budget = chunking.default_budget(memory.total_bytes(device)) if call.memory_budget is None else call.memory_budget
    return chunking.plan_chunks(num_rows, bytes_per_row, budget, call.chunk_rows, enough)


def buffer(name: str, rows: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return an uninitialised ``[rows, width]`` tensor. On a CPU, calls with the same name share memory."""
    if traits(device).recycled_pages:
        return pages.scratch(name, rows * width * dtype.itemsize).view(dtype).view(rows, width)
    return torch.empty(rows, width, dtype=dtype, device=device)


class TeacherRows(Protocol):
    """The logits of one side, chunk by chunk: computed into a buffer, or read in place."""

    @property
    def bias(self) -> Tensor | None:
        """Bias ``[V]`` that the row kernels add to the logits, or None."""

    @property
    def bytes_per_row(self) -> int:
        """Bytes that one row takes in buffers."""

    def allocate(self, rows: int, name: str) -> None:
        """Allocate buffers for chunks of at most this many rows."""

    def logits(self, start: int, stop: int) -> Tensor:
        """Return logits ``[C, V]`` before bias, scale and softcap."""

    def release(self) -> None:
        """Release the buffers."""


class StudentRows(TeacherRows, Protocol):
    """The logits of a student, with the path of its gradients."""

    @property
    def dz_dtype(self) -> torch.dtype:
        """Dtype of the logit gradients."""

    def sink(self, call: Call, arrays: Arrays, gradients: Gradients) -> Sink:
        """Return the sink that turns logit gradients into gradients of the student's tensors."""


@dataclass
class Gradients:
    """Output tensors for the gradients by the student's tensors. None means not computed."""

    input: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None

    @property
    def wanted(self) -> bool:
        """Return whether any gradient must be computed."""
        return any(g is not None for g in (self.input, self.weight, self.bias))


class Sink(Protocol):
    """Turns the logit gradients of each chunk into gradients of the student's tensors."""

    dz_scale: float
    """Factor included in the logit gradients passed to ``add``."""

    def dz(self, start: int, stop: int, logits: Tensor) -> Tensor:
        """Return memory for the logit gradients of a chunk ``[C, V]``. It may overlap the logits."""

    def add(self, start: int, stop: int, dz: Tensor) -> None:
        """Accumulate the logit gradients of a chunk."""

    def finish(self) -> None:
        """Undo the scaling of gradients and losses after the last chunk."""


@dataclass
class Arrays:
    """Inputs and outputs of a pass for n rows."""

    stages: Stage
    """Stages that the backend runs. Without ``NORMALISERS`` it reads the state."""
    state: Tensor  # [S, n]
    weight: Tensor | None  # [n] token weights; in a backward pass times the upstream gradients
    labels: Tensor | None  # [n] or [n, K]
    loss: Tensor | None = None  # [n] or [n, K], out
    stats: Tensor | None = None  # [5, n], out

    def part(self, rows: slice) -> Arrays:
        """Return the arrays of some of the rows."""
        weight, labels, loss = (None if t is None else t[rows] for t in (self.weight, self.labels, self.loss))
        return Arrays(self.stages, self.state[:, rows], weight, labels, loss, None if self.stats is None else self.stats[:, rows])


class Work:
    """One pass over the rows of a call. The subclasses (dense, sparse, one side) define how a chunk is processed."""

    def __init__(self, call: Call, student: StudentRows, arrays: Arrays, sink: Sink | None) -> None:
        self.call, self.student, self.arrays, self.sink = call, student, arrays, sink
        self.backend = selection.load(call.backend)
        self.dz_scale = 1.0 if sink is None else sink.dz_scale

    @property
    def bytes_per_row(self) -> int:
        """Bytes that one row takes in buffers."""
        return self.student.bytes_per_row

    def allocate(self, rows: int) -> None:
        """Allocate the buffers for chunks of at most this many rows."""
        self.student.allocate(rows, "student logits")

    def chunk(self, start: int, stop: int) -> None:
        """Process the rows from start to stop."""
        logits = self.student.logits(start, stop)
        dz = None if self.sink is None else self.sink.dz(start, stop, logits)
        self.rows(start, stop, logits, dz)
        if self.sink is not None and dz is not None:
            self.sink.add(start, stop, dz)

    def rows(self, start: int, stop: int, logits: Tensor, dz: Tensor | None) -> None:
        """Run the row kernels on the student's logits ``[C, V]``."""
        raise NotImplementedError


class Dense(Work):
    """A pass over two sides that both have logits."""

    def __init__(self, call: Call, student: StudentRows, teacher: TeacherRows, arrays: Arrays, sink: Sink | None) -> None:
        super().__init__(call, student, arrays, sink)
        self.teacher = teacher

    @property
    def bytes_per_row(self) -> int:
        return self.student.bytes_per_row + self.teacher.bytes_per_row

    def allocate(self, rows: int) -> None:
        super().allocate(rows)
        self.teacher.allocate(rows, "teacher logits")

    def rows(self, start: int, stop: int, logits: Tensor, dz: Tensor | None) -> None:
        part = self.arrays.part(slice(start, stop))
        batch = RowBatch(
            student=logits, teacher=self.teacher.logits(start, stop), student_bias=self.student.bias, teacher_bias=self.teacher.bias,
            labels=part.labels, weight=part.weight, state=part.state, loss=part.loss, stats=part.stats, dz=dz, dz_scale=self.dz_scale,
        )  # fmt: skip
        self.backend.rows(self.call, batch, part.stages)


@dataclass(frozen=True)
class Form(Transform):
    """One side of a call without its tensors. Each kind of side has a subclass in its own file in ``kdkernels/sides``.

    ``tensors`` arguments hold the side's tensors by the kind's names: ``input``, ``weight``, ...
    """

    dtype: torch.dtype = torch.float32
    """Dtype of a logits tensor, or of a head's matrix products."""

    @property
    def is_head(self) -> bool:
        """Return whether the logits come from matrix products."""
        return False

    @property
    def heads(self) -> tuple[torch.dtype, ...]:
        """Dtypes of the matrix products, one per head."""
        return (self.dtype,) if self.is_head else ()

    @property
    def is_sparse(self) -> bool:
        """Return whether the teacher has ids instead of logits, so that the row kernels read only the student's logits."""
        return False

    def storage(self, call: Call) -> torch.dtype:
        """Return the dtype of the logits that a row kernel reads."""
        return self.dtype

    def student_rows(self, call: Call, tensors: Tensors, index: Tensor | None) -> StudentRows:
        """Return the rows of a student."""
        raise NotImplementedError(f"{type(self).__name__} cannot be a student")

    def teacher_rows(self, call: Call, tensors: Tensors, index: Tensor | None) -> TeacherRows | None:
        """Return the rows of a teacher; None for a teacher without logits."""
        raise NotImplementedError

    def work(self, call: Call, tensors: Tensors, selected: Selected, student: StudentRows, arrays: Arrays, sink: Sink | None) -> Work:
        """Return the pass of a distillation against this teacher. The default needs logits on both sides."""
        teacher = self.teacher_rows(call, tensors, selected.index)
        assert teacher is not None
        return Dense(call, student, teacher, arrays, sink)

    def complaints(self, call: Call, tensors: Tensors, valid: Tensor | None) -> list[Complaint]:
        """Check the values of a teacher in the valid rows, on its device: return one flag and message per check."""
        return []

    def reference_logits(self, call: Call, tensors: Tensors, valid: Tensor | None) -> Tensor:
        """Return logits ``[..., V]`` in the compute dtype, in plain torch, with the inputs of invalid rows zeroed."""
        raise NotImplementedError

    def reference(self, call: Call, tensors: Tensors, z: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return the divergence ``[...]``, the teacher's entropy ``[...]`` and its most likely token ``[..., 1]``, in plain torch.

        Args:
            z: ``[..., V]``, the student's logits.
            valid: ``[...]``, False for ignored rows.
        """
        raise NotImplementedError
