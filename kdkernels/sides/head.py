"""Hidden states with an LM head. Logits and gradients are matrix products, computed chunk by chunk."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import torch
from torch import Tensor

from .. import reference
from ..backends import Product, ProductOf, selection
from ..backends.selection import traits
from ..divergences import Divergence
from ..fused import chunking, gemm
from ..fused.call import Call, Tensors, flat
from ..fused.work import Arrays, Gradients, Rows, buffer
from .logits import DenseForm, check_logits
from .side import Checked, TeacherKind, check_fit, check_floating, check_number


@dataclass(frozen=True, eq=False)
class LMHead:
    """Hidden states and the LM head that maps them to logits.

    ``z = hidden @ weight[:vocab_size].T + bias[:vocab_size]``, then ``z * scale``, then ``softcap * tanh(z / softcap)``.

    Args:
        hidden: ``[..., D]``, the last hidden states (after the final norm).
        weight: ``[V, D]``, the LM head, same dtype as ``hidden`` (any dtype under autocast).
        bias: ``[V]`` or None.
        scale: multiplies the logits (Cohere's ``logit_scale``; Granite's ``1 / logits_scaling``).
        softcap: soft cap of the logits (Gemma 2's ``final_logit_softcapping``), or None.
        vocab_size: the real vocabulary size if the head is padded (Qwen: 151936 / 152064); rows beyond it are cut off.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    vocab_size: int | None = None


Side: TypeAlias = LMHead | Tensor
"""A student or teacher: an :class:`LMHead`, or a logits tensor ``[..., V]``."""


@flat
@dataclass(frozen=True)
class HeadForm(DenseForm):
    """A head: its scale and softcap, and the dtype of its products."""

    @property
    def is_head(self) -> bool:
        return True

    def storage(self, call: Call) -> torch.dtype:
        return call.head_storage(self.dtype)

    def student_rows(self, call: Call, tensors: Tensors, index: Tensor | None) -> HeadRows:
        return HeadRows(call, self.dtype, tensors, index)

    def teacher_rows(self, call: Call, tensors: Tensors, index: Tensor | None) -> HeadRows:
        return HeadRows(call, self.dtype, tensors, index)

    def reference_logits(self, call: Call, tensors: Tensors, valid: Tensor | None) -> Tensor:
        dtype, bias = call.compute_dtype, tensors.get("bias")
        z = reference.zero_invalid(tensors["input"].to(dtype), valid) @ tensors["weight"][: call.vocab].to(dtype).t()
        return reference.transform(z if bias is None else z + bias[: call.vocab].to(dtype), self)


class HeadRows:
    """Logits of hidden states and a head, computed chunk by chunk in a buffer."""

    def __init__(self, call: Call, dtype: torch.dtype, tensors: Tensors, index: Tensor | None) -> None:
        self.rows, self.dtype, self.vocab = Rows(tensors["input"], index), dtype, call.vocab
        self._weight, self._bias, self._bias_dtype = tensors["weight"], tensors.get("bias"), call.compute_dtype
        self.storage = call.head_storage(dtype)
        self.own_product = own_product(call, self._weight, dtype)
        self.buffer = self._weight.new_empty(0)

    # Cast lazily: callers that only need sizes must not copy the head.

    @cached_property
    def weight(self) -> Tensor:
        """``[V, D]`` in the dtype of the matrix products."""
        return self._weight[: self.vocab].to(self.dtype)

    @cached_property
    def bias(self) -> Tensor | None:
        """``[V]`` in the compute dtype."""
        return None if self._bias is None else self._bias[: self.vocab].to(self._bias_dtype)

    @property
    def _width(self) -> int:
        return chunking.padded_vocab(self.vocab, self.storage.itemsize)

    @property
    def bytes_per_row(self) -> int:
        """Bytes of one row of the buffer."""
        return self._width * self.storage.itemsize

    def allocate(self, rows: int, name: str) -> None:
        """Allocate the buffer, ``[rows, V]`` with padded rows."""
        self.buffer = buffer(name, rows, self._width, self.storage, self.rows.tensor.device)

    def release(self) -> None:
        """Release the buffer."""
        self.buffer = self._weight.new_empty(0)

    def hidden(self, start: int, stop: int) -> Tensor:
        """Return hidden states ``[C, D]`` in the dtype of the matrix products."""
        return self.rows.take(start, stop).to(self.dtype)

    def logits(self, start: int, stop: int) -> Tensor:
        """Compute logits ``[C, V]`` before bias, scale and softcap."""
        out = self.buffer[: stop - start, : self.vocab]
        (self.own_product or gemm.logits)(self.hidden(start, stop), self.weight, out)
        return out

    @property
    def dz_dtype(self) -> torch.dtype:
        """Dtype of logit gradients: that of the products that read them, or, on devices without wide products, that of the logits."""
        return self.dtype if traits(self._weight.device).narrow_gradients or self.own_product else self.storage

    def sink(self, call: Call, arrays: Arrays, gradients: Gradients) -> HeadSink:
        """Return the sink for gradients by hidden states, weight and bias."""
        return HeadSink(self, call, arrays, gradients)


class HeadSink:
    """Gradients by hidden states, weight and bias. Logit gradients overwrite the logits; each row starts at the same address.

    In float16 they are scaled to fit: row weights are divided by their largest (see ``_in_units``) and multiplied by ``dz_scale``.
    ``finish`` undoes the scaling in float32.
    """

    def __init__(self, head: HeadRows, call: Call, arrays: Arrays, gradients: Gradients) -> None:
        self.head, self.arrays, self.gradients = head, arrays, gradients
        self.hidden = None if gradients.input is None else Rows(gradients.input, head.rows.index)
        self.vocab = slice(0, call.vocab)
        self.dz_scale, self.unit = 1.0, None
        if head.dz_dtype == torch.float16:
            self.dz_scale = call.dz_scale
            arrays.weight, self.unit = _in_units(arrays.weight)
        self.restore: float | Tensor = 1.0 / self.dz_scale if self.unit is None else self.unit / self.dz_scale
        for accumulator in (gradients.weight, gradients.bias):
            if accumulator is not None:  # zero the padded rows, or everything if no chunk writes it
                accumulator[0 if arrays.state.shape[1] == 0 else call.vocab :].zero_()

    def dz(self, start: int, stop: int, logits: Tensor) -> Tensor:
        """Return ``[C, V]`` in the memory of the logits."""
        return self.head.buffer.view(self.head.dz_dtype)[: stop - start, self.vocab]

    def add(self, start: int, stop: int, dz: Tensor) -> None:
        """Multiply the logit gradients of a chunk and add the products to the gradients."""
        if self.hidden is not None:
            into = self.hidden.take(start, stop) if self.hidden.sliceable else None
            product = gemm.grad_hidden(dz, self.head.weight, self.restore, into)
            if product is not into:
                self.hidden.put(start, stop, product)
        d_weight, d_bias = self.gradients.weight, self.gradients.bias
        if d_weight is not None:
            gemm.add_grad_weight(d_weight[self.vocab], dz, self.head.hidden(start, stop), first=start == 0)
        if d_bias is not None:
            total = dz.sum(0, dtype=d_bias.dtype)
            if start == 0:
                d_bias[self.vocab] = total
            else:
                d_bias[self.vocab] += total

    def finish(self) -> None:
        """Undo the scaling of gradients and losses."""
        if self.unit is not None and self.arrays.loss is not None:
            self.arrays.loss.mul_(self.unit)
        if self.unit is not None or self.dz_scale != 1.0:
            for accumulator in (self.gradients.weight, self.gradients.bias):
                if accumulator is not None:
                    accumulator.mul_(self.restore)


def _in_units(weight: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Return ``(weight / unit, unit)``, where ``unit`` ``[]`` is a power of two such that the largest quotient is in [1/2, 1).

    Float16 gradients are computed with the quotients, and float32 results are multiplied by ``unit``. Does not synchronise with the host.
    """
    if weight is None or not weight.numel():
        return weight, None
    largest = weight.abs().amax()
    usable = torch.isfinite(largest) & (largest > 0)
    unit = torch.where(usable, torch.frexp(largest).exponent, 0).clamp(-100, 100).to(weight.dtype).exp2()
    return weight / unit, unit


def own_product(call: Call, weight: Tensor, dtype: torch.dtype) -> Product | None:
    """Return the backend's matrix product for a head in ``dtype``, or None. Only for products that make torch widen the head."""
    product_of: ProductOf | None = getattr(selection.load(call.backend), "product_of", None)
    return None if product_of is None else product_of(weight, dtype, call.head_storage(dtype))


def check_head(name: str, side: LMHead) -> Checked:
    """Check shapes, dtypes, devices and numbers of a head."""
    hidden, weight, bias = side.hidden, side.weight, side.bias
    check_floating(f"{name}.hidden", hidden)
    if hidden.dim() < 2:
        raise ValueError(f"{name}.hidden must have two or more dimensions [..., D], got shape {list(hidden.shape)}: add one with [None]")
    check_floating(f"{name}.weight", weight)
    if weight.dim() != 2 or weight.shape[0] == 0:
        raise ValueError(f"{name}.weight must be [V, D] with V > 0, got shape {list(weight.shape)}")
    if hidden.shape[-1] == 0:
        raise ValueError(f"{name}.hidden has hidden size 0: shape {list(hidden.shape)}")
    if weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"{name}.hidden has size {hidden.shape[-1]}, {name}.weight {list(weight.shape)} needs {weight.shape[1]}: pass the head as "
            "[V, D], like nn.Linear.weight"
        )
    if bias is not None:
        check_floating(f"{name}.bias", bias)
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"{name}.bias must be [{weight.shape[0]}] like the head's rows, got {list(bias.shape)}")
    tensors = {"input": hidden, "weight": weight} | ({} if bias is None else {"bias": bias})
    for part, tensor in tensors.items():
        if tensor.device != hidden.device:
            raise ValueError(f"{name}.{part} is on {tensor.device}, {name}.hidden on {hidden.device}: move one with .to(device)")
    vocab = _check_numbers(name, side)
    softcap = None if side.softcap is None else float(side.softcap)
    form = HeadForm(float(side.scale), softcap, _product_dtype(name, hidden, weight))
    return Checked(form, tensors, hidden.shape[:-1], hidden.device, vocab)


def _check_numbers(name: str, side: LMHead) -> int:
    """Check ``vocab_size``, ``scale`` and ``softcap``, and return the vocabulary."""
    vocab, size = side.weight.shape[0], side.vocab_size
    if size is not None and (isinstance(size, bool) or not isinstance(size, (int, torch.SymInt)) or not 0 < size <= vocab):
        raise ValueError(f"{name}.vocab_size must be an int in [1, {vocab}] (the head's rows), got {size!r}")
    check_number(f"{name}.scale", side.scale)
    if not -math.inf < side.scale < math.inf or side.scale == 0:
        raise ValueError(f"{name}.scale must be finite and not 0, got {side.scale!r}")
    if side.softcap is not None:
        check_number(f"{name}.softcap", side.softcap)
        if not 0 < side.softcap < math.inf:
            raise ValueError(f"{name}.softcap must be finite and > 0, or None for no cap, got {side.softcap!r}")
    return vocab if size is None else size


def _product_dtype(name: str, hidden: Tensor, weight: Tensor) -> torch.dtype:
    """Return the dtype of the matrix products: autocast's, or the operands' common dtype."""
    device_type = hidden.device.type
    if device_type != "meta" and torch.is_autocast_enabled(device_type) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(device_type)
    if weight.dtype != hidden.dtype:
        raise TypeError(
            f"{name}.hidden is {hidden.dtype}, {name}.weight {weight.dtype}: convert one with .to(dtype), or run under torch.autocast"
        )
    return hidden.dtype


def check_side(name: str, side: object) -> Checked:
    """Check a student or teacher that is a head or a logits tensor."""
    if isinstance(side, LMHead):
        return check_head(name, side)
    if isinstance(side, Tensor):
        return check_logits(name, side)
    raise TypeError(f"{name} must be an LMHead or a tensor of logits [..., V], got {type(side).__name__}")


def check_teacher(teacher: object, student: Checked, divergence: Divergence, temperature: float) -> Checked:
    """Check a teacher of any kind, alone and against the student and the options of the loss."""
    if isinstance(teacher, TeacherKind):
        return teacher.check(student, divergence, temperature)
    checked = check_side("teacher", teacher)
    check_fit("teacher", checked, student)
    return checked
