"""The one-side primitives computed densely, to compare the fused ones with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from oracle import assert_close_2x, dense_logits, make_labels, to_dtype
from torch import Tensor

import kdkernels as kd

PER_TOKEN = ("cross_entropy", "token_logprobs", "logsumexp", "entropy")


def make_ids(leading: tuple[int, ...], vocab: int, k: int | None, device: str = "cpu") -> Tensor:
    """Return random ids, with a row that has none, a single -1, and a repeated id."""
    shape = leading if k is None else (*leading, k)
    ids = torch.randint(vocab, shape, generator=torch.Generator().manual_seed(9))
    flat = ids.view(-1) if k is None else ids.view(-1, k)
    flat[-1] = -1
    if k is not None and k > 1 and len(flat) > 1:
        flat[0, 0] = -1
        flat[1, 1] = flat[1, 0]
    return ids.to(device)


def arguments(name: str, leading: tuple[int, ...], vocab: int, k: int | None = None, device: str = "cpu") -> tuple[Tensor, ...]:
    """Return the arguments of a primitive other than its side."""
    if name == "cross_entropy":
        return (make_labels(leading, vocab, device),)
    return (make_ids(leading, vocab, k, device),) if name == "token_logprobs" else ()


def dense(name: str, side: kd.LMHead | Tensor, *args: Tensor, temperature: float = 1.0) -> Tensor:
    """Compute a primitive densely: logits in the model's dtype, the rest in float32 or wider."""
    z = dense_logits(side)
    x = z.to(torch.promote_types(z.dtype, torch.float32)) / temperature
    if name == "logsumexp":
        return torch.logsumexp(x, -1)
    log_q = torch.log_softmax(x, -1)
    if name == "entropy":
        q = log_q.exp()
        return -(q * torch.where(q == 0, 0.0, log_q)).sum(-1)
    ids = args[0] if args[0].dim() == x.dim() else args[0].unsqueeze(-1)
    valid = ids >= 0
    chosen = torch.where(valid, log_q.gather(-1, ids.clamp(min=0)), 0.0).view(args[0].shape)
    return -chosen.sum() / valid.sum() if name == "cross_entropy" else chosen


def fused(name: str, side: kd.LMHead | Tensor, *args: Tensor, **options: Any) -> Tensor:
    result: Tensor = getattr(kd, name)(side, *args, **options)
    return result


def tensors(side: kd.LMHead | Tensor) -> dict[str, Tensor]:
    fields = {"logits": side} if isinstance(side, Tensor) else vars(side)
    return {name: t for name, t in fields.items() if isinstance(t, Tensor)}


def run(
    function: Callable[..., Tensor],
    name: str,
    side: kd.LMHead | Tensor,
    args: tuple[Tensor, ...],
    options: Mapping[str, Any],
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """Return the value and every gradient, with a random upstream gradient of both signs."""
    side = to_dtype(side, dtype, requires_grad=True)
    value = function(name, side, *args, **options)
    upstream = torch.randn(value.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    value.backward(upstream.to(value.device, value.dtype))
    grads = {f"d_{n}": t.grad for n, t in tensors(side).items()}
    assert all(g is not None for g in grads.values())
    return {"value": value.detach(), **grads}


def check(backend: str, name: str, side: kd.LMHead | Tensor, args: tuple[Tensor, ...], **options: Any) -> dict[str, Tensor]:
    temperature = options.pop("temperature", 1.0)
    t = {} if name == "cross_entropy" else {"temperature": temperature}
    actual = run(fused, name, side, args, {**t, **options, "backend": backend})
    eager, truth = run(dense, name, side, args, t), run(dense, name, side, args, t, dtype=torch.float64)
    assert actual.keys() == truth.keys()
    for quantity, value in actual.items():
        assert value.dtype == eager[quantity].dtype, quantity
        # A gradient of the logits is a difference of upstream gradients times probabilities, which are of size 1.
        scale = 1.0 if quantity in ("d_logits", "value") else None
        assert_close_2x(f"{name} {quantity}", value, eager[quantity], truth[quantity], scale)
    return actual


HEADS: dict[str, dict[str, Any]] = {
    "head": {"dim": 16},
    "head with everything": {"dim": 16, "bias": True, "scale": 0.7, "softcap": 5.0, "pad": 3},
    "logits": {"dim": None},
}
