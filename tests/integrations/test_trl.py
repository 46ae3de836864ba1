"""TRL's trainers with the patch train and evaluate as without it."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from patched import ARGUMENTS, ROWS, compare, lines_for, needs, run
from training import make_model, make_rows, make_tokenizer

from kdkernels.integrations import UnsupportedVersion, trl

pytestmark = [needs("trl"), pytest.mark.filterwarnings("ignore")]
VOCAB = 192


def models() -> tuple[Any, Any]:
    return make_model(16, 1, VOCAB, seed=1, initializer_range=0.2), make_model(24, 1, VOCAB, seed=2, initializer_range=0.4)


def gkd(folder: Path, rows: int = 12, **options: Any) -> Any:
    from datasets import Dataset
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    data = [
        {"messages": [{"role": "user", "content": r["prompt"]}, {"role": "assistant", "content": r["response"]}]} for r in make_rows(rows)
    ]
    student, teacher = models()
    args = GKDConfig(**{**ARGUMENTS, "output_dir": str(folder), "lmbda": 0.0, "max_length": 64, **options})
    return GKDTrainer(student, teacher, args, train_dataset=Dataset.from_list(data), processing_class=make_tokenizer())


def gold(folder: Path, **options: Any) -> Any:
    from datasets import Dataset
    from trl.experimental.gold import GOLDConfig, GOLDTrainer

    data = [
        {"messages": [{"role": "user", "content": r["prompt"]}, {"role": "assistant", "content": r["response"]}]} for r in make_rows(12)
    ]
    student, teacher = models()
    lengths = {"max_length": 64, "max_completion_length": 16}
    args = GOLDConfig(**{**ARGUMENTS, "output_dir": str(folder), "lmbda": 0.0, "use_uld_loss": False, **lengths, **options})
    return GOLDTrainer(student, teacher, args, train_dataset=Dataset.from_list(data), processing_class=make_tokenizer())


def distillation(folder: Path, **options: Any) -> Any:
    from datasets import Dataset
    from trl import DistillationConfig, DistillationTrainer

    student, teacher = models()
    args = DistillationConfig(**{**ARGUMENTS, "output_dir": str(folder), "max_completion_length": 6, **options})
    data = Dataset.from_list([{"prompt": row["prompt"]} for row in make_rows(12)])
    tokenizer = make_tokenizer()
    tokenizer.padding_side = "left"
    return DistillationTrainer(student, teacher, args, train_dataset=data, processing_class=tokenizer)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_gkd_trains_as_without_the_patch(tmp_path: Path, beta: float) -> None:
    unpatched, _ = compare(lambda: gkd(tmp_path, beta=beta), trl.patch, VOCAB)
    assert unpatched.rows_of_logits > ROWS


def test_gkd_divides_by_the_items_of_all_accumulated_batches(tmp_path: Path) -> None:
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    compare(lambda: gkd(tmp_path, **options), trl.patch, VOCAB)


def test_gkd_trains_on_its_own_samples(tmp_path: Path) -> None:
    options = {"lmbda": 1.0, "max_new_tokens": 5, "temperature": 0.7}
    compare(lambda: gkd(tmp_path, **options), trl.patch, VOCAB)


@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_gold_with_one_tokenizer_trains_as_without_the_patch(tmp_path: Path, beta: float) -> None:
    compare(lambda: gold(tmp_path, beta=beta, temperature=1.5), trl.patch, VOCAB)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_distillation_trainer_trains_and_logs_as_without_the_patch(tmp_path: Path, beta: float) -> None:
    _, patched = compare(lambda: distillation(tmp_path, beta=beta, temperature=1.3), trl.patch, VOCAB)
    assert "entropy" in patched.logs[0]


def test_evaluation_gives_the_same_loss_and_logits(tmp_path: Path) -> None:
    def evaluated() -> tuple[float, Any]:
        trainer = gkd(tmp_path)
        trainer.args.eval_strategy = "no"
        batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
        with torch.no_grad():
            loss, outputs = trainer.compute_loss(trainer.model, batch, return_outputs=True)
        return loss.item(), outputs.logits

    loss, logits = evaluated()
    with trl.patch():
        patched_loss, patched_logits = evaluated()
    assert patched_loss == pytest.approx(loss, rel=1e-5)
    torch.testing.assert_close(patched_logits, logits, rtol=0, atol=0)


def test_subclass_keeps_its_loss(tmp_path: Path) -> None:
    from trl.experimental.gkd import GKDTrainer

    class CustomLoss(GKDTrainer):
        @staticmethod
        def generalized_jsd_loss(student_logits: Any, *args: Any, **kwargs: Any) -> Any:
            return student_logits.float().square().mean()

    def build() -> Any:
        trainer = gkd(tmp_path)
        trainer.__class__ = CustomLoss
        return trainer

    unpatched = run(build(), VOCAB)
    with trl.patch():
        assert run(build(), VOCAB).losses == unpatched.losses


def test_undo_restores_trls_losses() -> None:
    from trl.experimental.gkd import GKDTrainer
    from trl.experimental.gold import GOLDTrainer
    from trl.trainer import distillation_trainer

    before = GKDTrainer.compute_loss, GOLDTrainer.compute_loss, distillation_trainer._chunked_divergence_loss
    patch = trl.patch()
    assert trl.patch() is patch
    assert "GKDTrainer" in str(patch)
    assert "\n" not in str(patch)
    with pytest.raises(ValueError, match="undo"):
        trl.patch(memory_budget=1 << 20)
    patch.undo()
    assert before == (GKDTrainer.compute_loss, GOLDTrainer.compute_loss, distillation_trainer._chunked_divergence_loss)


def test_replacement_has_trls_signature() -> None:
    from trl.trainer import distillation_trainer

    parameters = inspect.signature(distillation_trainer._chunked_divergence_loss).parameters
    with trl.patch():
        assert list(inspect.signature(distillation_trainer._chunked_divergence_loss).parameters) == list(parameters)


def test_unknown_version_of_trl_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    from trl.experimental.gkd import GKDTrainer

    with monkeypatch.context() as patched:
        patched.setattr("importlib.metadata.version", lambda name: "99.0")
        with pytest.raises(UnsupportedVersion, match=r"trl 99\.0 .* 1\.16\.0"):
            trl.patch()
        trl.patch(force=True).undo()

    def compute_loss(self: Any, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        return None

    monkeypatch.setattr(GKDTrainer, "compute_loss", compute_loss)
    with pytest.raises(UnsupportedVersion, match=r"GKDTrainer\.compute_loss"):
        trl.patch()


def test_documented_lines_patch_trl(tmp_path: Path) -> None:
    from trl.experimental.gkd import GKDTrainer

    trainer = gkd(tmp_path)
    try:
        exec(lines_for("TRL"), {"trainer": trainer})
        assert "kdkernels" in GKDTrainer.compute_loss.__code__.co_filename
    finally:
        trl.patch().undo()
    assert len([entry for entry in trainer.state.log_history if "loss" in entry]) == 3
