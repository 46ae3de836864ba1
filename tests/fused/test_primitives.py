"""One-side primitives against float64 and against dense torch in the same dtype. See also test_primitives_calls.py."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import require
from one_side import HEADS, PER_TOKEN, arguments, check, fused, make_ids, tensors
from oracle import FLOATS, all_pairs, make_side, name_of, to_dtype
from torch import Tensor

import kdkernels as kd

pytestmark = pytest.mark.usefixtures("poison")

CASES = all_pairs(
    {
        "name": (*PER_TOKEN, "token_logprobs of 5", "token_logprobs of 1"),
        "side": tuple(HEADS),
        "dtype": FLOATS,
        "temperature": (1.0, 0.5, 3.0),
        "shape": (((7,), 127), ((2, 3), 1000), ((1, 1), 2), ((3, 2, 2), 33)),
        "chunk_rows": (None, 4),
    }
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize(("rows", "vocab"), [(300, 4099), (3, 128_256), (2, 1_000_000)])
@pytest.mark.parametrize("name", PER_TOKEN)
def test_rows_of_any_length_equal_the_dense_result(
    name: str, rows: int, vocab: int, dtype: torch.dtype, engine_backend: str, device: str
) -> None:
    """Rows that fit in a CPU core's cache, a CTA, a cluster of CTAs, or none of them."""
    require(engine_backend, device, dtype)
    side = make_side((rows,), vocab, None, dtype=dtype, device=device)
    check(engine_backend, name, side, arguments(name, (rows,), vocab, device=device), temperature=0.7)


@pytest.mark.parametrize("case", CASES, ids=lambda c: ",".join(name_of(v) for v in c.values()))
def test_primitives_equal_the_dense_result(case: dict[str, Any], backend: str, device: str) -> None:
    require(backend, device, case["dtype"])
    leading, vocab = case["shape"]
    name, _, k = case["name"].partition(" of ")
    side = make_side(leading, vocab, dtype=case["dtype"], device=device, **HEADS[case["side"]])
    args = arguments(name, leading, vocab, int(k) if k else None, device)
    check(backend, name, side, args, temperature=case["temperature"], chunk_rows=case["chunk_rows"])


@pytest.mark.parametrize("name", PER_TOKEN)
def test_rows_of_several_blocks_equal_the_dense_result(name: str, backend: str, device: str) -> None:
    """A row of several blocks, the last of which is not full."""
    side = make_side((2,), 50257, None, device=device)
    check(backend, name, side, arguments(name, (2,), 50257, None, device), temperature=2.0)


def test_more_ids_than_a_block_holds_equal_the_dense_result(backend: str, device: str) -> None:
    """More ids than a kernel's block holds, many of them equal."""
    side = make_side((3,), 40, 8, device=device)
    check(backend, "token_logprobs", side, (make_ids((3,), 40, 100, device),))


@pytest.mark.parametrize("name", PER_TOKEN)
def test_excluded_columns_and_peaked_rows_are_finite(name: str, backend: str, device: str) -> None:
    """Rows with -inf logits, with a token of probability 1, and with logits in the thousands."""
    z = make_side((4,), 70, None, device=device)
    assert isinstance(z, Tensor)
    args = arguments(name, (4,), 70, None, device)
    z[0, 30:] = -math.inf
    z[1] *= 100
    z[2] += 3000
    if name in ("cross_entropy", "token_logprobs"):
        args[0][0], args[0][1:] = 3, 5
    result = check(backend, name, z, args)
    assert torch.isfinite(result["value"]).all()
    assert (result["d_logits"][0, 30:] == 0).all()


def test_entropy_of_uniform_and_of_certain_rows(any_backend: str, device: str) -> None:
    z = torch.zeros(3, 1000, device=device)
    z[1, 7] = 200.0
    z[2, 10:] = -math.inf
    expected = torch.tensor([math.log(1000), 0.0, math.log(10)], device=device)
    torch.testing.assert_close(kd.entropy(z, backend=any_backend), expected, rtol=1e-6, atol=1e-12)


def test_logprob_of_an_excluded_id_is_minus_infinity(any_backend: str, device: str) -> None:
    z = torch.zeros(2, 5, device=device)
    z[0, 3] = -math.inf
    logprobs = kd.token_logprobs(z, torch.tensor([3, 3], device=device), backend=any_backend)
    assert logprobs[0] == -math.inf
    assert logprobs[1] == pytest.approx(-math.log(5), rel=1e-6)


# ---- gradients


@pytest.mark.parametrize("name", [*PER_TOKEN, "token_logprobs of 3"])
@pytest.mark.parametrize("side", HEADS)
@pytest.mark.parametrize("backend", ["torch", "native"])
def test_primitives_pass_gradcheck(name: str, side: str, backend: str) -> None:
    require(backend, "cpu", torch.float64)
    name, _, k = name.partition(" of ")
    args = arguments(name, (3,), 11, int(k) if k else None)
    options = {} if name == "cross_entropy" else {"temperature": 1.7}
    sample = to_dtype(make_side((3,), 11, dtype=torch.float64, **{**HEADS[side], "pad": None}), None, requires_grad=True)

    def function(*leaves: Tensor) -> Tensor:
        if isinstance(sample, Tensor):
            return fused(name, leaves[0], *args, backend=backend, chunk_rows=2, **options)
        bias = leaves[2] if len(leaves) > 2 else None
        head = kd.LMHead(leaves[0], leaves[1], bias, sample.scale, sample.softcap)
        return fused(name, head, *args, backend=backend, chunk_rows=2, **options)

    torch.autograd.gradcheck(function, tuple(tensors(sample).values()))


@pytest.mark.parametrize("function", [kd.softmax, kd.log_softmax])
@pytest.mark.parametrize("backend", ["torch", "native"])
def test_softmax_passes_gradcheck(function: Callable[..., Tensor], backend: str) -> None:
    require(backend, "cpu", torch.float64)
    z = torch.randn(2, 3, 7, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda x: function(x, 0.6, backend=backend), (z,))


@pytest.mark.parametrize("name", [*PER_TOKEN, "token_logprobs of 3"])
@pytest.mark.parametrize("trained", [("hidden",), ("weight",), ("bias",), ("hidden", "bias"), ()])
def test_only_tensors_that_require_grad_get_gradients(name: str, trained: tuple[str, ...], engine_backend: str, device: str) -> None:
    name, _, k = name.partition(" of ")
    args = arguments(name, (5,), 23, int(k) if k else None, device)
    side = to_dtype(make_side((5,), 23, 8, bias=True, device=device), None, requires_grad=True)
    expected = torch.autograd.grad(fused(name, side, *args, backend=engine_backend).sum(), list(tensors(side).values()))
    for n, t in tensors(side).items():
        t.requires_grad_(n in trained)
    value = fused(name, side, *args, backend=engine_backend, chunk_rows=2)
    assert value.requires_grad == bool(trained)
    if trained:
        value.sum().backward()
    for (n, t), grad in zip(tensors(side).items(), expected, strict=True):
        if n in trained:
            torch.testing.assert_close(t.grad, grad)
        else:
            assert t.grad is None


@pytest.mark.parametrize("name", [*PER_TOKEN, "token_logprobs of 3"])
@pytest.mark.parametrize("dim", [8, None])
def test_second_backward_through_a_primitive_is_identical(name: str, dim: int | None, engine_backend: str, device: str) -> None:
    """Two backward passes through a retained graph give equal gradients."""
    name, _, k = name.partition(" of ")
    side = to_dtype(make_side((5,), 23, dim, device=device), None, requires_grad=True)
    value = fused(name, side, *arguments(name, (5,), 23, int(k) if k else None, device), backend=engine_backend)
    leaves = list(tensors(side).values())
    first = torch.autograd.grad(value.sum(), leaves, retain_graph=True)
    for a, b in zip(first, torch.autograd.grad(value.sum(), leaves), strict=True):
        assert torch.equal(a, b)


def test_second_derivative_of_a_primitive_raises() -> None:
    z = torch.randn(2, 5, requires_grad=True)
    ids = torch.zeros(2, dtype=torch.int64)
    for name, value in {
        "logsumexp": kd.logsumexp(z, backend="torch"),
        "entropy": kd.entropy(z, backend="torch"),
        "token_logprobs": kd.token_logprobs(z, ids, backend="torch"),
        "cross_entropy": kd.cross_entropy(z, ids, backend="torch"),
        "softmax": kd.softmax(z, backend="torch"),
        "log_softmax": kd.log_softmax(z, backend="torch"),
    }.items():
        (grad,) = torch.autograd.grad((value * 2).sum(), z, create_graph=True)
        with pytest.raises(RuntimeError, match=f"kdkernels.{name} has no second derivative"):
            torch.autograd.grad(grad.sum(), z)
