"""Training on the rows of recipes: teacher's and student's prompts, per-task means, and a changing weight."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from training import make_model, make_rows, make_tokenizer
from transformers import TrainerCallback

from kdkernels.cli.recipes import shared
from kdkernels.recipes import chain_of_thought as cot
from kdkernels.recipes import disco, in_context, scott, socratic
from kdkernels.recipes.rows import Item
from kdkernels.trainer import DistillationArguments, DistillationTrainer, load_examples

TOKENIZER = make_tokenizer()
ITEMS = [
    Item(f"k{n}", ({"role": "user", "content": f"{word} plus two "},), str(n), {}, f"row {n}")
    for n, word in enumerate(("one", "two", "three", "four"))
]


def trainer_of(rows: Any, out: Path, teacher: bool, **options: Any) -> DistillationTrainer:
    arguments = DistillationArguments(
        output_dir=str(out), learning_rate=0.1, optim="sgd", use_cpu=True, disable_tqdm=True, save_strategy="no", report_to="none",
        dataloader_pin_memory=False, lr_scheduler_type="constant", **options,
    )  # fmt: skip
    return DistillationTrainer(
        model=make_model(16, seed=1, dtype=torch.float64),
        teacher=make_model(24, seed=2, dtype=torch.float64, initializer_range=0.3) if teacher else None,
        args=arguments,
        train_dataset=rows,
        processing_class=TOKENIZER,
    )


@pytest.mark.parametrize("style", ["step-by-step", "mt-cot"])
def test_loss_is_the_weighted_sum_of_task_means(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, style: Any) -> None:
    rationales = [cot.Rationale(item, "two plus " * (n + 1) + "is one") for n, item in enumerate(ITEMS)]
    rows = cot.multi_task(ITEMS, rationales, style=style)
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda _, **options: TOKENIZER)
    weights = {"label": 0.75, "rationale": 2.5}
    trainer = trainer_of(cot.balance(rows, weights, shared.lengths(rows, tmp_path)), tmp_path, teacher=False, kd_weight=0.0, ce_weight=1.0)
    batch = trainer.data_collator(trainer.train_dataset)
    loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=batch["labels"].ne(-100).sum())
    losses: dict[str, list[torch.Tensor]] = {"label": [], "rationale": []}
    for example in load_examples(rows, TOKENIZER):
        logits = trainer.model(torch.tensor([list(example.student_ids)])).logits[0]
        scored = torch.tensor(list(example.student_scored))
        targets = torch.tensor(list(example.student_ids))[scored + 1]
        losses[str(example.task)].append(torch.nn.functional.cross_entropy(logits[scored], targets, reduction="none"))
    expected = sum(weights[task] * torch.cat(parts).mean() for task, parts in losses.items())
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)  # the weights are float32 in the batch


def test_cross_entropy_weight_falls_during_training(tmp_path: Path) -> None:
    trainer = trainer_of(
        make_rows(6), tmp_path, teacher=True, max_steps=5, per_device_train_batch_size=6, kd_weight=0.7, ce_weight=2.0, ce_weight_last=0.5
    )  # fmt: skip
    ce_weights: list[float] = []

    class Look(TrainerCallback):
        def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
            ce_weights.append(trainer.objective_now().ce_weight)

    trainer.add_callback(Look())
    batch = trainer.data_collator(trainer.train_dataset)
    tokens = batch["labels"].ne(-100).sum()

    def loss(step: int) -> float:
        trainer.state.global_step, trainer.state.max_steps = step, 5
        return float(trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=tokens).detach())

    def evaluated() -> float:
        return float(trainer.evaluate(trainer.train_dataset)["eval_loss"])

    before_training = evaluated()
    trainer.train()
    assert ce_weights == [2.0, 1.625, 1.25, 0.875, 0.5]
    first, middle, last = (loss(step) for step in (0, 2, 4))
    assert first > middle > last
    assert middle == pytest.approx((first + last) / 2, rel=1e-12)
    assert evaluated() == pytest.approx(first, rel=1e-6), "every evaluation uses the first weight"
    assert before_training > first
    assert loss(9) == last


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_invalid_last_weight_raises(tmp_path: Path, value: float) -> None:
    with pytest.raises(ValueError, match="ce_weight_last must be finite and >= 0"):
        DistillationArguments(output_dir=str(tmp_path), ce_weight_last=value)
    assert DistillationArguments(output_dir=str(tmp_path), kd_weight=0.0, ce_weight_last=1.0).ce_weight == 0.0


@pytest.mark.parametrize("chat", [True, False])
def test_demonstrations_are_tokenised_only_for_the_teacher(chat: bool) -> None:
    demonstrations = in_context.demonstrations(ITEMS, 2, seed=0)
    distilled = load_examples(in_context.context_distillation(ITEMS, demonstrations, chat=chat), TOKENIZER)
    tuned = load_examples(in_context.in_context_tuning(ITEMS, demonstrations, chat=chat), TOKENIZER)
    alone = load_examples(
        [
            {k: v for k, v in row.items() if k in ("messages", "prompt", "response")}
            for row in in_context.context_distillation(ITEMS, demonstrations, chat=chat)
        ],
        TOKENIZER,
    )
    for distillation, tuning, plain in zip(distilled, tuned, alone, strict=True):
        assert list(distillation.student_ids) == list(plain.student_ids)
        assert list(distillation.teacher_ids) == list(tuning.student_ids) == list(tuning.teacher_ids)
        assert len(distillation.teacher_ids) > len(distillation.student_ids)
        assert (
            list(distillation.teacher_ids)[-len(distillation.teacher_scored) :]
            == list(distillation.student_ids)[-len(distillation.student_scored) :]
        )


@pytest.mark.parametrize("chat", [True, False])
def test_rows_of_every_recipe_are_read(chat: bool) -> None:
    rationales = [cot.Rationale(item, "one plus two") for item in ITEMS]
    steps = [socratic.Decomposition(item, (("one?", "two"), ("three?", "four"))) for item in ITEMS]
    reviews = [Item(f"r{n}", ({"role": "user", "content": ""},), None, {"text": "a red cat", "label": "one"}, f"row {n}") for n in range(2)]
    new = [disco.Counterfactual(reviews[0], "a blue cat", "two", 1.0, 0)]
    rows = [
        *cot.fine_tune_cot(rationales, chat=chat),
        *cot.multi_task(ITEMS, rationales, style="step-by-step", chat=chat),
        *cot.multi_task(ITEMS, rationales, style="mt-cot", chat=chat),
        *scott.factual_rows(ITEMS, ["one"] * 4, chat=chat),
        *scott.counterfactual_rows(ITEMS, ["5"] * 4, ["one"] * 4, chat=chat),
        *socratic.questioner_rows(steps, chat=chat),
        *socratic.solver_rows(steps, chat=chat),
        *disco.rows(reviews, new, ["one", "two"], chat=chat),
        *in_context.language_modelling(ITEMS, 0.5),
    ]
    examples = load_examples(rows, TOKENIZER)
    assert len(examples) == len(rows)
    assert [e.task for e in examples] == [row.get("task") for row in rows]
    assert {e.weight for e in examples[-4:]} == {0.5}
