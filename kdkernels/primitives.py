"""Quantities of an LM head without storing ``[N, V]`` logits: cross-entropy, log-probabilities, log-sum-exp, entropy, top-k tokens and
samples; and the softmax of a logits tensor.

Sides are ``LMHead(hidden [..., D], weight [V, D], ...)`` or logits ``[..., V]``, as for ``distillation_loss``, in float16, bfloat16,
float32 or float64. Results per token are float32 (float64 for float64 sides). Common arguments:

- ``temperature``: T > 0, divides the logits. Values below 2^-100 are raised to 2^-100, which gives the limit: the largest logit.
- ``memory_budget``: bytes for the chunk buffers, see ``distillation_loss``; ``chunk_rows`` sets the rows per chunk directly.
- ``backend``: ``"auto"`` selects the best backend that can run. A name selects that backend or raises ``BackendUnavailable``.

Hidden states, head and bias, or logits, get exact gradients for any upstream gradient if they require them. The forward pass computes the
hidden gradient; for a trainable head, backward recomputes the chunks of logits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .fused import ops
from .fused import softmax as softmax_of_logits
from .fused.call import Quantity, Tensors
from .fused.checks import Options, prepare, prepare_head, prepare_softmax
from .losses import check_num_items, mean_denominator
from .sides import Sampled, Side, TopK
from .sides.side import check_floating

__all__ = ["cross_entropy", "entropy", "log_softmax", "logsumexp", "sample", "softmax", "token_logprobs", "topk_logprobs"]


def cross_entropy(
    student: Side,
    labels: Tensor,
    ignore_index: int = -100,
    token_weights: Tensor | None = None,
    reduction: str = "mean",
    num_items: int | Tensor | None = None,
    *,
    memory_budget: int | None = None,
    chunk_rows: int | None = None,
    logits_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Tensor:
    """Return the cross-entropy of the labels in nats: ``-log softmax(z)[label]`` per valid token, times its weight.

    The forward pass computes the gradient chunk by chunk, so that forward and backward take three matrix products (two with a frozen
    head). ``distillation_loss`` describes the arguments in more detail.

    Args:
        student: an ``LMHead`` or logits ``[..., V]``.
        labels: ``[...]`` integers; position i holds the target of position i (labels are not shifted).
        ignore_index: tokens with this label are dropped before any matrix product, with loss 0 and gradient 0.
        token_weights: ``[...]`` floats >= 0; constants.
        reduction: ``"mean"`` over ``num_items`` (default: the number of valid tokens), ``"sum"``, or ``"none"`` (the leading shape).
        logits_dtype: dtype of the chunk's logits; ``torch.bfloat16`` halves their size for bfloat16 heads.

    Raises:
        TypeError, ValueError: an invalid argument; the message names it.
    """
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels must be a tensor, got {type(labels).__name__}")
    check_num_items(num_items)
    options = Options("forward_kl", 1.0, True, ignore_index, 0.0, 1.0, reduction, memory_budget, chunk_rows, logits_dtype, backend)
    call, tensors = prepare(student, None, options, labels, token_weights, "cross_entropy")
    loss, count, *_ = ops.run(call, tensors)
    return loss / mean_denominator(num_items, count, loss.dtype) if reduction == "mean" else loss


def token_logprobs(
    side: Side,
    ids: Tensor,
    temperature: float = 1.0,
    *,
    memory_budget: int | None = None,
    chunk_rows: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """Return ``log softmax(z / T)`` in nats at given tokens: one or K per position.

    Args:
        side: an ``LMHead`` or logits ``[..., V]``.
        ids: ``[...]`` or ``[..., K]`` integers in [0, V); -1 gives 0 with gradient 0. Rows with only -1 are dropped before any matrix
            product.

    Returns:
        Log-probabilities in the shape of ``ids``.

    Raises:
        TypeError, ValueError: ids are not integers, have a wrong shape, or are outside the vocabulary; T <= 0.
    """
    options = Options(temperature=temperature, memory_budget=memory_budget, chunk_rows=chunk_rows, backend=backend)
    return ops.run(*prepare_head(side, "logprobs", options, ids))[0]


def logsumexp(
    side: Side, temperature: float = 1.0, *, memory_budget: int | None = None, chunk_rows: int | None = None, backend: str = "auto"
) -> Tensor:
    """Return ``log sum exp(z / T)`` over the vocabulary, ``[...]``: the logarithm of the partition function, as in z-loss."""
    options = Options(temperature=temperature, memory_budget=memory_budget, chunk_rows=chunk_rows, backend=backend)
    return ops.run(*prepare_head(side, "logsumexp", options))[0]


def entropy(
    side: Side, temperature: float = 1.0, *, memory_budget: int | None = None, chunk_rows: int | None = None, backend: str = "auto"
) -> Tensor:
    """Return the entropy of ``softmax(z / T)`` in nats, ``[...]``. Logits of -inf contribute 0."""
    options = Options(temperature=temperature, memory_budget=memory_budget, chunk_rows=chunk_rows, backend=backend)
    return ops.run(*prepare_head(side, "entropy", options))[0]


def topk_logprobs(
    side: Side, k: int, temperature: float = 1.0, *, memory_budget: int | None = None, chunk_rows: int | None = None, backend: str = "auto"
) -> TopK:
    """Return the k most likely tokens in falling order, with ``log softmax(z / T)`` over the whole vocabulary. Detached.

    Ties are ordered by rising id on every backend. NaN logits sort last, like -inf, and make all log-probabilities of their row NaN.

    Args:
        k: in [1, V].

    Returns:
        ``TopK`` with int32 ids and log-probabilities ``[..., k]``, and the temperature.

    Raises:
        TypeError, ValueError: k outside [1, V]; T <= 0.
    """
    options = Options(temperature=temperature, memory_budget=memory_budget, chunk_rows=chunk_rows, backend=backend)
    call, tensors = prepare_head(side, "topk", options, count=k)
    _check_count("k", k, call.vocab)
    ids, logprobs = ops.run(call, tensors)
    return TopK(ids, logprobs, temperature=temperature)


def sample(
    side: Side,
    num_samples: int = 1,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
    *,
    memory_budget: int | None = None,
    chunk_rows: int | None = None,
    backend: str = "auto",
) -> Sampled:
    """Draw independent samples from ``softmax(z / T)``, with replacement. Detached.

    Draws are exact: the row kernel uses the Gumbel-max trick without storing ``[N, V]`` noise. One seed is drawn from the generator. The
    random numbers are a function of seed, row, column and draw index (Philox4x32-10), and the winner is chosen in float64. The same
    generator state therefore gives the same ids for all chunk sizes and backends, as long as the logits are equal: a matrix product of
    another shape may round them differently, which changes about one draw in millions.

    Args:
        num_samples: S >= 1 draws per position.
        generator: a generator on the side's device; default: the device's global generator.

    Returns:
        ``Sampled`` with int32 ids ``[..., S]``, each with count 1. Ids are -1 in rows whose log-sum-exp is not finite.

    Raises:
        TypeError, ValueError: S < 1; T <= 0; the generator is on another device.
    """
    options = Options(temperature=temperature, memory_budget=memory_budget, chunk_rows=chunk_rows, backend=backend)
    call, tensors = prepare_head(side, "sample", options, count=num_samples)
    device = tensors.student.device
    _check_count("num_samples", num_samples)
    _check_generator(generator, device)
    seed = torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device=device, generator=generator)
    (ids,) = ops.run(call, Tensors({**tensors.named, "seed": seed}))
    return Sampled(ids, torch.ones((), dtype=torch.int32, device=device).expand(ids.shape))


def softmax(
    logits: Tensor,
    temperature: float = 1.0,
    out: Tensor | None = None,
    *,
    memory_budget: int | None = None,
    chunk_rows: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """Return ``softmax(logits / T)`` over the last dimension, in the dtype of the logits, computed in float32 (float64 for float64).

    Args:
        logits: ``[..., V]``.
        out: tensor for the result, with the shape and dtype of the logits. ``out=logits`` works in place. Records no gradient.

    Raises:
        TypeError, ValueError: ``out`` has a wrong shape, dtype or layout, or partially overlaps the logits; T <= 0.
    """
    options = Options(temperature=temperature, memory_budget=memory_budget, chunk_rows=chunk_rows, backend=backend)
    return _softmax(logits, out, "softmax", options)


def log_softmax(
    logits: Tensor,
    temperature: float = 1.0,
    out: Tensor | None = None,
    *,
    memory_budget: int | None = None,
    chunk_rows: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """Return the logarithm of ``softmax``, with the same arguments."""
    options = Options(temperature=temperature, memory_budget=memory_budget, chunk_rows=chunk_rows, backend=backend)
    return _softmax(logits, out, "log_softmax", options)


def _softmax(logits: Tensor, out: Tensor | None, quantity: Quantity, options: Options) -> Tensor:
    _check_softmax(logits, out)
    return softmax_of_logits.run(prepare_softmax(logits, quantity, options), logits, out)


def _check_count(name: str, value: int, largest: int | None = None) -> None:
    """Check that a value is an int >= 1 and, if ``largest`` is given, <= ``largest``."""
    bounds = ">= 1" if largest is None else f"in [1, {largest}] (the vocabulary)"
    if isinstance(value, bool) or not isinstance(value, int) or value < 1 or (largest is not None and value > largest):
        raise ValueError(f"{name} must be an int {bounds}, got {value!r}")


def _check_generator(generator: torch.Generator | None, device: torch.device) -> None:
    if generator is None:
        return
    if not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator, got {type(generator).__name__}")
    if generator.device.type != device.type or (device.index is not None and generator.device.index not in (None, device.index)):
        raise ValueError(f"generator is on {generator.device}, the side on {device}: make one with torch.Generator({str(device)!r})")


def _check_softmax(logits: Tensor, out: Tensor | None) -> None:
    """Check the logits ``[..., V]``, and shape, dtype, layout and memory of ``out``."""
    check_floating("logits", logits)
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
        raise ValueError("out= records no gradient: call it under torch.no_grad(), or omit out=")
    ops.refuse_tangents("out= records no forward-mode derivative: omit out=", logits, out)
    if out.stride(-1) != 1 and out.shape[-1] > 1:
        raise ValueError(f"out must have unit stride in its last dimension, got strides {out.stride()}")
    try:
        rows = out.view(-1, out.shape[-1])
    except RuntimeError:
        raise ValueError(f"out must have one stride between all its rows, got strides {out.stride()} for {list(out.shape)}") from None
    if rows.shape[0] > 1 and rows.stride(0) < rows.shape[1]:
        raise ValueError(f"the rows of out must not overlap, got strides {out.stride()} for {list(out.shape)}")
    if out is logits or torch.compiler.is_compiling() or not out.numel():
        return
    same = out.data_ptr() == logits.data_ptr() and out.stride() == logits.stride()
    (a, b), (c, d) = _extent(out), _extent(logits)
    if not same and a < d and c < b:
        raise ValueError("out partially overlaps the logits: pass out=logits, or a tensor with separate memory")


def _extent(tensor: Tensor) -> tuple[int, int]:
    """Return the addresses of the first byte and one past the last. Different storages can share memory (NumPy, DLPack)."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (int(last) + 1) * tensor.element_size()
