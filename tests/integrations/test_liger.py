"""The losses with Liger's names, arguments and averages, compared with plain torch. ``liger_suite.py`` runs Liger's own tests."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kdkernels.compat import liger
from kdkernels.compat.liger import chunked_loss

N, V = 12, 37


def tensors() -> dict[str, Tensor]:
    torch.manual_seed(0)
    by_name = {
        "student": torch.randn(N, 8), "head": torch.randn(V, 8), "teacher": torch.randn(N, 16), "teacher_head": torch.randn(V, 16),
        "bias": torch.randn(V), "teacher_bias": torch.randn(V),
    }  # fmt: skip
    return {name: tensor.double().requires_grad_(name in ("student", "head", "bias")) for name, tensor in by_name.items()}


def labels() -> Tensor:
    values = torch.randint(V, (N,), generator=torch.Generator().manual_seed(1))
    values[::4] = -100
    return values


def jsd(log_q: Tensor, log_p: Tensor, beta: float) -> Tensor:
    if beta in (0.0, 1.0):
        a, b = (log_p, log_q) if beta == 0 else (log_q, log_p)
        return (a.exp() * (a - b)).sum(-1)
    log_m = torch.log(beta * log_p.exp() + (1 - beta) * log_q.exp())
    return beta * (log_p.exp() * (log_p - log_m)).sum(-1) + (1 - beta) * (log_q.exp() * (log_q - log_m)).sum(-1)


def gradients(loss: Tensor, *parameters: Tensor, scale: float = 1.0) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss * scale, parameters, retain_graph=True)


def assert_same(actual: Tensor, expected: Tensor, *parameters: Tensor, tolerance: float = 1e-9) -> None:
    """Check values and gradients, also for a scaled loss."""
    torch.testing.assert_close(actual.double(), expected.double(), rtol=tolerance, atol=tolerance)
    for scale in (1.0, 3.0):
        for gradient, expected_gradient in zip(
            gradients(actual, *parameters, scale=scale), gradients(expected, *parameters, scale=scale), strict=True
        ):
            torch.testing.assert_close(gradient, expected_gradient, rtol=10 * tolerance, atol=10 * tolerance)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("masked", [False, True])
def test_fused_linear_jsd(beta: float, masked: bool) -> None:
    t, y = tensors(), labels() if masked else None
    log_q, log_p = (F.log_softmax(t[a] @ t[b].T / 2, -1) for a, b in (("student", "head"), ("teacher", "teacher_head")))
    values = jsd(log_q, log_p, beta)
    expected = values.mean() if y is None else values[y != -100].mean()
    loss = liger.LigerFusedLinearJSD(beta, temperature=2.0)(t["student"], t["head"], t["teacher"], t["teacher_head"], y)
    assert_same(loss, expected, t["student"], t["head"])


def test_fused_linear_jsd_with_cross_entropy() -> None:
    t, y = tensors(), labels()
    z = t["student"] @ t["head"].T + t["bias"]
    u = t["teacher"] @ t["teacher_head"].T + t["teacher_bias"]
    soft = jsd(F.log_softmax(z / 2, -1), F.log_softmax(u / 2, -1), 0.2)[y != -100].mean()
    hard = F.cross_entropy(z, y)
    module = chunked_loss.LigerFusedLinearJSDLoss(0.3, 0.7, beta=0.2, temperature=2.0, chunk_size=5, return_soft_hard_loss=True)
    outputs = module(t["student"], t["head"], t["teacher"], t["teacher_head"], y, t["bias"], t["teacher_bias"])
    assert_same(outputs[0], 0.3 * hard + 0.7 * soft, t["student"], t["head"], t["bias"])
    torch.testing.assert_close(torch.stack(outputs[1:]).double(), torch.stack([soft, hard]), rtol=1e-6, atol=0)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("masked", [False, True])
def test_jsd_of_log_probabilities(beta: float, masked: bool) -> None:
    log_q = torch.randn(N, V).log_softmax(-1).requires_grad_()
    log_p, y = torch.randn(N, V).log_softmax(-1), labels() if masked else None
    values = jsd(log_q, log_p, beta)
    expected = values.mean() if y is None else values[y != -100].mean()
    assert_same(liger.LigerJSD(beta)(log_q, log_p, y), expected, log_q, tolerance=1e-6)


@pytest.mark.parametrize("reduction", ["batchmean", "mean", "sum", "none"])
@pytest.mark.parametrize("log_target", [False, True])
def test_kl_of_log_probabilities(reduction: str, log_target: bool) -> None:
    log_q = torch.randn(N, V).log_softmax(-1).requires_grad_()
    p = torch.randn(N, V).log_softmax(-1) if log_target else torch.randn(N, V).softmax(-1)
    loss = liger.LigerKLDIVLoss(reduction=reduction, log_target=log_target)(log_q, p)
    expected = F.kl_div(log_q, p, reduction=reduction, log_target=log_target)
    assert loss.shape == expected.shape
    assert_same(loss.sum(), expected.sum(), log_q, tolerance=1e-5)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"softcap": 5.0},
        {"label_smoothing": 0.1},
        {"lse_square_scale": 1e-2},
        {"ce_weight": True, "label_smoothing": 0.1, "lse_square_scale": 1e-2, "softcap": 5.0},
        {"use_token_scaling": True},
    ],
    ids=str,
)
def test_fused_linear_cross_entropy(options: dict[str, Any], reduction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kdkernels.compat.liger.cross_entropy.CHUNK_BYTES", 5 * 4 * V)
    t, y = tensors(), labels()
    x, weight, bias = (t[name].detach().float().requires_grad_() for name in ("student", "head", "bias"))
    class_weights = torch.rand(V) if options.get("ce_weight") else None
    z, valid = x @ weight.T + bias, y != -100
    if "softcap" in options:
        z = options["softcap"] * torch.tanh(z / options["softcap"])
    smoothing = options.get("label_smoothing", 0.0)
    values = F.cross_entropy(z, y, class_weights, label_smoothing=smoothing, reduction="none")
    squares = torch.where(valid, options.get("lse_square_scale", 0.0) * z.logsumexp(-1) ** 2, 0.0)
    if "use_token_scaling" in options:
        values = values * z.detach().softmax(-1).gather(1, y.clamp(min=0)[:, None]).squeeze(1)
    divisor = class_weights[y[valid]].sum() if class_weights is not None else valid.sum()
    expected = {"none": values + squares, "sum": (values + squares).sum(), "mean": values.sum() / divisor + squares.sum() / valid.sum()}
    module = liger.LigerFusedLinearCrossEntropyLoss(**{**options, "ce_weight": class_weights}, reduction=reduction)
    loss = module(weight, x, y, bias)
    upstream = torch.rand(N) if reduction == "none" else torch.ones(())
    assert_same((loss * upstream).sum(), (expected[reduction] * upstream).sum(), x, weight, bias, tolerance=1e-5)


def test_cross_entropy_returns_the_requested_outputs() -> None:
    t, y = tensors(), labels()
    x, weight = t["student"].detach().float(), t["head"].detach().float()
    module = liger.LigerFusedLinearCrossEntropyLoss(
        lse_square_scale=0.1, return_z_loss=True, return_token_accuracy=True, return_predicted_tokens=True
    )
    output = module(weight, x, y)
    assert isinstance(output, liger.CrossEntropyOutput)
    predicted, valid = (x @ weight.T).argmax(-1), y != -100
    assert torch.equal(output.predicted_tokens, predicted.masked_fill(~valid, -1))
    assert output.token_accuracy.item() == pytest.approx((predicted == y)[valid].float().mean().item())
    torch.testing.assert_close(output.z_loss, 0.1 * (x @ weight.T).logsumexp(-1)[valid].square().mean())


def test_different_vocabularies_raise() -> None:
    t = tensors()
    with pytest.raises(ValueError, match="vocab"):
        chunked_loss.liger_fused_linear_jsd(t["student"], t["head"], t["teacher"], t["teacher_head"][:-1], labels())
