"""Config files of ``kdkernels train``: ``resolved.yaml`` repeats a run, and invalid values are one-line errors."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from runs import log, make_home, run_in, weights, write_rows
from training import make_model, make_rows
from typer.testing import CliRunner

from kdkernels.cli import app

HELD_OUT = "held-out.jsonl"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_home(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="module")
def finished(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "out"
    options = {"divergence": "jsd(beta=0.3)", "temperature": 2.0, "seed": 3, "lora_r": None, "hub_token": "hf_secret", "max_steps": 3}
    run_in(home, out, **options, eval_data=[str(home / HELD_OUT)])
    return out


def train(*words: Any) -> Any:
    return CliRunner().invoke(app, ["train", *(str(word) for word in words)])


def resolved(out: Path) -> dict[str, Any]:
    return yaml.safe_load((out / "resolved.yaml").read_text())


def write(path: Path, options: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(options))
    return path


def test_resolved_options_repeat_the_run_to_the_same_bits(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = train("--config", finished / "resolved.yaml", "--output-dir", out)
    assert result.exit_code == 0, result.output
    assert "Warning" not in result.output
    assert weights(out) == weights(finished)
    assert log(out) == log(finished)
    repeated, original = resolved(out), resolved(finished)
    assert {name for name in repeated if repeated[name] != original[name]} == {"output-dir"}


def test_resolved_options_hold_every_default_and_no_secret(home: Path, finished: Path) -> None:
    from dataclasses import fields

    from kdkernels.cli.train.options import AdapterOptions
    from kdkernels.trainer import DistillationArguments

    options = resolved(finished)
    names = {f.name for group in (DistillationArguments, AdapterOptions) for f in fields(group) if f.init} - {"hub_token"}
    assert {name.replace("_", "-") for name in names} | {"student", "teacher", "data", "eval-data"} <= options.keys()
    assert (options["learning-rate"], options["weight-decay"], options["lora-target-modules"]) == (1e-2, 0.0, ["all-linear"])
    assert options["student"] == str(home / "student")
    assert not any(b"hf_secret" in path.read_bytes() for path in finished.rglob("*") if path.is_file())


def test_resolved_options_repeat_a_lora_run(home: Path, tmp_path: Path) -> None:
    run_in(home, tmp_path / "one", lora_r=2, lora_target_modules=["q_proj", "o_proj"], max_steps=1)
    assert train("--config", tmp_path / "one" / "resolved.yaml", "--output-dir", tmp_path / "two").exit_code == 0
    one, two = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two


@pytest.mark.parametrize("changed", ["data", "student"])
def test_changed_content_since_the_record_raises(home: Path, finished: Path, tmp_path: Path, changed: str) -> None:
    options = resolved(finished)
    if changed == "data":
        options["data"] = [str(write_rows(tmp_path / "rows.jsonl", make_rows(24, seed=7)))]
        message = "another --data (its content changed)"
    else:
        shutil.copytree(home / "student", tmp_path / "student")
        options["student"] = str(tmp_path / "student")
        make_model(8, 1, seed=9).save_pretrained(tmp_path / "student")
        message = "another the --student's weights or config"
    for plan in ([], ["--plan"]):
        result = train("--config", write(tmp_path / "run.yaml", options), "--output-dir", tmp_path / "out", *plan)
        assert result.exit_code == 2, result.output
        assert message in result.output
        assert not (tmp_path / "out").exists()
    del options["record"]
    assert train("--config", write(tmp_path / "run.yaml", options), "--output-dir", tmp_path / "out", "--plan").exit_code == 0


def test_changed_version_since_the_record_warns(finished: Path, tmp_path: Path) -> None:
    options = resolved(finished)
    options["record"]["machine"]["version_of_torch"] = "1.0"
    result = train("--config", write(tmp_path / "run.yaml", options), "--output-dir", tmp_path / "out", "--plan")
    assert result.exit_code == 0, result.output
    assert "Warning: another version of torch (1.0 in the config, " in result.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning-rat": 1e-4}, "unknown option 'learning_rat' in the config; nearest: learning_rate"),
        ({"lora-rr": 4}, "unknown option 'lora_rr' in the config; nearest: lora_r"),
        ({"learning-rate": "fast"}, "--learning-rate: invalid float value: 'fast'"),
        ({"max-steps": [3]}, "max-steps in the config: one value is needed, not a list ([3])"),
        ({"max-steps": 2.5}, "--max-steps: invalid int value: '2.5'"),
        ({"seed": True}, "--seed: invalid int value: 'True'"),
        ({"packing": "perhaps"}, "perhaps"),
        ({"packing": {"length": 3}}, "packing in the config: one value is needed, not a mapping"),
        ({"divergence": 3}, "divergence in the config: text is needed, not 3"),
        ({"divergence": ["jsd"]}, "divergence must be a name or a kdkernels divergence, got list"),
        ({"overlong": ["drop"]}, "overlong in the config: one value is needed, not a list (['drop'])"),
        ({"lora-r": 2, "lora-target-modules": 3}, "lora-target-modules in the config: text or a list of texts is needed, not 3"),
        ({"lora-r": "two"}, "--lora-r: invalid int value: 'two'"),
        ({"student": 5}, "--student 5: a path or name is needed, as text"),
        ({"record": "yes"}, "record in the config: it is the block of a resolved.yaml"),
    ],
)
def test_invalid_values_in_a_config_raise(home: Path, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    base = {"student": str(home / "student"), "teacher": str(home / "teacher"), "data": str(home / "train.jsonl"), "output-dir": "unused"}
    result = train("--config", write(tmp_path / "run.yaml", {**base, **options}))
    assert result.exit_code == 2, result.output
    assert len(result.output.splitlines()) == 1
    assert message in result.output


def test_resolved_options_repeat_a_run_with_mappings(home: Path, tmp_path: Path) -> None:
    options = {"divergence": {"name": "jsd", "beta": 0.3}, "feature_layers": [[0, 0]], "feature_weight": 0.5, "max_steps": 1}
    run_in(home, tmp_path / "one", **options)
    assert train("--config", tmp_path / "one" / "resolved.yaml", "--output-dir", tmp_path / "two").exit_code == 0
    assert weights(tmp_path / "one") == weights(tmp_path / "two")


def test_single_layer_name_and_date_in_a_config_are_converted() -> None:
    from datetime import date

    from kdkernels.cli.train.settings import read_settings

    paths = {"student": "s", "teacher": "t", "data": "d", "output_dir": "o"}
    settings = read_settings({**paths, "lora_r": 2, "lora_target_modules": "q_proj", "template_date": date(2026, 11, 28)}, {}, [])
    assert settings.adapter.lora_target_modules == ["q_proj"]
    assert settings.args.template_date == "2026-11-28"


def invoke_init(*words: Any, **options: Any) -> Any:
    return CliRunner().invoke(app, ["init", *(str(word) for word in words)], **options)


@pytest.mark.parametrize(
    ("memory", "present", "absent"),
    [
        ("1", {"learning-rate": 5e-5}, {"lora-r", "cache"}),
        (str(80_000 / 2**30), {"lora-r": 16, "student-dtype": "bfloat16", "gradient-checkpointing": True}, {"cache"}),
        (str(20_000 / 2**30), {"lora-r": 16, "cache": "cache"}, {"teacher"}),
    ],
)
def test_init_writes_a_config_that_fits_the_memory(
    home: Path, tmp_path: Path, memory: str, present: dict[str, Any], absent: set[str]
) -> None:
    out = tmp_path / "run.yaml"
    paths = ["--student", home / "student", "--teacher", home / "teacher", "--data", home / "train.jsonl", "--out", out]
    result = invoke_init(*paths, "--memory", memory, "--output-dir", tmp_path / "out")
    assert result.exit_code == 0, result.output
    options = yaml.safe_load(out.read_text())
    assert options.items() >= present.items()
    assert not options.keys() & absent
    assert out.read_text().count("#") > 5
    if "teacher" in options:
        plan = train("--config", out, "--plan", "--use-cpu")
        assert plan.exit_code == 0, plan.output
    repeated = invoke_init(*paths)
    assert repeated.exit_code == 2
    assert "already exists" in repeated.output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--student", "./gone"], "--teacher is missing (on a terminal, kdkernels init asks for it)"),
        (["--student", "./gone", "--teacher", "./t", "--data", "d"], "--student ./gone: no such folder"),
        (["--out", "run.json"], "--out run.json: the name of a config ends in .yaml"),
        (["--student", "HOME", "--teacher", "HOME", "--data", "d", "--memory", "0"], "--memory 0: it must be finite and > 0"),
        (["--student", "HOME", "--teacher", "HOME", "--data", "d", "--memory", "1e-6"], "do not fit in 0.0 GiB as bfloat16"),
    ],
)
def test_invalid_options_of_init_raise(home: Path, tmp_path: Path, words: list[str], message: str) -> None:
    words = [str(home / "student") if word == "HOME" else word for word in words]
    result = invoke_init(*(["--out", tmp_path / "run.yaml"] if "--out" not in words else []), *words)
    assert result.exit_code == 2, result.output
    assert message in result.output
    assert not (tmp_path / "run.yaml").exists()


def test_init_writes_the_same_config_from_questions(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([home / "student", home / "teacher", home / "train.jsonl"])
    monkeypatch.setattr("kdkernels.cli.init._ask", lambda name, question: str(next(answers)))
    from_questions, from_options = tmp_path / "questions.yaml", tmp_path / "options.yaml"
    assert invoke_init("--out", from_questions, "--memory", 1).exit_code == 0
    paths = ["--student", home / "student", "--teacher", home / "teacher", "--data", home / "train.jsonl"]
    assert invoke_init("--out", from_options, "--memory", 1, *paths).exit_code == 0
    assert from_questions.read_text() == from_options.read_text()
