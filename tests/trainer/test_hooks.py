"""The trainer uses private parts of transformers in one file, and accepts batches of other collators."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest
import torch
from training import dense, make_tokenizer, trainers

pytest.importorskip("transformers")
from transformers import Trainer

import kdkernels
from kdkernels.trainer.batch import Batch

PACKAGE = Path(kdkernels.__file__).parent


def test_private_methods_of_transformers_are_used_in_one_file() -> None:
    private = {name for name in vars(Trainer) if name.startswith("_") and not name.startswith("__")}
    assert {"_save_checkpoint", "_prepare_inputs"} <= private
    files = [file for folder in ("trainer", "cli/train") for file in (PACKAGE / folder).glob("*.py") if file.name != "hooks.py"]
    used = {
        f"{file.name}: {name}"
        for file in files
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if (name := getattr(node, "attr", None) or getattr(node, "name", None)) in private
    }
    assert not used


def test_batch_with_other_keys_and_one_view_is_accepted(tmp_path: Path) -> None:
    trainer = trainers(tmp_path, make_tokenizer())()
    batch = trainer.data_collator(trainer.train_dataset)
    expected = dense(trainer, batch) / batch["scored"].numel()
    one_view: dict[str, Any] = {name: value for name, value in batch.items() if not name.startswith("teacher_") and name != "sizes"}
    torch.testing.assert_close(trainer.compute_loss(trainer.model, {**one_view, "source": ["a"] * 12}), expected, rtol=1e-12, atol=0)
    assert Batch.of(one_view).item_indices().tolist() == Batch.of(batch).item_indices().tolist()
