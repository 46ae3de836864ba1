"""Top-k and sampled tokens, which are equal on every backend, and softmax of a logits tensor."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from conftest import RUNNABLE, require
from oracle import FLOATS, assert_close_2x, dense_logits, make_side, name_of, to_dtype
from torch import Tensor

import kdkernels as kd
from kdkernels.fused import philox

pytestmark = pytest.mark.usefixtures("poison")

HEADS: dict[str, dict[str, Any]] = {
    "head": {"dim": 16},
    "head with everything": {"dim": 16, "bias": True, "scale": 0.7, "softcap": 5.0, "pad": 3},
    "logits": {"dim": None},
}
heads = pytest.mark.parametrize("side", HEADS)


def seeded(seed: int, device: str = "cpu") -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


# ---- top-k


def by_definition(z: Tensor, count: int) -> Tensor:
    """Return ids by descending logit, then ascending id. NaN counts as -inf."""
    rows = z.double().nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf).tolist()
    return torch.tensor([sorted(range(len(row)), key=lambda v, row=row: (-row[v], v))[:count] for row in rows])


@heads
@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
@pytest.mark.parametrize("k", [1, 5, 64, 300])
def test_topk_logprobs_are_the_largest(side: str, dtype: torch.dtype, k: int, any_backend: str, device: str) -> None:
    require(any_backend, device, dtype)
    sample = make_side((2, 3), 300, dtype=dtype, device=device, **HEADS[side])
    top = kd.topk_logprobs(sample, k, 0.7, backend=any_backend, chunk_rows=4)
    assert top.ids.shape == top.logprobs.shape == (2, 3, k)
    assert (top.tail, top.temperature) == ("bucket", 0.7)
    truth = torch.log_softmax(dense_logits(to_dtype(sample, torch.float64)) / 0.7, -1)
    same = torch.log_softmax(dense_logits(sample).to(torch.promote_types(dtype, torch.float32)) / 0.7, -1)
    index = top.ids.long()
    assert_close_2x("logprobs", top.logprobs, same.gather(-1, index), truth.gather(-1, index))
    if side == "logits":
        assert torch.equal(index.cpu().view(-1, k), by_definition(sample.view(-1, 300).cpu(), k))
    else:  # products of backends round differently: check order, uniqueness, and that no larger one is missing
        assert (top.logprobs.diff(dim=-1) <= 0).all()
        assert (index.sort(-1).values.diff(dim=-1) > 0).all()
        least = truth.gather(-1, index).amin(-1, keepdim=True)
        others = truth.scatter(-1, index, -math.inf)
        assert (others <= least + 0.05).all()


@pytest.mark.parametrize("vocab", [1, 31, 33, 1000, 4097])
def test_topk_breaks_ties_by_id(vocab: int, any_backend: str, device: str) -> None:
    """Rows have few different values, also a single value and zeros of both signs, so that ties occur everywhere."""
    z = torch.randint(-2, 3, (6, vocab), generator=torch.Generator().manual_seed(0)).float().to(device)
    z[1] = 1.5
    z[2] = torch.where(z[2] > 0, 0.0, -0.0)
    for k in {1, min(vocab, 7), max(1, vocab - 1), min(vocab, 1024)}:
        assert torch.equal(kd.topk_logprobs(z, k, backend=any_backend).ids.long().cpu(), by_definition(z.cpu(), k)), k


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=name_of)
def test_topk_lists_excluded_columns_last(dtype: torch.dtype, any_backend: str, device: str) -> None:
    """-inf comes after every finite logit, with log-probability -inf. NaN comes last, and its row's log-probabilities are NaN."""
    require(any_backend, device, dtype)
    z = torch.randn(4, 200, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    z[0, 5:] = -math.inf
    z[1, ::2] = -math.inf
    z[2] = -math.inf
    z[3, 7] = math.nan
    top = kd.topk_logprobs(z, 120, backend=any_backend)
    assert torch.equal(top.ids.long().cpu(), by_definition(z.cpu(), 120))
    assert torch.isfinite(top.logprobs[0]).sum() == 5
    assert (top.logprobs[0, 5:] == -math.inf).all()
    assert torch.isnan(top.logprobs[3]).all()


@pytest.mark.parametrize(("rows", "vocab"), [(300, 4099), (3, 128_256), (2, 1_000_000)])
def test_topk_and_draws_of_long_and_unaligned_rows_equal_torch(rows: int, vocab: int, engine_backend: str, device: str) -> None:
    """Rows are processed by one or many threads. They have many ties or almost none, and any alignment in memory."""
    z = make_side((rows,), vocab, None, device=device)
    for logits in (z, z.round(), z.bfloat16()[:, 3:]):
        order = torch.sort(logits.double(), dim=-1, descending=True, stable=True).indices
        for k in (1, 64, 1024):
            assert torch.equal(kd.topk_logprobs(logits, k, backend=engine_backend).ids.long(), order[:, :k]), k
        ids = kd.sample(logits, 2, generator=seeded(6, device), backend=engine_backend).ids
        assert torch.equal(ids, kd.sample(logits, 2, generator=seeded(6, device), backend="torch").ids)


def test_topk_is_detached(any_backend: str, device: str) -> None:
    side = to_dtype(make_side((3,), 40, 8, device=device), None, requires_grad=True)
    top, drawn = kd.topk_logprobs(side, 3, backend=any_backend), kd.sample(side, 3, backend=any_backend)
    assert not top.logprobs.requires_grad
    assert not drawn.ids.requires_grad


# ---- random numbers


@pytest.mark.parametrize(
    ("key", "counter", "words"),
    [  # test vectors of the Random123 library, philox4x32-10
        (0, (0, 0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (-1, (2**32 - 1,) * 4, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (0x299F31D0A4093822, (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
    ],
)
def test_philox_equals_its_test_vectors(key: int, counter: tuple[int, ...], words: tuple[int, ...]) -> None:
    actual = philox.philox(torch.tensor(key), tuple(torch.tensor([c]) for c in counter))
    assert tuple(int(w) for w in actual) == words


def test_uniform_numbers_depend_on_seed_row_draw_and_column() -> None:
    """Numbers differ for every row (also above 2^32), column, draw and seed, and are never 0."""
    rows = torch.tensor([0, 1, 2**32, 2**32 + 1, 2**33]).repeat(2)
    draws = torch.tensor([0, 1]).repeat_interleave(5)
    numbers = torch.cat([philox.uniform(torch.tensor(seed), rows, draws, 1100).flatten() for seed in (0, 1, 2**40)])
    assert numbers.unique().numel() == numbers.numel()
    assert numbers.min() > 0
    assert numbers.mean() == pytest.approx(0.5, abs=0.01)


# ---- draws


def chi_square(ids: Tensor, probabilities: Tensor) -> float:
    """Return chi-square of the counts as a standard normal deviate (Wilson and Hilferty 1931)."""
    expected = probabilities * ids.numel()
    assert expected.min() > 5
    counts = torch.bincount(ids.flatten().long(), minlength=len(probabilities)).double()
    freedom = len(probabilities) - 1
    statistic = float(((counts - expected) ** 2 / expected).sum())
    return ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))


@pytest.mark.parametrize("per_row", [1, 1000])
def test_a_million_draws_follow_the_distribution(per_row: int, device: str) -> None:
    """Many rows with one draw, and few rows with many, with temperature and softcap.

    One backend suffices, since the others draw the same ids, see below.
    """
    backend, draws = "native" if device == "cpu" else "triton", 1_000_000
    require(backend, device)
    generator = torch.Generator().manual_seed(3)
    hidden, weight = torch.ones(draws // per_row, 1), torch.randn(600, 1, generator=generator) * 2
    side = kd.LMHead(hidden.to(device), weight.to(device), softcap=2.0)
    z = 2.0 * torch.tanh(weight[:, 0].double() / 2.0)
    drawn = kd.sample(side, per_row, 1.5, seeded(11, device), backend=backend)
    assert drawn.ids.shape == drawn.counts.shape == (draws // per_row, per_row)
    assert drawn.ids.dtype == torch.int32
    assert (drawn.counts == 1).all()
    assert abs(chi_square(drawn.ids.cpu(), torch.softmax(z / 1.5, 0))) < 4


def test_neighbouring_rows_and_draws_are_independent() -> None:
    """Pairs of draws, from the same row and from neighbouring rows, are as frequent as the products of their probabilities."""
    require("native", "cpu")
    z = torch.randn(20, generator=torch.Generator().manual_seed(5))
    p = torch.softmax(z.double(), 0)
    ids = kd.sample(z.expand(100_000, 20), 2, generator=seeded(1), backend="native").ids.long()
    joint = (p[:, None] * p).flatten()
    frequent = joint * 100_000 > 10
    for pair in (ids[:, 0] * 20 + ids[:, 1], ids[1:, 0] * 20 + ids[:-1, 0]):
        index = torch.where(frequent, frequent.cumsum(0) - 1, int(frequent.sum()))[pair]
        merged = torch.cat([joint[frequent], joint[~frequent].sum().unsqueeze(0)])
        assert abs(chi_square(index, merged)) < 4


@heads
@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
def test_backends_draw_the_same_ids(side: str, dtype: torch.dtype, backend: str, device: str) -> None:
    """Draws equal the reference's, with several chunks and groups of columns."""
    require(backend, device, dtype)
    leading, vocab = ((5,), 600) if dtype in (torch.float32, torch.bfloat16) else ((3,), 1100)
    sample = make_side(leading, vocab, dtype=dtype, device=device, **HEADS[side])
    expected = kd.sample(sample, 2, 0.8, seeded(2, device), backend="reference").ids
    assert torch.equal(kd.sample(sample, 2, 0.8, seeded(2, device), backend=backend, chunk_rows=2).ids, expected)


@heads
def test_draws_do_not_depend_on_chunks(side: str, engine_backend: str, device: str) -> None:
    sample = make_side((300,), 200, device=device, **HEADS[side])
    expected = kd.sample(sample, 3, 0.8, seeded(2, device), backend=engine_backend).ids
    for options in ({"chunk_rows": 1}, {"chunk_rows": 7}, {"chunk_rows": 128}, {"memory_budget": 10_000}):
        assert torch.equal(kd.sample(sample, 3, 0.8, seeded(2, device), backend=engine_backend, **options).ids, expected), options


def test_backends_draw_the_same_ids_for_many_rows(device: str) -> None:
    """Draws compare differences in float64. In float32 some of the 100,000 rows would differ between backends."""
    z = make_side((100_000,), 16, None, device=device)
    backend = "native" if device == "cpu" else "triton"
    require(backend, device)
    ids = kd.sample(z, generator=seeded(8, device), backend="torch").ids
    assert torch.equal(kd.sample(z, generator=seeded(8, device), backend=backend, chunk_rows=40_000).ids, ids)
    reseeded = kd.sample(z, generator=seeded(9, device), backend=backend).ids
    assert 0.5 < (reseeded != ids).double().mean() < 1


def test_more_draws_than_grid_blocks_equal_those_of_torch(device: str) -> None:
    """A CUDA launch has at most 65535 blocks in its second dimension."""
    z = make_side((2,), 7, None, device=device)
    backend = "native" if device == "cpu" else "triton"
    require(backend, device)
    ids = kd.sample(z, 70_000, generator=seeded(8, device), backend="torch").ids
    assert torch.equal(kd.sample(z, 70_000, generator=seeded(8, device), backend=backend).ids, ids)


def test_equal_rows_draw_differently(backend: str, device: str) -> None:
    """Random numbers depend on the row's number in the call, within and across chunks."""
    z = make_side((1,), 50, None, device=device, spread=0.5).expand(20, 50)
    ids = kd.sample(z, generator=seeded(0, device), backend=backend, chunk_rows=5).ids
    assert ids.unique().numel() > 12


@pytest.mark.parametrize("backend", ["reference", *RUNNABLE])
def test_draws_of_rows_with_excluded_or_certain_columns(backend: str, device: str) -> None:
    """Excluded columns are never drawn, a certain one always, and a row that is not a distribution gives -1."""
    require(backend, device)
    z = torch.zeros(6, 700, device=device)
    z[0, 1:699] = -math.inf
    z[1, 650] = 200.0
    z[2] = -math.inf
    z[3, 3] = math.nan
    z[4] -= 5000
    z[5] = -math.inf
    z[5, 699] = -1e30
    ids = kd.sample(z, 12, generator=seeded(4, device), backend=backend).ids
    assert set(ids[0].tolist()) == {0, 699}
    assert (ids[1] == 650).all()
    assert (ids[2:4] == -1).all()
    assert ids[4].unique().numel() > 8
    assert (ids[5] == 699).all()


def test_default_generator_gives_each_call_a_new_seed() -> None:
    z = torch.zeros(50, 100)
    torch.manual_seed(0)
    first, second = kd.sample(z).ids, kd.sample(z).ids
    assert not torch.equal(first, second), "each call has another seed"
    torch.manual_seed(0)
    assert torch.equal(kd.sample(z).ids, first)


# ---- softmax


FUNCTIONS = {"softmax": (kd.softmax, torch.softmax), "log_softmax": (kd.log_softmax, torch.log_softmax)}
functions = pytest.mark.parametrize("name", FUNCTIONS)


@functions
@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
@pytest.mark.parametrize("shape", [(5,), (3, 127), (2, 2, 4099)], ids=str)
@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_softmax_equals_torch(
    name: str, dtype: torch.dtype, shape: tuple[int, ...], temperature: float, any_backend: str, device: str
) -> None:
    require(any_backend, device, dtype)
    z = make_side(shape[:-1], shape[-1], None, dtype=dtype, device=device)
    upstream = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(device)
    results = []
    for function, leaf in (
        (lambda x: FUNCTIONS[name][0](x, temperature, backend=any_backend), to_dtype(z, None, True)),
        (lambda x: FUNCTIONS[name][1](x / temperature, -1), to_dtype(z, None, True)),
        (lambda x: FUNCTIONS[name][1](x / temperature, -1), to_dtype(z, torch.float64, True)),
    ):
        value = function(leaf)
        value.backward(upstream.to(value.dtype))
        results.append((value.detach(), leaf.grad))
    for quantity, actual, eager, truth in zip(("value", "gradient"), *results, strict=True):
        assert actual.dtype == dtype
        assert_close_2x(f"{name} {quantity}", actual, eager, truth, None if quantity == "value" else float(upstream.abs().max()))


@functions
@pytest.mark.parametrize("vocab", [33_000, 40_001])
def test_softmax_of_rows_longer_than_the_registers_equals_torch(name: str, vocab: int, backend: str, device: str) -> None:
    z = torch.randn(2, vocab, generator=torch.Generator().manual_seed(1)).to(device).requires_grad_()
    fused, eager = FUNCTIONS[name]
    value, expected = fused(z, 2.0, backend=backend), eager(z / 2.0, -1)
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-7)
    upstream = torch.randn(2, vocab, generator=torch.Generator().manual_seed(2)).to(device)
    torch.testing.assert_close(
        *(torch.autograd.grad(v, z, upstream)[0] for v in (value, expected)), rtol=1e-4, atol=1e-4 / math.sqrt(vocab)
    )


@functions
def test_softmax_writes_into_out(name: str, any_backend: str, device: str) -> None:
    z = torch.randn(2, 3, 50, generator=torch.Generator().manual_seed(1)).to(device)
    function = FUNCTIONS[name][0]
    expected = function(z, 2.0, backend=any_backend)
    wide = torch.full((2, 3, 64), 7.0, device=device)
    assert function(z, 2.0, out=wide[..., :50], backend=any_backend).data_ptr() == wide.data_ptr()
    assert torch.equal(wide[..., :50], expected)
    assert (wide[..., 50:] == 7).all()
    same = z.clone()
    assert function(same, 2.0, out=same, backend=any_backend) is same
    assert torch.equal(same, expected)
    view = z.clone()
    function(view, 2.0, out=view.view(2, 3, 50), backend=any_backend)
    assert torch.equal(view, expected)
    with torch.no_grad():  # raises if a gradient is needed, see test_primitives_calls.py
        leaf = z.clone().requires_grad_()
        assert not function(leaf, 2.0, out=torch.empty_like(z), backend=any_backend).requires_grad


@functions
def test_softmax_accepts_strided_logits(name: str, any_backend: str, device: str) -> None:
    z = torch.randn(2, 5, 30, generator=torch.Generator().manual_seed(1)).to(device)
    function = FUNCTIONS[name][0]
    for view in (z[:, :-1], z.transpose(0, 1), z[..., ::2], z[..., :7], z[:1].expand(3, 5, 30)):
        leaf = view.detach().requires_grad_()
        value = function(leaf, backend=any_backend, chunk_rows=3)
        expected = function(leaf.contiguous(), backend=any_backend)
        assert torch.equal(value, expected)
        upstream = torch.arange(value.numel(), device=device).view(value.shape).float() / value.numel()
        for strided in (upstream, upstream[..., :1].expand_as(value)):
            grads = [torch.autograd.grad(v, leaf, strided, retain_graph=True)[0] for v in (value, expected)]
            assert torch.equal(*grads)


@functions
def test_softmax_of_excluded_columns_and_empty_tensors(name: str, any_backend: str, device: str) -> None:
    """Rows with excluded columns, without a finite logit, and no rows."""
    fused, eager = FUNCTIONS[name]
    z = torch.zeros(3, 40, device=device)
    z[0, 5:] = -math.inf
    z[1] = -math.inf
    torch.testing.assert_close(fused(z, backend=any_backend), eager(z, -1), equal_nan=True)
    assert fused(z[:0], backend=any_backend).shape == (0, 40)
    assert fused(torch.zeros(2, 0, 3, device=device, requires_grad=True), backend=any_backend).requires_grad


def test_softmax_does_not_depend_on_chunks(engine_backend: str, device: str) -> None:
    z = torch.randn(9, 30, device=device)
    assert torch.equal(kd.softmax(z, chunk_rows=2, backend=engine_backend), kd.softmax(z, backend=engine_backend))
