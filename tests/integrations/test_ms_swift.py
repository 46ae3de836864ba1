"""ms-swift's GKDTrainer.compute_loss with the patch equals the unpatched loss.

The trainer is made without ``__init__``, which needs a data set in ms-swift's format, a template and a registered model. The attributes
that its loss reads are set by hand.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from patched import BUDGET, ROWS, Allocations, encoded, lines_for, needs
from training import make_model, make_tokenizer

from kdkernels.integrations import UnsupportedVersion, ms_swift

pytestmark = [needs("swift"), pytest.mark.filterwarnings("ignore")]
VOCAB = 192


def build(teacher: str = "local", topk: int | None = None, beta: float = 0.5, sft_alpha: float = 0.0, temperature: float = 1.3) -> Any:
    from accelerate import Accelerator
    from swift.rlhf_trainers.gkd_trainer import GKDTrainer

    trainer = GKDTrainer.__new__(GKDTrainer)
    trainer.accelerator = Accelerator(cpu=True)
    trainer.model = make_model(16, 1, VOCAB, seed=1, initializer_range=0.2)
    trainer.teacher_model = make_model(24, 1, VOCAB, seed=2, initializer_range=0.4).eval() if teacher == "local" else None
    trainer.use_teacher_api, trainer._is_self_distillation = teacher == "api", teacher == "self"
    trainer._teacher_use_disable_adapter, trainer.use_liger_gkd_loss = False, False
    trainer.beta, trainer.temperature, trainer.gkd_logits_topk = beta, temperature, topk
    trainer.template = SimpleNamespace(sequence_parallel_size=1)
    trainer.args = SimpleNamespace(
        sft_alpha=sft_alpha, report_to=[], offload_teacher_model=False, gradient_checkpointing_kwargs=None, use_logits_to_keep=False
    )
    trainer.get_use_logits_to_keep = lambda default: False
    return trainer


def batch(trainer: Any) -> dict[str, Any]:
    from swift.rl_core.data import GKDBatch
    from swift.rlhf_trainers.gkd_loss import DataSource
    from transformers import DataCollatorForSeq2Seq

    inputs = dict(DataCollatorForSeq2Seq(make_tokenizer())(encoded(8)))
    gkd_batch = GKDBatch(data_source=DataSource.DATASET)
    if trainer.use_teacher_api:
        logits = make_model(24, 1, VOCAB, seed=2, initializer_range=0.4)(inputs["input_ids"]).logits.detach()
        gkd_batch.teacher_topk_logprobs, gkd_batch.teacher_topk_indices = logits.log_softmax(-1).topk(5)
        gkd_batch.teacher_topk_logprobs[0] = -torch.inf  # positions that the API did not cover
    return {"model_inputs": inputs, "gkd_batch": gkd_batch, "teacher_model_inputs": dict(inputs)}


def steps(trainer: Any) -> tuple[list[float], list[torch.Tensor], int]:
    """Take three SGD steps. Return the losses, the first gradients with the final weights, and the largest number of rows of logits."""
    optimizer, losses, gradients = torch.optim.SGD(trainer.model.parameters(), lr=0.5), [], []
    with Allocations(VOCAB) as allocations:
        for _ in range(3):
            loss = trainer.compute_loss(trainer.model, batch_without_allocations(trainer))
            optimizer.zero_grad()
            loss.backward()
            losses.append(loss.item())
            gradients = gradients or [parameter.grad.clone() for parameter in trainer.model.parameters()]
            optimizer.step()
    return losses, [*gradients, *(parameter.detach() for parameter in trainer.model.parameters())], allocations.rows


def batch_without_allocations(trainer: Any) -> dict[str, Any]:
    trainer.fixed_batch = getattr(trainer, "fixed_batch", None) or batch(trainer)
    return {
        **trainer.fixed_batch,
        "model_inputs": dict(trainer.fixed_batch["model_inputs"]),
        "teacher_model_inputs": dict(trainer.fixed_batch["model_inputs"]),
    }


@pytest.mark.parametrize(
    "options",
    [
        {"beta": 0.0},
        {"beta": 0.5, "sft_alpha": 0.3},
        {"beta": 1.0},
        {"topk": 5, "beta": 0.5},
        {"topk": 5, "beta": 0.0, "teacher": "api"},
        {"teacher": "self", "beta": 0.5, "sft_alpha": 1.0},
    ],
    ids=str,
)
def test_three_steps_equal_the_unpatched_loss(options: dict[str, Any]) -> None:
    trainer = build(**options)
    trainer.fixed_batch = batch(trainer)
    losses, tensors, dense_rows = steps(trainer)
    with ms_swift.patch(memory_budget=BUDGET):
        trainer = build(**options)
        trainer.fixed_batch = batch(trainer)
        patched_losses, patched_tensors, rows = steps(trainer)
    assert patched_losses == pytest.approx(losses, rel=1e-5)
    for actual, expected in zip(patched_tensors, tensors, strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * max(expected.abs().max().item(), 1e-3))
    assert rows <= ROWS < dense_rows


def test_different_vocabularies_use_the_unpatched_loss() -> None:
    def loss() -> float:
        trainer = build()
        trainer.teacher_model = make_model(24, 1, VOCAB + 8, seed=2)
        return float(trainer.compute_loss(trainer.model, batch(trainer)))

    expected = loss()
    with ms_swift.patch():
        assert loss() == expected


def test_undo_restores_ms_swift_and_unknown_versions_raise(monkeypatch: pytest.MonkeyPatch) -> None:
    from swift.rlhf_trainers.gkd_trainer import GKDTrainer

    before = GKDTrainer.compute_loss
    patch = ms_swift.patch()
    assert ms_swift.patch() is patch
    assert GKDTrainer.compute_loss is not before
    patch.undo()
    assert GKDTrainer.compute_loss is before
    monkeypatch.setattr("importlib.metadata.version", lambda name: "99.0")
    with pytest.raises(UnsupportedVersion, match=r"ms-swift 99\.0 .* 4\.6\.0"):
        ms_swift.patch()


def test_documented_lines_for_ms_swift_run() -> None:
    trained: list[bool] = []
    try:
        exec(lines_for("ms-swift"), {"trainer": SimpleNamespace(train=lambda: trained.append(True))})
    finally:
        ms_swift.patch().undo()
    assert trained
