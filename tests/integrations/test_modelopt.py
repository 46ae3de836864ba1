"""ModelOpt's KDTrainer with the patch trains and evaluates as without it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from patched import ARGUMENTS, ROWS, compare, encoded, lines_for, needs
from training import make_model, make_tokenizer

from kdkernels.integrations import UnsupportedVersion, modelopt

pytestmark = [needs("modelopt"), pytest.mark.filterwarnings("ignore")]
VOCAB = 192


def build(folder: Path, temperature: float = 1.0, **options: Any) -> Any:
    from modelopt.torch.distill.plugins.huggingface import KDTrainer
    from transformers import DataCollatorForSeq2Seq, TrainingArguments

    student = make_model(16, 1, VOCAB, seed=1, initializer_range=0.2)
    teacher = make_model(24, 1, VOCAB, seed=2, initializer_range=0.4)
    return KDTrainer(
        student,
        TrainingArguments(**{**ARGUMENTS, "output_dir": str(folder), **options}),
        data_collator=DataCollatorForSeq2Seq(make_tokenizer()),
        train_dataset=encoded(),
        eval_dataset=encoded(4),
        distill_args={"teacher_model": teacher, "temperature": temperature},
    )


@pytest.mark.parametrize(
    ("temperature", "options"), [(1.0, {}), (2.0, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2})]
)
def test_three_steps_equal_the_unpatched_trainer(tmp_path: Path, temperature: float, options: dict[str, Any]) -> None:
    unpatched, _ = compare(lambda: build(tmp_path, temperature, **options), modelopt.patch, VOCAB)
    assert unpatched.rows_of_logits > ROWS


def test_evaluation_equals_the_unpatched_trainers(tmp_path: Path) -> None:
    expected = build(tmp_path).evaluate()
    with modelopt.patch():
        metrics = build(tmp_path).evaluate()
    assert {"eval_loss", "eval_ce_loss"} <= metrics.keys()
    for name in ("eval_loss", "eval_ce_loss"):
        assert metrics[name] == pytest.approx(expected[name], rel=1e-6)


def test_undo_restores_modelopt_and_unknown_versions_raise(monkeypatch: pytest.MonkeyPatch) -> None:
    from modelopt.torch.distill.plugins.huggingface import KDTrainer

    before = KDTrainer.compute_loss
    patch = modelopt.patch()
    assert modelopt.patch() is patch
    assert KDTrainer.compute_loss is not before
    patch.undo()
    assert KDTrainer.compute_loss is before
    monkeypatch.setattr("importlib.metadata.version", lambda name: "99.0")
    with pytest.raises(UnsupportedVersion, match=r"nvidia-modelopt 99\.0 .* 0\.47\.0"):
        modelopt.patch()


def test_documented_lines_patch_modelopt(tmp_path: Path) -> None:
    trainer = build(tmp_path)
    try:
        exec(lines_for("NVIDIA ModelOpt"), {"trainer": trainer})
        assert "kdkernels" in type(trainer).compute_loss.__code__.co_filename
    finally:
        modelopt.patch().undo()
    assert trainer.state.global_step == 3
