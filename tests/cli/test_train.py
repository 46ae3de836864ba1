"""``kdkernels train`` from two saved models and a JSONL file: summaries, interruptions, configs, caches and errors."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from runs import log
from training import TEMPLATE, make_model, make_rows, make_tokenizer
from typer.testing import CliRunner

pytest.importorskip("transformers")
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainingArguments

from kdkernels.cli.root import app
from kdkernels.cli.train.callbacks import Interrupt, LogFile
from kdkernels.cli.train.command import EPILOG
from kdkernels.cli.train.record import data_content
from kdkernels.cli.train.settings import read_settings
from kdkernels.support.files import Output
from kdkernels.trainer import DistillationArguments, load_examples

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with models, training rows and held-out rows."""
    folder = tmp_path_factory.mktemp("home")
    tokenizer = make_tokenizer()
    for name, hidden, seed in (("student", 16, 1), ("teacher", 24, 2), ("teacher2", 24, 3)):
        make_model(hidden, seed=seed, initializer_range=0.05 if name == "student" else 0.5, attention_dropout=0.1).save_pretrained(
            folder / name
        )
        tokenizer.save_pretrained(folder / name)
    for name, count, seed in (("train", 60, 0), ("held-out", 13, 1)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in make_rows(count, seed)))
    return folder


def options(home: Path, out: Path, *more: str, steps: int = 42) -> list[str]:
    return [
        "train", "--teacher", str(home / "teacher"), "--student", str(home / "student"), "--data", str(home / "train.jsonl"),
        "--eval-data", str(home / "held-out.jsonl"), "--output-dir", str(out), "--max-steps", str(steps), "--save-steps", "8",
        "--learning-rate", "1e-2", "--divergence", "jsd(beta=0.3)", "--ce-weight", "0.5", *more,
    ]  # fmt: skip


def config_of(config: dict[str, Any]) -> dict[str, Any]:
    return {name.replace("-", "_"): value for name, value in config.items()}


def train(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments), catch_exceptions=False)


def start(*arguments: str) -> subprocess.Popen[str]:
    threads = str(torch.get_num_threads())  # as in this process: another number of threads rounds differently
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    return subprocess.Popen(
        [sys.executable, "-m", "kdkernels.cli", *arguments], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    for _ in range(1200):
        if path.exists():
            return
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    raise AssertionError(f"{path} was not written within 60 s")


def held_out_loss(home: Path, model: Path) -> float:
    """Return the loss over the held-out rows by the dense formula, one row at a time."""
    import kdkernels as kd

    student, teacher = (AutoModelForCausalLM.from_pretrained(path).double() for path in (model, home / "teacher"))
    total, tokens = 0.0, 0
    for example in load_examples(home / "held-out.jsonl", make_tokenizer()):
        ids, rows = torch.tensor([list(example.student_ids)]), torch.tensor(list(example.student_scored))
        with torch.no_grad():
            z, u = (m(ids).logits[0, rows] for m in (student, teacher))
        divergence = kd.JSD(beta=0.3).reference(z.log_softmax(-1), u.log_softmax(-1)).sum()
        total += (divergence + 0.5 * torch.nn.functional.cross_entropy(z, ids[0, rows + 1], reduction="sum")).item()
        tokens += len(rows)
    return total / tokens


@pytest.fixture(scope="module")
def finished(home: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("finished") / "out"
    result = train(*options(home, out))
    assert result.exit_code == 0, result.output
    return out, result.output


def test_summary_reports_the_losses_of_the_models(home: Path, finished: tuple[Path, str]) -> None:
    out, output = finished
    summary = json.loads((out / "summary.json").read_text())
    before, after = held_out_loss(home, home / "student"), held_out_loss(home, out)
    assert after < before
    assert summary["before"]["eval_loss"] == pytest.approx(before, rel=1e-5)
    assert summary["after"]["eval_loss"] == pytest.approx(after, rel=1e-5)
    assert f"{before:.4f}" in output
    assert f"{after:.4f}" in output
    assert "Trained 42 steps." in output
    assert Path(summary["checkpoint"]) == out / "checkpoint-42"
    assert held_out_loss(home, Path(summary["checkpoint"])) == after
    assert Path(summary["figure"]).read_bytes().startswith(b"\x89PNG")
    assert len(output.splitlines()) < 20  # short output: one line before training, one for each of 4 logs


def test_finished_run_is_not_repeated(home: Path, finished: tuple[Path, str]) -> None:
    out, output = finished
    modified = (out / "model.safetensors").stat().st_mtime_ns
    repeated = train(*options(home, out))
    assert repeated.exit_code == 0
    assert "This run is finished" in repeated.output
    assert output[output.index("Trained 42 steps.") :] in repeated.output
    assert (out / "model.safetensors").stat().st_mtime_ns == modified


def test_resumed_run_gives_the_same_model(home: Path, finished: tuple[Path, str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = start(*options(home, out))
    wait_for(out / "checkpoint-16", process)  # the previous one is complete now
    process.kill()
    process.communicate()
    assert not (out / "checkpoint-42" / "trainer_state.json").exists()
    with (out / ".kdkernels").open("a") as marker:
        marker.write('{"made":"checkpoint-99"}\n')
    (out / "checkpoint-99").mkdir()  # an incomplete checkpoint
    (out / "checkpoint-99" / "trainer_state.json").write_text('{"global_st')
    result = train(*options(home, out))
    assert result.exit_code == 0, result.output
    assert "Resuming at checkpoint-" in result.output
    assert not (out / "checkpoint-99").exists()
    expected, actual = (load_file(folder / "model.safetensors") for folder in (finished[0], out))
    assert all(torch.equal(expected[name], actual[name]) for name in expected)
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (finished[0], out)]
    assert summaries[0]["before"] == summaries[1]["before"]
    assert summaries[0]["after"] == summaries[1]["after"]


def test_run_killed_after_its_last_step_is_completed(home: Path, finished: tuple[Path, str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished[0], out)
    (out / "summary.json").unlink()
    (out / "model.safetensors").write_bytes(b"half")
    result = train(*options(home, out))
    assert result.exit_code == 0, result.output
    expected, actual = (load_file(folder / "model.safetensors") for folder in (finished[0], out))
    assert all(torch.equal(expected[name], actual[name]) for name in expected)
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (finished[0], out)]
    assert summaries[0]["after"] == summaries[1]["after"]
    assert summaries[1]["steps"] == 42
    assert log(out) == log(finished[0])


def test_a_log_keeps_no_line_that_is_written_again(tmp_path: Path) -> None:
    evaluations = [{"eval_loss": 3.0, "step": 0}, {"eval_loss": 2.0, "step": 2}, {"eval_loss": 1.0, "step": 2}]
    lines = [evaluations[0], {"loss": 2.5, "step": 2}, evaluations[1], {"train_runtime": 9.0, "step": 2}, evaluations[2]]
    checkpoint = SimpleNamespace(global_step=2, log_history=lines[1:3])
    with Output(tmp_path / "out", "train") as output:
        file = LogFile(output, "log.jsonl")
        for line in lines:
            file.append(line)
        file.drop_final_evaluation(checkpoint)
        assert log(output.folder) == [*lines[:3], {"step": 2}]  # ``log`` leaves times out
        file.on_train_begin(None, SimpleNamespace(global_step=1), None)
        assert log(output.folder) == lines[:1]
        file.clear()
        assert log(output.folder) == []


def test_finished_run_continues_with_more_steps(home: Path, finished: tuple[Path, str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished[0], out)
    result = train(*options(home, out, steps=45))
    assert result.exit_code == 0, result.output
    assert "Resuming at checkpoint-42" in result.output
    assert "Trained 45 steps." in result.output
    assert json.loads((out / "checkpoint-45" / "trainer_state.json").read_text())["global_step"] == 45


def test_an_interrupted_run_saves_a_checkpoint(home: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = start(*options(home, out, "--save-steps", "5", steps=100_000))
    wait_for(out / "checkpoint-5" / "trainer_state.json", process)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    step = int(output.partition("Interrupted at step ")[2].partition(";")[0])
    AutoModelForCausalLM.from_pretrained(out / f"checkpoint-{step}")
    assert json.loads((out / f"checkpoint-{step}" / "trainer_state.json").read_text())["global_step"] == step
    assert not (out / "summary.json").exists()


def test_first_ctrl_c_stops_after_the_step_and_the_second_at_once() -> None:
    control = SimpleNamespace(should_save=False, should_training_stop=False)
    before = signal.getsignal(signal.SIGINT)  # SIG_IGN if a shell started the tests in the background
    with Interrupt() as interrupt:
        os.kill(os.getpid(), signal.SIGINT)
        assert not interrupt.stopped, "the run stops only at the end of a step"
        interrupt.on_step_end(SimpleNamespace(world_size=1), None, control)
        assert interrupt.stopped
        assert control.should_save
        assert control.should_training_stop
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("run.yaml", "max-steps: 1\nmax_steps: 5\n"), ("run.yaml", "max-steps: 1\nmax-steps: 5\n"),
        ("run.json", '{"max-steps": 1, "max_steps": 5}'), ("run.json", '{"max_steps": 1, "max_steps": 5}'),
    ],
)  # fmt: skip
def test_repeated_option_in_a_config_raises(tmp_path: Path, name: str, text: str) -> None:
    from kdkernels.cli.train.settings import TrainError, read_config

    (tmp_path / name).write_text(text)
    with pytest.raises(TrainError, match=r"max.steps' twice"):
        read_config(tmp_path / name)


def test_options_override_a_config(home: Path, tmp_path: Path) -> None:
    config = {
        "teacher": [str(home / "teacher"), str(home / "teacher2")], "student": str(home / "student"), "data": str(home / "train.jsonl"),
        "output-dir": str(tmp_path / "out"), "max_steps": 50, "learning-rate": "1e-3", "divergence": {"name": "jsd", "beta": 0.3},
        "logging-steps": 1,
    }  # fmt: skip
    import yaml

    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / "run.json").write_text(json.dumps(config))
    from kdkernels.cli.train.settings import read_config, read_settings

    for name in ("run.yaml", "run.json"):
        settings = read_settings(
            read_config(tmp_path / name), {"teacher": [str(home / "teacher")]}, ["--max-steps", "2", "--t-squared", "false", "--packing"]
        )
        assert settings.teacher == [str(home / "teacher")]
        assert (settings.args.max_steps, settings.args.learning_rate, settings.args.divergence) == (2, 1e-3, "jsd(beta=0.3)")
        assert (settings.args.t_squared, settings.args.packing, settings.args.disable_tqdm) == (False, True, True)
    (tmp_path / "no.yaml").write_text("save-strategy: no\neval-strategy: no\nlearning-rate: null\nseed: 3\npacking: no\n")
    args = read_settings({**config_of(config), **read_config(tmp_path / "no.yaml")}, {}, []).args
    assert (args.save_strategy, args.eval_strategy, args.learning_rate, args.seed, args.packing) == ("no", "no", 5e-5, 3, False)
    mixed = read_settings(read_config(tmp_path / "run.yaml"), {}, ["--bf16", "--use-cpu"])
    assert [dtype for _, _, dtype in mixed.models] == ["float32", "auto", "auto"]
    narrow = read_settings(read_config(tmp_path / "run.yaml"), {"student_dtype": "bfloat16"}, [])
    assert [dtype for _, _, dtype in narrow.models] == ["bfloat16", "auto", "auto"]
    result = train("train", "--config", str(tmp_path / "run.yaml"), "--teacher", str(home / "teacher"), "--max-steps", "2")
    assert result.exit_code == 0, result.output
    assert "No held-out loss: neither --eval-data nor --eval-fraction was given. Training loss" in result.output


def test_numbers_and_paths_reach_the_arguments_exactly(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from kdkernels.cli.train import run

    runs: list[Any] = []
    monkeypatch.setattr(run, "run", lambda settings, console: runs.append(settings) or 0)
    (tmp_path / "run.json").write_text(
        '{"learning_rate": 1.2345678901234567e-05, "seed": 1234567890, "logging_steps": 7654321, "bf16": false}'
    )
    result = train(
        "train", "--student", "s", "--teacher", "t", "--data", "d", "--output-dir=--out", "--save-steps", "1234567",
        "--max-steps", "123456789012", "--warmup-steps", "0.12345678901234567", "--config", str(tmp_path / "run.json"),
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    args = runs[0].args
    assert (args.save_steps, args.max_steps, args.output_dir) == (1234567, 123456789012, "--out")
    assert (args.learning_rate, args.warmup_steps) == (1.2345678901234567e-05, 0.12345678901234567)
    assert (args.seed, args.logging_steps, args.bf16) == (1234567890, 7654321, False)


def test_student_saved_in_bfloat16_is_trained_in_float32(home: Path, tmp_path: Path) -> None:
    saved = AutoModelForCausalLM.from_pretrained(home / "student", dtype=torch.bfloat16)
    for part in (saved, make_tokenizer()):
        part.save_pretrained(tmp_path / "student")
    student_options = ["--student", str(tmp_path / "student"), "--learning-rate", "1e-5"]
    result = train(*options(home, tmp_path / "out", *student_options, steps=2))
    assert result.exit_code == 0, result.output
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    changed = sum((p != q.float()).sum().item() for p, q in zip(trained.parameters(), saved.parameters(), strict=True))
    assert changed > 0.5 * saved.num_parameters()


def test_plan_trains_and_writes_nothing(home: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = train(*options(home, out, "--plan", "--per-device-train-batch-size", "4", "--gradient-accumulation-steps", "2", steps=30))
    assert result.exit_code == 0, result.output
    assert not out.exists()
    assert "data: 60 examples in 60 rows" in result.output
    assert "steps: 30 of 8 rows each, 3.75 epochs" in result.output
    assert str(home / "teacher") in result.output
    assert "MiB of buffers, where dense logits take" in result.output
    on_prompt = train(*options(home, out, "--plan", "--kd-on-prompt", "--student-dtype", "bfloat16"))
    rows = load_examples(home / "train.jsonl", make_tokenizer())
    assert f"{sum(len(e.student_ids) - 1 for e in rows):,} of them scored" in on_prompt.output
    assert "GiB in bfloat16, 192 columns" in on_prompt.output


def test_repeated_data_options_are_added(home: Path, tmp_path: Path) -> None:
    more = "--data", str(home / "held-out.jsonl")
    result = train(*options(home, tmp_path / "out", *more, "--plan"))
    assert "data: 73 examples in 73 rows" in result.output
    paths = {"student": "x", "teacher": "y", "output_dir": str(tmp_path / "out")}
    settings = read_settings({**paths, "data": ["a.jsonl", "b.jsonl"], "eval_data": "c.jsonl"}, {}, [])
    assert (settings.data, settings.eval_data) == (["a.jsonl", "b.jsonl"], ["c.jsonl"])
    assert read_settings({**paths, "data": "a.jsonl"}, {"data": ["b.jsonl"]}, []).data == ["b.jsonl"]  # options override the config


def test_plan_reports_reasoning_and_cut_rows(home: Path, tmp_path: Path) -> None:
    thoughts = tiny.write(tmp_path / "thoughts.jsonl", [{**row, "reasoning": "red"} for row in make_rows(3)])
    arguments = *options(home, tmp_path / "out", "--data", str(thoughts), "--plan"), "--overlong", "truncate", "--max-length"
    assert "reasoning of 3 rows: learnt between <think> and </think>" in train(*arguments, "100").output
    assert "reasoning of 3 rows: left out (--reasoning drop)" in train(*arguments, "100", "--reasoning", "drop").output
    assert re.search(
        r"\d+ of 63 rows are over max_length=6: cut \d+, by \d+ tokens of their responses, and left out \d+", train(*arguments, "6").output
    )


def test_data_content_depends_on_every_file_and_its_order(tmp_path: Path) -> None:
    files = [str(tmp_path / name) for name in ("a.jsonl", "b.jsonl")]
    for number, file in enumerate(files):
        tiny.write(Path(file), tiny.rows(2, seed=number))
    both = data_content(files)
    assert len({tuple(data_content(paths)) for paths in (files, files[:1], files[1:], files[::-1])}) == 4
    tiny.write(Path(files[1]), tiny.rows(3))
    assert data_content(files) != both


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--lerning-rate", "1"], "unknown option --lerning-rate; nearest: --learning-rate"),
        (["--techer", "x"], "unknown option --techer; nearest: --teacher"),
        (["--divergence", "kl"], "divergence 'kl' is unknown; valid names: forward_kl"),
        (["--temperature", "warm"], "--temperature: invalid float value: 'warm'"),
        (["--save-strategy", "daily"], "save_strategy"),
        (["stray"], "'stray' belongs to no option"),
        (["--student", "./nowhere"], "--student ./nowhere: no such folder"),
        (["--data", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
        (["--student-dtype", "float8"], "--student-dtype 'float8': choose one of auto, float32"),
        (["--max-length", "4"], "train.jsonl, row 1: "),
        (["--max-length", "4000"], "a model takes 128 tokens"),
        (["--cache", "x"], "--cache and --teacher: the cache is the teacher"),
        (["--config", "nowhere.yaml"], "--config nowhere.yaml: no such file"),
        (["--on-policy-fraction", "2"], "on_policy_fraction is a share"),
    ],
)
def test_invalid_options_of_train_raise(home: Path, tmp_path: Path, more: list[str], message: str) -> None:
    result = train(*options(home, tmp_path / "out", *more))
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.output.split())
    assert not (tmp_path / "out" / "run.json").exists()


def test_unreadable_configs_raise(tmp_path: Path) -> None:
    for name, text, message in (
        ("a.yaml", "student: [", "can't be read"), ("b.json", "[1]", "a mapping of options is needed"),
        ("c.toml", "", "unknown file extension"),
        ("d.yaml", "studnt: x", "unknown option 'studnt' in the config; nearest: student"), ("e.yaml", "student: x", "--data is missing"),
        ("f.yaml", "{student: x, data: y, teacher: z}", "--output-dir is missing"),
        ("g.yaml", "{student: x, data: y, output_dir: o}", "--teacher is missing"),
        ("k.yaml", "{student: x, data: [y, 3]}", "--data ['y', 3]: a path or name is needed, as text"),
        ("l.yaml", "{student: 3, data: y}", "--student 3: a path or name is needed, as text"),
        ("m.yaml", "{student: x, data: y, teacher: [z, 3]}", "--teacher ['z', 3]: a path or name is needed"),
        ("h.yaml", "{student: x, data: y, max-steps: 10.5}", "max-steps: invalid int value: '10.5'"),
        ("i.yaml", "{student: x, data: y, temperature: true}", "--temperature: invalid float value: 'True'"),
        ("j.yaml", "{student: x, data: y, ce-weight: [1, 2]}", "ce-weight in the config: one value is needed, not a list ([1, 2])"),
    ):  # fmt: skip
        (tmp_path / name).write_text(text)
        result = train("train", "--config", str(tmp_path / name))
        assert result.exit_code == 2
        assert message in result.output, result.output


def test_train_refuses_the_folder_of_another_run(home: Path, finished: tuple[Path, str], tmp_path: Path) -> None:
    out, _ = finished
    result = train(*options(home, out, "--temperature", "3"))
    assert result.exit_code == 2
    assert "holds a run with another --temperature (1.0 then, 3.0 now)" in result.output
    data = tmp_path / "train.jsonl"
    data.write_text((home / "train.jsonl").read_text() + json.dumps(make_rows(1)[0]))
    assert "another --data (its content changed)" in train(*options(home, out, "--data", str(data))).output
    record = json.loads((out / "run.json").read_text())
    record["settings"]["processes"] = 2
    started = shutil.copytree(out / "checkpoint-8", tmp_path / "begun" / "checkpoint-8").parent
    (started / "run.json").write_text(json.dumps(record))
    shutil.copy(out / ".kdkernels", started)
    assert "another number of processes (2 then, 1 now)" in " ".join(train(*options(home, started)).output.split())
    assert (started / "checkpoint-8" / "model.safetensors").is_file()
    (tmp_path / "other" / "checkpoint-3").mkdir(parents=True)
    assert "holds checkpoints but no run.json" in train(*options(home, tmp_path / "other")).output
    assert "is the --student, which would be overwritten" in train(*options(home, home / "student")).output
    shutil.rmtree(started / "checkpoint-8")  # without a checkpoint, the folder can be used again
    result = train(*options(home, started, "--temperature", "3", steps=1))
    assert result.exit_code == 0, result.output
    assert json.loads((started / "run.json").read_text())["settings"]["temperature"] == 3.0


def test_cache_replaces_the_teacher(home: Path, finished: tuple[Path, str], tmp_path: Path) -> None:
    both = tmp_path / "both"
    both.mkdir()
    for name in ("train", "held-out"):
        (both / f"{name}.jsonl").write_bytes((home / f"{name}.jsonl").read_bytes())
    for data, folder in ((both, "cache"), (home / "train.jsonl", "part")):
        cache_run = train(
            "cache", "--teacher", str(home / "teacher"), "--data", str(data), "--out", str(tmp_path / folder), "--kind", "hidden"
        )
        assert cache_run.exit_code == 0, cache_run.output
    arguments = options(home, tmp_path / "out")
    del arguments[1:3]  # --teacher
    result = train(*arguments, "--cache", str(tmp_path / "cache"))
    assert result.exit_code == 0, result.output
    live, cached = (json.loads((folder / "summary.json").read_text()) for folder in (finished[0], tmp_path / "out"))
    assert cached["after"]["eval_loss"] == pytest.approx(live["after"]["eval_loss"], rel=1e-2)  # hidden states are stored in bfloat16
    result = train(*arguments, "--output-dir", str(tmp_path / "held-out-apart"), "--cache", str(tmp_path / "part"))
    assert result.exit_code == 0, result.output
    assert "13 of 13 held-out examples are not in the cache, so evaluations report the cross-entropy alone" in result.output
    apart = json.loads((tmp_path / "held-out-apart" / "summary.json").read_text())["after"]
    assert set(apart) == {"eval_cross_entropy", "eval_tokens"}
    assert apart["eval_cross_entropy"] == pytest.approx(cached["after"]["eval_cross_entropy"], rel=1e-5)
    result = train(*arguments, "--output-dir", str(tmp_path / "other"), "--cache", str(tmp_path / "nowhere"))
    assert result.exit_code == 2
    assert f"--cache {tmp_path / 'nowhere'}: " in result.output
    assert "holds no manifest.json" in result.output
    assert train(*arguments, "--cache", str(tmp_path / "cache"), "--plan").output.count("teacher: cache") == 1
    topk = [str(tmp_path / "topk"), "--kind", "topk", "--k", "8"]
    assert train("cache", "--teacher", str(home / "teacher"), "--data", str(both), "--out", *topk).exit_code == 0
    for more in (["--plan"], []):
        result = train(*arguments, "--output-dir", str(tmp_path / "sparse"), "--cache", topk[0], "--divergence", "forward_kl", *more)
        assert result.exit_code == 0, result.output
    warm = [*arguments, "--output-dir", str(tmp_path / "warm"), "--cache", topk[0], "--divergence", "forward_kl", "--plan"]
    assert "temperature=2.0, but the teacher's log-probabilities were computed at 1.0" in train(*warm, "--temperature", "2").output
    warm[warm.index(topk[0])] = str(tmp_path / "warmer")
    cache_options = ["--out", str(tmp_path / "warmer"), *topk[1:], "--temperature", "2"]
    assert train("cache", "--teacher", str(home / "teacher"), "--data", str(both), *cache_options).exit_code == 0
    result = train(*warm, "--temperature", "2")
    assert result.exit_code == 0, result.output
    assert "MiB of buffers" in result.output
    sparse = json.loads((tmp_path / "sparse" / "summary.json").read_text())
    assert sparse["after"]["eval_loss"] < sparse["before"]["eval_loss"]


def test_unfinished_text_cache_is_refused_as_data(home: Path, tmp_path: Path) -> None:
    data, out = str(home / "held-out.jsonl"), tmp_path / "text"
    cached = train(
        "cache", "--teacher", str(home / "teacher"), "--data", data, "--out", str(out), "--kind", "text", "--max-new-tokens", "4"
    )
    assert cached.exit_code == 0, cached.output
    arguments = options(home, tmp_path / "out", "--data", str(out), "--plan")
    assert train(*arguments).exit_code == 0
    from kdkernels.teachers.cache import Manifest

    dataclasses.replace(Manifest.read(out), complete=False).write(out)
    for more in ([], ["--data", data, "--eval-data", str(out)]):
        result = train(*arguments[:-1], *more)
        assert result.exit_code == 2
        assert f"{out} is unfinished: 13 of 13 examples" in " ".join(result.output.split())


def test_teacher_with_another_tokenizer_or_template_is_refused(home: Path, tmp_path: Path) -> None:
    make_model(24, seed=3).save_pretrained(tmp_path / "teacher")
    make_tokenizer(words=["green", "red"]).save_pretrained(tmp_path / "teacher")
    result = train(*options(home, tmp_path / "out", "--teacher", str(tmp_path / "teacher")))
    assert result.exit_code == 2
    assert "ids stand for different tokens" in result.output
    for file in (tmp_path / "teacher").glob("*token*"):
        file.unlink()  # a teacher without a tokenizer uses the student's
    assert train(*options(home, tmp_path / "out", "--teacher", str(tmp_path / "teacher"), "--plan")).exit_code == 0
    make_tokenizer(template="{{ 'one ' }}" + TEMPLATE).save_pretrained(tmp_path / "teacher")
    chat = tmp_path / "chat.jsonl"
    chat.write_text(json.dumps({"messages": [{"role": "user", "content": "one"}], "response": "two"}))
    result = train(*options(home, tmp_path / "out", "--teacher", str(tmp_path / "teacher"), "--data", str(chat)))
    assert result.exit_code == 2
    assert "the chat templates of student and teacher differ: token 0 is" in result.output


def test_config_of_the_documentation_is_valid(tmp_path: Path) -> None:
    from kdkernels.cli.train.settings import read_config, read_settings

    page = (ROOT / "docs" / "trainer.md").read_text(encoding="utf-8")
    (tmp_path / "run.yaml").write_text(page.partition("```yaml\n# run.yaml\n")[2].partition("```")[0])
    config = read_config(tmp_path / "run.yaml")
    del config["bf16"]  # needs a device with bfloat16
    settings = read_settings(config, {}, [])
    assert (settings.args.divergence, settings.args.learning_rate, settings.args.max_length) == ("jsd(beta=0.3)", 1e-4, 4096)


def test_help_lists_every_field_added_to_transformers() -> None:
    added = {f.name for f in dataclasses.fields(DistillationArguments)} - {f.name for f in dataclasses.fields(TrainingArguments)}
    listed = {word.strip("`,;:").removeprefix("--").replace("-", "_") for word in EPILOG.split() if word.startswith("`--")}
    assert added <= listed
    assert "Every field of DistillationArguments" in train("train", "--help").output


def test_teacher_is_loaded_without_sharding(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FSDP loads a model on rank 0 only, and ZeRO-3 in partitions. Both are switched off while the teacher is loaded."""
    from transformers.integrations import deepspeed as zero

    from kdkernels.cli.train import loading
    from kdkernels.trainer import hooks

    states: dict[str, Any] = {}

    def load(cls: Any, role: str, path: str, **options: Any) -> None:
        states[role] = os.environ.get(hooks.FSDP_LOADING), zero._hf_deepspeed_config_weak_ref

    config = object()
    monkeypatch.setattr(loading, "load", load)
    monkeypatch.setattr(zero, "_hf_deepspeed_config_weak_ref", config)
    monkeypatch.setenv(hooks.FSDP_LOADING, "true")
    for role in ("teacher", "student"):
        loading.model_of(role, str(home / role), "auto")
    assert states == {"teacher": ("false", None), "student": ("true", config)}
