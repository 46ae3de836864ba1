"""Variants: the implementations of a case. A variant is a name; ``build`` turns it into a step: one forward and backward pass.

floor           only the work that no loss can avoid: the matrix products of the heads, or one pass over the logits;
                ``floor/float32`` with float32 logits
eager, compile  the dense formula
native, ...     a backend of kdkernels; ``native/bfloat16`` with that ``logits_dtype``, ``native@rows=512`` with that many rows per chunk,
                ``native@budget=128`` with a memory budget in MiB
rows:native     the backend's row kernels alone, on logits, into preallocated memory; ``rows:native/float32`` on float32 logits, with the
                gradient written over them in the case's dtype, as the loss does by default for a 16-bit head on a GPU
trl, ...        another library: see peers.py
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import kdkernels as kd

from .. import divergences, reference
from ..backends import selection
from ..backends.rows import FORWARD, STATE, RowBatch, Stage
from ..fused import chunking, gemm
from ..fused.call import Call
from ..fused.work import Form
from .cases import IGNORED, Case, Inputs, tensors
from .cases import build as build_inputs
from .peers import PEERS

Step = Callable[[], Tensor | None]
"""Writes gradients to the inputs and returns the loss, 0-dim or per token; the floor does neither. A step that overwrites its inputs has a
method ``prepare``, which restores them and is not timed."""

BACKENDS = ("cuda", "triton", "native", "torch")


@dataclass(frozen=True)
class Variant:
    """The parsed name of a variant."""

    name: str
    logits_dtype: str | None = None
    chunk_rows: int | None = None
    budget_mib: int | None = None
    rows_only: bool = False

    @classmethod
    def parse(cls, text: str) -> Variant:
        name, _, option = text.partition("@")
        key, _, value = option.partition("=")
        if option and (key not in ("rows", "budget") or not value.isdigit() or int(value) == 0):
            raise ValueError(f"variant {text!r}: after @ comes rows=512 or budget=128 (MiB)")
        number = int(value) if value else None
        name, _, logits_dtype = name.partition("/")
        rows_only = name.startswith("rows:")
        return cls(
            name.removeprefix("rows:"),
            logits_dtype or None,
            number if key == "rows" else None,
            number if key == "budget" else None,
            rows_only,
        )

    @property
    def is_ours(self) -> bool:
        return self.name in BACKENDS

    @property
    def floor(self) -> str:
        """The variant that is the lower bound of this one: the floor; for row kernels, with logits of the same dtype."""
        return f"floor/{self.logits_dtype}" if self.rows_only and self.logits_dtype else "floor"

    def floor_bytes(self, case: Case) -> int:
        """Return the bytes that an operation on logits must move: ``case.floor_bytes``, with this variant's dtype of the logits."""
        if case.has_heads or self.logits_dtype is None:
            return case.floor_bytes
        sides = 2 if case.operation == "distillation" else 1
        read = _dtype(self.logits_dtype).itemsize
        return case.valid * case.v * (sides * read + case.torch_dtype.itemsize)

    @property
    def options(self) -> dict[str, Any]:
        """Keywords for ``distillation_loss``."""
        options = {
            "backend": self.name,
            "logits_dtype": _dtype(self.logits_dtype) if self.logits_dtype else None,
            "chunk_rows": self.chunk_rows,
            "memory_budget": self.budget_mib << 20 if self.budget_mib else None,
        }
        return {k: v for k, v in options.items() if v is not None}


def _dtype(name: str) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def operation_of(variant: str, case: Case) -> str:
    """Return the operation of a variant: the case's, or its own if it is a bound."""
    return PEERS[variant].operation if variant in PEERS else case.operation


def build(variant: str, case: Case, inputs: Inputs) -> Step:
    """Return the step of a variant.

    Raises:
        Exception: of any type, if the variant cannot run here.
    """
    v = Variant.parse(variant)
    if v.is_ours:
        return _rows(v, case, inputs) if v.rows_only else _ours(v, case, inputs)
    if variant in PEERS:
        if (reason := PEERS[variant].cannot(case, inputs.device.type)) is not None:
            raise ValueError(reason)
        return _trained(PEERS[variant].build(case, inputs))
    if v.name == "floor":
        return _floor(v, case, inputs)
    if variant not in _BUILDERS:
        raise ValueError(f"variant {variant!r} is unknown; valid: {', '.join(('floor', *_BUILDERS, *BACKENDS, *PEERS))}")
    return _BUILDERS[variant](case, inputs)


def peers_for(case: Case, device: str) -> list[str]:
    """Return the installed peers that can run the case or a bound of it."""
    return [name for name, peer in PEERS.items() if peer.cannot(case, device) is None]


def backends_for(device: str, dtype: torch.dtype) -> list[str]:
    """Return the backends that "auto" may select, best first.

    Backends that can run but are not selected are left out: with TRITON_INTERPRET=1 Triton runs on a CPU, but timing it is pointless.
    """
    return [n for n in selection.auto_order(device) if selection.unavailable(n, device, (dtype, dtype)) is None]


def compiled(backends: list[str]) -> list[str]:
    """Return the backends with row kernels; if none has, the first backend."""
    return [name for name in backends if name != "torch"] or backends[:1]


def default_variants(case: Case, device: str, backends: list[str] | None = None, peers: list[str] | None = None) -> list[str]:
    """Return the default variants: the floor, the dense formula, installed peers, and kdkernels' backends.

    The backends are those that "auto" may select; the compiled ones also with a bfloat16 head's logits in bfloat16.
    """
    ours = backends_for(device, case.torch_dtype) if backends is None else backends
    narrow = [f"{name}/{case.dtype}" for name in compiled(ours) if case.has_heads and case.dtype == "bfloat16"]
    others = [name for name in peers_for(case, device) if peers is None or name in peers]
    return ["floor", "eager", "compile", *others, *ours, *narrow]


def prepare(step: Step) -> None:
    """Restore inputs that an earlier pass of a step has overwritten."""
    getattr(step, "prepare", lambda: None)()


# --- the truth


def _true_distillation(case: Case, inputs: Inputs) -> Tensor:
    return kd.distillation_loss(
        inputs.student, inputs.teacher, divergence=case.divergence, temperature=case.temperature,
        labels=inputs.labels if case.masked else None, backend="reference",
    )  # fmt: skip


def _true_cross_entropy(case: Case, inputs: Inputs) -> Tensor:
    return F.cross_entropy(_logits(tensors(inputs.student)), inputs.labels, ignore_index=IGNORED)


TRUTHS: dict[str, Callable[[Case, Inputs], Tensor]] = {"distillation": _true_distillation, "cross_entropy": _true_cross_entropy}
"""The true value of each operation: dense and differentiable, from float64 inputs."""

TOLERANCE = {8: 1e-10, 4: 1e-4, 2: 0.05}
"""Largest accepted relative error of a variant, by the bytes of its dtype."""


def errors(variant: str, case: Case, device: str) -> dict[str, float]:
    """Return relative errors against float64, in the Frobenius norm: of the loss, and of the gradient by each trained tensor."""
    inputs = build_inputs(case, device)
    step = build(variant, case, inputs)
    prepare(step)
    loss = step()
    if loss is None:
        return {}
    truth = inputs.double()
    true_loss = TRUTHS[operation_of(variant, case)](case, truth)
    true_loss.backward()  # type: ignore[no-untyped-call]
    names = ["loss", *(f"gradient of {x}" for x in (("hidden", "weight") if case.has_heads else ("logits",)))]
    # A row kernel returns losses per token, all of them valid.
    pairs: list[tuple[Any, Any]] = [(loss.double().mean(), true_loss.detach())]
    pairs += [(a.grad, b.grad) for a, b in zip(inputs.trained, truth.trained, strict=True)]
    return {name: float((a.double() - b).norm() / b.norm()) for name, (a, b) in zip(names, pairs, strict=False)}


def check(variant: str, case: Case, device: str) -> float | None:
    """Check a variant's loss and gradients on a small version of the case against float64.

    Returns:
        The largest relative error of a gradient; None for the floor, which has no gradients.

    Raises:
        RuntimeError: the error of the loss or a gradient is larger than the dtype explains.
    """
    by_name = errors(variant, replace(case, n=min(case.n, 96), v=min(case.v, 1000)), device)
    tolerance = TOLERANCE[case.torch_dtype.itemsize]
    for name, error in by_name.items():
        if not error <= tolerance:
            raise RuntimeError(f"the {name} differs from the float64 reference by {error:.1e}, more than {tolerance:.0e}")
    return max((error for name, error in by_name.items() if name != "loss"), default=None)


# --- ours


def _trained(loss_of: Callable[[], Tensor]) -> Step:
    """Return a step of a loss: forward and backward."""

    def step() -> Tensor:
        loss = loss_of()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    return step


def _call(v: Variant, case: Case, inputs: Inputs) -> dict[str, Any]:
    labels = inputs.labels if case.masked else None
    return {"divergence": case.divergence, "temperature": case.temperature, "labels": labels, **v.options}


def _ours(v: Variant, case: Case, inputs: Inputs) -> Step:
    if case.operation == "cross_entropy":
        return _trained(lambda: kd.cross_entropy(inputs.student, inputs.labels, IGNORED, **v.options))
    options = _call(v, case, inputs)
    kd.plan(inputs.student, inputs.teacher, **options)  # raises if the backend cannot run
    return _trained(lambda: kd.distillation_loss(inputs.student, inputs.teacher, **options))


def held(variant: str, case: Case, inputs: Inputs) -> dict[str, int]:
    """Return the bytes that a pass of kdkernels holds by design (docs/memory.md), with the rows and number of its chunks.

    Forward: the chunk buffers and the unscaled gradients that it saves: hidden ``[N, Ds]`` in its own dtype (float32 for float16),
    head ``[V, Ds]`` in float32. Backward: these and the returned gradients in the parameters' dtypes, without chunk buffers.
    """
    p = kd.plan(inputs.student, inputs.teacher, **_call(Variant.parse(variant), case, inputs))
    size = case.torch_dtype.itemsize
    returned = sum(t.numel() * size for t in inputs.trained)
    saved = returned if case.has_heads else 0
    if case.has_heads and not case.frozen_head:
        saved += case.v * case.ds * (max(size, 4) - size)
    if case.has_heads and case.dtype == "float16":
        saved += case.n * case.ds * (4 - size)
    return {
        "rows_per_chunk": p.rows_per_chunk,
        "num_chunks": p.num_chunks,
        "buffer_bytes": p.buffer_bytes,
        "accounted_bytes": saved + max(p.buffer_bytes, returned),
    }


def _rows(v: Variant, case: Case, inputs: Inputs) -> Step:
    """Return a step that only calls the backend's ``rows`` on preallocated tensors, without any other allocation or launch."""
    if case.has_heads or case.masked or case.operation != "distillation":
        raise ValueError("row kernels take logits without masked tokens, in a distillation")
    z_s, z_t = (tensors(side)[0].detach() for side in (inputs.student, inputs.teacher))
    if v.logits_dtype:
        return _RowsInPlace(v, case, z_s, z_t, inputs.trained[0])
    return _row_kernels(v, case, z_s, z_t, torch.empty_like(z_s), inputs.trained[0])


def _row_kernels(v: Variant, case: Case, z_s: Tensor, z_t: Tensor, dz: Tensor, trained: Tensor) -> Callable[[], Tensor]:
    """Return a step that calls the backend's ``rows`` once, and sets ``dz`` as the gradient of ``trained``."""
    form = Form(dtype=dz.dtype)
    problem = Call(
        divergences.resolve(case.divergence), case.v, temperature=case.temperature, student=form, teacher=form, wants_input=True,
        backend=selection.select(v.name, z_s.device.type, (z_s.dtype, z_t.dtype)),
    )  # fmt: skip
    loss = torch.empty(case.n, dtype=problem.compute_dtype, device=z_s.device)
    state = torch.empty(len(STATE), case.n, dtype=problem.compute_dtype, device=z_s.device)
    # With this dz_scale, dz is the gradient of the mean.
    batch = RowBatch(z_s, z_t, None, None, None, None, state, loss=loss, dz=dz, dz_scale=1 / case.n)
    kernel = selection.load(problem.backend)

    def step() -> Tensor:
        kernel.rows(problem, batch, FORWARD | Stage.GRADIENT)
        trained.grad = dz
        return loss

    return step


class _RowsInPlace:
    """Row kernels on logits of a wider dtype than the case's. The gradient overwrites them; each row begins where its logits begin."""

    def __init__(self, v: Variant, case: Case, z_s: Tensor, z_t: Tensor, trained: Tensor) -> None:
        wide = _dtype(str(v.logits_dtype))
        if wide.itemsize <= z_s.dtype.itemsize:
            raise ValueError(f"variant {v.name}/{v.logits_dtype}: in place, the logits are wider than the case's {case.dtype}")
        width = chunking.padded_vocab(case.v, wide.itemsize)
        rows = [torch.empty(case.n, width, dtype=wide, device=z.device) for z in (z_s, z_t)]
        self._logits, self._source = rows[0][:, : case.v], z_s
        rows[1][:, : case.v].copy_(z_t)
        dz = rows[0].view(z_s.dtype)[:, : case.v]
        self._step = _row_kernels(v, case, self._logits, rows[1][:, : case.v], dz, trained)

    def prepare(self) -> None:
        """Write the student's logits again, because the last pass overwrote them with the gradient."""
        self._logits.copy_(self._source)

    def __call__(self) -> Tensor:
        return self._step()


# --- the floor and the dense formula


def _floor(v: Variant, case: Case, inputs: Inputs) -> Step:
    """Return the step of the floor: all valid rows at once, into preallocated memory."""
    n, sides = case.valid, [inputs.student] + [inputs.teacher] * (case.operation == "distillation")
    rows = [[t.detach() for t in tensors(side)] for side in sides]
    dtype = _dtype(v.logits_dtype or case.dtype)
    sources = [r[0][:n] for r in rows]
    if not case.has_heads:
        dz = torch.empty_like(sources[0])
        sources = [z.to(dtype) for z in sources]

        def read_all_and_write() -> None:
            torch.add(sources[0], sources[1], out=dz) if len(sources) == 2 else torch.mul(sources[0], 2, out=dz)

        return read_all_and_write
    weights = [r[1] for r in rows]
    logits = [torch.empty(n, case.v, dtype=dtype, device=h.device) for h in sources]
    dz = logits[0].view(case.torch_dtype)[:, : case.v]  # the products of backward are in the heads' dtype
    d_hidden, d_weight = torch.empty_like(sources[0]), torch.empty_like(weights[0])

    def multiply() -> None:
        for h, w, z in zip(sources, weights, logits, strict=True):
            gemm.logits(h, w, z)
        torch.mm(dz, weights[0], out=d_hidden)
        if not case.frozen_head:
            torch.mm(dz.t(), sources[0], out=d_weight)

    return multiply


def _logits(side: tuple[Tensor, ...]) -> Tensor:
    return side[0] @ side[1].t() if len(side) == 2 else side[0]


def _dense_loss(case: Case) -> Callable[[Tensor, Tensor], Tensor]:
    """Return a function of ``[N, V]`` logits: the mean over tokens of T^2 D, with float32 softmaxes, in idiomatic PyTorch."""
    t, beta = case.temperature, kd.JSD().beta

    def log_q_and_p(z_s: Tensor, z_t: Tensor) -> tuple[Tensor, Tensor]:
        return F.log_softmax(z_s.float() / t, dim=-1), F.log_softmax(z_t.float() / t, dim=-1)

    def forward_kl(z_s: Tensor, z_t: Tensor) -> Tensor:
        log_q, log_p = log_q_and_p(z_s, z_t)
        return t**2 * F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")

    def reverse_kl(z_s: Tensor, z_t: Tensor) -> Tensor:
        log_q, log_p = log_q_and_p(z_s, z_t)
        return t**2 * F.kl_div(log_p, log_q, log_target=True, reduction="batchmean")

    def jsd(z_s: Tensor, z_t: Tensor) -> Tensor:
        log_q, log_p = log_q_and_p(z_s, z_t)
        log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
        of_teacher = F.kl_div(log_m, log_p, log_target=True, reduction="batchmean")
        of_student = F.kl_div(log_m, log_q, log_target=True, reduction="batchmean")
        return t**2 * (beta * of_teacher + (1 - beta) * of_student)

    divergence = divergences.resolve(case.divergence)

    def by_definition(z_s: Tensor, z_t: Tensor) -> Tensor:
        x, u = z_s.float() / t, z_t.float() / t
        return t**2 * divergence.reference(reference.normalize(x, u, divergence), reference.normalize(u, x, divergence)).sum(-1).mean()

    return {"forward_kl": forward_kl, "reverse_kl": reverse_kl, "jsd": jsd}.get(case.divergence, by_definition)


def _eager(case: Case, inputs: Inputs, transform: Callable[[Any], Any] = lambda f: f) -> Step:
    student, teacher = tensors(inputs.student), tensors(inputs.teacher)
    if case.operation == "cross_entropy":
        dense: Callable[..., Tensor] = transform(lambda s, labels: F.cross_entropy(_logits(s).float(), labels, ignore_index=IGNORED))
        return _trained(lambda: dense(student, inputs.labels))
    formula = _dense_loss(case)

    def loss_of(s: tuple[Tensor, ...], t: tuple[Tensor, ...]) -> Tensor:
        with torch.no_grad():
            z_t = _logits(t)
        return formula(_logits(s), z_t)

    distil: Callable[..., Tensor] = transform(loss_of)
    if not case.masked:
        return _trained(lambda: distil(student, teacher))

    def over_valid_rows() -> Tensor:
        valid = inputs.labels != IGNORED
        return distil((student[0][valid], *student[1:]), (teacher[0][valid], *teacher[1:]))

    return _trained(over_valid_rows)


def _compile(case: Case, inputs: Inputs) -> Step:
    # Discard code for other shapes, and compile for this shape only, which gives the fastest code.
    torch.compiler.reset()
    return _eager(case, inputs, lambda f: torch.compile(f, dynamic=False))


_BUILDERS: dict[str, Callable[[Case, Inputs], Step]] = {"eager": _eager, "compile": _compile}
