"""Reports of ``kdkernels train``: values that are not finite, plans, logs, best checkpoints and saved configs."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
import runs
from runs import log, run_in, summary, weights
from training import Make, make_model, make_tokenizer, trainers
from transformers import AutoConfig

from kdkernels.trainer import DistillationArguments, DistillationTrainer
from kdkernels.trainer.arguments import METRICS, metric_name
from kdkernels.trainer.checkpoints import CheckpointError, flaw
from kdkernels.trainer.finite import NotFiniteError


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.make_home(tmp_path_factory.mktemp("home"))


@pytest.fixture
def make(tmp_path: Path) -> Make:
    return trainers(tmp_path, make_tokenizer())


def test_nan_in_training_raises_and_keeps_earlier_checkpoints(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = DistillationTrainer.training_step

    def diverging(self: Any, model: Any, *args: Any) -> Any:
        if self.state.global_step == 3:
            next(model.parameters()).data.fill_(math.nan)
        return step(self, model, *args)

    monkeypatch.setattr(DistillationTrainer, "training_step", diverging)
    out = tmp_path / "out"
    with pytest.raises(NotFiniteError, match="not finite at step 4: loss nan"):
        run_in(home, out)
    assert flaw(out / "checkpoint-3") is None
    assert not (out / "checkpoint-4").exists()
    assert not (out / "model.safetensors").exists()
    assert summary(out)["not_finite"] == {"loss": "nan", "grad_norm": "nan"}
    assert (out / summary(out)["figure"]).is_file()
    assert log(out)[-1]["loss"] == "nan"


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_not_saved(make: Make, value: float) -> None:
    from transformers import TrainerCallback

    class Spoil(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            next(model.parameters()).data[0, 0] = value

    trainer = make(save_strategy="steps", save_steps=1)
    trainer.add_callback(Spoil())
    with pytest.raises(NotFiniteError, match="weights nan"):
        trainer.train()
    assert not list(Path(trainer.args.output_dir).glob("checkpoint-*"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_steps": 0}, "max_steps must be an integer >= 1, or -1 for the steps of num_train_epochs, got 0"),
        ({"max_steps": -2}, "max_steps must be an integer >= 1"),
        ({"num_train_epochs": 0}, "num_train_epochs must be finite and > 0, got 0"),
        ({"save_steps": 0}, "save_steps must be an integer >= 1, or a share of all steps between 0 and 1, got 0"),
        ({"logging_steps": 2.5}, "logging_steps must be an integer >= 1"),
        ({"eval_steps": -1, "eval_strategy": "steps"}, "eval_steps must be an integer >= 1"),
        ({"warmup_steps": 1.5}, "warmup_steps must be an integer >= 0"),
        ({"learning_rate": math.nan}, "learning_rate must be finite"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps must be an integer >= 1"),
        ({"train_sampling_strategy": "batch_rebalance"}, "'batch_rebalance' is not supported"),
        ({"ignore_data_skip": True}, "on other rows than an uninterrupted one"),
    ],
)
def test_invalid_numbers_of_steps_raise(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DistillationArguments(output_dir=str(tmp_path), **options)


@pytest.mark.parametrize(
    "options",
    [
        {"max_steps": -1, "num_train_epochs": 0.5}, {"max_steps": 3, "gradient_accumulation_steps": 5},
        {"max_steps": -1, "num_train_epochs": 1.2, "dataloader_drop_last": True, "per_device_train_batch_size": 7},
    ],
)  # fmt: skip
def test_plan_has_the_steps_of_the_run(home: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    import io

    from rich.console import Console

    from kdkernels.cli.train.plan import plan
    from kdkernels.cli.train.settings import read_settings

    run_in(home, tmp_path / "out", **options)
    paths = {"teacher": [str(home / "teacher")], "student": str(home / "student"), "data": [str(home / "train.jsonl")]}
    fresh = {"per_device_train_batch_size": 4, "use_cpu": True, "save_steps": 0.5, "warmup_steps": 0.5, **options}
    output = io.StringIO()
    plan(read_settings({**paths, **fresh, "output_dir": str(tmp_path / "new")}, {}, []), Console(file=output, width=500))
    steps = summary(tmp_path / "out")["steps"]
    assert f"steps: {steps} of " in output.getvalue()
    assert f"checkpoints every {math.ceil(steps / 2)} step" in output.getvalue()
    assert f"a warm-up of {math.ceil(steps / 2)} steps" in output.getvalue()
    assert "run: begins in" in output.getvalue()


def test_logs_and_evaluations_are_lines_without_a_terminal(home: Path, tmp_path: Path) -> None:
    printed = run_in(home, tmp_path / "out", eval_data=[str(home / "held-out.jsonl")], eval_strategy="steps", eval_steps=3)
    lines = [line for line in printed.splitlines() if "loss" in line and ":" in line]
    starts = ["before training, held-out", "step 2 of 6:", "step 3 of 6, held-out", "step 4 of 6:", "step 6 of 6:", "step 6 of 6, held-out"]
    assert [line for line in lines if line.startswith(("before", "step"))] == lines[:6]
    assert all(line.startswith(start) for line, start in zip(lines, starts, strict=False))
    assert [line["step"] for line in log(tmp_path / "out") if "loss" in line or "eval_loss" in line] == [0, 2, 3, 4, 6, 6, 6]


def test_direction_of_each_metric_is_known(tmp_path: Path) -> None:
    for name, greater_is_better in METRICS.items():
        for metric in (name, f"eval_{name}", f"eval_chats_{name}"):
            args = DistillationArguments(
                output_dir=str(tmp_path), metric_for_best_model=metric, load_best_model_at_end=True, eval_strategy="steps",
                save_steps=500, eval_steps=500, use_cpu=True,
            )  # fmt: skip
            assert args.greater_is_better is greater_is_better
    assert metric_name("exact_match") is None
    assert DistillationArguments(output_dir=str(tmp_path), metric_for_best_model="divergence", greater_is_better=True).greater_is_better


def test_best_model_is_saved_at_the_end(home: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True, "metric_for_best_model": "cross_entropy"}
    printed = run_in(home, out, eval_data=[str(home / "held-out.jsonl")], learning_rate=0.3, **options)
    values = {line["step"]: line["eval_cross_entropy"] for line in log(out) if "eval_cross_entropy" in line and line["step"]}
    report = summary(out)
    assert report["best"]["value"] == min(values.values()) == report["after"]["eval_cross_entropy"]
    assert report["checkpoint"] == report["best"]["checkpoint"]
    assert weights(out) == (Path(report["checkpoint"]) / "model.safetensors").read_bytes()
    assert f"best by cross_entropy, {min(values.values()):.4f}" in printed


def test_unknown_metric_for_the_best_model_raises(home: Path, tmp_path: Path) -> None:
    from kdkernels.cli.train.settings import TrainError

    options = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True, "metric_for_best_model": "feature_loss"}
    with pytest.raises(TrainError, match="feature_loss: an evaluation of this run has loss, divergence, cross_entropy"):
        run_in(home, tmp_path / "out", eval_data=[str(home / "held-out.jsonl")], **options)
    assert not (tmp_path / "out" / "run.json").exists()


def test_saved_config_keeps_the_students_values(make: Make, tmp_path: Path) -> None:
    student = make_model(16, use_cache=True, pad_token_id=5, bos_token_id=7)
    trainer = make(student, save_strategy="steps", save_steps=1)
    trainer.train()
    trainer.save_model(str(tmp_path / "end"))
    for folder in (tmp_path / "end", next(Path(trainer.args.output_dir).glob("checkpoint-*"))):
        config = AutoConfig.from_pretrained(folder)
        assert (config.use_cache, config.pad_token_id, config.bos_token_id) == (True, 5, 7)


def test_on_policy_training_needs_only_prompts(home: Path, tmp_path: Path) -> None:
    prompts = [{"prompt": "one plus two is "}, {"messages": [{"role": "user", "content": "red"}]}, {"prompt": "a cat ", "response": "runs"}]
    data = runs.write_rows(tmp_path / "prompts.jsonl", prompts)
    run_in(home, tmp_path / "out", data=[str(data)], on_policy_fraction=1.0, max_new_tokens=3, max_steps=2)
    assert summary(tmp_path / "out")["steps"] == 2
    with pytest.raises(ValueError, match="response"):
        run_in(home, tmp_path / "half", data=[str(data)], on_policy_fraction=0.5, max_steps=1)


def test_teacher_with_another_vocabulary_size_is_refused(make: Make) -> None:
    with pytest.raises(ValueError, match="the teacher 5000, and the tokenizer has"):
        make(teacher=make_model(24, vocab_size=5000))
    make(teacher=make_model(24, vocab_size=5000), vocab_size=150)
    with pytest.warns(UserWarning, match="pad their vocabulary differently"):
        make(teacher=make_model(24, vocab_size=256))


def test_teacher_with_another_tokenizer_is_refused(tmp_path: Path) -> None:
    args = DistillationArguments(output_dir=str(tmp_path), use_cpu=True)
    tokenizer, teacher_tokenizer = make_tokenizer(), make_tokenizer(words=["green", "red"])
    with pytest.raises(ValueError, match="tokenizers of teacher and student differ"):
        DistillationTrainer(make_model(16), make_model(24), args, [], None, tokenizer, teacher_tokenizer)


def test_bfloat16_weights_and_a_missing_end_token_warn(make: Make, tmp_path: Path) -> None:
    import torch

    with pytest.warns(UserWarning, match="weights are bfloat16, in which most updates round to nothing"):
        make(make_model(16, dtype=torch.bfloat16))
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    with pytest.warns(UserWarning, match="no end-of-text token"):
        trainers(tmp_path, tokenizer)()


def test_trainer_refuses_a_checkpoint_with_other_settings(make: Make, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    make(save_strategy="steps", save_steps=1, output_dir=out).train()
    for options, name in (({"temperature": 3.0}, "temperature"), ({"weight_decay": 0.5}, "weight_decay"), ({"seed": 9}, "seed")):
        with pytest.raises(CheckpointError, match=f"with another {name}"):
            make(max_steps=2, output_dir=out, **options).train(resume_from_checkpoint=True)
    with pytest.raises(CheckpointError, match="with another teacher"):
        make(teacher=make_model(24, seed=9), max_steps=2, output_dir=out).train(resume_from_checkpoint=True)
    trainer = make(max_steps=2, save_strategy="no", output_dir=out)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 2


def test_tensorboard_writes_into_the_output_folder(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    from kdkernels.cli.train.callbacks import reporting_under

    monkeypatch.setenv("WANDB_DIR", "elsewhere")
    with reporting_under(tmp_path):
        assert Path(os.environ["TENSORBOARD_LOGGING_DIR"]).parent == tmp_path
        assert os.environ["WANDB_DIR"] == "elsewhere"
    assert "TENSORBOARD_LOGGING_DIR" not in os.environ


def test_nan_and_infinity_are_text_in_the_log(tmp_path: Path) -> None:
    from kdkernels.cli.train.callbacks import number

    assert json.loads(json.dumps([number(v) for v in (math.nan, -math.inf, 1.5)])) == ["nan", "-inf", 1.5]
