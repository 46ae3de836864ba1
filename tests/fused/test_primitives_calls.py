"""Semantics of the primitives: chunks, ignored tokens, calling conventions, errors and containers."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import interpreted
from one_side import PER_TOKEN, arguments, fused, make_ids, run, tensors
from oracle import make_labels, make_side, to_dtype
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import kdkernels as kd

pytestmark = pytest.mark.usefixtures("poison")

# ---- chunks and matrix products


@pytest.mark.parametrize("name", [*PER_TOKEN, "token_logprobs of 3"])
@pytest.mark.parametrize("dim", [8, None])
def test_primitives_do_not_depend_on_chunks(name: str, dim: int | None, engine_backend: str, device: str) -> None:
    name, _, k = name.partition(" of ")
    side = make_side((2, 11), 301, dim, device=device)
    args = arguments(name, (2, 11), 301, int(k) if k else None, device)
    in_one_chunk = run(fused, name, side, args, {"backend": engine_backend})
    for options in ({"chunk_rows": 1}, {"chunk_rows": 7}, {"memory_budget": 3000}):
        for quantity, value in run(fused, name, side, args, {"backend": engine_backend, **options}).items():
            if dim is None:  # dense logits: identical bits
                assert torch.equal(value, in_one_chunk[quantity]) or (name, quantity) == ("cross_entropy", "value"), (quantity, options)
            torch.testing.assert_close(value, in_one_chunk[quantity], rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize(
    ("name", "frozen", "forward", "backward"),
    [
        # logits, grad_hidden, add_grad_weight
        ("cross_entropy", False, (1, 1, 1), (0, 0, 0)),
        ("cross_entropy", True, (1, 1, 0), (0, 0, 0)),
        ("entropy", False, (1, 1, 0), (1, 0, 1)),
        ("entropy", True, (1, 1, 0), (0, 0, 0)),
        ("token_logprobs", True, (1, 1, 0), (0, 0, 0)),
        ("token_logprobs of 3", True, (1, 1, 0), (0, 0, 0)),
        ("token_logprobs of 3", False, (1, 1, 0), (1, 0, 1)),
    ],
)
def test_primitives_take_no_needless_matrix_product(
    name: str, frozen: bool, forward: tuple[int, ...], backward: tuple[int, ...], calls: dict[str, int]
) -> None:
    """The gradient of the hidden states is computed in forward. Only a trainable head with per-token results multiplies again."""
    name, _, k = name.partition(" of ")
    side = make_side((6,), 23, 8)
    assert isinstance(side, kd.LMHead)
    side.hidden.requires_grad_()
    side.weight.requires_grad_(not frozen)
    value = fused(name, side, *arguments(name, (6,), 23, int(k) if k else None), backend="torch")
    assert tuple(calls.values()) == forward
    value.sum().backward()
    assert tuple(b - f for b, f in zip(calls.values(), forward, strict=True)) == backward


def test_memory_does_not_grow_with_the_number_of_tokens() -> None:
    """N x V float32 logits would take 128 MiB. A chunk takes 4 MiB."""
    script = """
import resource, torch, kdkernels as kd
hidden, weight = torch.randn(4096, 8, requires_grad=True), torch.randn(8192, 8, requires_grad=True)
ids = torch.randint(8192, (4096,))
def work(n):
    side = kd.LMHead(hidden[:n], weight)
    kd.cross_entropy(side, ids[:n], chunk_rows=128).backward()
    kd.token_logprobs(side, ids[:n], chunk_rows=128).sum().backward()
    kd.entropy(side, chunk_rows=128).sum().backward()
    kd.sample(side, chunk_rows=128), kd.topk_logprobs(side, 4, chunk_rows=128)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
work(256); before = peak(); work(4096); print(peak() - before)
"""
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert int(out) <= 32, f"{out} MiB"


# ---- ignored tokens


@pytest.mark.parametrize("k", [None, 3])
@pytest.mark.parametrize("dim", [8, None])
def test_rows_without_an_id_are_not_read(k: int | None, dim: int | None, any_backend: str, device: str) -> None:
    side = to_dtype(make_side((4,), 23, dim, device=device), None, requires_grad=True)
    ids = make_ids((4,), 23, k, device)
    with torch.no_grad():
        next(iter(tensors(side).values()))[-1] = math.nan
    value = kd.token_logprobs(side, ids, backend=any_backend)
    assert (value[ids < 0] == 0).all()
    value.sum().backward()
    for t in tensors(side).values():
        assert t.grad is not None
        assert torch.isfinite(t.grad).all()
    assert (next(iter(tensors(side).values())).grad[-1] == 0).all()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_ids_may_have_any_integer_dtype(dtype: torch.dtype, any_backend: str, device: str) -> None:
    """Narrow dtypes can't hold the vocabulary size, and unsigned ones can't hold -1."""
    z = torch.randn(2, 70_000, device=device)
    ids = torch.tensor([torch.iinfo(dtype).max % 70_000, 3], device=device)
    expected = kd.token_logprobs(z, ids, backend=any_backend)
    assert (expected != 0).all()
    assert torch.equal(kd.token_logprobs(z, ids.to(dtype), backend=any_backend), expected)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dim", [8, None])
def test_cross_entropy_equals_that_of_the_loss(reduction: str, dim: int | None, any_backend: str, device: str) -> None:
    """Reductions, weights, ignored labels and num_items have the same meaning as in distillation_loss."""
    side = make_side((2, 4), 33, dim, device=device)
    labels, weights = make_labels((2, 4), 33, device), torch.rand(2, 4, device=device)
    options = {"reduction": reduction, "num_items": 5, "token_weights": weights, "backend": any_backend}
    results = []
    for function in (
        lambda s: kd.cross_entropy(s, labels, **options),
        lambda s: kd.distillation_loss(s, side, labels=labels, kd_weight=0.0, ce_weight=1.0, **options),
    ):
        leaf = to_dtype(side, None, requires_grad=True)
        value = function(leaf)
        value.sum().backward()
        results.append([value.detach(), *(t.grad for t in tensors(leaf).values())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", [*PER_TOKEN, "token_logprobs of 3"])
@pytest.mark.parametrize("dim", [8, None])
@pytest.mark.parametrize("case", ["no rows", "none valid"])
def test_primitives_without_valid_rows_are_zero(name: str, dim: int | None, case: str, any_backend: str, device: str) -> None:
    if case == "none valid" and name in ("logsumexp", "entropy"):
        pytest.skip("every row is valid")
    name, _, k = name.partition(" of ")
    leading = (2, 0) if case == "no rows" else (2, 3)
    side = to_dtype(make_side(leading, 23, dim, device=device), None, requires_grad=True)
    args = arguments(name, (2, 3), 23, int(k) if k else None, device)
    args = tuple(a[:, : leading[1]].clone().fill_(-100 if name == "cross_entropy" else -1) for a in args)
    value = fused(name, side, *args, backend=any_backend)
    assert value.shape == (() if name == "cross_entropy" else args[0].shape if args else leading)
    assert (value == 0).all()
    value.sum().backward()
    for t in tensors(side).values():
        assert t.grad is not None
        assert t.grad.shape == t.shape
        assert (t.grad == 0).all()


@pytest.mark.parametrize("dim", [8, None])
def test_sample_and_topk_accept_no_rows(dim: int | None, any_backend: str, device: str) -> None:
    side = make_side((2, 0), 23, dim, device=device)
    assert kd.sample(side, 3, backend=any_backend).ids.shape == (2, 0, 3)
    assert kd.topk_logprobs(side, 3, backend=any_backend).ids.shape == (2, 0, 3)


def test_nan_stays_in_its_row(any_backend: str, device: str) -> None:
    z = make_side((3,), 40, None, device=device)
    assert isinstance(z, Tensor)
    z[1, 5] = math.nan
    for name in ("logsumexp", "entropy", "token_logprobs"):
        args = (torch.tensor([1, 2, 3], device=device),) if name == "token_logprobs" else ()
        value = fused(name, z, *args, backend=any_backend)
        assert torch.isnan(value).tolist() == [False, True, False]


# ---- ways to call


def test_results_have_documented_dtypes(any_backend: str, device: str) -> None:
    for dtype, result in ((torch.float16, torch.float32), (torch.bfloat16, torch.float32), (torch.float32, torch.float32)):
        side = make_side((3,), 20, 8, dtype=dtype, device=device)
        assert kd.logsumexp(side, backend=any_backend).dtype == result
        top = kd.topk_logprobs(side, 2, backend=any_backend)
        assert (top.ids.dtype, top.logprobs.dtype) == (torch.int32, result)
        z = make_side((3,), 20, None, dtype=dtype, device=device)
        assert kd.softmax(z, backend=any_backend).dtype == dtype


@pytest.mark.parametrize("name", PER_TOKEN)
def test_inference_mode_and_autocast_keep_results(name: str, engine_backend: str, device: str) -> None:
    side = make_side((5,), 23, 8, device=device)
    assert isinstance(side, kd.LMHead)
    args = arguments(name, (5,), 23, None, device)
    with torch.inference_mode():
        plain = fused(name, side, *args, backend=engine_backend)
    torch.testing.assert_close(plain, fused(name, side, *args, backend=engine_backend))
    half = to_dtype(side, torch.bfloat16, requires_grad=True)
    with torch.autocast(device, torch.bfloat16):
        leaf = to_dtype(side, None, requires_grad=True)
        mixed = fused(name, leaf, *args, backend=engine_backend)
    exact = fused(name, half, *args, backend=engine_backend)
    torch.testing.assert_close(mixed, exact)
    mixed.sum().backward()
    exact.sum().backward()
    for a, b in zip(tensors(leaf).values(), tensors(half).values(), strict=True):
        assert a.grad is not None
        assert a.grad.dtype == torch.float32
        torch.testing.assert_close(a.grad, b.grad.float(), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("name", [*PER_TOKEN, "token_logprobs of 3"])
def test_strided_sides_equal_copies(name: str, engine_backend: str, device: str) -> None:
    """logits[:, :-1] has no single row stride."""
    name, _, k = name.partition(" of ")
    z = make_side((2, 5), 23, None, device=device)
    args = arguments(name, (2, 4), 23, int(k) if k else None, device)
    leaf = z.clone().requires_grad_()
    value = fused(name, leaf[:, :-1], *args, backend=engine_backend, chunk_rows=3)
    value.sum().backward()
    copy = z[:, :-1].contiguous().requires_grad_()
    expected = fused(name, copy, *args, backend=engine_backend)
    expected.sum().backward()
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(leaf.grad[:, :-1], copy.grad)
    assert (leaf.grad[:, -1] == 0).all()


def test_activation_checkpointing_keeps_gradients() -> None:
    side, ids = make_side((6,), 31, 8), make_ids((6,), 31, 3)
    assert isinstance(side, kd.LMHead)

    def value(h: Tensor, w: Tensor) -> Tensor:
        return kd.token_logprobs(kd.LMHead(h, w), ids, backend="torch").square()

    results = []
    for function in (value, lambda *leaves: checkpoint(value, *leaves, use_reentrant=False)):
        leaves = [t.clone().requires_grad_() for t in (side.hidden, side.weight)]
        results.append(torch.autograd.grad(function(*leaves).sum(), leaves))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_token_logprobs_are_deterministic(backend: str, device: str) -> None:
    if interpreted(backend, device):
        pytest.skip("the interpreter runs in order")
    side, ids = make_side((64,), 301, 8, device=device), torch.randint(5, (64, 9), device=device)
    first, second = (run(fused, "token_logprobs", side, (ids,), {"backend": backend}) for _ in range(2))
    assert all(torch.equal(first[n], second[n]) for n in first)


# ---- invalid input


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda s: kd.token_logprobs(s, torch.tensor([0, 1, 20])), ValueError, r"ids contain 20 \(1 such .* the vocabulary \[0, 20\)"),
        (lambda s: kd.token_logprobs(s, torch.tensor([0, -2, 1])), ValueError, "ids contain -2"),
        (lambda s: kd.token_logprobs(s, torch.tensor([[0, 1], [0, 1], [0, 99]])), ValueError, "ids contain 99"),
        (lambda s: kd.token_logprobs(s, torch.zeros(3)), TypeError, "ids must be integers, got torch.float32"),
        (lambda s: kd.token_logprobs(s, torch.zeros(3, dtype=torch.bool)), TypeError, "ids must be integers"),
        (lambda s: kd.token_logprobs(s, [0, 1, 2]), TypeError, "ids must be a tensor, got list"),
        (lambda s: kd.token_logprobs(s, torch.zeros(2, dtype=torch.int64)), ValueError, r"ids must have the leading shape \[3\]"),
        (lambda s: kd.token_logprobs(s, torch.zeros(3, 0, dtype=torch.int64)), ValueError, "K >= 1"),
        (lambda s: kd.token_logprobs(s, torch.zeros(3, device="meta", dtype=torch.int64)), ValueError, "ids are on meta"),
        (lambda s: kd.cross_entropy(s, torch.tensor([0, 1, 20])), ValueError, "labels contain 20"),
        (lambda s: kd.cross_entropy(s, None), TypeError, "labels must be a tensor, got NoneType"),
        (lambda s: kd.cross_entropy(s, torch.zeros(3)), TypeError, "labels must be integers"),
        (lambda s: kd.cross_entropy(s, torch.zeros(3, dtype=torch.int64), reduction="avg"), ValueError, "reduction must be"),
        (lambda s: kd.topk_logprobs(s, 0), ValueError, r"k must be an int in \[1, 20\]"),
        (lambda s: kd.topk_logprobs(s, 21), ValueError, r"k must be an int in \[1, 20\] \(the vocabulary\), got 21"),
        (lambda s: kd.topk_logprobs(s, 2.0), ValueError, "k must be an int"),
        (lambda s: kd.sample(s, 0), ValueError, "num_samples must be an int >= 1, got 0"),
        (lambda s: kd.sample(s, True), ValueError, "num_samples must be an int"),
        (lambda s: kd.sample(s, generator=3), TypeError, "generator must be a torch.Generator, got int"),
        (lambda s: kd.entropy(s, 0.0), ValueError, "temperature must be finite and > 0, got 0.0"),
        (lambda s: kd.logsumexp(s, math.nan), ValueError, "temperature must be finite and > 0"),
        (lambda s: kd.sample(s, temperature=-1.0), ValueError, "temperature must be finite and > 0"),
        (lambda s: kd.topk_logprobs(s, 1, temperature=0), ValueError, "temperature must be finite and > 0"),
        (lambda s: kd.softmax(s, 0.0), ValueError, "temperature must be finite and > 0"),
        (lambda s: kd.entropy("z"), TypeError, "side must be an LMHead or a tensor"),
        (lambda s: kd.entropy(s, chunk_rows=0), ValueError, "chunk_rows must be a positive int"),
        (lambda s: kd.entropy(kd.LMHead(s[:, :2], torch.ones(20, 2)), memory_budget=8), ValueError, "memory_budget=8 bytes is too small"),
        (lambda s: kd.entropy(s, backend="abacus"), ValueError, "backend 'abacus' is unknown"),
        (lambda s: kd.softmax(s.long()), TypeError, "logits must be float16, bfloat16, float32 or float64"),
        (lambda s: kd.softmax(s[:, :0]), ValueError, "logits must be .* with V > 0"),
        (lambda s: kd.softmax(s, out=torch.empty(3, 19)), ValueError, r"out must be torch.float32 of shape \[3, 20\]"),
        (lambda s: kd.log_softmax(s, out=s.double()), ValueError, "out must be torch.float32 .* got torch.float64"),
        (lambda s: kd.softmax(s, out=torch.empty(3, 20, device="meta")), ValueError, "on meta"),
        (lambda s: kd.softmax(s, out=[]), TypeError, "out must be a tensor, got list"),
        (lambda s: kd.softmax(s, out=torch.empty(20, 3).t()), ValueError, "out must have unit stride"),
        (lambda s: kd.softmax(s.view(3, 1, 20).expand(3, 2, 20), out=torch.empty(3, 3, 20)[:, :-1]), ValueError, "one stride between"),
        (lambda s: kd.softmax(s, out=torch.empty(1, 20).expand(3, 20)), ValueError, "the rows of out must not overlap"),
        (lambda s: kd.topk_logprobs(kd.LMHead(s[:, :0], torch.ones(20, 0)), 1), ValueError, r"hidden has hidden size 0: shape \[3, 0\]"),
        (lambda s: kd.softmax(s[:2], out=s[1:]), ValueError, "out partially overlaps the logits"),
        (lambda s: kd.softmax(s.requires_grad_(), out=torch.empty(3, 20)), ValueError, "out= records no gradient"),
    ],
)  # fmt: skip
def test_invalid_calls_of_primitives_raise(call: Callable[[Tensor], Any], error: type[Exception], message: str) -> None:
    z = torch.randn(3, 20)
    before = z.clone()
    with pytest.raises(error, match=message):
        call(z)
    assert torch.equal(z, before), "the input is unchanged"


def test_unavailable_backend_raises_with_a_reason() -> None:
    z = torch.randn(2, 5)
    with pytest.raises(kd.BackendUnavailable, match="cannot run here"):
        kd.entropy(z, backend="cuda")
    with pytest.raises(kd.BackendUnavailable, match="float64"):
        kd.softmax(z.double(), backend="triton")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
def test_generator_of_another_device_raises() -> None:
    with pytest.raises(ValueError, match="generator is on cpu, the side on cuda"):
        kd.sample(torch.randn(2, 5, device="cuda"), generator=torch.Generator())


# ---- containers


def test_topk_and_sampled_check_their_tensors() -> None:
    ids, logprobs = torch.tensor([[1, -1]]), torch.tensor([[-0.5, math.nan]])
    assert kd.TopK(ids, logprobs).tail == "bucket"
    assert kd.Sampled(ids, torch.ones(1, 2)).counts.sum() == 2
    for make, error, message in (
        (lambda: kd.TopK(ids.float(), logprobs), TypeError, "TopK.ids must be integers"),
        (lambda: kd.TopK(ids, ids), TypeError, "TopK.logprobs must be floating point"),
        (lambda: kd.TopK(ids, logprobs[:, :1]), ValueError, r"TopK.logprobs must have the ids' shape \[1, 2\]"),
        (lambda: kd.TopK(ids, [0.0]), TypeError, "TopK.logprobs must be a tensor"),
        (lambda: kd.TopK([1], logprobs), TypeError, "TopK.ids must be a tensor"),
        (lambda: kd.TopK(ids[:, :0], logprobs[:, :0]), ValueError, "K >= 1"),
        (lambda: kd.TopK(ids, logprobs, tail="fold"), ValueError, "TopK.tail must be one of 'bucket', 'renorm', 'zero', got 'fold'"),
        (lambda: kd.TopK(ids, logprobs, temperature=0.0), ValueError, "TopK.temperature must be finite and > 0"),
        (lambda: kd.TopK(ids, logprobs.to("meta")), ValueError, "TopK.logprobs is on meta, the ids on cpu"),
        (lambda: kd.Sampled(ids, torch.ones(1, 3)), ValueError, "Sampled.counts must have the ids' shape"),
        (lambda: kd.Sampled(ids, torch.ones(1, 2, dtype=torch.bool)), TypeError, "Sampled.counts must be numbers"),
    ):
        with pytest.raises(error, match=message):
            make()


def test_backend_without_one_side_kernels_serves_only_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """Choosing it by name for a primitive raises. The loss runs on it."""
    from kdkernels.backends import selection
    from kdkernels.backends import torch as module

    z = torch.randn(2, 5)
    for name, call in (("head_rows", kd.entropy), ("softmax_rows", kd.softmax)):
        with monkeypatch.context() as patch:
            patch.delattr(module, name)
            selection._select.cache_clear()
            with pytest.raises(kd.BackendUnavailable, match="for the distillation loss only"):
                call(z, backend="torch")
            assert torch.isfinite(kd.distillation_loss(z, z, backend="torch"))
        selection._select.cache_clear()
