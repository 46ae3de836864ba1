"""Stages of a row, run separately, together, and on slices of the columns, give the same results on every backend."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from conftest import require
from fibers import CudaOnCpu
from more_divergences import Mixed, NegLogAcceptance
from torch import Tensor

import kdkernels as kd
from kdkernels.backends import selection
from kdkernels.backends.rows import FORWARD, STATE, STATS, HeadBatch, RowBatch, Stage
from kdkernels.divergences import REGISTRY, Divergence
from kdkernels.fused import merge
from kdkernels.fused.call import Call
from kdkernels.fused.work import Form

ALL = FORWARD | Stage.GRADIENT
PARTS = (
    (Stage.NORMALISERS, Stage.SUMS, Stage.GRADIENT), (Stage.NORMALISERS, Stage.SUMS | Stage.GRADIENT), (FORWARD, Stage.GRADIENT),
)  # fmt: skip
ROWS, VOCAB, WIDTH = 4, 101, 112
SLICES = (slice(0, 37), slice(37, VOCAB))


@dataclass(frozen=True)
class Features:
    """Optional parts of a call besides the divergence."""

    temperature: float = 1.0
    labels: bool = False
    stats: bool = False
    bias: bool = False
    weight: bool = False
    scale: float = 1.0
    softcap: float | None = None
    empty: bool = False  # the first slice of the second row has no finite logit, and the last columns none on either side


PLAIN = Features(temperature=2.0)
FEATURES = {
    "plain": PLAIN,
    "empty": Features(labels=True, stats=True, empty=True),
    "labels": Features(labels=True, weight=True, scale=0.7),
    "statistics": Features(temperature=1.7, labels=True, stats=True, bias=True, softcap=20.0),  # the cap makes -inf finite
}


def problem_of(divergence: Divergence, features: Features, vocab: int, dtype: torch.dtype, backend: str) -> Call:
    form = Form(features.scale, features.softcap, dtype)
    return Call(
        divergence, vocab, temperature=features.temperature, ce_weight=0.5 if features.labels else 0.0, has_labels=features.labels,
        student=form, teacher=form, return_stats=features.stats, wants_input=True,
        backend=backend,
    )  # fmt: skip


def batch_of(features: Features, dtype: torch.dtype) -> RowBatch:
    """Return rows with tensors for all outputs of the features, filled with NaN. Rows start at multiples of 16 bytes."""
    generator = torch.Generator().manual_seed(3)
    compute = torch.promote_types(dtype, torch.float32)
    student, teacher, bias = (3 * torch.randn(n, VOCAB, generator=generator, dtype=compute) for n in (ROWS, ROWS, 2))

    def stored(rows: Tensor) -> Tensor:
        return torch.empty(ROWS, WIDTH, dtype=dtype)[:, :VOCAB].copy_(rows)

    if features.empty:
        student[1, SLICES[0]] = -math.inf
        teacher[1, SLICES[0]] = -math.inf
        student[:, 90:] = teacher[:, 90:] = -math.inf
    return RowBatch(
        stored(student), stored(teacher), *(bias if features.bias else (None, None)),
        labels=torch.tensor([36, 60, 37, 89]) if features.labels else None,
        weight=torch.tensor([1.0, 0.5, 2.0, 0.0], dtype=compute) if features.weight else None,
        state=torch.full((len(STATE), ROWS), math.nan, dtype=compute), loss=torch.full((ROWS,), math.nan, dtype=compute),
        stats=torch.full((len(STATS), ROWS), math.nan) if features.stats else None,
        dz=stored(torch.full_like(student, math.nan)),
    )  # fmt: skip


def slice_of(batch: RowBatch, columns: slice) -> RowBatch:
    """Return the same rows restricted to these columns."""
    labels = None
    if batch.labels is not None:
        inside = (batch.labels >= columns.start) & (batch.labels < columns.stop)
        labels = torch.where(inside, batch.labels - columns.start, -1)
    student_bias, teacher_bias = (None if b is None else b[columns] for b in (batch.student_bias, batch.teacher_bias))
    assert batch.dz is not None
    return replace(
        batch, student=batch.student[:, columns], teacher=batch.teacher[:, columns], student_bias=student_bias, teacher_bias=teacher_bias,
        labels=labels, state=torch.full_like(batch.state, math.nan), loss=None, dz=batch.dz[:, columns].clone(),
        stats=None if batch.stats is None else torch.full_like(batch.stats, math.nan),
    )  # fmt: skip


GPUS = ("cuda sm_80", "cuda sm_90")
"""The CUDA kernels on CPU fibers, as launched on a GPU without and with clusters."""


def module_of(backend: str) -> Any:
    if backend in GPUS:
        return CudaOnCpu(clusters=backend == "cuda sm_90")
    require(backend, "cpu")
    return selection.load(backend)


def assert_same(actual: Iterable[Tensor | None], expected: Iterable[Tensor | None], digits: float) -> None:
    """Compare results, which must be finite: those in 16 bits up to one rounding, beside the error of float32."""
    for ours, theirs in zip(actual, expected, strict=True):
        if ours is None or theirs is None:
            assert ours is theirs
            continue
        assert theirs.isfinite().all(), "a result was not written"
        eps = torch.finfo(torch.promote_types(ours.dtype, torch.float32)).eps
        rounding = torch.finfo(ours.dtype).eps if ours.itemsize == 2 else 0.0
        torch.testing.assert_close(ours, theirs, rtol=digits * eps + rounding, atol=digits * eps)


def run_all_stages(module: Any, problem: Call, batch: RowBatch) -> RowBatch:
    module.rows(problem, batch, ALL)
    return batch


def cases(divergences: Sequence[str], interpreted: dict[str, Iterable[str]]) -> list[tuple[str, str, str, str]]:
    """Return backend, divergence, features and dtypes of the logits.

    Triton's interpreter is slow and runs a selection. On fibers, every two of GPU, divergence, features and dtype meet.
    """
    combinations = []
    for i, divergence in enumerate(divergences):
        for j, features in enumerate(FEATURES):
            combinations += [(backend, divergence, features, "float32 float64") for backend in ("torch", "native")]
            combinations.append((GPUS[(i + j // 2) % 2], divergence, features, ("float32", "bfloat16", "float16")[(i + j) % 3]))
    return combinations + [("triton", divergence, features, "float32") for features, some in interpreted.items() for divergence in some]


@pytest.mark.parametrize(
    ("backend", "divergence", "features", "dtypes"),
    cases(sorted(REGISTRY), {"plain": ["forward_kl", "jsd"], "labels": ["total_variation", "logit_mse"], "statistics": ["forward_kl"]}),
)
def test_stages_one_by_one_equal_stages_together(backend: str, divergence: str, features: str, dtypes: str) -> None:
    module, feature_set = module_of(backend), FEATURES[features]
    for dtype in (getattr(torch, name) for name in dtypes.split()):
        problem = problem_of(REGISTRY[divergence](), feature_set, VOCAB, dtype, backend)
        together = run_all_stages(module, problem, batch_of(feature_set, dtype))
        for parts in PARTS:
            apart = batch_of(feature_set, dtype)
            for stages in parts:
                module.rows(problem, apart, stages)
            assert_same((apart.loss, apart.stats, apart.dz), (together.loss, together.stats, together.dz), 16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_one_read_kernel_runs_the_forward_stages_together(dtype: torch.dtype) -> None:
    module, problem = module_of("cuda sm_90"), problem_of(kd.ForwardKL(), PLAIN, VOCAB, dtype, "cuda")
    ran = {}
    for stages in (ALL, FORWARD, Stage.NORMALISERS, Stage.SUMS, Stage.GRADIENT, Stage.SUMS | Stage.GRADIENT):
        module.rows(problem, batch_of(PLAIN, dtype), stages)
        ran[stages] = module.one_read
    assert [stages for stages in ran if ran[stages]] == [ALL, FORWARD]


EVERY = [*sorted(REGISTRY), "logit_mse(centered=True)"]


@pytest.mark.parametrize(
    ("backend", "divergence", "features", "dtypes"), cases(EVERY, {"empty": ["reverse_kl"], "labels": ["skew_kl"], "statistics": EVERY})
)
def test_slices_of_the_columns_merge_into_the_whole(backend: str, divergence: str, features: str, dtypes: str) -> None:
    module, feature_set = module_of(backend), FEATURES[features]
    for dtype in (getattr(torch, name) for name in dtypes.split()):
        problem = problem_of(kd.divergences.parse(divergence), feature_set, VOCAB, dtype, backend)
        together = run_all_stages(module, problem, batch_of(feature_set, dtype))
        assert_same(sliced(module, problem, batch_of(feature_set, dtype)), (together.loss, together.stats, together.dz), 256)


def sliced(module: Any, problem: Call, batch: RowBatch) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return loss, statistics and gradient of the rows, computed on two slices of the columns whose states are merged."""
    parts, scales = [slice_of(batch, columns) for columns in SLICES], module.state_scales(problem)
    problems = [replace(problem, vocab=columns.stop - columns.start) for columns in SLICES]

    def run(stages: Stage) -> Tensor:
        for part, of_part in zip(parts, problems, strict=True):
            module.rows(of_part, part, stages)
        return torch.stack([part.state for part in parts])

    state = merge.normalisers(problem, run(Stage.NORMALISERS), scales)
    for part in parts:
        part.state = state.clone()
    state = merge.sums(run(Stage.SUMS), [columns.start for columns in SLICES])
    for part in parts:
        part.state = state.clone()
    run(Stage.GRADIENT)
    stats = None
    if batch.stats is not None:
        stats = merge.statistics(problem, state, torch.stack([part.stats for part in parts if part.stats is not None]))
    gradient = torch.cat([part.dz for part in parts if part.dz is not None], -1)
    return merge.loss(problem, state, batch.weight, scales), stats, gradient


def one_side(quantity: str, dtype: torch.dtype) -> HeadBatch:
    """Return rows of one side with tensors for an entropy, or for log-probabilities at ids, and their gradients."""
    generator = torch.Generator().manual_seed(5)
    logits, d_logprobs = (torch.randn(ROWS, n, generator=generator, dtype=dtype) for n in (VOCAB, 3))
    top, log_sum, entropy, upstream = (torch.full((ROWS,), value, dtype=dtype) for value in (math.nan, math.nan, math.nan, 0.7))
    batch = HeadBatch(3 * logits, None, top, log_sum, d_lse=upstream, dz=torch.full_like(logits, math.nan), dz_scale=0.5)
    if quantity == "entropy":
        return replace(batch, entropy=entropy, d_entropy=2 * upstream)
    ids = torch.tensor([[3, 60, 3], [-1, 100, 0], [7, 8, 9], [-1, -1, -1]])
    return replace(batch, ids=ids, logprobs=torch.full_like(d_logprobs, math.nan), d_logprobs=d_logprobs)


@pytest.mark.parametrize("quantity", ["entropy", "token_logprobs"])
@pytest.mark.parametrize("backend", ["torch", "native", "triton"])
def test_stages_of_one_side_one_by_one_equal_stages_together(backend: str, quantity: str) -> None:
    require(backend, "cpu")
    module, dtype = selection.load(backend), torch.float32
    call = Call(kd.ForwardKL(), VOCAB, quantity=quantity, temperature=1.7, student=Form(dtype=dtype))
    together = one_side(quantity, dtype)
    module.head_rows(call, together, ALL)
    for parts in PARTS:
        apart = one_side(quantity, dtype)
        for stages in parts:
            module.head_rows(call, apart, stages)
        results = ([getattr(batch, name) for name in ("top", "log_sum", "entropy", "logprobs", "dz")] for batch in (apart, together))
        assert_same(*results, 16)


@pytest.fixture
def more_divergences(monkeypatch: pytest.MonkeyPatch) -> None:
    """Register divergences that only tests use."""
    for divergence in (NegLogAcceptance, Mixed):
        monkeypatch.setitem(REGISTRY, divergence.name, divergence)
    if selection.unavailable("triton", "cpu", (torch.float32, torch.float32)) is None:
        from more_triton_divergences import FUNCTIONS as MORE

        from kdkernels.backends.triton.divergences import FUNCTIONS

        for name, functions in MORE.items():
            monkeypatch.setitem(FUNCTIONS, name, functions)


@pytest.mark.parametrize("divergence", [NegLogAcceptance(), Mixed(0.3)], ids=["neg_log_acceptance", "mixed"])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_functions_of_sums_run_in_stages(backend: str, divergence: Divergence, more_divergences: None) -> None:
    """The logarithm of a sum, and two divergences in one pass, against float64 autograd: at once, and on slices."""
    require(backend, "cpu")
    module = selection.load(backend)
    for features in (FEATURES["plain"], FEATURES["labels"]):
        problem = problem_of(divergence, features, VOCAB, torch.float32, backend)
        together = run_all_stages(module, problem, batch_of(features, torch.float32))
        assert_same(sliced(module, problem, batch_of(features, torch.float32)), (together.loss, None, together.dz), 256)
        exact = batch_of(features, torch.float32)
        z = exact.student.double().requires_grad_()
        x, u = (side * features.scale / features.temperature for side in (z, exact.teacher.double()))
        value = divergence.reference_value(x.log_softmax(-1), u.log_softmax(-1)) * features.temperature**2
        if exact.labels is not None:
            value = value + 0.5 * torch.nn.functional.cross_entropy(z * features.scale, exact.labels, reduction="none")
        value = value if exact.weight is None else value * exact.weight
        (gradient,) = torch.autograd.grad(value.sum(), z)
        torch.testing.assert_close(together.loss, value.detach().float(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(together.dz, gradient.float(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["neg_log_acceptance", "mixed"])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_functions_of_sums_are_losses_like_any_other(backend: str, name: str, more_divergences: None) -> None:
    require(backend, "cpu")
    teacher = torch.randn(6, 40, generator=torch.Generator().manual_seed(1))
    results = []
    for chosen in ("reference", backend):
        student = torch.randn(6, 40, generator=torch.Generator().manual_seed(0)).requires_grad_()
        loss = kd.distillation_loss(student, teacher, divergence=name, temperature=1.5, backend=chosen)
        loss.backward()
        results.append((loss.detach(), student.grad))
    for ours, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)
