"""The trainer against the dense formula, and the same step however it is split, packed or interrupted."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from training import make_model, make_rows, make_tokenizer

pytest.importorskip("transformers")
from transformers import TrainerCallback

import kdkernels as kd
from kdkernels.teachers.live import LiveTeacher
from kdkernels.trainer import DistillationArguments, DistillationTrainer, load_examples
from kdkernels.trainer.arguments import parse_divergence
from kdkernels.trainer.rollouts import rollouts

Make = Callable[..., DistillationTrainer]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer()


@pytest.fixture
def make(tokenizer: Any, tmp_path: Path) -> Make:
    """A trainer of a small student in float64, on 12 rows, that takes one SGD step over 8 of them."""
    numbers = itertools.count()

    def build(
        student: Any = None,
        teacher: Any = "live",
        rows: Any = None,
        eval_rows: Any = None,
        dtype: torch.dtype = torch.float64,
        **options: Any,
    ) -> DistillationTrainer:
        defaults = {
            "output_dir": str(tmp_path / str(next(numbers))), "max_steps": 1, "per_device_train_batch_size": 8, "learning_rate": 1.0,
            "optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "use_cpu": True, "disable_tqdm": True,
            "save_strategy": "no", "logging_steps": 1,
            "dataloader_pin_memory": False,
        }  # fmt: skip
        student = make_model(16, seed=1, dtype=dtype) if student is None else student
        teacher = make_model(24, seed=2, dtype=dtype, initializer_range=0.3) if isinstance(teacher, str) else teacher
        rows = make_rows(12) if rows is None else rows
        args = DistillationArguments(**{**defaults, **options})
        return DistillationTrainer(student, teacher, args, train_dataset=rows, eval_dataset=eval_rows, processing_class=tokenizer)

    return build


def gradients(trainer: DistillationTrainer) -> dict[str, Tensor]:
    """Of the first step, as the optimizer gets them."""
    found: dict[str, Tensor] = {}

    class Look(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            found.update({name: p.grad.clone() for name, p in model.named_parameters()})

    trainer.add_callback(Look())
    trainer.train()
    return found


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor], rtol: float = 1e-10) -> None:
    assert one.keys() == other.keys()
    assert max(g.abs().max() for g in one.values()) > 1e-4
    for name in one:
        scale = other[name].abs().max().item()
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=rtol * scale + 1e-15, msg=lambda text, n=name: f"{n}: {text}")


def dense(trainer: DistillationTrainer, batch: dict[str, Any]) -> Tensor:
    """The loss summed over tokens as the papers write it, from whole logits."""
    args, student = trainer.args, trainer.model
    z = [
        model(input_ids=batch[f"{p}input_ids"], attention_mask=batch[f"{p}attention_mask"]).logits.flatten(0, 1)[
            batch[f"{p}scored"], : trainer.vocab_size
        ]
        for model, p in ((student, ""), (trainer.teacher.models[0], "teacher_"))
    ]
    log_q, log_p = (torch.log_softmax(x / args.temperature, -1) for x in z)
    divergence = parse_divergence(args.divergence).reference(log_q, log_p.detach()).sum(-1)
    labels = batch["input_ids"].flatten()[batch["scored"] + 1]
    ce = torch.nn.functional.cross_entropy(z[0], labels, reduction="none")
    if "response" in batch:
        ce = ce * batch["response"]
    total = args.kd_weight * args.temperature**2 * divergence + args.ce_weight * ce
    return (total * batch["token_weights"]).sum()


# One step is the dense formula


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
def test_a_step_is_the_dense_formula(make: Make, options: dict[str, Any], tied: bool) -> None:
    rows = make_rows(8)
    rows[0]["weight"], rows[3]["weight"] = 0.0, 2.5
    if "kd_on_prompt" not in options:
        rows[1]["teacher_prompt"] = "the cat sees a bird "
    trainer = make(student=make_model(16, seed=1, dtype=torch.float64, tie_word_embeddings=tied), rows=rows, **options)
    batch = trainer.data_collator(trainer.train_dataset)
    expected = dense(trainer, batch)
    tokens = batch["labels"].ne(-100).sum()
    named = dict(trainer.model.named_parameters())
    wanted = dict(zip(named, torch.autograd.grad(expected / tokens, named.values()), strict=True))
    loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=tokens)
    torch.testing.assert_close(loss, expected / tokens, rtol=1e-12, atol=0)
    assert_same(gradients(trainer), wanted)


def test_moe_auxiliary_loss_is_added(make: Make) -> None:
    student = make_model(16, seed=1, family="Mixtral", num_local_experts=4, output_router_logits=True, router_aux_loss_coef=0.5)
    trainer = make(student=student, dtype=torch.float32)
    batch = trainer.data_collator(trainer.train_dataset)
    tokens = batch["labels"].ne(-100).sum()
    plain = trainer.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=tokens)
    torch.testing.assert_close(loss, dense(trainer, batch) / tokens + 0.5 * plain.aux_loss, rtol=1e-6, atol=0)


def test_lora_student(make: Make) -> None:
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
    wanted = torch.autograd.grad(expected, trained.values())
    loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=tokens)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
    found = torch.autograd.grad(loss, trained.values())
    assert_same(dict(zip(trained, found, strict=True)), dict(zip(trained, wanted, strict=True)))


@pytest.mark.parametrize("mode", ["probs", "logits"])
def test_several_teachers(make: Make, mode: str) -> None:
    teachers = [make_model(24, seed=s, dtype=torch.float64, initializer_range=0.3) for s in (2, 3)]
    trainer = make(teacher=teachers, ensemble_mode=mode, temperature=2.0)
    batch = trainer.data_collator(trainer.train_dataset)
    given = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    with torch.no_grad():
        z, *u = (model(**given).logits.flatten(0, 1)[batch["scored"]] / 2 for model in (trainer.model, *teachers))
        p = sum(u).div(2).softmax(-1) if mode == "logits" else sum(x.softmax(-1) for x in u).div(2)
        expected = 4 * (p * (p.log() - z.log_softmax(-1))).sum(-1).mean()
        torch.testing.assert_close(trainer.compute_loss(trainer.model, batch), expected, rtol=1e-10, atol=0)
    assert torch.isfinite(next(iter(gradients(trainer).values()))).all()


def test_differently_padded_vocabularies_are_cut_to_the_tokenizer(make: Make, tokenizer: Any) -> None:
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


@pytest.mark.skipif(sys.platform == "win32", reason="no peak memory of a process there")
def test_a_step_holds_no_logits() -> None:
    here = Path(__file__).parent
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(here.parent), os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, str(here / "training_memory.py"), "16", "64", "150000"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    logits = 16 * 64 * 150_000 * 4 / 2**20  # of one model
    assert float(done.stdout.split()[-1]) < logits / 2, "with 64 MiB for chunks, gradients and activations of a few MiB"


# The same step, however it is split


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
    packed.model.config.use_cache = True  # the trap: a cache switches off the mask between examples
    assert packed.teacher.models[0].config.use_cache
    assert_same(gradients(packed), reference, 1e-12)


def test_packing_is_refused_where_examples_would_see_each_other(make: Make) -> None:
    config = {"family": "Mamba", "intermediate_size": 32, "state_size": 4, "attn_implementation": "eager"}
    trainer = make(student=make_model(16, dtype=torch.float64, **config), packing=True, max_length=40)
    with pytest.raises(ValueError, match=r"packing=True does not work with mamba: .*; set packing=False"):
        trainer.train()


# Evaluation and logs


def test_evaluation_weighs_tokens(make: Make) -> None:
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
    packed = make(packing=True, max_length=40, eval_rows={"one": rows, "two": rows}, divergence="jsd", ce_weight=0.5)
    metrics = packed.evaluate()
    assert metrics["eval_one_loss"] == pytest.approx(expected, rel=1e-10)
    assert metrics["eval_two_loss"] == pytest.approx(expected, rel=1e-10)
    loss, logits, labels = packed.prediction_step(packed.model, packed.data_collator(packed.eval_dataset["one"]), True)
    assert (logits, labels) == (None, None)
    assert loss.item() == pytest.approx(expected, rel=1e-6)


def test_every_term_is_logged(make: Make) -> None:
    trainer = make(ce_weight=0.5, feature_weight=0.1, per_device_train_batch_size=4, gradient_accumulation_steps=2, rows=make_rows(8))
    batch = trainer.data_collator(trainer.train_dataset)
    side = LiveTeacher(copy.deepcopy(trainer.model), vocab_size=192).targets(_view(batch, ""))
    _, stats = kd.distillation_loss(
        side, trainer.teacher.targets(_view(batch, "teacher_")), labels=batch["labels"].flatten()[batch["scored"] + 1], return_stats=True
    )
    trainer.train()
    (log,) = [entry for entry in trainer.state.log_history if "loss" in entry]
    for name in ("divergence", "cross_entropy", "student_entropy", "teacher_entropy", "top1_agreement"):
        assert log[name] == pytest.approx(getattr(stats, name).mean().item(), rel=1e-5), name
    assert log["valid_tokens"] == batch["scored"].numel()
    assert log["loss"] == pytest.approx(log["divergence"] + 0.5 * log["cross_entropy"] + 0.1 * log["feature_loss"], rel=1e-5)
    assert log["tokens_per_second"] > 0
    assert log["peak_memory_mib"] > 10


def _view(batch: dict[str, Any], prefix: str) -> Any:
    from kdkernels.data.collator import view_of

    return view_of(batch, prefix)


# Interrupted


@pytest.mark.parametrize(
    "options",
    [{}, {"on_policy_fraction": 0.7, "max_new_tokens": 4, "packing": True, "max_length": 60}, {"feature_weight": 1.0}],
    ids=["data", "on_policy", "features"],
)
def test_a_resumed_run_is_the_run(make: Make, options: dict[str, Any]) -> None:
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
    expected, found = whole.model.state_dict(), resumed.model.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    started = student().state_dict()
    assert not any(torch.equal(started[name], found[name]) for name in started)


# On-policy


def _rollouts(trainer: DistillationTrainer, count: int = 4, **options: Any) -> Any:
    defaults = {"temperature": 1.0, "max_new_tokens": 6, "max_length": None, "vocab_size": None, "place": (0, 0, 0, 0)}
    return rollouts(trainer.model, trainer.train_dataset[:count], trainer.tokenizer, **{**defaults, **options})


def test_rollouts_keep_prompts_and_end_at_the_end_token(make: Make) -> None:
    rows = make_rows(12)
    rows[1]["teacher_prompt"] = "the cat sees"
    trainer = make(rows=rows)
    trainer.model.lm_head.weight.data[0] = 0.3 * trainer.model.lm_head.weight.data[1:].sum(0)  # some rollouts end
    state = torch.get_rng_state()
    trainer.model.train()
    first = _rollouts(trainer, 12, max_new_tokens=30)
    assert torch.equal(torch.get_rng_state(), state)
    assert trainer.model.training
    lengths = set()
    for (given,), (own,) in zip(trainer.train_dataset, first, strict=True):
        cut, their = given.student_scored[0] + 1, given.teacher_scored[0] + 1
        assert list(own.student_ids[:cut]) == list(given.student_ids[:cut])
        assert list(own.teacher_ids[:their]) == list(given.teacher_ids[:their])
        response = list(own.student_ids[cut:])
        assert list(own.teacher_ids[their:]) == response
        assert list(own.student_scored) == list(range(cut - 1, cut - 1 + len(response)))
        assert 0 not in response[:-1]
        assert response[-1] == 0 or len(response) == 30
        lengths.add(len(response))
    assert len(lengths) > 1
    assert _rollouts(trainer, 12, max_new_tokens=30) == first
    assert _rollouts(trainer, 12, max_new_tokens=30, place=(0, 1, 0, 0)) != first
    assert max(len(e.student_ids) for (e,) in _rollouts(trainer, max_length=13, max_new_tokens=9)) <= 13
    assert all(t < 30 for (e,) in _rollouts(trainer, vocab_size=30) for t in e.student_ids[e.student_scored[0] + 1 :])


def test_left_padding_does_not_change_a_rollout(make: Make) -> None:
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


def test_on_policy_steps_count_and_score_rollouts(make: Make) -> None:
    trainer = make(
        on_policy_fraction=1.0,
        max_new_tokens=5,
        divergence="reverse_kl",
        ce_weight=0.5,
        gradient_accumulation_steps=2,
        per_device_train_batch_size=4,
    )
    seen: list[Any] = []
    compute = trainer.compute_loss

    def recorded(model: Any, inputs: Any, **keywords: Any) -> Any:
        loss = compute(model, inputs, **keywords)
        with torch.no_grad():
            batch = {**inputs, "response": torch.zeros(inputs["scored"].numel())}  # no cross-entropy of its own words
            seen.append((keywords["num_items_in_batch"], inputs["scored"].numel(), loss.detach(), dense(trainer, batch)))
        return loss

    trainer.compute_loss = recorded  # type: ignore[method-assign]
    trainer.train()
    total = sum(count for _, count, _, _ in seen)
    assert len(seen) == 2
    for items, _, loss, expected in seen:
        assert items == total
        torch.testing.assert_close(loss, expected / total, rtol=1e-10, atol=0)


def test_the_mixture_follows_the_fraction(make: Make) -> None:
    trainer = make(on_policy_fraction=0.5, max_new_tokens=2, max_steps=30, per_device_train_batch_size=1, dtype=torch.float32)
    own: list[bool] = []
    compute = trainer.compute_loss
    trainer.compute_loss = lambda model, inputs, **k: (own.append(bool(inputs.get("on_policy"))), compute(model, inputs, **k))[1]  # type: ignore[method-assign]
    trainer.train()
    assert 8 <= sum(own) <= 22  # 30 fair coins: outside once in 500 seeds


# Features


def test_projectors_are_kept_apart(make: Make) -> None:
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
    # The last of transformers' hidden states is after the final norm; the layer's own output is what it norms.
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


# What does not fit


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"divergence": "kl"}, "divergence 'kl' is unknown; valid names: forward_kl"),
        ({"divergence": "jsd(gamma=1)"}, "divergence 'jsd' has no parameter 'gamma'; it has: beta"),
        ({"divergence": "jsd(0.3)"}, "can't be read: write a name, or a name with parameters such as"),
        ({"divergence": "jsd(beta=1)"}, "in the open interval"),
        ({"temperature": 0}, "temperature must be finite and > 0, got 0"),
        ({"ce_weight": -1}, "ce_weight must be finite and >= 0, got -1"),
        ({"kd_weight": 0}, "are all 0"),
        ({"on_policy_fraction": 1.5}, "on_policy_fraction is a share, from 0 to 1, got 1.5"),
        ({"on_policy_fraction": 0.5, "kd_weight": 0, "ce_weight": 1}, "learns from the divergence only"),
        ({"max_length": 0}, "max_length must be an integer >= 1, got 0"),
        ({"max_new_tokens": 2.5}, "max_new_tokens must be an integer >= 1, got 2.5"),
        ({"overlong": "cut"}, "overlong must be one of error, drop, truncate, got 'cut'"),
        ({"ensemble_mode": "mean"}, "ensemble_mode must be one of probs, logits, got 'mean'"),
        ({"memory_budget": -1}, "memory_budget must be a positive int"),
        ({"remove_unused_columns": True}, "would remove the teacher's view"),
        ({"label_smoothing_factor": 0.1}, "no label smoothing"),
        ({"max_length": 1000}, r"max_length=1000, but a model takes 128 tokens \(its max_position_embeddings\)"),
        ({"feature_layers": [0, 1]}, r"feature_layers=\[0, 1\]: give \(student, teacher\) pairs"),
        ({"train_sampling_strategy": "group_by_length"}, "group_by_length' is not supported"),
        ({"feature_weight": 1.0, "feature_layers": {0: 7}}, "names layer 7 of the teacher, which has 2"),
    ],
)
def test_arguments_that_make_no_sense(make: Make, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_arguments_survive_json(tmp_path: Path) -> None:
    for given, kept in (
        (kd.JSD(beta=0.3), "jsd(beta=0.3)"), ("jsd(beta=0.5)", "jsd"),
        ({"name": "logit_mse", "centered": True}, "logit_mse(centered=True)"),
        (kd.ABDivergence(0.5, 0.25), "ab_divergence(alpha=0.5, beta=0.25)"), ("reverse_kl", "reverse_kl"),
    ):  # fmt: skip
        args = DistillationArguments(output_dir=str(tmp_path), divergence=given, use_cpu=True)
        assert json.loads(args.to_json_string())["divergence"] == kept
        assert parse_divergence(args.divergence) == parse_divergence(given)


def test_teachers_that_can_not_serve(make: Make) -> None:
    class Cache:
        vocab_size = 192
        salt = "s"

        def targets(self, view: Any) -> None:
            raise KeyError(view.keys[0])

    with pytest.raises(TypeError, match="teacher must be a model, a list of models or a teacher source"):
        make(teacher=3)
    for options, message in (
        ({"on_policy_fraction": 0.5}, "on_policy_fraction=0.5 needs a teacher that runs"),
        ({"feature_weight": 0.5}, "feature_weight=0.5 needs a teacher that runs"),
        ({"kd_on_prompt": True}, "a cache holds targets of responses only"),
        ({"vocab_size": 100}, "the teacher's targets are over 192 tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            make(teacher=Cache(), **options)
    trainer = make(teacher=Cache())
    with pytest.raises(KeyError) as error:
        trainer.train()
    assert error.value.args[0] in [e.key("s") for (e,) in trainer.train_dataset]
    student = make_model(16)
    with pytest.raises(ValueError, match="teacher is the student itself"):
        make(student=student, teacher=student)
    two = [make_model(24, seed=s, dtype=torch.float64) for s in (2, 3)]
    with pytest.raises(ValueError, match="needs one teacher"):
        make(teacher=two, feature_weight=1.0)
    with pytest.raises(ValueError, match="several teachers need mode='probs'"):
        LiveTeacher(two)


def test_the_trainer_asks_for_what_it_needs(tokenizer: Any, tmp_path: Path) -> None:
    from transformers import TrainingArguments

    with pytest.raises(TypeError, match="args must be DistillationArguments, got TrainingArguments"):
        DistillationTrainer(model=make_model(), args=TrainingArguments(str(tmp_path)), processing_class=tokenizer)
    with pytest.raises(TypeError, match=r"train_dataset is a mapping \(train, test\)"):
        DistillationTrainer(make_model(), None, DistillationArguments(str(tmp_path)), {"train": [], "test": []}, processing_class=tokenizer)
    with pytest.raises(TypeError, match="processing_class is missing"):
        DistillationTrainer(model=make_model(), args=DistillationArguments(str(tmp_path)))


def test_examples_are_taken_as_they_are(make: Make, tokenizer: Any) -> None:
    examples = load_examples(make_rows(3), tokenizer)
    assert make(rows=examples).train_dataset == [(e,) for e in examples]
    assert math.isfinite(make(rows=examples).train().training_loss)
    longest = max(map(len, examples))
    with pytest.raises(ValueError, match=f"an example has {longest} tokens, more than max_length={longest - 1}"):
        make(rows=examples, max_length=longest - 1)
