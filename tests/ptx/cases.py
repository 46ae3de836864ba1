"""Calls of the Triton backend for the executor, checked against float64.

Each case runs three rows, whose CTAs run their warps forwards, backwards and shuffled, and returns how large each error is, as a share
of what the 2x rule allows.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from support import oracle
from torch import Tensor

import kdkernels as kd
from kdkernels.backends import torch as torch_backend
from kdkernels.backends import triton as triton_backend
from kdkernels.backends.rows import FORWARD, STATE, STATS, HeadBatch, RowBatch, Stage, Transform
from kdkernels.divergences import Divergence
from kdkernels.fused.call import Call
from kdkernels.fused.work import Form

ROWS = 3
NAN = float("nan")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
VOCABS = (1, 130, 777, 1040, 4643, 8208)
"""One column; tails of a block, odd and a multiple of 16; more than one block, odd and a multiple of 16."""
SCALE = 0.7
CAPS = (20.0, 15.0)


class WrongResultError(AssertionError):
    """A result beyond what the 2x rule allows."""


def compare(results: dict[str, tuple[Tensor, Tensor, Tensor, float | None]]) -> dict[str, float]:
    """Error / allowed error of each result, from itself, float32 torch's and the truth.

    Raises:
        WrongResultError: one is above 1.
    """
    shares = {}
    for name, (ours, same, truth, scale) in results.items():
        error, same_error, floor = oracle.errors(ours, same, truth, scale)
        shares[name] = error / (2 * same_error + floor)
        if not shares[name] <= 1:
            raise WrongResultError(f"{name}: error {error:.2e}, float32 torch {same_error:.2e}, floor {floor:.1e}")
    return shares


def padded(rows: Tensor, dense: bool) -> Tensor:
    """The rows in a NaN-filled buffer in which each starts at a multiple of 64 bytes, or right behind the one before if ``dense``."""
    step = 64 // rows.element_size()
    vocab = rows.shape[1]
    buffer = torch.full((len(rows), vocab if dense else -(-vocab // step) * step), NAN, dtype=rows.dtype)
    buffer[:, :vocab] = rows
    return buffer[:, :vocab]


def random_rows(vocab: int, seed: int, spread: float = 3.0) -> Tensor:
    return torch.randn(ROWS, vocab, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * spread


def transformed(z: Tensor, bias: Tensor | None, transform: Transform) -> Tensor:
    z = (z if bias is None else z + bias.to(z.dtype)) * transform.scale
    return z if transform.softcap is None else transform.softcap * torch.tanh(z / transform.softcap)


# ---- rows of both sides


@dataclass(frozen=True)
class Rows:
    """A call of ``rows``: loss and logit gradient of a chunk.

    ``student``, ``teacher`` and ``gradient`` are dtypes; the gradient lies over the student's rows unless ``apart``. ``dense`` rows
    follow each other without padding. With ``two_calls`` the statistics and the gradient come from a launch each.
    """

    divergence: Divergence
    vocab: int
    student: str = "float32"
    teacher: str = "float32"
    gradient: str = "bfloat16"
    temperature: float = 2.0
    apart: bool = False
    dense: bool = False
    two_calls: bool = False
    student_bias: bool = False
    teacher_bias: bool = False
    student_softcap: bool = False
    teacher_softcap: bool = False
    labels: bool = False
    weights: bool = False
    stats: bool = False

    @property
    def problem(self) -> Call:
        return Call(
            self.divergence,
            self.vocab,
            temperature=self.temperature,
            ce_weight=0.3 if self.labels else 0.0,
            has_labels=self.labels,
            return_stats=self.stats,
            student=Form(SCALE, CAPS[0], DTYPES[self.gradient]) if self.student_softcap else Form(dtype=DTYPES[self.gradient]),
            teacher=Form(1 / SCALE, CAPS[1]) if self.teacher_softcap else Form(),
        )

    def run(self) -> dict[str, float]:
        student_logits = random_rows(self.vocab, 0).to(DTYPES[self.student])
        teacher_logits = random_rows(self.vocab, 1).to(DTYPES[self.teacher])
        student, teacher = (padded(z, self.dense) for z in (student_logits, teacher_logits))
        dz = torch.full_like(student, NAN, dtype=DTYPES[self.gradient]) if self.apart else _over(student, DTYPES[self.gradient])
        generator = torch.Generator().manual_seed(7)
        student_bias, teacher_bias = (
            torch.randn(self.vocab, generator=generator) if has else None for has in (self.student_bias, self.teacher_bias)
        )
        problem = self.problem
        batch = RowBatch(
            student,
            teacher,
            student_bias,
            teacher_bias,
            labels=torch.randint(self.vocab, (ROWS,), generator=generator) if self.labels else None,
            weight=torch.tensor([0.5, -1.5, 2.0]) if self.weights else None,
            state=torch.full((len(STATE), ROWS), NAN),
            loss=torch.full((ROWS,), NAN),
            stats=torch.full((len(STATS), ROWS), NAN) if self.stats else None,
            dz=dz,
            dz_scale=problem.dz_scale,
        )
        if self.two_calls:
            triton_backend.rows(problem, batch, FORWARD)
            triton_backend.rows(problem, batch, Stage.GRADIENT)
        else:
            triton_backend.rows(problem, batch, FORWARD | Stage.GRADIENT)
        assert batch.loss is not None
        ours = {"loss": batch.loss, "dz": dz / problem.dz_scale}
        if batch.stats is not None:
            ours |= dict(zip(STATS, batch.stats, strict=True))
        same, truth = (self._reference(batch, student_logits, teacher_logits, dtype) for dtype in (torch.float32, torch.float64))
        return compare({name: (value, same[name], truth[name], 1.0 if name == "loss" else None) for name, value in ours.items()})

    def _reference(self, batch: RowBatch, student_logits: Tensor, teacher_logits: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        """Loss, gradient and statistics by torch, in a dtype."""
        leaf = student_logits.to(dtype, copy=True).requires_grad_()
        student = transformed(leaf, batch.student_bias, self.problem.student)
        teacher = transformed(teacher_logits.to(dtype), batch.teacher_bias, self.problem.teacher)
        options: dict[str, Any] = {
            "divergence": self.divergence,
            "temperature": self.temperature,
            "labels": batch.labels,
            "ce_weight": self.problem.ce_weight,
        }
        loss = oracle.dense_loss(student, teacher, **options, token_weights=batch.weight, reduction="none")
        torch.autograd.backward(loss.sum())
        assert leaf.grad is not None
        stats = oracle.token_stats(student.detach(), teacher, options) if self.stats else {}
        return {"loss": loss.detach(), "dz": leaf.grad, **stats}


def _over(logits: Tensor, dtype: torch.dtype) -> Tensor:
    """A matrix of a dtype no wider, each row starting where the row of logits does."""
    ratio = logits.element_size() // dtype.itemsize
    whole = torch.empty(0, dtype=dtype).set_(logits.untyped_storage())
    return whole.as_strided(logits.shape, (logits.stride(0) * ratio, 1))


# ---- one side


@dataclass(frozen=True)
class Head:
    """A call of ``head_rows`` for statistics, log-probabilities at ids and the gradient of all of them."""

    vocab: int
    logits: str = "float32"
    gradient: str = "bfloat16"
    temperature: float = 2.0
    dense: bool = False
    two_calls: bool = False
    bias: bool = False
    softcap: bool = False
    entropy: bool = False
    ids: int = 0

    def run(self) -> dict[str, float]:
        exact = random_rows(self.vocab, 0).to(DTYPES[self.logits])
        logits = padded(exact, self.dense)
        dz = _over(logits, DTYPES[self.gradient])
        generator = torch.Generator().manual_seed(7)
        bias = torch.randn(self.vocab, generator=generator) if self.bias else None
        form = Form(SCALE, CAPS[0]) if self.softcap else Form()
        ids = torch.randint(self.vocab, (ROWS, self.ids), generator=generator) if self.ids else None
        if ids is not None:
            ids[0, 0] = -1
        upstream = {"log_sum": torch.randn(ROWS, generator=generator)}
        if self.entropy:
            upstream["entropy"] = torch.randn(ROWS, generator=generator)
        if ids is not None:
            upstream["logprobs"] = torch.randn(ids.shape, generator=generator)
        problem = Call(kd.ForwardKL(), self.vocab, "logsumexp", self.temperature, student=replace(form, dtype=DTYPES[self.gradient]))
        batch = HeadBatch(
            logits, bias, torch.full((ROWS,), NAN), torch.full((ROWS,), NAN),
            entropy=torch.full((ROWS,), NAN) if self.entropy else None,
            ids=ids,
            logprobs=None if ids is None else torch.full(ids.shape, NAN),
            d_lse=upstream["log_sum"], d_entropy=upstream.get("entropy"), d_logprobs=upstream.get("logprobs"),
            dz=dz,
            dz_scale=problem.dz_scale,
        )  # fmt: skip
        if self.two_calls:
            triton_backend.head_rows(problem, batch, FORWARD)
            triton_backend.head_rows(problem, batch, Stage.GRADIENT)
        else:
            triton_backend.head_rows(problem, batch, FORWARD | Stage.GRADIENT)

        def reference(dtype: torch.dtype) -> dict[str, Tensor]:
            leaf = exact.to(dtype, copy=True).requires_grad_()
            x = transformed(leaf, bias, form) / self.temperature
            log_q = torch.log_softmax(x, -1)
            values = {"log_sum": torch.logsumexp(x, -1), "entropy": -(log_q.exp() * log_q).sum(-1)}
            if ids is not None:
                values["logprobs"] = torch.where(ids < 0, 0.0, log_q.gather(-1, ids.clamp(min=0)))
            torch.autograd.backward([(values[name] * up.to(dtype)).sum() for name, up in upstream.items()])
            assert leaf.grad is not None
            return {name: value.detach() for name, value in values.items()} | {"dz": leaf.grad}

        same, truth = reference(torch.float32), reference(torch.float64)
        ours = {"log_sum": batch.top * problem.inv_temperature + batch.log_sum, "dz": dz / problem.dz_scale}
        if batch.entropy is not None:
            ours["entropy"] = batch.entropy
        if batch.logprobs is not None:
            ours["logprobs"] = batch.logprobs
        return compare({name: (value, same[name], truth[name], 1.0) for name, value in ours.items()})


@dataclass(frozen=True)
class Draws:
    """A call of ``head_rows`` for draws, which every backend makes alike."""

    vocab: int
    logits: str = "float32"
    dense: bool = False
    bias: bool = False
    softcap: bool = False
    draws: int = 2

    def run(self) -> dict[str, float]:
        exact = random_rows(self.vocab, 0).to(DTYPES[self.logits])
        logits = padded(exact, self.dense)
        bias = torch.randn(self.vocab, generator=torch.Generator().manual_seed(7)) if self.bias else None
        form = Form(SCALE, CAPS[0]) if self.softcap else Form()
        problem = Call(kd.ForwardKL(), self.vocab, "logsumexp", 0.8, student=form)

        def drawn(backend: Any) -> Tensor:
            draws = torch.full((ROWS, self.draws), -2, dtype=torch.int32)
            state = torch.full((2, ROWS), NAN)
            batch = HeadBatch(logits, bias, state[0], state[1], draws=draws, seed=torch.tensor(2**40 + 3), first_row=2**33)
            backend.head_rows(problem, batch, FORWARD)
            return draws

        ours, expected = drawn(triton_backend), drawn(torch_backend)
        if not torch.equal(ours, expected):
            raise WrongResultError(f"drew {ours.tolist()}, expected {expected.tolist()}")
        return {"draws": 0.0}


@dataclass(frozen=True)
class Softmax:
    """``softmax_rows`` and ``softmax_gradient_rows``, each in place if ``in_place``."""

    vocab: int
    dtype: str = "float32"
    logarithm: bool = False
    dense: bool = False
    in_place: bool = False

    def run(self) -> dict[str, float]:
        dtype, temperature = DTYPES[self.dtype], 0.7
        exact, upstream = (random_rows(self.vocab, seed).to(dtype) for seed in (0, 1))
        x = padded(exact, self.dense)
        y = x if self.in_place else torch.full_like(x, NAN)
        triton_backend.softmax_rows(x, y, temperature, self.logarithm)
        result = y.clone()
        dy = padded(upstream, self.dense)
        dx = dy if self.in_place else torch.full_like(dy, NAN)
        triton_backend.softmax_gradient_rows(y, dy, dx, temperature, self.logarithm)

        def reference(wide: torch.dtype) -> tuple[Tensor, Tensor]:
            function = torch.log_softmax if self.logarithm else torch.softmax
            value = function(exact.to(wide) / temperature, -1)
            d = upstream.to(wide)
            saved = result.to(wide)  # the gradient is that of the result as it was rounded
            total = d.sum(-1, keepdim=True) if self.logarithm else (saved * d).sum(-1, keepdim=True)
            return value, (d - saved.exp() * total if self.logarithm else saved * (d - total)) / temperature

        same, truth = reference(torch.float32), reference(torch.float64)
        return compare({"y": (result, same[0], truth[0], 1.0), "dx": (dx, same[1], truth[1], 1.0)})


Case = Rows | Head | Draws | Softmax

# ---- which cases

_ROW_FACTORS: dict[str, Any] = {
    "divergence": oracle.ONE_OF_EACH,
    "vocab": (777, 1040, 4643, 8208, 130),
    "dtypes": (
        ("float32", "float32", "bfloat16"), ("float32", "float32", "float32"), ("bfloat16", "bfloat16", "bfloat16"),
        ("float32", "float32", "float16"), ("bfloat16", "float32", "bfloat16"),
    ),
    "temperature": (2.0, 1.0),
    "apart": (False, True),
    "dense": (False, True),
    "two_calls": (False, True),
    **dict.fromkeys(("student_bias", "teacher_bias", "student_softcap", "teacher_softcap", "labels", "weights", "stats"), (False, True)),
}  # fmt: skip
_HEAD_FACTORS: dict[str, Any] = {
    "vocab": (777, 8208, 4643, 130),
    "dtypes": (("float32", "bfloat16"), ("bfloat16", "bfloat16"), ("float32", "float32"), ("float16", "float16")),
    "ids": (0, 1, 5, 70),
    **dict.fromkeys(("dense", "two_calls", "bias", "softcap", "entropy"), (False, True)),
}
_DRAW_FACTORS: dict[str, Any] = {
    "vocab": (777, 4643, 130),
    "logits": tuple(DTYPES),
    **dict.fromkeys(("dense", "bias", "softcap"), (False, True)),
}
_SOFTMAX_FACTORS: dict[str, Any] = {
    "vocab": (777, 8208, 33000),  # the last is too long for one read
    "dtype": tuple(DTYPES),
    **dict.fromkeys(("logarithm", "dense", "in_place"), (False, True)),
}


LIGHT: list[Divergence] = [
    kd.JSD(0.999), kd.JSD(0.001), kd.SkewKL(0.9999), kd.SkewReverseKL(0.9999),
    *(kd.JSD(beta) for beta in (0.9, 0.99, 0.9999, 0.1, 0.01, 0.0001)),
    *(skew(alpha) for skew in (kd.SkewKL, kd.SkewReverseKL) for alpha in (0.9, 0.99, 0.999)),
]  # fmt: skip
"""Mixtures that are nearly q or nearly p, so that values are small."""


def _cases(of: Callable[..., Case], factors: dict[str, Any], names: dict[str, tuple[str, ...]], everything: bool) -> Iterator[Case]:
    """Cases in which every two settings meet; ``everything``: every combination."""
    chosen = _product(factors) if everything else oracle.all_pairs(factors)
    for settings in chosen:
        settings = dict(settings)
        for together, fields in names.items():
            settings |= dict(zip(fields, settings.pop(together), strict=True))
        yield of(**settings)


def _product(factors: dict[str, Any]) -> list[dict[str, Any]]:
    return [dict(zip(factors, values, strict=True)) for values in itertools.product(*factors.values())]


def sample() -> Iterator[Case]:
    """Return cases for each kernel that cover every pair of settings."""
    yield from _cases(Rows, _ROW_FACTORS, {"dtypes": ("student", "teacher", "gradient")}, False)
    yield from _cases(Head, _HEAD_FACTORS, {"dtypes": ("logits", "gradient")}, False)
    yield from _cases(Draws, _DRAW_FACTORS, {}, False)
    yield from _cases(Softmax, _SOFTMAX_FACTORS, {}, False)
    yield Rows(kd.ForwardKL(), 1)
    for divergence in LIGHT[:4]:
        yield Rows(divergence, 1040, gradient="float32", stats=True)


def everything() -> Iterator[Case]:
    """The sample, every row kernel without features, each alone with every feature, light mixtures, and every softmax and draw."""
    yield from sample()
    plain = {name: _ROW_FACTORS[name] for name in ("divergence", "vocab", "dtypes")}
    yield from _cases(Rows, plain, {"dtypes": ("student", "teacher", "gradient")}, True)
    for divergence, name in itertools.product(oracle.ONE_OF_EACH, list(_ROW_FACTORS)[7:]):
        feature: dict[str, Any] = {name: True}
        yield Rows(divergence, 4643, **feature)
    for divergence in oracle.DIVERGENCES + oracle.NEGATIVE:
        yield Rows(divergence, 1040, student_bias=True, labels=True, stats=True)
    for divergence, dtype in itertools.product(LIGHT, ("float32", "bfloat16")):
        yield Rows(divergence, 1040, dtype, dtype, stats=True)
    yield from _cases(Draws, _DRAW_FACTORS, {}, True)
    yield from _cases(Softmax, _SOFTMAX_FACTORS, {}, True)
