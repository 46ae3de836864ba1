"""How a case may be computed. A variant is a name; ``build`` turns it into a step: one forward and backward pass.

``floor``: what no loss can do without, and nothing else: the matrix products of two heads, or one pass over given logits.
``eager`` and ``compile``: the dense formula. ``torch``, ``native``, ``triton``, ``cuda``: a backend of ours, with ``/bfloat16`` or
``/float16`` appended for that ``logits_dtype``. ``trl``, ``liger``: peers, where they are installed. A new one is one more entry of
``_BUILDERS``.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import kdkernels as kd
from kdkernels import LMHead, dispatch

from .cases import Case, Inputs, tensors
from .cases import build as build_inputs

Step = Callable[[], Tensor | None]
"""Leaves gradients in the inputs and returns the loss; the floor has neither."""

BACKENDS = ("cuda", "triton", "native", "torch")

PEERS = {"trl": "trl", "liger": "liger_kernel"}
"""Variant -> the package that it needs. Neither is a dependency."""


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
    """What a run measures if nobody says otherwise: the floor, the dense formula, peers that are installed, and our backends.

    Ours are those that "auto" may take, best first; the best of them with a bfloat16 head's logits in bfloat16 too.
    """
    probe = build_inputs(replace(case, n=1, v=8), device)

    def runs(backend: str) -> bool:
        try:
            kd.plan(probe.student, probe.teacher, backend=backend)
        except kd.BackendUnavailable:
            return False
        return True

    # Not every backend that can run: with TRITON_INTERPRET=1 Triton can on a CPU, but there is nothing to time in an interpreter.
    ours = [name for name in dispatch.AUTO_ORDER.get(device, ("torch",)) if runs(name)]
    narrow = [f"{name}/{case.dtype}" for name in ours[:1] if case.has_heads and case.dtype == "bfloat16"]
    peers = [name for name, package in PEERS.items() if case.has_heads and importlib.util.find_spec(package) is not None]
    return ["floor", "eager", "compile", *peers, *ours, *narrow]


def check(variant: str, case: Case, device: str) -> float | None:
    """That a variant computes the case's loss and gradients at all: a small relative of the case against float64.

    Returns:
        The largest relative error of a gradient, in the Frobenius norm; None for the floor, which has no gradients.

    Raises:
        RuntimeError: the loss or a gradient is off by more than the dtype explains.
    """
    if variant == "floor":
        return None
    small = replace(case, n=96, v=min(case.v, 1000))
    inputs = build_inputs(small, device)
    loss = build(variant, small, inputs)()
    truth = inputs.double()
    true_loss = kd.distillation_loss(
        truth.student, truth.teacher, divergence=case.divergence, temperature=case.temperature, backend="reference"
    )
    true_loss.backward()  # type: ignore[no-untyped-call]
    tolerance = 0.05 if case.torch_dtype.itemsize == 2 else 1e-4
    got: list[Any] = [loss, *(t.grad for t in inputs.trained)]
    expected: list[Any] = [true_loss.detach(), *(t.grad for t in truth.trained)]
    names = ("loss", "gradient of hidden", "gradient of weight") if case.has_heads else ("loss", "gradient of logits")
    errors = [float((a.double() - b).norm() / b.norm()) for a, b in zip(got, expected, strict=True)]
    for name, error in zip(names, errors, strict=True):
        if not error <= tolerance:
            raise RuntimeError(f"the {name} differs from the float64 reference by {error:.1e}, more than {tolerance:.0e}")
    return max(errors[1:])


def _ours(case: Case, inputs: Inputs, **options: Any) -> Step:
    options = {"divergence": case.divergence, "temperature": case.temperature, **options}
    kd.plan(inputs.student, inputs.teacher, **options)  # raises where the backend cannot run
    return _trained(lambda: kd.distillation_loss(inputs.student, inputs.teacher, **options))


def _trained(loss_of: Callable[[], Tensor]) -> Step:
    """Forward and backward of a loss."""

    def step() -> Tensor:
        loss = loss_of()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    return step


def _floor(case: Case, inputs: Inputs) -> Step:
    """Everything over all rows at once, into memory that is there already."""
    if not case.has_heads:
        z_s, z_t = (tensors(side)[0].detach() for side in (inputs.student, inputs.teacher))
        dz = torch.empty_like(z_s)

        def read_both_and_write() -> None:
            torch.add(z_s, z_t, out=dz)

        return read_both_and_write
    (h_s, w_s), (h_t, w_t) = ([t.detach() for t in tensors(side)] for side in (inputs.student, inputs.teacher))
    z_s, z_t = (torch.empty(case.n, case.v, dtype=h_s.dtype, device=h_s.device) for _ in range(2))
    d_hidden, d_weight = torch.empty_like(h_s), torch.empty_like(w_s)

    def multiply() -> None:
        torch.mm(h_s, w_s.t(), out=z_s)
        torch.mm(h_t, w_t.t(), out=z_t)
        torch.mm(z_s, w_s, out=d_hidden)
        torch.mm(z_s.t(), h_s, out=d_weight)

    return multiply


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

    def logits(side: tuple[Tensor, ...]) -> Tensor:
        return side[0] @ side[1].t() if len(side) == 2 else side[0]

    def loss_of(student: tuple[Tensor, ...], teacher: tuple[Tensor, ...]) -> Tensor:
        with torch.no_grad():
            z_t = logits(teacher)
        return formula(logits(student), z_t)

    dense: Callable[..., Tensor] = transform(loss_of)
    student, teacher = tensors(inputs.student), tensors(inputs.teacher)
    return _trained(lambda: dense(student, teacher))


def _compile(case: Case, inputs: Inputs) -> Step:
    # Without what was compiled for another shape, and for this one shape alone: that is as fast as it gets.
    torch.compiler.reset()
    return _eager(case, inputs, lambda f: torch.compile(f, dynamic=False))


_BETA = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": kd.JSD().beta}
"""How both peers name divergences."""


def _heads(inputs: Inputs) -> tuple[LMHead, LMHead]:
    if not isinstance(inputs.student, LMHead) or not isinstance(inputs.teacher, LMHead):
        raise ValueError("this peer takes hidden states and heads, not logits")
    return inputs.student, inputs.teacher


def _trl(case: Case, inputs: Inputs) -> Step:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction  # type: ignore[import-not-found]

    (s, t), beta = _heads(inputs), _BETA[case.divergence]

    def loss_of() -> Tensor:
        per_token, _ = ChunkedDivergenceFunction.apply(s.hidden, s.weight, None, t.hidden, t.weight, None, beta, case.temperature)
        mean: Tensor = per_token.mean() * case.temperature**2
        return mean

    return _trained(loss_of)


def _liger(case: Case, inputs: Inputs) -> Step:
    """Its fused linear kernel on a GPU, its chunked loss elsewhere."""
    (s, t), beta = _heads(inputs), _BETA[case.divergence]
    labels = torch.zeros(case.n, dtype=torch.long, device=inputs.device)  # the chunked loss wants some, whatever their weight
    if inputs.device.type == "cuda":
        from liger_kernel.transformers import LigerFusedLinearJSD  # type: ignore[import-not-found]

        fused = LigerFusedLinearJSD(jsd_beta=beta, temperature=case.temperature)
    else:
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss  # type: ignore[import-not-found]

        fused = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta, temperature=case.temperature)
    return _trained(lambda: fused(s.hidden, s.weight, t.hidden, t.weight, labels) * case.temperature**2)


_BUILDERS: dict[str, Callable[[Case, Inputs], Step]] = {
    "floor": _floor,
    "eager": _eager,
    "compile": _compile,
    "trl": _trl,
    "liger": _liger,
}
