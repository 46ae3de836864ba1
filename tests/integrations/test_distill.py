"""``distill`` patches any transformers Trainer: its steps equal those of the dense formula."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from patched import ARGUMENTS, BUDGET, ROWS, assert_agree, encoded, lines_for, run
from torch.nn import functional as F
from training import gradients, make_model, make_rows, make_tokenizer, trainers
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

from kdkernels import JSD
from kdkernels.divergences import Divergence
from kdkernels.integrations import UnsupportedVersion
from kdkernels.integrations.transformers import distill

VOCAB = 192


def build(folder: Path, cls: type[Trainer] = Trainer, **options: Any) -> Trainer:
    args = TrainingArguments(**{**ARGUMENTS, "output_dir": str(folder), **options})
    collator = DataCollatorForSeq2Seq(make_tokenizer())
    return cls(make_model(16, 1, VOCAB, seed=1, initializer_range=0.2), args, data_collator=collator, train_dataset=encoded())


def teacher() -> Any:
    return make_model(24, 1, VOCAB, seed=2, initializer_range=0.4)


class Dense(Trainer):
    """A Trainer with the same loss, computed from dense logits."""

    teacher_model: Any
    settings: tuple[Divergence | str, float, float]

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        from kdkernels.divergences import parse

        divergence, temperature, ce_weight = self.settings
        labels = inputs.pop("labels")[:, 1:]
        mask = labels != -100
        z = model(**inputs).logits[:, :-1][mask]
        with torch.no_grad():
            u = self.teacher_model(**inputs).logits[:, :-1][mask]
        log_q, log_p = F.log_softmax(z / temperature, -1), F.log_softmax(u / temperature, -1)
        distance = temperature**2 * parse(divergence).reference(log_q, log_p).sum()
        return (distance + ce_weight * F.cross_entropy(z, labels[mask], reduction="sum")) / num_items_in_batch


@pytest.mark.parametrize(
    ("divergence", "temperature", "ce_weight", "options"),
    [
        ("forward_kl", 1.0, 0.0, {}),
        (JSD(beta=0.3), 2.0, 0.5, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}),
    ],
)
def test_three_steps_equal_the_dense_formula(
    tmp_path: Path, divergence: Divergence | str, temperature: float, ce_weight: float, options: dict[str, Any]
) -> None:
    dense = build(tmp_path, Dense, **options)
    assert isinstance(dense, Dense)
    dense.teacher_model, dense.settings, dense._loss_shifts_labels = teacher().eval(), (divergence, temperature, ce_weight), True
    expected = run(dense, VOCAB)
    trainer = build(tmp_path, **options)
    distill(trainer, teacher(), divergence=divergence, temperature=temperature, ce_weight=ce_weight, memory_budget=BUDGET)
    actual = run(trainer, VOCAB)
    assert_agree(expected, actual)
    assert actual.rows_of_logits <= ROWS < expected.rows_of_logits


def test_first_gradient_equals_that_of_the_distillation_trainer(tmp_path: Path) -> None:
    student = make_model(16, 1, VOCAB, seed=1, initializer_range=0.2)
    distillation_trainer = trainers(tmp_path, make_tokenizer())(
        student, teacher(), rows=make_rows(12), dtype=torch.float32, temperature=2.0, ce_weight=0.5, divergence="reverse_kl",
        per_device_train_batch_size=12,
    )  # fmt: skip
    expected = gradients(distillation_trainer)
    trainer = build(tmp_path, per_device_train_batch_size=12, max_steps=1)
    distill(trainer, teacher(), divergence="reverse_kl", temperature=2.0, ce_weight=0.5)
    actual = run(trainer, VOCAB).gradients
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, rtol=0, atol=1e-5 * gradient.abs().max().item())


def test_undo_restores_the_trainers_loss(tmp_path: Path) -> None:
    trainer = build(tmp_path)
    accepts = trainer.model_accepts_loss_kwargs
    model = teacher()
    patch = distill(trainer, model)
    assert distill(trainer, model) is patch
    with pytest.raises(ValueError, match="undo"):
        distill(trainer, model, temperature=2.0)
    patch.undo()
    assert trainer.compute_loss.__func__ is Trainer.compute_loss
    assert trainer.model_accepts_loss_kwargs == accepts
    trainer.compute_loss = lambda *_, **__: None  # type: ignore[method-assign]
    patch.undo()


def test_later_patch_must_be_undone_first(tmp_path: Path) -> None:
    trainer = build(tmp_path)
    patch = distill(trainer, teacher())
    trainer.compute_loss = lambda *_, **__: None  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="undo the later patch first"):
        patch.undo()


def test_evaluation_reports_the_distillation_loss_and_logits(tmp_path: Path) -> None:
    trainer = build(tmp_path, per_device_eval_batch_size=12)
    distill(trainer, teacher())
    predicted = trainer.predict(encoded())  # type: ignore[arg-type]
    assert predicted.predictions.shape[-1] == VOCAB
    batch = trainer._prepare_inputs(trainer.data_collator(encoded()))
    assert predicted.metrics["test_loss"] == pytest.approx(trainer.compute_loss(trainer.model, batch).item(), rel=1e-5)


def test_batch_without_labels_raises(tmp_path: Path) -> None:
    trainer = build(tmp_path)
    distill(trainer, teacher())
    with pytest.raises(ValueError, match="no labels"):
        trainer.compute_loss(trainer.model, {"input_ids": torch.zeros(1, 4, dtype=torch.int64)})


def test_unknown_version_of_transformers_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = build(tmp_path)
    monkeypatch.setattr("importlib.metadata.version", lambda name: "99.0")
    with pytest.raises(UnsupportedVersion, match=r"transformers 99\.0 .* 5\.6\.0 to "):
        distill(trainer, teacher())
    distill(trainer, teacher(), force=True)


def test_documented_lines_patch_a_trainer(tmp_path: Path) -> None:
    trainer = build(tmp_path)
    exec(lines_for("transformers Trainer"), {"trainer": trainer, "teacher": teacher()})
    assert "kdkernels" in trainer.compute_loss.__code__.co_filename
    assert len([entry for entry in trainer.state.log_history if "loss" in entry]) == 3
