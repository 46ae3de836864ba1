"""The trainer's steps equal the dense formula, also when accumulated, packed or resumed."""

from __future__ import annotations

import copy
import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from training import Make, assert_same, dense, gradients, make_model, make_rows, make_tokenizer, trainers

pytest.importorskip("transformers")

import kdkernels as kd
from kdkernels.data.collator import view_of
from kdkernels.teachers.live import LiveTeacher


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer()


@pytest.fixture
def make(tokenizer: Any, tmp_path: Path) -> Make:
    return trainers(tmp_path, tokenizer)


# One step


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"divergence": "jsd(beta=0.3)", "temperature": 2.0, "ce_weight": 0.5, "kd_weight": 0.7},
        {"divergence": "reverse_kl", "kd_on_prompt": True, "ce_weight": 0.3},
        {"divergence": "skew_kl", "vocab_size": 170},
    ],
    ids=lambda options: options.get("divergence", "forward_kl"),
)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_one_step_equals_the_dense_formula(make: Make, options: dict[str, Any], tied: bool) -> None:
    rows = make_rows(8)
    rows[0]["weight"], rows[3]["weight"] = 0.0, 2.5
    if "kd_on_prompt" not in options:
        rows[1]["teacher_prompt"] = "the cat sees a bird "
    trainer = make(student=make_model(16, seed=1, dtype=torch.float64, tie_word_embeddings=tied), rows=rows, **options)
    batch = trainer.data_collator(trainer.train_dataset)
    expected = dense(trainer, batch)
    tokens = batch["labels"].ne(-100).sum()
    parameters = dict(trainer.model.named_parameters())
    expected_gradients = dict(zip(parameters, torch.autograd.grad(expected / tokens, parameters.values()), strict=True))
    loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=tokens)
    torch.testing.assert_close(loss, expected / tokens, rtol=1e-12, atol=0)
    assert_same(gradients(trainer), expected_gradients)


def test_moe_auxiliary_loss_is_added(make: Make) -> None:
    student = make_model(16, seed=1, family="Mixtral", num_local_experts=4, output_router_logits=True, router_aux_loss_coef=0.5)
    trainer = make(student=student, dtype=torch.float32)
    batch = trainer.data_collator(trainer.train_dataset)
    tokens = batch["labels"].ne(-100).sum()
    plain = trainer.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=tokens)
    torch.testing.assert_close(loss, dense(trainer, batch) / tokens + 0.5 * plain.aux_loss, rtol=1e-6, atol=0)


def test_step_of_a_lora_student_equals_the_dense_formula(make: Make) -> None:
    peft = pytest.importorskip("peft")
    student = peft.get_peft_model(
        make_model(16, seed=1, dtype=torch.float64), peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    )
    student = student.double()
    trainer = make(student=student)
    batch = trainer.data_collator(trainer.train_dataset)
    tokens = batch["labels"].ne(-100).sum()
    trained = {name: p for name, p in student.named_parameters() if p.requires_grad}
    assert any("lm_head" in name for name in trained)
    expected = dense(trainer, batch) / tokens
    expected_gradients = torch.autograd.grad(expected, trained.values())
    loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=tokens)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
    actual = torch.autograd.grad(loss, trained.values())
    assert_same(dict(zip(trained, actual, strict=True)), dict(zip(trained, expected_gradients, strict=True)))


@pytest.mark.parametrize("mode", ["probs", "logits"])
def test_step_with_two_teachers_equals_the_dense_formula(make: Make, mode: str) -> None:
    teachers = [make_model(24, seed=s, dtype=torch.float64, initializer_range=0.3) for s in (2, 3)]
    trainer = make(teacher=teachers, ensemble_mode=mode, temperature=2.0)
    batch = trainer.data_collator(trainer.train_dataset)
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    with torch.no_grad():
        z, *u = (model(**inputs).logits.flatten(0, 1)[batch["scored"]] / 2 for model in (trainer.model, *teachers))
        p = sum(u).div(2).softmax(-1) if mode == "logits" else sum(x.softmax(-1) for x in u).div(2)
        expected = 4 * (p * (p.log() - z.log_softmax(-1))).sum(-1).mean()
        torch.testing.assert_close(trainer.compute_loss(trainer.model, batch), expected, rtol=1e-10, atol=0)
    assert torch.isfinite(next(iter(gradients(trainer).values()))).all()


def test_differently_padded_vocabularies_are_cut_to_the_tokenizers_size(make: Make, tokenizer: Any) -> None:
    with pytest.warns(UserWarning, match=r"pad their vocabulary differently \(192 and 200 columns\): cut to the real 176"):
        trainer = make(teacher=make_model(24, seed=2, dtype=torch.float64, vocab_size=200))
    assert trainer.vocab_size == len(tokenizer) < 192
    batch = trainer.data_collator(trainer.train_dataset)
    torch.testing.assert_close(
        trainer.compute_loss(trainer.model, batch), dense(trainer, batch) / batch["scored"].numel(), rtol=1e-12, atol=0
    )
    with pytest.raises(ValueError, match=r"192 columns of logits, the teacher 100, and the real vocabulary is 176"):
        make(teacher=make_model(24, vocab_size=100))
    with pytest.raises(ValueError, match=r"vocab_size=193, but the narrowest of the models has 192"):
        make(vocab_size=193)


def test_cross_entropy_alone_needs_no_teacher(make: Make) -> None:
    trainer = make(teacher=None, kd_weight=0.0, ce_weight=2.0)
    batch = trainer.data_collator(trainer.train_dataset)
    logits = trainer.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    expected = 2 * torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    torch.testing.assert_close(trainer.compute_loss(trainer.model, batch), expected, rtol=1e-12, atol=0)
    with pytest.raises(ValueError, match="teacher is missing"):
        make(teacher=None)


@pytest.mark.skipif(sys.platform == "win32", reason="the resource module is missing")
def test_a_step_uses_less_memory_than_dense_logits() -> None:
    support = Path(__file__).parents[1] / "support"
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(support.parents[1]), os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, str(support / "training_memory.py"), "16", "64", "150000"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    logits = 16 * 64 * 150_000 * 4 / 2**20  # bytes of one model's logits, in MiB
    assert float(done.stdout.split()[-1]) < logits / 2, "the chunks use 64 MiB, gradients and activations a few"


# Accumulation and packing


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_accumulation_does_not_change_a_step(make: Make, dtype: torch.dtype, rtol: float) -> None:
    options = {"ce_weight": 0.5, "temperature": 2.0, "dtype": dtype}
    whole = gradients(make(**options))
    for size in (4, 1):
        split = gradients(make(per_device_train_batch_size=size, gradient_accumulation_steps=8 // size, **options))
        assert_same(split, whole, rtol)


@pytest.mark.parametrize("flat", [False, True])
def test_packing_does_not_change_a_step(make: Make, flat: bool) -> None:
    options = {"ce_weight": 0.5, "per_device_train_batch_size": 12, "learning_rate": 1.0}
    plain = make(**options)
    reference = gradients(plain)
    packed = make(packing=True, max_length=40, **options)
    packed.data_collator = dataclasses.replace(packed.data_collator, flat=flat)
    assert 1 < len(packed.train_dataset) < 12
    packed.model.config.use_cache = True  # with a cache, transformers would drop the mask between examples
    assert packed.teacher.models[0].config.use_cache
    assert_same(gradients(packed), reference, 1e-12)


def test_packing_raises_if_examples_would_attend_to_each_other(make: Make) -> None:
    config = {"family": "Mamba", "intermediate_size": 32, "state_size": 4, "attn_implementation": "eager"}
    trainer = make(student=make_model(16, dtype=torch.float64, **config), packing=True, max_length=40)
    with pytest.raises(ValueError, match=r"packing=True does not work with mamba: .*; set packing=False"):
        trainer.train()


# Evaluation and logs


def test_evaluation_cross_entropy_does_not_depend_on_weights(make: Make) -> None:
    rows = [{**row, "weight": i % 3} for i, row in enumerate(make_rows(12))]
    with_teacher = make(eval_rows=rows, ce_weight=1.0).evaluate()
    without_teacher = make(eval_rows=rows, kd_weight=0.0, ce_weight=1.0)
    metrics = without_teacher.evaluate()
    assert metrics["eval_cross_entropy"] == pytest.approx(with_teacher["eval_cross_entropy"], rel=1e-6)
    batch = without_teacher.data_collator(without_teacher.eval_dataset)
    assert metrics["eval_loss"] == pytest.approx(dense(without_teacher, batch).item() / metrics["eval_tokens"], rel=1e-12)
    assert metrics["eval_loss"] != pytest.approx(metrics["eval_cross_entropy"], rel=1e-3)


def test_evaluation_is_a_mean_over_tokens(make: Make) -> None:
    rows = make_rows(11, seed=5)
    trainer = make(eval_rows=rows, divergence="jsd", ce_weight=0.5)
    batch = trainer.data_collator(trainer.eval_dataset)
    expected = (dense(trainer, batch) / batch["scored"].numel()).item()
    for size in (1, 4, 16):
        trainer.args.per_device_eval_batch_size = size
        metrics = trainer.evaluate()
        assert metrics["eval_loss"] == pytest.approx(expected, rel=1e-10)
        assert metrics["eval_tokens"] == batch["scored"].numel()
    assert trainer.evaluate(rows[:3])["eval_tokens"] < metrics["eval_tokens"]
    predictions, labels, metrics = trainer.predict(rows)
    assert (predictions, labels) == (None, None)
    assert metrics["test_loss"] == pytest.approx(expected, rel=1e-10)
    packed = make(packing=True, max_length=40, eval_rows={"one": rows, "two": rows}, divergence="jsd", ce_weight=0.5)
    metrics = packed.evaluate()
    assert metrics["eval_one_loss"] == pytest.approx(expected, rel=1e-10)
    assert metrics["eval_two_loss"] == pytest.approx(expected, rel=1e-10)
    loss, logits, labels = packed.prediction_step(packed.model, packed.data_collator(packed.eval_dataset["one"]), True)
    assert (logits, labels) == (None, None)
    assert loss.item() == pytest.approx(expected, rel=1e-6)


def test_every_term_of_the_loss_is_logged(make: Make) -> None:
    trainer = make(ce_weight=0.5, feature_weight=0.1, per_device_train_batch_size=4, gradient_accumulation_steps=2, rows=make_rows(8))
    batch = trainer.data_collator(trainer.train_dataset)
    side = LiveTeacher(copy.deepcopy(trainer.model), vocab_size=192).targets(view_of(batch))
    _, stats = kd.distillation_loss(
        side, trainer.teacher.targets(view_of(batch, "teacher_")), labels=batch["labels"].flatten()[batch["scored"] + 1], return_stats=True
    )
    trainer.train()
    (log,) = [entry for entry in trainer.state.log_history if "loss" in entry]
    for name in ("divergence", "cross_entropy", "student_entropy", "teacher_entropy", "top1_agreement"):
        assert log[name] == pytest.approx(getattr(stats, name).mean().item(), rel=1e-5), name
    assert log["valid_tokens"] == batch["scored"].numel()
    assert log["loss"] == pytest.approx(log["divergence"] + 0.5 * log["cross_entropy"] + 0.1 * log["feature_loss"], rel=1e-5)
    assert log["tokens_per_second"] > 0
    assert log["peak_memory_mib"] > 10


# Resuming


@pytest.mark.parametrize(
    "options",
    [{}, {"on_policy_fraction": 0.7, "max_new_tokens": 4, "packing": True, "max_length": 60}, {"feature_weight": 1.0}],
    ids=["data", "on_policy", "features"],
)
def test_resumed_training_equals_uninterrupted_training(make: Make, options: dict[str, Any]) -> None:
    settings = {
        "max_steps": 6, "save_strategy": "steps", "save_steps": 3, "optim": "adamw_torch", "learning_rate": 1e-2,
        "lr_scheduler_type": "linear", "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "dtype": torch.float32,
        "rows": make_rows(17), **options,
    }  # fmt: skip

    def student() -> Any:
        return make_model(16, seed=1, attention_dropout=0.2)

    whole = make(student=student(), **settings)
    whole.train()
    resumed = make(student=student(), **{**settings, "seed": 42})
    torch.manual_seed(123)
    resumed.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-3")
    expected, actual = whole.model.state_dict(), resumed.model.state_dict()
    assert expected.keys() == actual.keys()
    assert all(torch.equal(expected[name], actual[name]) for name in expected)
    initial = student().state_dict()
    assert not any(torch.equal(initial[name], actual[name]) for name in initial)


# Features


def test_feature_loss_equals_its_formula_and_projectors_are_saved_apart(make: Make) -> None:
    from safetensors.torch import load_file

    trainer = make(
        feature_weight=1.0, feature_layers="0:1", kd_weight=0.0, ce_weight=0.0, rows=make_rows(8), save_strategy="steps", save_steps=1
    )
    batch = trainer.data_collator(trainer.train_dataset)
    student = trainer.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], output_hidden_states=True).hidden_states[
        1
    ]
    teacher = trainer.teacher.models[0](
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], output_hidden_states=True
    ).hidden_states
    projector = trainer.objective.features.projectors["0_1"]
    # The last entry of transformers' hidden_states is after the final norm; the loss uses the layer's output before it.
    raw = {}
    hook = (
        trainer.teacher.models[0].model.layers[1].register_forward_hook(lambda m, i, o: raw.update(out=o[0] if isinstance(o, tuple) else o))
    )
    trainer.teacher.models[0](input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    hook.remove()
    assert len(teacher) == 3
    rows = batch["scored"]
    expected = (projector(student.flatten(0, 1)[rows]) - raw["out"].flatten(0, 1)[rows]).square().mean(-1).mean()
    torch.testing.assert_close(trainer.compute_loss(trainer.model, batch), expected, rtol=1e-10, atol=0)
    trainer.train()
    saved = Path(trainer.args.output_dir, "checkpoint-1")
    assert not any("projector" in name for name in load_file(saved / "model.safetensors"))
    torch.testing.assert_close(load_file(saved / "projector.safetensors")["0_1.weight"], projector.weight.detach())
