"""A batch for head taps, and comparisons of a tap's loss and gradients with those of the model's logits."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kdkernels as kd
from kdkernels.tap.head import HeadTap

VOCAB = 96
IDS = torch.randint(4, VOCAB, (2, 8), generator=torch.Generator().manual_seed(1))
ROWS = torch.tensor([1, 4, 5, 12, 14])
TEACHER = 3 * torch.randn(len(ROWS), VOCAB, generator=torch.Generator().manual_seed(2))


def loss_of(side: Any, teacher: Tensor = TEACHER) -> Tensor:
    return kd.distillation_loss(side, teacher, temperature=2.0, backend="torch")


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    assert actual.keys() == expected.keys()
    largest = max(g.abs().max().item() for g in expected.values())
    for name, gradient in expected.items():
        error = (actual[name] - gradient).abs().max().item() / largest
        assert error <= tolerance, f"{name}: {error:.2e}"


def assert_falls_back(model: nn.Module, reason: str) -> None:
    """Check that the tap uses the dense logits, with a warning that matches ``reason``, and gives their loss and gradients."""
    tap = HeadTap(model)
    with pytest.warns(UserWarning, match=f"dense logits are used.*{reason}"):
        loss = tap(model, lambda tapped: loss_of(tapped.side(ROWS)), input_ids=IDS)
    actual = gradients(model, loss)
    dense = loss_of(model(input_ids=IDS, use_cache=False).logits.flatten(0, 1)[ROWS])
    assert loss.item() == pytest.approx(dense.item(), rel=1e-5)
    expected = gradients(model, dense)
    assert expected
    assert_same_gradients(actual, expected)


def assert_equals_the_model(model: nn.Module, **inputs: Any) -> HeadTap:
    """Check that loss and gradients equal those from the logits, without a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        tap = HeadTap(model)
        loss = tap(model, lambda tapped: loss_of(tapped.side(ROWS)), input_ids=IDS, **inputs)
    actual = gradients(model, loss)
    dense = loss_of(model(input_ids=IDS, use_cache=False, **inputs).logits.flatten(0, 1)[ROWS])
    assert loss.item() == pytest.approx(dense.item(), rel=1e-5)
    assert_same_gradients(actual, gradients(model, dense))
    assert tap.fallback_reason is None
    return tap
