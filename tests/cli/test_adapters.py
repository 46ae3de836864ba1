"""LoRA adapters: ``kdkernels train --lora-r``, ``--student ADAPTER`` and ``kdkernels merge``."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import killed_at, log, make_home, run_in, summary
from training import Make, make_model, make_tokenizer, trainers
from typer.testing import CliRunner

from kdkernels.cli import app
from kdkernels.cli.train.options import AdapterOptions

peft = pytest.importorskip("peft")
LORA = {"lora_r": 2, "lora_dropout": 0.1, "max_steps": 4}
HELD_OUT = "held-out.jsonl"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_home(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="module")
def finished(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 4 steps with LoRA, a checkpoint after each, and the merged model."""
    out = tmp_path_factory.mktemp("finished") / "out"
    run_in(home, out, **LORA, merge=True, eval_data=[str(home / HELD_OUT)])
    return out


def adapter_weights(out: Path) -> bytes:
    return (out / "adapter_model.safetensors").read_bytes()


def invoke(*words: Any) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words])


def logits(folder: Path) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    from kdkernels.teachers.loading import load

    model = load(AutoModelForCausalLM, "student", str(folder)).eval()
    with torch.no_grad():
        return model(torch.arange(40)[None]).logits


def test_output_is_a_trained_adapter(home: Path, finished: Path) -> None:
    config = json.loads((finished / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(home / "student")
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (2, 4, 0.1)
    assert "lm_head" not in config["target_modules"]
    assert not (finished / "model.safetensors").exists()
    assert summary(finished)["after"]["eval_loss"] < summary(finished)["before"]["eval_loss"]


@pytest.mark.parametrize("step", [1, 4])
def test_resumed_lora_run_gives_the_same_bits(home: Path, finished: Path, tmp_path: Path, step: int) -> None:
    out = killed_at(step, finished, tmp_path / "out")
    for path in (out / "adapter_model.safetensors", out / "adapter_config.json"):
        path.unlink()
    shutil.rmtree(out / "merged")
    run_in(home, out, **LORA, merge=True, eval_data=[str(home / HELD_OUT)])
    assert adapter_weights(out) == adapter_weights(finished)
    assert log(out) == log(finished)
    merged = [(folder / "merged" / "model.safetensors").read_bytes() for folder in (out, finished)]
    assert merged[0] == merged[1]


def test_the_base_model_of_a_lora_is_named_as_it_was_given(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)
    run_in(home, tmp_path, student="student", lora_r=2, max_steps=1, save_steps=5)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == "student"
    assert json.loads((tmp_path / "base_model.json").read_text())["base"] == "student"
    assert summary(tmp_path)["steps"] == 1


def test_resume_refuses_another_lora(home: Path, finished: Path) -> None:
    for change, message in (({"lora_r": 3}, "--lora-r (2 then, 3 now)"), ({"use_rslora": True}, "--use-rslora (False then, True now)")):
        with pytest.raises(ValueError, match=re.escape(message)):
            run_in(home, finished, **{**LORA, **change})


def save_adapter(folder: Path, base: Path, model: Any = None, **options: Any) -> Path:
    """Save an adapter with random weights that names ``base`` as its base model."""
    torch.manual_seed(3)
    config = AdapterOptions(**{"lora_r": 2, **options}).config()
    config.init_lora_weights = False
    adapted = peft.get_peft_model(make_model(8, 1, seed=1, initializer_range=0.05) if model is None else model, config)
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    adapted.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"use_dora": True}, {"lora_target_modules": ["q_proj,down_proj"]}])
def test_merged_weights_give_the_outputs_of_the_adapter(home: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    adapter, merged = save_adapter(tmp_path / "adapter", home / "student", lora_alpha=16.0, **options), tmp_path / "merged"
    for _ in range(2):  # the command can be repeated
        result = invoke("merge", adapter, "--out", merged)
        assert result.exit_code == 0, result.output
    expected = logits(adapter)
    torch.testing.assert_close(logits(merged), expected, rtol=0, atol=1e-5)
    assert (logits(home / "student") - expected).abs().max() > 1e-3
    assert not list(merged.glob("adapter*"))
    assert (merged / "tokenizer.json").is_file()


def test_training_continues_an_adapter(home: Path, finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run_in(home, out, student=str(finished), max_steps=2, eval_data=[str(home / HELD_OUT)])
    assert summary(out)["before"]["eval_loss"] == pytest.approx(summary(finished)["after"]["eval_loss"], rel=1e-5)
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == str(home / "student")
    assert adapter_weights(out) != adapter_weights(finished)


def test_resume_refuses_another_base_model_of_the_adapter(home: Path, tmp_path: Path) -> None:
    """Changed weights of the base model make another student."""
    base, adapter, out = tmp_path / "base", tmp_path / "adapter", tmp_path / "out"
    shutil.copytree(home / "student", base)
    run_in(home, adapter, student=str(base), lora_r=2, max_steps=1)
    (adapter / "base_model.json").unlink()  # as peft saves it
    run_in(home, out, student=str(adapter), max_steps=1)
    make_model(8, 1, seed=9).save_pretrained(base)
    with pytest.raises(ValueError, match="the --student's weights or config"):
        run_in(home, out, student=str(adapter), max_steps=2)


@pytest.mark.parametrize(
    ("model_options", "message"),
    [
        ({"hidden": 12}, "of shape"),
        ({"seed": 5}, "the config or weights there are not those that it was trained on"),
        ({"family": "GPTNeoX"}, "not found in the base model"),
    ],
)
def test_adapter_for_another_model_is_refused(
    home: Path, finished: Path, tmp_path: Path, model_options: dict[str, Any], message: str
) -> None:
    adapter, base = tmp_path / "adapter", tmp_path / "base"
    shutil.copytree(finished, adapter, ignore=shutil.ignore_patterns("checkpoint-*", ".kdkernels"))
    make_model(**{"hidden": 8, "layers": 1, "seed": 1, **model_options}).save_pretrained(base)
    make_tokenizer().save_pretrained(base)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(base)}))
    if "seed" not in model_options:
        (adapter / "base_model.json").unlink()
    for command in (
        ("train", "--student", adapter, "--teacher", home / "teacher", "--data", home / "train.jsonl", "--output-dir", tmp_path / "out"),
        ("merge", adapter, "--out", tmp_path / "out"),
    ):
        result = invoke(*command)
        assert result.exit_code == 2, result.output
        assert len(result.output.splitlines()) == 1
        assert f"{adapter}: the adapter is for another model than {base}" in result.output
        assert message in result.output
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("layers", "message"),
    [((2, 1), "layers.1.self_attn.q_proj.lora_A.weight of shape (2, 8) has no place there"), ((1, 2), "it has no weights for")],
)
def test_adapter_for_another_number_of_layers_is_refused(tmp_path: Path, layers: tuple[int, int], message: str) -> None:
    """No weight of the adapter is dropped without an error, and none keeps its random initial value."""
    make_model(8, layers[1], seed=1).save_pretrained(tmp_path / "base")
    adapter = save_adapter(tmp_path / "adapter", tmp_path / "base", make_model(8, layers[0]), lora_target_modules=["q_proj"])
    result = invoke("merge", adapter, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert message in result.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--lora-alpha", "8"], "--lora-alpha without --lora-r"),
        (["--use-dora"], "--use-dora without --lora-r"),
        (["--lora-r", "0"], "--lora-r 0: it must be an integer >= 1"),
        (["--lora-r", "two"], "--lora-r: invalid int value: 'two'"),
        (["--lora-r", "2", "--lora-dropout", "1.5"], "--lora-dropout 1.5: it must be from 0 to below 1"),
        (["--lora-r", "2", "--lora-alpha", "nan"], "--lora-alpha nan: it must be finite and > 0"),
        (["--lora-r", "2", "--lora-target-modules", "w_query"], "--lora-target-modules w_query: "),
        (["--lora-alhpa", "2"], "unknown option --lora-alhpa; nearest: --lora-alpha"),
        (["--merge"], "--merge, but no adapter is trained"),
    ],
)
def test_invalid_adapter_options_raise(home: Path, tmp_path: Path, options: list[str], message: str) -> None:
    result = invoke(
        "train", "--student", home / "student", "--teacher", home / "teacher", "--data", home / "train.jsonl", "--output-dir",
        tmp_path / "out", *options,
    )  # fmt: skip
    assert result.exit_code == 2, result.output
    assert message in result.output
    assert not (tmp_path / "out").exists()


def test_lora_on_an_adapter_and_merge_of_a_whole_model_raise(home: Path, finished: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="which is an adapter already"):
        run_in(home, tmp_path / "out", student=str(finished), lora_r=2)
    result = invoke("merge", home / "student", "--out", tmp_path / "merged")
    assert result.exit_code == 2
    assert "a whole model has nothing to merge" in result.output


def test_missing_base_model_is_named(home: Path, finished: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    shutil.copytree(finished, adapter, ignore=shutil.ignore_patterns("checkpoint-*"))
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(tmp_path / "gone")}))
    result = invoke("merge", adapter, "--out", tmp_path / "merged")
    assert result.exit_code == 2
    assert f"is an adapter, and its base model can't be loaded: {tmp_path / 'gone'}: no such folder" in result.output


def test_adapter_is_used_as_teacher(home: Path, finished: Path, tmp_path: Path) -> None:
    """The same adapter as teacher and student has divergence 0."""
    run_in(home, tmp_path / "out", teacher=[str(finished)], student=str(finished), max_steps=1, eval_data=[str(home / HELD_OUT)])
    assert summary(tmp_path / "out")["before"]["eval_divergence"] == pytest.approx(0, abs=1e-6)


def test_plan_counts_only_trained_parameters(home: Path) -> None:
    result = invoke(
        "train", "--plan", "--student", home / "student", "--teacher", home / "teacher", "--data", home / "train.jsonl", "--output-dir",
        "unwritten", "--lora-r", "2", "--use-cpu",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    model = peft.get_peft_model(make_model(8, 1), peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert f"student: {count / 1e6:,.3f} M parameters are trained" in result.output


class Shapes(torch.utils._python_dispatch.TorchDispatchMode):  # type: ignore[misc]
    """Record the shape of every tensor that an operator returns, also inside the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.recorded: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        self.recorded |= {tuple(t.shape) for t in torch.utils._pytree.tree_leaves(result) if isinstance(t, torch.Tensor)}
        return result


@pytest.fixture
def make(tmp_path: Path) -> Make:
    return trainers(tmp_path, make_tokenizer())


@pytest.mark.parametrize("frozen", [True, False])
def test_frozen_head_has_no_gradient_and_no_logits(make: Make, frozen: bool) -> None:
    """No tensor of shape ``[N, V]`` is made. The head's gradient ``[V, D]`` is made only if the head is trained."""
    student = make_model(16, seed=1)
    if frozen:
        student = peft.get_peft_model(student, peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    trainer = make(student=student, dtype=torch.float32, temperature=2.0, ce_weight=0.5, memory_budget=8 * 192 * 3)
    batch = trainer.data_collator(trainer.train_dataset)
    trainer.compute_loss(trainer.model, batch)  # the first call measures the head
    head = trainer.model.get_output_embeddings().weight
    with Shapes() as shapes:
        trainer.compute_loss(trainer.model, batch).backward()
    rows, columns = batch["scored"].numel(), trainer.vocab_size
    assert not {shape for shape in shapes.recorded if shape and shape[-1] in (columns, 192) and math.prod(shape[:-1]) >= rows}
    weight_shapes = (
        {shape for shape in shapes.recorded if shape in ((192, 16), (columns, 16))} - {tuple(head.shape)} if frozen else shapes.recorded
    )
    assert (head.grad is None) == frozen
    assert frozen or tuple(head.shape) in weight_shapes
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in trainer.model.parameters())
