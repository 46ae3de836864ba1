"""The experiments of benchmarks/learning run, and their tables are correct. Committed results are not repeated."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("sklearn")  # the digits data set

from benchmarks.learning import digits
from benchmarks.learning.table import table


def test_same_seed_gives_equal_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digits, "STEPS", 12)
    monkeypatch.setattr(digits, "TEMPERATURES", (2.0,))
    rows = digits.one_seed(0)
    assert list(rows) == ["teacher", "labels alone", "soft targets, T = 2", "soft targets and labels, T = 2", "logits matched"]
    assert rows["labels alone"]["errors on threes, none seen, %"] == 100.0  # the student never sees a label "three"
    assert rows == digits.one_seed(0)
    assert rows != digits.one_seed(1)


def test_training_and_test_images_are_disjoint() -> None:
    data = digits.split(0)
    train_images = {tuple(image.tolist()) for image in data.train}
    assert len(data.train) == 1000
    assert len(data.test) == 797
    assert not any(tuple(image.tolist()) in train_images for image in data.test)
    assert data.train[:300].shape == (300, 64)


def test_jitter_moves_by_at_most_one_pixel() -> None:
    image = torch.zeros(1, 8, 8)
    image[0, 4, 4] = 1
    moved = digits.jitter(image.reshape(1, 64).expand(500, 64), torch.Generator().manual_seed(0)).view(-1, 8, 8)
    assert torch.equal(moved.sum((1, 2)), torch.ones(500))
    positions = {tuple(m.nonzero()[0].tolist()) for m in moved}
    assert positions == {(i, j) for i in (3, 4, 5) for j in (3, 4, 5)}


def test_table_shows_mean_and_spread() -> None:
    record: dict[str, Any] = {
        "environment": {"cpu": "a CPU", "torch": "2", "date": "2026-01-01"},
        "runs": [{"a": {"x": 1.0}, "b": {"x": 2.0, "y": 5.0}}, {"a": {"x": 3.0}, "b": {"x": 2.0, "y": 7.0}}],
    }
    text = table(record)
    assert "| a | 2.00 ± 1.41 |  |" in text
    assert "| b | 2.00 ± 0.00 | 6.00 ± 1.41 |" in text
    assert "over 2 seeds" in text
