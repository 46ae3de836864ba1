"""Suites: the cases of a run, most important first, because a time budget may cut off the last ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from ..divergences import REGISTRY
from . import variants
from .cases import Case
from .measure import Job

SUITES = ("smoke", "standard", "full")
"""Suites of increasing size."""

PARTS = ("headline", "rows")
"""Suites for one question each: the whole loss at the sizes of the README, and the row kernels alone. A minute each on a GPU."""

DTYPES = {"cpu": "float32", "cuda": "bfloat16"}
"""Default dtype of a case, by device."""

SHAPES = [
    (8192, 128256, 2048, 4096),
    (16384, 151936, 2048, 4096),
    (8192, 128256, 4096, 4096),
    (16384, 32000, 2048, 4096),
    (8192, 152064, 3584, 5120),
    (32768, 151936, 1024, 4096),
    (16384, 256000, 2304, 3584),
]
"""N, V, Ds, Dt of common students and teachers, for a GPU."""

ROW_VOCABULARIES = (32000, 128256, 151936, 256000)
FEW = ("forward_kl", "jsd")
ROWS_FEW = ("forward_kl", "reverse_kl", "jsd")
SAMPLES = {"smoke": 6, "standard": 9, "full": 12, "headline": 7, "rows": 15}
VISITS = {"cpu": 3, "cuda": 1}
"""Number of processes over which the samples are distributed."""


def jobs(
    suite: str,
    device: str,
    *,
    shapes: Sequence[tuple[int, int, int, int]] = (),
    divergences: Sequence[str] = (),
    dtypes: Sequence[str] = (),
    temperature: float = 2.0,
    backends: list[str] | None = None,
    peers: list[str] | None = None,
) -> list[Job]:
    """Return the jobs of a run.

    Args:
        shapes, divergences, dtypes: if any is not empty, run only these cases, with the suite's number of samples.
        backends: names of backends; None takes those that "auto" may select.
        peers: names of other libraries; None takes those that are installed and run on the device.
    """
    samples = SAMPLES[suite]
    of = _Cases(device, temperature, samples, backends, peers)
    if shapes or divergences or dtypes:
        chosen = shapes or [_shape(job.case) for job in of.smoke()[:1]]
        return [
            of.job(Case(*shape, dtype=dtype, divergence=divergence))
            for shape in chosen
            for dtype in dtypes or (DTYPES[device],)
            for divergence in divergences or FEW
        ]
    of_suite: dict[str, Callable[[], list[Job]]] = {
        "smoke": of.smoke, "standard": of.standard, "full": of.full, "headline": of.headline, "rows": lambda: of.rows(ROWS_FEW),
    }  # fmt: skip
    return list(dict.fromkeys(of_suite[suite]()))


def _shape(case: Case) -> tuple[int, int, int, int]:
    return case.n, case.v, case.ds, case.dt


class _Cases:
    """The suites of one device."""

    def __init__(self, device: str, temperature: float, samples: int, backends: list[str] | None, peers: list[str] | None) -> None:
        self.device, self.temperature, self.samples, self.backends, self.peers = device, temperature, samples, backends, peers
        self.gpu = device != "cpu"
        self.dtype = DTYPES[device]

    def job(
        self, case: Case, *, samples: int | None = None, memory: bool = True, curve: str = "", only: Sequence[str] | None = None
    ) -> Job:
        case = replace(case, temperature=self.temperature)
        names = variants.default_variants(case, self.device, self.backends, self.peers) if only is None else only
        samples = self.samples if samples is None else samples
        return Job(case, tuple(names), samples, memory, curve, VISITS[self.device] if samples else 1)

    @property
    def ours(self) -> list[str]:
        import torch

        return variants.backends_for(self.device, getattr(torch, self.dtype)) if self.backends is None else self.backends

    @property
    def best(self) -> list[str]:
        """Our best backend, also with narrow logits if the dtype is narrow."""
        first = self.ours[:1]
        return first + [f"{name}/{self.dtype}" for name in first if self.dtype != "float32"]

    def smoke(self) -> list[Job]:
        """Return a few small cases with the best backend only: the others are for machines where it cannot run."""
        best = _Cases(self.device, self.temperature, self.samples, self.ours[:1] if self.backends is None else self.backends, self.peers)
        n, v, ds, dt = (4096, 32000, 1024, 2048) if self.gpu else (512, 16000, 256, 512)
        heads = [best.job(Case(n, v, ds, dt, self.dtype, d), memory=d == FEW[0]) for d in FEW]
        return [*heads, best.job(Case(n, v, dtype=self.dtype))]

    def headline(self) -> list[Job]:
        """Return the README's cases for the compiled backends at two budgets, without torch.compile, which would take most of the time."""
        shapes = SHAPES[:2] if self.gpu else [(512, 16000, 256, 512)]
        budgets = (1024, 4096) if self.gpu else (16, 64)
        wide = ["floor/float32"] * (self.dtype != "float32")
        narrow = [""] if self.dtype == "float32" else ["", f"/{self.dtype}"]
        ours = [f"{b}{dtype}@budget={mib}" for b in variants.compiled(self.ours) for dtype in narrow for mib in budgets]
        cases = [Case(*shape, self.dtype, d) for shape in shapes for d in FEW]
        return [self.job(case, only=["floor", *wide, "eager", *self._peers(case), *ours]) for case in cases]

    def standard(self) -> list[Job]:
        return self._standard_gpu() if self.gpu else self._standard_cpu()

    def _standard_cpu(self) -> list[Job]:
        shape = (2048, 32000, 512, 1024)
        heads = [Case(*shape, dtype, d) for dtype, d in (("float32", "forward_kl"), ("float32", "jsd"), ("bfloat16", "forward_kl"))]
        logits = [Case(*shape[:2], dtype="float32", divergence=d) for d in FEW]
        other = [Case(*shape, dtype="float32", operation="cross_entropy")]
        return [*map(self.job, heads + logits + other), *self.tokens((1024, 4096, 16384)), *self.precision()]

    def _standard_gpu(self) -> list[Job]:
        first = [self.job(Case(*SHAPES[0], self.dtype, d)) for d in FEW]
        # Without torch.compile, which would take most of the time.
        rest = [self._quick(self.job(Case(*shape, self.dtype, d))) for shape in SHAPES[1:] for d in FEW]
        small = [self.job(Case(n, *SHAPES[2][1:], self.dtype)) for n in (256, 1024)]
        masked = [self.job(Case(*SHAPES[0], self.dtype, masked=0.5)), self.job(Case(*SHAPES[0], self.dtype, frozen_head=True))]
        other = [self.job(Case(*SHAPES[0], self.dtype, operation="cross_entropy"))]
        return [*first, *self.rows(), *rest, *small, *masked, *other, *self.tokens((1024, 8192, 65536)), *self.precision()]

    @staticmethod
    def _quick(job: Job) -> Job:
        return replace(job, variants=tuple(name for name in job.variants if name != "compile"))

    def full(self) -> list[Job]:
        base = SHAPES[0] if self.gpu else (1024, 32000, 256, 512)
        every = [self.job(Case(*base, self.dtype, d)) for d in REGISTRY]
        variations = [
            self.job(Case(*base, self.dtype, d, masked=masked, frozen_head=frozen))
            for d in FEW for masked, frozen in ((0.5, False), (0.0, True), (0.5, True))
        ]  # fmt: skip
        dense = [self.job(Case(n, 1 << k, dtype=self.dtype)) for n in ((8192, 16384) if self.gpu else (512,)) for k in range(12, 19)]
        wide = self.tokens((1024, 2048, 4096, 8192, 16384, 32768, 65536))
        return [*self.standard(), *every, *variations, *self.vocabulary(), *self.width(), *self.chunks(), *wide, *dense, *self.rows()]

    # --- curves: a few variants each, at points that differ in one property

    def _curve(self, name: str, cases: Sequence[Case], only: Sequence[str], memory: bool = True) -> list[Job]:
        return [self.job(case, samples=min(self.samples, 6), memory=memory, curve=name, only=only) for case in cases]

    def tokens(self, counts: Sequence[int]) -> list[Job]:
        """Return cases for time and memory over the number of tokens. On a CPU the hidden sizes are small, to save time."""
        v, ds, dt = (128256, 2048, 4096) if self.gpu else (32000, 64, 128)
        only = ["floor", "eager", *self.best[:1], *(f"{name}@budget=128" for name in self.best[:1])]
        return self._curve("tokens", [Case(n, v, ds, dt, self.dtype) for n in counts], only)

    def vocabulary(self) -> list[Job]:
        n, ds, dt = (8192, 2048, 4096) if self.gpu else (512, 128, 256)
        return self._curve("vocabulary", [Case(n, 1 << k, ds, dt, self.dtype) for k in range(12, 19)], ["floor", "eager", *self.best])

    def width(self) -> list[Job]:
        n, v, widths = (8192, 128256, (512, 1024, 2048, 4096, 8192)) if self.gpu else (512, 32000, (64, 128, 256, 512, 1024))
        return self._curve(
            "student width", [Case(n, v, ds, 2 * widths[1], self.dtype) for ds in widths], ["floor", "eager", *self.best], False
        )

    def chunks(self) -> list[Job]:
        """Return one case whose variants differ in the rows per chunk."""
        shape = SHAPES[0] if self.gpu else (2048, 32000, 256, 512)
        counts = [1 << k for k in range(6, 14) if 1 << k <= shape[0]]
        return self._curve(
            "rows per chunk", [Case(*shape, self.dtype)], ["floor", *(f"{b}@rows={c}" for b in self.best[:1] for c in counts)]
        )

    def precision(self) -> list[Job]:
        """Return cases for the errors against float64 as the student approaches its teacher, with wide and narrow logits."""
        n, v, d = (512, 128256, 2048) if self.gpu else (64, 32000, 256)
        ours = [f"{name}{narrow}" for name in self.ours[:1] for narrow in ("", "/bfloat16")]
        cases = [Case(n, v, d, d, "bfloat16", divergence, gap=gap) for divergence in FEW for gap in (1.0, 0.3, 0.1, 0.03)]
        jobs = [self.job(case, samples=0, memory=False, curve="gap", only=()) for case in cases]
        return [replace(job, variants=("eager", *self._peers(job.case), *ours)) for job in jobs]

    def _peers(self, case: Case) -> list[str]:
        return [
            name for name in variants.peers_for(case, self.device)
            if variants.operation_of(name, case) == case.operation and (self.peers is None or name in self.peers)
        ]  # fmt: skip

    def rows(self, divergences: Sequence[str] = tuple(REGISTRY)) -> list[Job]:
        """Return cases that compare the row kernels alone with one pass over the same memory, at several vocabularies.

        On a GPU, also with float32 logits whose bfloat16 gradient overwrites them, as in the loss with a bfloat16 head.
        """
        ours = [f"rows:{name}" for name in variants.compiled(self.ours) if name != "torch"]
        wide = ["floor/float32", *(f"{name}/float32" for name in ours)] if self.gpu else []
        n = 4096 if self.gpu else 256
        return [
            self.job(
                Case(n, v, dtype="bfloat16", divergence=d), samples=max(self.samples, 15), memory=False, curve="row kernels",
                only=["floor", *ours, *wide],
            )
            for d in divergences
            for v in ROW_VOCABULARIES
        ]  # fmt: skip
