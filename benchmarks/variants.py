"""How a case may be computed. A variant is a name; ``build`` turns it into a step: one forward and backward pass.

``floor``: the matrix products alone. ``eager`` and ``compile``: the dense formula. ``torch``, ``native``, ``triton``, ``cuda``: a
backend of ours, with ``/bfloat16`` or ``/float16`` appended for that ``logits_dtype``. A new peer is one more entry of ``_BUILDERS``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import kdkernels as kd
from kdkernels import LMHead

from .cases import Case, Inputs
from .cases import build as build_inputs

Step = Callable[[], Tensor | None]
"""Leaves gradients in the inputs and returns the loss; the floor has neither."""

BACKENDS = ("torch", "native", "triton", "cuda")


def build(variant: str, case: Case, inputs: Inputs, **options: Any) -> Step:
    """The step of a variant.

    Args:
        options: keywords for ``distillation_loss``; only our own variants look at them.

    Raises:
        Exception: whatever says that it cannot run here, before anything is measured.
    """
    name, _, logits_dtype = variant.partition("/")
    if name in BACKENDS:
        return _ours(case, inputs, backend=name, logits_dtype=getattr(torch, logits_dtype) if logits_dtype else None, **options)
    if name not in _BUILDERS:
        raise ValueError(f"variant {variant!r} is unknown; valid: {', '.join((*_BUILDERS, *BACKENDS))}")
    return _BUILDERS[name](case, inputs)


def default_variants(case: Case, device: str) -> list[str]:
    """What a run measures if nobody says otherwise: our backends that can run, each in the forms that differ for this dtype."""
    probe = build_inputs(replace(case, n=1, v=8), device)

    def runs(backend: str) -> bool:
        try:
            kd.plan(probe.student, probe.teacher, backend=backend)
        except kd.BackendUnavailable:
            return False
        return True

    ours = [name for name in BACKENDS if runs(name)]
    narrow = [f"{name}/{case.dtype}" for name in ours if case.torch_dtype.itemsize == 2]
    return ["floor", "eager", "compile", *ours, *narrow]


def check(variant: str, case: Case, device: str) -> None:
    """That a variant computes the case's loss and gradients at all: a small relative of the case against float64.

    Raises:
        RuntimeError: the loss or a gradient is off by more than the dtype explains.
    """
    if variant == "floor":
        return
    small = replace(case, n=96, v=min(case.v, 1000))
    inputs = build_inputs(small, device)
    loss = build(variant, small, inputs)()
    student, teacher = (LMHead(s.hidden.detach().double(), s.weight.detach().double()) for s in (inputs.student, inputs.teacher))
    truth = Inputs(student, teacher)
    for tensor in truth.trained:
        tensor.requires_grad_()
    true_loss = kd.distillation_loss(student, teacher, divergence=case.divergence, temperature=case.temperature, backend="reference")
    true_loss.backward()
    tolerance = 0.05 if case.torch_dtype.itemsize == 2 else 1e-4
    got: list[Any] = [loss, *(t.grad for t in inputs.trained)]
    expected: list[Any] = [true_loss.detach(), *(t.grad for t in truth.trained)]
    for name, a, b in zip(("loss", "hidden gradient", "head gradient"), got, expected, strict=True):
        error = float((a.double() - b).norm() / b.norm())
        if not error <= tolerance:
            raise RuntimeError(f"the {name} differs from the float64 reference by {error:.1e}, more than {tolerance:.0e}")


def _ours(case: Case, inputs: Inputs, **options: Any) -> Step:
    options = {"divergence": case.divergence, "temperature": case.temperature, **options}
    kd.plan(inputs.student, inputs.teacher, **options)  # raises where the backend cannot run

    def step() -> Tensor:
        loss = kd.distillation_loss(inputs.student, inputs.teacher, **options)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    return step


def _floor(case: Case, inputs: Inputs) -> Step:
    """The four matrix products over all rows at once, each into memory that is there already."""
    (h_s, w_s), (h_t, w_t) = ((side.hidden.detach(), side.weight.detach()) for side in (inputs.student, inputs.teacher))
    z_s, z_t = (torch.empty(case.n, case.v, dtype=h_s.dtype, device=h_s.device) for _ in range(2))
    d_hidden, d_weight = torch.empty_like(h_s), torch.empty_like(w_s)

    def step() -> None:
        torch.mm(h_s, w_s.t(), out=z_s)
        torch.mm(h_t, w_t.t(), out=z_t)
        torch.mm(z_s, w_s, out=d_hidden)
        torch.mm(z_s.t(), h_s, out=d_weight)

    return step


def _dense_loss(case: Case) -> Callable[[Tensor, Tensor], Tensor]:
    """The mean over tokens of T^2 D from ``[N, V]`` logits, with float32 softmaxes, as a good engineer writes it."""
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

    formulas = {"forward_kl": forward_kl, "reverse_kl": reverse_kl, "jsd": jsd}
    if case.divergence not in formulas:
        raise ValueError(f"no dense formula of {case.divergence} here; there are {', '.join(formulas)}")
    return formulas[case.divergence]


def _eager(case: Case, inputs: Inputs, transform: Callable[[Any], Any] = lambda f: f) -> Step:
    formula = _dense_loss(case)

    def loss_of(h_s: Tensor, w_s: Tensor, h_t: Tensor, w_t: Tensor) -> Tensor:
        with torch.no_grad():
            z_t = h_t @ w_t.t()
        return formula(h_s @ w_s.t(), z_t)

    dense: Callable[..., Tensor] = transform(loss_of)
    s, t = inputs.student, inputs.teacher

    def step() -> Tensor:
        loss = dense(s.hidden, s.weight, t.hidden, t.weight)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    return step


def _compile(case: Case, inputs: Inputs) -> Step:
    return _eager(case, inputs, torch.compile)


_BUILDERS: dict[str, Callable[[Case, Inputs], Step]] = {"floor": _floor, "eager": _eager, "compile": _compile}
