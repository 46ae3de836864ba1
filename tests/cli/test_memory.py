"""Quantised and placed models in ``kdkernels train``. Missing requirements are reported before a model is loaded."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import killed_at, make_home, run_in, summary
from training import make_model, make_tokenizer
from typer.testing import CliRunner

from kdkernels.cli import app
from kdkernels.teachers import loading

HELD_OUT = "held-out.jsonl"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of ``make_home`` with models wide enough for quantisation in groups of 32."""
    home = make_home(tmp_path_factory.mktemp("home"))
    for name, seed in (("student", 1), ("teacher", 2)):
        make_model(32, 1, seed=seed, initializer_range=0.3, intermediate_size=64).save_pretrained(home / name)
        make_tokenizer().save_pretrained(home / name)
    return home


def train(home: Path, out: Path, *words: Any) -> Any:
    paths = ["--student", home / "student", "--teacher", home / "teacher", "--data", home / "train.jsonl", "--output-dir", out, "--use-cpu"]
    return CliRunner().invoke(app, ["train", *(str(word) for word in (*paths, *words))])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--teacher-quantization", "bnb-4bit"], "--teacher-quantization bnb-4bit needs bitsandbytes: pip install bitsandbytes"),
        (["--teacher-quantization", "int8"], "--teacher-quantization int8 needs torchao: pip install torchao"),
        (["--student-quantization", "int4", "--lora-r", "2"], "--student-quantization int4 needs torchao: pip install torchao"),
        (["--teacher-quantization", "int3"], "--teacher-quantization int3: choose one of bnb-4bit, bnb-8bit, int8, int4"),
        (["--teacher-device", "cuda:9"], "--teacher-device cuda:9: torch can't use it here"),
        (["--teacher-device-map", "everywhere"], "--teacher-device-map everywhere: give auto, balanced, sequential, or JSON"),
        (["--teacher-device", "cpu", "--teacher-device-map", "auto"], "--teacher-device and --teacher-device-map: give one of them"),
    ],
)
def test_missing_requirements_are_reported_before_loading(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], message: str
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name in ("torchao", "bitsandbytes") else find(name, *more))
    load = loading._load

    def watched(cls: Any, *more: Any, **options: Any) -> Any:
        assert "Model" not in cls.__name__
        return load(cls, *more, **options)

    monkeypatch.setattr(loading, "_load", watched)
    result = train(home, tmp_path / "out", *options)
    assert result.exit_code == 2, result.output
    assert message in result.output
    assert len(result.output.splitlines()) == 1


def test_bitsandbytes_without_a_gpu_is_refused(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    from kdkernels.teachers.quantization import check_quantization

    with pytest.raises(ValueError, match="--teacher-quantization bnb-8bit needs a CUDA GPU, and torch sees none here: take int8 or int4"):
        check_quantization("--teacher-quantization", "bnb-8bit")


def test_teacher_device_without_a_teacher_is_refused(home: Path, tmp_path: Path) -> None:
    paths = [
        "--student",
        home / "student",
        "--data",
        home / "train.jsonl",
        "--output-dir",
        tmp_path / "out",
        "--kd-weight",
        0,
        "--ce-weight",
        1,
    ]
    result = CliRunner().invoke(app, ["train", *(str(word) for word in paths), "--teacher-device", "cpu"])
    assert result.exit_code == 2
    assert "--teacher-device, but no --teacher runs" in result.output


@pytest.mark.parametrize(
    "placed", [{"teacher_device": "cpu"}, {"teacher_device_map": "auto"}, {"teacher_device_map": json.dumps({"": "cpu"})}]
)
def test_placement_of_the_teacher_does_not_change_training(home: Path, tmp_path: Path, placed: dict[str, str]) -> None:
    for name, options in (("plain", {}), ("placed", placed)):
        run_in(home, tmp_path / name, **options, max_steps=1, save_strategy="no", eval_data=[str(home / HELD_OUT)])
    assert summary(tmp_path / "placed")["after"] == summary(tmp_path / "plain")["after"]


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_quantised_teacher_is_close_to_the_original(home: Path, tmp_path: Path, name: str) -> None:
    pytest.importorskip("torchao")
    for out, options in (("plain", {}), (name, {"teacher_quantization": name})):
        run_in(home, tmp_path / out, **options, max_steps=1, save_strategy="no", eval_data=[str(home / HELD_OUT)])
    exact, quantised = (summary(tmp_path / out)["before"]["eval_divergence"] for out in ("plain", name))
    assert exact != quantised
    assert exact == pytest.approx(quantised, rel=0.02 if name == "int8" else 0.2)


def test_resumed_lora_on_a_quantised_student_gives_the_same_bits(home: Path, tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    options = {"student_quantization": "int8", "lora_r": 2, "max_steps": 3, "eval_data": [str(home / HELD_OUT)]}
    uninterrupted = tmp_path / "whole"
    run_in(home, uninterrupted, **options)
    assert summary(uninterrupted)["after"]["eval_loss"] < summary(uninterrupted)["before"]["eval_loss"]
    resumed = killed_at(1, uninterrupted, tmp_path / "resumed")
    run_in(home, resumed, **options)
    expected, actual = ((out / "adapter_model.safetensors").read_bytes() for out in (uninterrupted, resumed))
    assert expected == actual
    with pytest.raises(ValueError, match="--student-quantization"):
        run_in(home, uninterrupted, **{**options, "student_quantization": None})


def test_quantised_student_needs_an_adapter(home: Path, tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    result = train(home, tmp_path / "out", "--student-quantization", "int8")
    assert result.exit_code == 2
    assert "quantised weights can't be trained. Add --lora-r 16" in result.output
