"""Other quantities of an LM head without holding ``[N, V]``: cross-entropy, log-probabilities, entropy, the most likely tokens,
samples; and the softmax of given logits.

Sides are those of ``distillation_loss``: ``LMHead(hidden [..., D], weight [V, D], ...)`` or logits ``[..., V]``, in float16, bfloat16,
float32 or float64. Results per token are float32 (float64 for float64 sides). Common arguments:

- ``temperature``: T > 0, divides the logits. Below 2^-100 it is taken as 2^-100, which gives the limit: the largest logit.
- ``memory_budget``: bytes for the chunk buffers, as of ``distillation_loss``; ``chunk_rows`` sets the rows per chunk directly.
- ``backend``: ``"auto"`` takes the best that can run; a name is honoured or raises ``BackendUnavailable``.

Gradients reach hidden states, head and bias, or logits, whichever require it, and are exact for any upstream gradient. The hidden
gradient is found in the forward pass; a trainable head recomputes the chunks of logits in backward.
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
    """Cross-entropy of the labels in nats, ``-log softmax(z)[label]`` per valid token, times its weight.

    The gradient is found in the forward pass, chunk by chunk, so that forward and backward take three matrix products (two with a
    frozen head), as in ``distillation_loss``, whose remarks on the arguments hold here.

    Args:
        student: an ``LMHead`` or logits ``[..., V]``.
        labels: ``[...]`` integers; position i holds the target of position i (nothing is shifted here).
        ignore_index: tokens with this label are dropped before any matrix product: loss 0, gradient 0.
        token_weights: ``[...]`` floats >= 0; constants.
        reduction: ``"mean"`` over ``num_items`` (default: the number of valid tokens), ``"sum"``, or ``"none"`` (the leading shape).
        logits_dtype: storage of chunk logits; ``torch.bfloat16`` halves them for bfloat16 heads.

    Raises:
        TypeError, ValueError: an argument that makes no sense; the message names it.
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
    """``log softmax(z / T)`` at the given tokens, in nats: of one per position, or of K.

    Args:
        side: an ``LMHead`` or logits ``[..., V]``.
        ids: ``[...]`` or ``[..., K]`` integers in [0, V); -1 gives 0, with gradient 0. Rows without another id are dropped before any
            matrix product.

    Returns:
        The shape of ``ids``.

    Raises:
        TypeError, ValueError: ids that are no integers, of another shape, or outside the vocabulary; T <= 0.
    """
    options = Options(temperature=temperature, memory_budget=memory_budget, chunk_rows=chunk_rows, backend=backend)
    return ops.run(*prepare_head(side, "logprobs", options, ids))[0]


def logsumexp(
    side: Side, temperature: float = 1.0, *, memory_budget: int | None = None, chunk_rows: int | None = None, backend: str = "auto"
) -> Tensor:
    """``log sum exp(z / T)`` over the vocabulary, ``[...]``: the logarithm of the partition function, as in z-loss."""
    options = Options(temperature=temperature, memory_budget=memory_budget, chunk_rows=chunk_rows, backend=backend)
    return ops.run(*prepare_head(side, "logsumexp", options))[0]


def entropy(
    side: Side, temperature: float = 1.0, *, memory_budget: int | None = None, chunk_rows: int | None = None, backend: str = "auto"
) -> Tensor:
    """Entropy of ``softmax(z / T)`` in nats, ``[...]``; -inf logits contribute 0."""
    options = Options(temperature=temperature, memory_budget=memory_budget, chunk_rows=chunk_rows, backend=backend)
    return ops.run(*prepare_head(side, "entropy", options))[0]


def topk_logprobs(
    side: Side, k: int, temperature: float = 1.0, *, memory_budget: int | None = None, chunk_rows: int | None = None, backend: str = "auto"
) -> TopK:
    """The k most likely tokens, the first one first, and their ``log softmax(z / T)``, over the whole vocabulary. Detached.

    Among equal logits the lower id comes first, on every backend. A NaN is ordered as -inf, which comes last; its row's log-probabilities
    are all NaN.

    Args:
        k: in [1, V].

    Returns:
        ``TopK`` of ids int32 and log-probabilities, ``[..., k]``, and T.

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
    """Independent draws from ``softmax(z / T)``, with replacement. Detached.

    Exact, by the Gumbel-max trick inside the row kernel, without ``[N, V]`` of noise. One seed is drawn from the generator; what
    is random about a column is then a function of seed, row, column and number of the draw (Philox4x32-10), and the choice is made in
    double precision. So the same state of the generator gives the same ids whatever the chunks and the backend, as far as these agree
    on the logits: a matrix product of other shape may round them otherwise, which changes about one draw in millions.

    Args:
        num_samples: S >= 1 draws per position.
        generator: of the side's device; default: that device's own.

    Returns:
        ``Sampled`` of ids int32 ``[..., S]`` (-1 where the log-sum-exp of a row is not finite), each counted once.

    Raises:
        TypeError, ValueError: S < 1; T <= 0; a generator of another device.
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
    """``softmax(logits / T)`` over the last dimension, in the dtype of the logits, computed in float32 (float64).

    Args:
        logits: ``[..., V]``.
        out: where to write it, of the same shape and dtype; ``out=logits`` works in place. Records no gradient.

    Raises:
        TypeError, ValueError: ``out`` does not fit, or shares only a part of its memory with the logits; T <= 0.
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
    """The logarithm of ``softmax``, with the same arguments."""
    options = Options(temperature=temperature, memory_budget=memory_budget, chunk_rows=chunk_rows, backend=backend)
    return _softmax(logits, out, "log_softmax", options)


def _softmax(logits: Tensor, out: Tensor | None, quantity: Quantity, options: Options) -> Tensor:
    _check_softmax(logits, out)
    return softmax_of_logits.run(prepare_softmax(logits, quantity, options), logits, out)


def _check_count(name: str, value: int, largest: int | None = None) -> None:
    """An int of at least 1 and, if there is a largest, at most that."""
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
    """Logits ``[..., V]``, and a place for the result that fits."""
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
        raise ValueError("out= records no gradient: call it under torch.no_grad(), or leave out= away")
    ops.refuse_tangents("out= records no forward-mode derivative: leave out= away", logits, out)
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
