"""Rollouts (responses sampled from the student): prompts, end tokens, draws, and training steps on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from training import Make, dense, make_rows, make_tokenizer, trainers

pytest.importorskip("transformers")

from kdkernels.trainer import DistillationTrainer
from kdkernels.trainer.rollouts import rollouts


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer()


@pytest.fixture
def make(tokenizer: Any, tmp_path: Path) -> Make:
    return trainers(tmp_path, tokenizer)


def _rollouts(trainer: DistillationTrainer, count: int = 4, **options: Any) -> Any:
    defaults = {"temperature": 1.0, "max_new_tokens": 6, "max_length": None, "vocab_size": None, "place": (0, 0, 0, 0)}
    return rollouts(trainer.model, trainer.train_dataset[:count], trainer.tokenizer, **{**defaults, **options})


def test_rollouts_keep_prompts_and_end_at_the_end_token(make: Make) -> None:
    rows = make_rows(12)
    rows[1]["teacher_prompt"] = "the cat sees"
    trainer = make(rows=rows)
    trainer.model.lm_head.weight.data[0] = 0.3 * trainer.model.lm_head.weight.data[1:].sum(
        0
    )  # raise the end token's logit, so that some rollouts end
    state = torch.get_rng_state()
    trainer.model.train()
    first = _rollouts(trainer, 12, max_new_tokens=30)
    assert torch.equal(torch.get_rng_state(), state)
    assert trainer.model.training
    lengths = set()
    for (example,), (rollout,) in zip(trainer.train_dataset, first, strict=True):
        student_prompt, teacher_prompt = example.student_scored[0] + 1, example.teacher_scored[0] + 1
        assert list(rollout.student_ids[:student_prompt]) == list(example.student_ids[:student_prompt])
        assert list(rollout.teacher_ids[:teacher_prompt]) == list(example.teacher_ids[:teacher_prompt])
        response = list(rollout.student_ids[student_prompt:])
        assert list(rollout.teacher_ids[teacher_prompt:]) == response
        assert list(rollout.student_scored) == list(range(student_prompt - 1, student_prompt - 1 + len(response)))
        assert 0 not in response[:-1]
        assert response[-1] == 0 or len(response) == 30
        lengths.add(len(response))
    assert len(lengths) > 1
    assert _rollouts(trainer, 12, max_new_tokens=30) == first
    assert _rollouts(trainer, 12, max_new_tokens=30, place=(0, 1, 0, 0)) != first
    assert max(len(e.student_ids) for (e,) in _rollouts(trainer, max_length=13, max_new_tokens=9)) <= 13
    assert all(t < 30 for (e,) in _rollouts(trainer, vocab_size=30) for t in e.student_ids[e.student_scored[0] + 1 :])


def test_rollouts_ignore_saved_generation_settings(make: Make) -> None:
    trainer = make()
    plain = _rollouts(trainer, max_new_tokens=12)
    saved = trainer.model.generation_config
    saved.update(min_p=0.9, no_repeat_ngram_size=1, typical_p=0.2, suppress_tokens=list(range(10, 90)))
    assert _rollouts(trainer, max_new_tokens=12) == plain
    assert trainer.model.generation_config is saved


def test_rollouts_are_packed_again(make: Make) -> None:
    options = {"packing": True, "max_length": 32, "on_policy_fraction": 1.0, "max_new_tokens": 20, "per_device_train_batch_size": 2}
    trainer = make(**options)
    (batch,), count = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 1, trainer.args.device)
    assert sum(batch["sizes"]) > 2
    assert max(batch["input_ids"].shape[1], batch["teacher_input_ids"].shape[1]) <= 32
    assert count == len(batch["scored"]) == sum(batch["counts"])
    trainer.train()


def test_rollouts_do_not_depend_on_the_batch(make: Make) -> None:
    trainer = make()
    together = _rollouts(trainer, temperature=0.0)
    assert len({e.student_scored[0] for (e,) in together}) > 1
    for number in range(4):
        alone = rollouts(
            trainer.model,
            trainer.train_dataset[number : number + 1],
            trainer.tokenizer,
            temperature=0.0,
            max_new_tokens=6,
            max_length=None,
            vocab_size=None,
            place=(0,),
        )
        assert alone[0] == together[number]


def test_on_policy_step_equals_the_dense_formula_on_rollouts(make: Make) -> None:
    trainer = make(
        on_policy_fraction=1.0,
        max_new_tokens=5,
        divergence="reverse_kl",
        ce_weight=0.5,
        gradient_accumulation_steps=2,
        per_device_train_batch_size=4,
    )
    steps: list[Any] = []
    compute = trainer.compute_loss

    def recorded(model: Any, inputs: Any, **keywords: Any) -> Any:
        loss = compute(model, inputs, **keywords)
        with torch.no_grad():
            batch = {**inputs, "response": torch.zeros(inputs["scored"].numel())}  # no cross-entropy on rollouts
            steps.append((keywords["num_items_in_batch"], inputs["scored"].numel(), loss.detach(), dense(trainer, batch)))
        return loss

    trainer.compute_loss = recorded  # type: ignore[method-assign]
    trainer.train()
    total = sum(count for _, count, _, _ in steps)
    assert len(steps) == 2
    for items, _, loss, expected in steps:
        assert items == total
        torch.testing.assert_close(loss, expected / total, rtol=1e-10, atol=0)


def test_share_of_on_policy_steps_follows_the_fraction(make: Make) -> None:
    trainer = make(on_policy_fraction=0.5, max_new_tokens=2, max_steps=30, per_device_train_batch_size=1, dtype=torch.float32)
    on_policy: list[bool] = []
    compute = trainer.compute_loss
    trainer.compute_loss = lambda model, inputs, **k: (on_policy.append(bool(inputs.get("on_policy"))), compute(model, inputs, **k))[1]  # type: ignore[method-assign]
    trainer.train()
    assert 8 <= sum(on_policy) <= 22  # 30 fair coins: outside for one seed in 500
