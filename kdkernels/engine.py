"""One call, chunk by chunk: select the valid rows, multiply, hand rows to a backend, accumulate gradients. Knows no autograd.

Where the gradients come from:

- student head, summed loss: hidden and head gradients in the forward pass, unscaled; backward scales them (``scale``).
- student head, per-token loss: the hidden gradient in the forward pass, row by row linear in its upstream gradient; a trainable
  head recomputes the chunks in backward, with the upstream gradients folded in (``recompute``).
- dense student, dense teacher: ``recompute``, from the saved row state. It takes the same number of exponentials and bytes as
  writing the gradient in forward and scaling it later, but no ``[N, V]`` is held in between.
- dense student, teacher head: the logit gradient in the forward pass, scaled in backward; the teacher is multiplied once only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from . import chunking, dispatch, gemm, pages
from .chunking import Chunks
from .problem import STATE, STATS, Problem, RowBatch, Transform

_BLOCK_ELEMENTS = 1 << 21  # of a block that stays in cache


@dataclass
class Inputs:
    """The tensors of a call. Leading shapes agree; heads are whole, ``problem.vocab`` of their rows are used."""

    student: Tensor  # [..., Ds] hidden states, or [..., V] logits
    student_weight: Tensor | None  # [>= V, Ds]
    student_bias: Tensor | None  # [>= V]
    teacher: Tensor  # [..., Dt] or [..., V]
    teacher_weight: Tensor | None
    teacher_bias: Tensor | None
    labels: Tensor | None  # [...] int
    token_weights: Tensor | None  # [...] float


@dataclass
class Outputs:
    """What a forward pass leaves. Gradients that nobody wants are empty."""

    loss: Tensor  # [] or, per token, [...]
    count: Tensor  # [] int64: valid tokens
    stats: Tensor  # [5, ...] float32, or empty
    state: Tensor  # [4, N]; columns beyond the valid rows are undefined. Empty unless ``recompute`` will read it
    d_student: Tensor  # [..., Ds or V], unscaled
    d_weight: Tensor  # [>= V, Ds] float32 or float64, unscaled
    d_bias: Tensor  # [>= V]


def recomputes(problem: Problem, student_is_head: bool, teacher_is_head: bool) -> bool:
    """Whether backward goes over the rows again instead of scaling what forward left."""
    if student_is_head:
        return problem.per_token and (problem.wants_weight or problem.wants_bias)
    return problem.wants_input and not teacher_is_head


class _Rows:
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


class _Side:
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
        self.rows = _Rows(source, index)
        self.is_head = weight is not None
        self.dtype = dtype
        self.weight = None if weight is None else weight[: problem.vocab].to(dtype)
        self.bias = None if bias is None else bias[: problem.vocab].to(problem.compute_dtype)
        self.storage = problem.storage(dtype) if self.is_head else source.dtype
        self.vocab = problem.vocab
        self.buffer = source.new_empty(0)

    @property
    def bytes_per_row(self) -> int:
        if not self.is_head and self.rows.sliceable:
            return 0
        return chunking.padded_vocab(self.vocab, self.storage.itemsize) * self.storage.itemsize

    def allocate(self, rows: int, name: str) -> None:
        """The buffer of a head's logits, ``[rows, V]`` with padded rows."""
        if not self.is_head:
            return
        width, device = chunking.padded_vocab(self.vocab, self.storage.itemsize), self.rows.tensor.device
        if device.type == "cpu":
            self.buffer = pages.scratch(name, rows * width * self.storage.itemsize).view(self.storage).view(rows, width)
        else:
            self.buffer = torch.empty(rows, width, dtype=self.storage, device=device)

    def hidden(self, start: int, stop: int) -> Tensor:
        return self.rows.take(start, stop).to(self.dtype)

    def logits(self, start: int, stop: int) -> Tensor:
        """``[C, V]`` before bias and transform."""
        if self.weight is None:
            return self.rows.take(start, stop)
        out = self.buffer[: stop - start, : self.vocab]
        gemm.logits(self.hidden(start, stop), self.weight, out)
        return out

    def over_logits(self, rows: int) -> Tensor:
        """``[rows, V]`` over the buffer for logit gradients, each row starting where its logits do.

        On a GPU in the dtype of the matrix products; a CPU multiplies what it has (see gemm.py).
        """
        narrow = self.dtype if self.buffer.is_cuda else self.storage
        return self.buffer.view(narrow)[:rows, : self.vocab]


def row_bytes(problem: Problem, inputs: Inputs) -> int:
    """Bytes that one row takes in the chunk buffers of both sides."""
    student, teacher = _sides(problem, inputs, None)
    return student.bytes_per_row + teacher.bytes_per_row


def plan(problem: Problem, num_rows: int, bytes_per_row: int, device_type: str) -> Chunks:
    """The chunks of a call with ``num_rows`` valid rows."""
    enough = chunking.useful_rows(device_type, bytes_per_row)
    return chunking.plan_chunks(num_rows, bytes_per_row, problem.memory_budget, problem.chunk_rows, enough)


def _sides(problem: Problem, inputs: Inputs, index: Tensor | None) -> tuple[_Side, _Side]:
    student = _Side(inputs.student, inputs.student_weight, inputs.student_bias, problem.student_dtype, index, problem)
    teacher = _Side(inputs.teacher, inputs.teacher_weight, inputs.teacher_bias, problem.teacher_dtype, index, problem)
    return student, teacher


def check_and_select(problem: Problem, inputs: Inputs, check: bool = True) -> tuple[Tensor | None, int]:
    """Flat indices of the valid rows (None: all of them) and their number.

    The one point where the host waits for the device, and only if there are labels or token weights to look at: the flags
    of bad values are computed before ``nonzero`` and read after it.

    Raises:
        ValueError: a label outside the vocabulary that is not ``ignore_index``; a negative or non-finite token weight.
    """
    num_rows = inputs.student.numel() // inputs.student.shape[-1] if inputs.student.shape[-1] else 0
    capturing = inputs.student.is_cuda and torch.cuda.is_current_stream_capturing()
    labels, weights = inputs.labels, inputs.token_weights
    bad_labels = bad_weights = index = None
    valid = None if labels is None else labels != problem.ignore_index
    if weights is not None and check and not capturing:
        bad_weights = ~(torch.isfinite(weights) & (weights >= 0))
        bad_weights = bad_weights if valid is None else bad_weights & valid
        any_bad_weight = bad_weights.any()
    if labels is not None and valid is not None:
        if check:
            bad_labels = valid & ((labels < 0) | (labels >= problem.vocab))
            any_bad_label = bad_labels.any()
        index = valid.reshape(-1).nonzero().squeeze(-1)
    if bad_labels is not None and labels is not None and bool(any_bad_label):
        wrong = labels[bad_labels]
        raise ValueError(
            f"labels contain {int(wrong[0])} ({wrong.numel()} such entries), outside the vocabulary [0, {problem.vocab}) and not "
            f"ignore_index={problem.ignore_index}: mask those positions with ignore_index, or correct vocab_size"
        )
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


def _select(values: Tensor | None, index: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """``[n]`` values of the selected rows."""
    if values is None:
        return None
    flat = values.reshape(-1)
    return (flat if index is None else flat.index_select(0, index)).to(dtype).contiguous()  # an upstream gradient may be expanded


def forward(problem: Problem, inputs: Inputs) -> Outputs:
    """Loss, statistics, and the gradients or the row state that backward will need."""
    index, count = check_and_select(problem, inputs)
    outputs = empty_outputs(problem, inputs)
    for gradient in (outputs.d_student, outputs.d_weight):
        pages.advise(gradient)
    outputs.count.fill_(count)
    if index is not None:
        outputs.d_student.zero_()
    student, teacher = _sides(problem, inputs, index)
    dtype, device = problem.compute_dtype, inputs.student.device
    recompute = recomputes(problem, student.is_head, teacher.is_head)
    loss = torch.empty(count, dtype=dtype, device=device)
    stats = torch.empty(len(STATS), count, dtype=torch.float32, device=device) if problem.return_stats else None
    state = torch.empty(len(STATE), count, dtype=dtype, device=device)
    _over_chunks(
        problem, inputs, student, teacher, index, count, state=state, statistics=True, loss=loss, stats=stats,
        weight=_select(inputs.token_weights, index, dtype),
        d_student=outputs.d_student if problem.wants_input and (student.is_head or not recompute) else None,
        # A head's gradient is not linear in one upstream number when there is one per token.
        d_weight=outputs.d_weight if problem.wants_weight and not problem.per_token else None,
        d_bias=outputs.d_bias if problem.wants_bias and not problem.per_token else None,
    )  # fmt: skip
    if recompute:
        outputs.state[:, :count] = state
    if problem.per_token:
        _scatter(outputs.loss, loss, index)
    else:
        outputs.loss.copy_(loss.sum())
    if stats is not None:
        for row, values in zip(outputs.stats, stats, strict=True):
            _scatter(row, values, index)
    return outputs


def recompute(problem: Problem, inputs: Inputs, state: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients that need the rows again, in their final dtypes and scale: (logits, weight, bias), empty if not wanted.

    Args:
        state: ``[4, N]`` as forward left it.
        upstream: gradient by the loss: 0-dim, or the leading shape if per token.
    """
    index, count = check_and_select(problem, inputs, check=False)
    student, teacher = _sides(problem, inputs, index)
    dtype = problem.compute_dtype
    weight = upstream.to(dtype).expand(inputs.student.shape[:-1])
    if inputs.token_weights is not None:
        weight = weight * inputs.token_weights
    d_weight = pages.advise(_weight_accumulator(problem, inputs, problem.wants_weight))
    d_bias = _accumulator(inputs.student_bias, problem.wants_bias, problem, inputs.student)
    d_student = pages.advise(inputs.student.new_empty(0 if student.is_head else inputs.student.shape))
    if index is not None:
        d_student.zero_()
    _over_chunks(
        problem, inputs, student, teacher, index, count, state=state[:, :count], statistics=False, loss=None, stats=None,
        weight=_select(weight, index, dtype),
        d_student=None if student.is_head else d_student,
        d_weight=d_weight if problem.wants_weight else None,
        d_bias=d_bias if problem.wants_bias else None,
    )  # fmt: skip
    if inputs.student_weight is not None:
        d_weight = d_weight.to(inputs.student_weight.dtype)
    if inputs.student_bias is not None:
        d_bias = d_bias.to(inputs.student_bias.dtype)
    return d_student, d_weight, d_bias


def scale(problem: Problem, inputs: Inputs, saved: Outputs, upstream: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients that forward left, times the upstream gradient, in their final dtypes; out of place, so that it can be done again."""
    per_row = upstream.unsqueeze(-1) if problem.per_token else upstream
    return (
        _scaled(saved.d_student, per_row, inputs.student),
        _scaled(saved.d_weight, upstream, inputs.student_weight),
        _scaled(saved.d_bias, upstream, inputs.student_bias),
    )


def _scaled(gradient: Tensor, factor: Tensor, like: Tensor | None) -> Tensor:
    """Multiplied in the wider dtype while it is written in that of ``like``: no float32 copy of the whole in between."""
    dtype = gradient.dtype if like is None else like.dtype
    out = pages.advise(torch.empty_like(gradient, dtype=dtype))
    if not gradient.numel():
        return out
    if gradient.is_cuda or dtype == gradient.dtype or factor.dim():
        return torch.mul(gradient, factor, out=out)
    # On a CPU torch's loops that change the dtype on the way are not vectorised: block by block, in cache, it is two that are.
    step = max(1, _BLOCK_ELEMENTS * gradient.shape[0] // gradient.numel())
    for start in range(0, gradient.shape[0], step):
        out[start : start + step].copy_(gradient[start : start + step] * factor)
    return out


def empty_outputs(problem: Problem, inputs: Inputs) -> Outputs:
    """Outputs of the right shapes and dtypes, undefined; also what the custom op tells the compiler."""
    student, weight, bias = inputs.student, inputs.student_weight, inputs.student_bias
    leading = student.shape[:-1]
    dtype = problem.compute_dtype
    is_head, teacher_is_head = weight is not None, inputs.teacher_weight is not None
    again = recomputes(problem, is_head, teacher_is_head)
    new = student.new_empty
    rows = math.prod(leading)
    keeps_input = problem.wants_input and (is_head or not again)
    return Outputs(
        loss=new(leading if problem.per_token else (), dtype=dtype),
        count=new((), dtype=torch.int64),
        stats=new((len(STATS), *leading) if problem.return_stats else (0,), dtype=torch.float32),
        state=new((len(STATE), rows) if again else (0,), dtype=dtype),
        d_student=new(student.shape if keeps_input else (0,)),
        d_weight=_weight_accumulator(problem, inputs, problem.wants_weight and not problem.per_token),
        d_bias=_accumulator(bias, problem.wants_bias and not problem.per_token, problem, student),
    )


def _weight_accumulator(problem: Problem, inputs: Inputs, wanted: bool) -> Tensor:
    """For the head's gradient: in the compute dtype, but in bfloat16 where a single product makes all of it and a CPU's GEMM rounds
    that to bfloat16 anyway."""
    out, weight = _accumulator(inputs.student_weight, wanted, problem, inputs.student), inputs.student_weight
    if not wanted or weight is None or weight.is_cuda or not weight.dtype == problem.student_dtype == torch.bfloat16:
        return out
    num_rows = math.prod(inputs.student.shape[:-1])
    single = plan(problem, num_rows, row_bytes(problem, inputs), weight.device.type).count <= 1
    return weight.new_empty(weight.shape) if single and problem.storage(weight.dtype) == weight.dtype else out


def _accumulator(parameter: Tensor | None, wanted: bool, problem: Problem, like: Tensor) -> Tensor:
    """Undefined, of the parameter's shape in the compute dtype; empty if not wanted."""
    return like.new_empty(parameter.shape if parameter is not None and wanted else (0,), dtype=problem.compute_dtype)


def _scatter(out: Tensor, values: Tensor, index: Tensor | None) -> None:
    """Writes the selected rows' values into the leading shape; 0 elsewhere."""
    flat = out.view(-1)
    if index is None:
        flat.copy_(values)
    else:
        flat.zero_()
        flat.index_copy_(0, index, values)


def _over_chunks(
    problem: Problem,
    inputs: Inputs,
    student: _Side,
    teacher: _Side,
    index: Tensor | None,
    count: int,
    *,
    state: Tensor,
    statistics: bool,
    loss: Tensor | None,
    stats: Tensor | None,
    weight: Tensor | None,
    d_student: Tensor | None,
    d_weight: Tensor | None,
    d_bias: Tensor | None,
) -> None:
    """The loop over chunks of both passes. Gradients that are None are not computed."""
    wants_grad = any(g is not None for g in (d_student, d_weight, d_bias))
    device = inputs.student.device
    chunks = plan(problem, count, student.bytes_per_row + teacher.bytes_per_row, device.type)
    student.allocate(min(chunks.rows, count), "student logits")
    teacher.allocate(min(chunks.rows, count), "teacher logits")
    backend = dispatch.load(problem.backend)
    labels = _select(inputs.labels, index, torch.int64) if problem.needs_ce else None
    gradient = None if d_student is None else _Rows(d_student, index)
    dz_scale = problem.dz_scale if student.is_head and student.over_logits(0).dtype == torch.float16 else 1.0
    vocab = slice(0, problem.vocab)
    for accumulator in (d_weight, d_bias):
        if accumulator is not None:
            accumulator[0 if count == 0 else problem.vocab :].zero_()
    for start, stop in chunks:
        r = slice(start, stop)
        student_logits = student.logits(start, stop)
        dz = None
        if wants_grad and student.is_head:
            dz = student.over_logits(stop - start)
        elif wants_grad and gradient is not None:
            dz = gradient.take(start, stop) if gradient.sliceable else torch.empty_like(student_logits)
        batch = RowBatch(
            student=student_logits, teacher=teacher.logits(start, stop),
            student_bias=student.bias, teacher_bias=teacher.bias,
            labels=None if labels is None else labels[r],
            weight=None if weight is None else weight[r],
            state=state[:, r],
            loss=None if loss is None else loss[r],
            stats=None if stats is None else stats[:, r],
            dz=dz, dz_scale=dz_scale,
        )  # fmt: skip
        backend.rows(problem, batch, statistics)
        if dz is None:
            continue
        if student.weight is None:
            if gradient is not None and not gradient.sliceable:
                gradient.put(start, stop, dz)
            continue
        if gradient is not None:
            gradient.put(start, stop, gemm.grad_hidden(dz, student.weight, 1.0 / dz_scale))
        if d_weight is not None:
            gemm.add_grad_weight(d_weight[vocab], dz, student.hidden(start, stop), first=start == 0)
        if d_bias is not None:
            total = dz.sum(0, dtype=d_bias.dtype)
            if start == 0:
                d_bias[vocab] = total
            else:
                d_bias[vocab] += total
    if dz_scale != 1.0:
        for accumulator in (d_weight, d_bias):
            if accumulator is not None:
                accumulator.mul_(1.0 / dz_scale)


__all__ = [
    "Inputs",
    "Outputs",
    "Transform",
    "check_and_select",
    "empty_outputs",
    "forward",
    "plan",
    "recompute",
    "recomputes",
    "scale",
]
