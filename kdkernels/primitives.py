"""What else an LM head can be asked without holding ``[N, V]``: cross-entropy, log-probabilities, entropy, the most likely tokens,
samples; and the softmax of logits that are there anyway.

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

from . import reference
from .backends import selection
from .fused import ops
from .fused.checks import check_choices, check_count, check_generator, check_numbers, check_softmax, device_of, prepare, prepare_head
from .fused.problem import SMALLEST_TEMPERATURE, Problem, Quantity
from .fused.sources import Inputs, check_values
from .losses import mean_denominator
from .sides import Sampled, Side, TopK

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
    problem, inputs = prepare(
        student, None, "forward_kl", 1.0, True, labels, ignore_index, 0.0, 1.0, token_weights,
        reduction, num_items, memory_budget, chunk_rows, logits_dtype, backend, False, "cross_entropy",
    )  # fmt: skip
    if problem.backend == "reference":
        check_values(problem, inputs)
        loss, count = reference.head_values(problem, student, inputs.labels), (labels != ignore_index).sum()
        if inputs.token_weights is not None:
            loss = torch.where(labels == ignore_index, torch.zeros_like(loss), loss * inputs.token_weights.to(loss.dtype))
        if reduction != "none":
            loss = loss.sum()
    else:
        loss, count, _ = ops.distillation_rows(problem, inputs)
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
    problem, inputs = prepare_head(side, "logprobs", temperature, memory_budget, chunk_rows, backend, ids)
    return _values(problem, inputs, side)


def logsumexp(
    side: Side, temperature: float = 1.0, *, memory_budget: int | None = None, chunk_rows: int | None = None, backend: str = "auto"
) -> Tensor:
    """``log sum exp(z / T)`` over the vocabulary, ``[...]``: the logarithm of the partition function, as in z-loss."""
    return _per_token(side, "logsumexp", temperature, memory_budget, chunk_rows, backend)


def entropy(
    side: Side, temperature: float = 1.0, *, memory_budget: int | None = None, chunk_rows: int | None = None, backend: str = "auto"
) -> Tensor:
    """Entropy of ``softmax(z / T)`` in nats, ``[...]``; -inf logits contribute 0."""
    return _per_token(side, "entropy", temperature, memory_budget, chunk_rows, backend)


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
    problem, inputs = prepare_head(side, "logsumexp", temperature, memory_budget, chunk_rows, backend, differentiable=False)
    check_count("k", k, problem.vocab)
    ids, logprobs = reference.topk(problem, side, k) if problem.backend == "reference" else ops.topk(problem, inputs, k)
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
    problem, inputs = prepare_head(side, "logsumexp", temperature, memory_budget, chunk_rows, backend, differentiable=False)
    device = inputs.student.device
    check_count("num_samples", num_samples)
    check_generator(generator, device)
    seed = torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device=device, generator=generator)
    if problem.backend == "reference":
        ids = reference.sample(problem, side, seed, num_samples)
    else:
        ids = ops.sample(problem, inputs, seed, num_samples)
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
    return _softmax(logits, temperature, out, False, memory_budget, chunk_rows, backend)


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
    return _softmax(logits, temperature, out, True, memory_budget, chunk_rows, backend)


def _per_token(
    side: Side, quantity: Quantity, temperature: float, memory_budget: int | None, chunk_rows: int | None, backend: str
) -> Tensor:
    problem, inputs = prepare_head(side, quantity, temperature, memory_budget, chunk_rows, backend)
    return _values(problem, inputs, side)


def _values(problem: Problem, inputs: Inputs, side: Side) -> Tensor:
    if problem.backend == "reference":
        check_values(problem, inputs)
        return reference.head_values(problem, side, inputs.labels)
    return ops.distillation_rows(problem, inputs)[0]


def _softmax(
    logits: Tensor,
    temperature: float,
    out: Tensor | None,
    logarithm: bool,
    memory_budget: int | None,
    chunk_rows: int | None,
    backend: str,
) -> Tensor:
    check_numbers(temperature=temperature)
    check_choices(memory_budget=memory_budget, chunk_rows=chunk_rows)
    check_softmax(logits, out)
    chosen = selection.select(backend, device_of(logits), (logits.dtype, logits.dtype), "softmax_rows")
    temperature = max(temperature, SMALLEST_TEMPERATURE)
    if chosen != "reference":
        return ops.softmax(logits, out, temperature, logarithm, memory_budget, chunk_rows, chosen)
    result = reference.softmax(logits, temperature, logarithm)
    return result if out is None else out.copy_(result)
