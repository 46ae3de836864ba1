"""Invalid arguments, teachers and examples raise errors that name them. Arguments can be saved as JSON."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from training import Make, make_model, make_rows, make_tokenizer, trainers

pytest.importorskip("transformers")
from transformers import LlamaForSequenceClassification, T5Config, T5ForConditionalGeneration

import kdkernels as kd
from kdkernels.divergences import parse
from kdkernels.teachers.live import LiveTeacher
from kdkernels.trainer import DistillationArguments, DistillationTrainer, load_examples


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer()


@pytest.fixture
def make(tokenizer: Any, tmp_path: Path) -> Make:
    return trainers(tmp_path, tokenizer)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"divergence": "kl"}, "divergence 'kl' is unknown; valid names: forward_kl"),
        ({"divergence": "jsd(gamma=1)"}, "divergence 'jsd' has no parameter 'gamma'; it has: beta"),
        ({"divergence": "jsd(0.3)"}, "cannot be parsed: write a name, or a name with parameters such as"),
        ({"divergence": "jsd(beta=1)"}, "in the open interval"),
        ({"temperature": 0}, "temperature must be finite and > 0, got 0"),
        ({"ce_weight": -1}, "ce_weight must be finite and >= 0, got -1"),
        ({"kd_weight": 0}, "are all 0"),
        ({"on_policy_fraction": 1.5}, "on_policy_fraction is a share, from 0 to 1, got 1.5"),
        ({"on_policy_fraction": 0.5, "kd_weight": 0, "ce_weight": 1}, "learns from the divergence only"),
        ({"max_length": 0}, "max_length must be an integer >= 1, got 0"),
        ({"max_new_tokens": 2.5}, "max_new_tokens must be an integer >= 1, got 2.5"),
        ({"overlong": "cut"}, "overlong must be one of error, drop, truncate, split, got 'cut'"),
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
def test_invalid_arguments_raise(make: Make, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataloader_prefetch_factor": 0, "dataloader_num_workers": 1}, "dataloader_prefetch_factor must be an integer >= 1, got 0"),
        ({"dataloader_num_workers": -1}, "dataloader_num_workers must be an integer >= 0, got -1"),
        ({"neftune_noise_alpha": float("nan")}, "neftune_noise_alpha must be finite and >= 0, got nan"),
        ({"neftune_noise_alpha": -1}, "neftune_noise_alpha must be finite and >= 0, got -1"),
        ({"eval_delay": float("inf")}, "eval_delay must be finite and >= 0, got inf"),
        ({"eval_accumulation_steps": 0}, "eval_accumulation_steps must be an integer >= 1, got 0"),
        ({"torch_empty_cache_steps": 0}, "torch_empty_cache_steps must be an integer >= 1, got 0"),
        ({"adam_beta2": 1.0}, "adam_beta2 must be >= 0 and < 1, got 1.0"),
        ({"adam_epsilon": float("nan")}, "adam_epsilon must be finite and >= 0, got nan"),
        ({"seed": -1}, "seed must be an integer >= 0, got -1"),
        ({"data_seed": 2**32}, "data_seed must be at most 4294967295, got 4294967296"),
        ({"lr_scheduler_kwargs": {"typo": 1}}, "lr_scheduler_type=linear, lr_scheduler_kwargs={'typo': 1}: .*typo"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "lr_scheduler_type=cosine_with_min_lr, lr_scheduler_kwargs=None: "),
        ({"optim_args": "typo"}, "optim=.*, optim_args='typo': "),
        ({"report_to": "nowhere"}, "report_to=nowhere: nowhere is not supported"),
    ],
)
def test_invalid_settings_of_transformers_raise(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DistillationArguments(output_dir=str(tmp_path), use_cpu=True, **options)


@pytest.mark.parametrize(("report", "package"), [("tensorboard", "tensorboard"), ("wandb", "wandb"), ("trackio", "trackio")])
def test_report_without_its_package_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, report: str, package: str) -> None:
    from transformers.integrations import integration_utils

    monkeypatch.setattr(integration_utils, f"is_{package}_available", lambda: False)
    with pytest.raises(ValueError, match=f"report_to={report}: .*{package} to be installed"):
        DistillationArguments(output_dir=str(tmp_path), use_cpu=True, report_to=report)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": "2"}, "temperature must be a Python number, got str"),
        ({"ce_weight_last": "0"}, "ce_weight_last must be a Python number, got str"),
        ({"on_policy_fraction": "all"}, "on_policy_fraction must be a Python number, got str"),
        ({"t_squared": "no"}, "t_squared must be True or False, got 'no'"),
        ({"packing": 1}, "packing must be True or False, got 1"),
    ],
)
def test_arguments_of_the_wrong_type_raise(make: Make, options: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        make(**options)


def test_hub_token_is_not_saved(tmp_path: Path) -> None:
    args = DistillationArguments(output_dir=str(tmp_path), hub_token="hf_a_secret", use_cpu=True)
    torch.save(args, tmp_path / "training_args.bin")
    assert b"hf_a_secret" not in (tmp_path / "training_args.bin").read_bytes()
    assert args.hub_token == "hf_a_secret"


def test_divergences_are_saved_as_text_in_json(tmp_path: Path) -> None:
    for divergence, spelling in (
        (kd.JSD(beta=0.3), "jsd(beta=0.3)"), ("jsd(beta=0.5)", "jsd"),
        ({"name": "logit_mse", "centered": True}, "logit_mse(centered=True)"),
        (kd.ABDivergence(0.5, 0.25), "ab_divergence(alpha=0.5, beta=0.25)"), ("reverse_kl", "reverse_kl"),
    ):  # fmt: skip
        args = DistillationArguments(output_dir=str(tmp_path), divergence=divergence, use_cpu=True)
        assert json.loads(args.to_json_string())["divergence"] == spelling
        assert parse(args.divergence) == parse(divergence)


def test_unsupported_teachers_and_students_raise(make: Make) -> None:
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
        ({"kd_on_prompt": True}, "a cache has targets for responses only"),
        ({"vocab_size": 100}, "the teacher's targets are over 192 tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            make(teacher=Cache(), **options)
    Cache.vocab_size = 200
    with pytest.raises(ValueError, match=r"over 200 columns, the student has 192 .*kdkernels cache --vocab-size \d+"):
        make(teacher=Cache())
    Cache.vocab_size = 192
    assert make(teacher=Cache(), kd_weight=0.0, ce_weight=1.0).train().training_loss > 0, "a teacher with weight 0 is not run"
    trainer = make(teacher=Cache())
    with pytest.raises(KeyError) as error:
        trainer.train()
    assert error.value.args[0] in [e.key("s") for (e,) in trainer.train_dataset]
    causal = make_model(16)
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=192, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))
    for model in (t5, causal.model, LlamaForSequenceClassification(causal.config)):
        for models in ({"student": model}, {"teacher": model}):
            with pytest.raises(TypeError, match=f"is a {type(model).__name__}, not a causal language model"):
                make(**models)
    student = make_model(16)
    with pytest.raises(ValueError, match="every parameter of the student is frozen"):
        make(student=make_model(16).requires_grad_(False)).train()
    with pytest.raises(ValueError, match="teacher is the student itself"):
        make(student=student, teacher=student)
    two = [make_model(24, seed=s, dtype=torch.float64) for s in (2, 3)]
    with pytest.raises(ValueError, match="needs one teacher"):
        make(teacher=two, feature_weight=1.0)
    with pytest.raises(ValueError, match="several teachers need mode='probs'"):
        LiveTeacher(two)


def test_missing_and_unused_trainer_arguments_raise(tokenizer: Any, tmp_path: Path) -> None:
    from transformers import TrainingArguments

    with pytest.raises(TypeError, match="args must be DistillationArguments, got TrainingArguments"):
        DistillationTrainer(model=make_model(), args=TrainingArguments(str(tmp_path)), processing_class=tokenizer)
    with pytest.raises(TypeError, match=r"train_dataset is a mapping \(train, test\)"):
        DistillationTrainer(make_model(), None, DistillationArguments(str(tmp_path)), {"train": [], "test": []}, processing_class=tokenizer)
    for name in ("compute_loss_func", "compute_metrics", "preprocess_logits_for_metrics"):
        with pytest.raises(TypeError, match=f"{name} would never be called"):
            DistillationTrainer(make_model(), None, DistillationArguments(str(tmp_path)), processing_class=tokenizer, **{name: print})
    with pytest.raises(TypeError, match="processing_class is missing"):
        DistillationTrainer(model=make_model(), args=DistillationArguments(str(tmp_path)))


def test_tokenised_examples_are_used_unchanged(make: Make, tokenizer: Any) -> None:
    examples = load_examples(make_rows(3), tokenizer)
    assert make(rows=examples).train_dataset == [(e,) for e in examples]
    assert math.isfinite(make(rows=examples).train().training_loss)
    longest = max(map(len, examples))
    with pytest.raises(ValueError, match=f"an example has {longest} tokens, more than max_length={longest - 1}"):
        make(rows=examples, max_length=longest - 1)
