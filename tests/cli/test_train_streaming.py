"""``kdkernels train --streaming``: resumed runs, held-out rows, plans, and refused options."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from rich.console import Console
from runs import killed_at, log, run_in, summary, weights
from training import make_tokenizer
from typer.testing import CliRunner

pytest.importorskip("transformers")

from kdkernels.cli.root import app
from kdkernels.cli.train import streamed
from kdkernels.cli.train.data import RunData, read_data
from kdkernels.cli.train.loading import check_data
from kdkernels.cli.train.plan import plan
from kdkernels.cli.train.settings import Settings, TrainError, read_settings
from kdkernels.data import rows as reading
from kdkernels.data.layouts import training_rows
from kdkernels.data.rows import DataError
from kdkernels.data.selection import is_held_out

ROOT = Path(__file__).parents[2]
STREAMED: dict[str, Any] = {"streaming": True, "shuffle_buffer": 5}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.make_home(tmp_path_factory.mktemp("home"))


def options_of(home: Path, folder: Path, **more: Any) -> dict[str, Any]:
    return {
        "teacher": [str(home / "teacher")], "student": str(home / "student"), "data": [str(home / "train.jsonl")], "max_steps": 7,
        "output_dir": str(folder / "out"), "use_cpu": True, "per_device_train_batch_size": 4, **STREAMED, **more,
    }  # fmt: skip


def settings_of(home: Path, folder: Path, **more: Any) -> Settings:
    return read_settings(options_of(home, folder, **more), {}, [])


@pytest.fixture(scope="module")
def finished(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 7 steps of 4 rows, which ends in the second pass over 24 rows."""
    out = tmp_path_factory.mktemp("finished") / "out"
    run_in(home, out, max_steps=7, **STREAMED)
    return out


def test_killed_streamed_run_resumes_to_the_same_bits(home: Path, finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = options_of(home, tmp_path, save_steps=1, learning_rate=1e-2, logging_steps=2)
    (tmp_path / "run.json").write_text(json.dumps(options))
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "kdkernels.cli", "train", "--config", str(tmp_path / "run.json")]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (out / "checkpoint-2").exists():
        assert process.poll() is None
        time.sleep(0.002)
    process.kill()
    process.wait()
    assert not (out / "summary.json").exists()
    assert "Resuming at checkpoint-" in run_in(home, out, max_steps=7, **STREAMED)
    assert weights(out) == weights(finished)
    assert log(out) == log(finished)


def test_mixed_packed_and_held_out_streams_resume_to_the_same_bits(home: Path, tmp_path: Path) -> None:
    options = {
        "data": [f"{home}/train.jsonl=3", f"{home}/held-out.jsonl=1"], "eval_fraction": 0.3, "packing": True, "max_length": 32,
        "on_policy_fraction": 0.5, "max_new_tokens": 3, "data_seed": 4, "max_steps": 3, **STREAMED,
    }  # fmt: skip
    run_in(home, tmp_path / "whole", **options)
    resumed = killed_at(2, tmp_path / "whole", tmp_path / "resumed")
    run_in(home, resumed, **options)
    assert weights(resumed) == weights(tmp_path / "whole")
    assert summary(resumed)["after"] == summary(tmp_path / "whole")["after"]


def test_resume_accepts_more_steps_and_refuses_other_data_or_order(home: Path, finished: Path, tmp_path: Path) -> None:
    out = killed_at(5, finished, tmp_path / "out")
    for options, message in (({"shuffle_buffer": 6}, r"--shuffle-buffer \(5 then, 6 now\)"), ({"data_seed": 9}, "--data-seed"),
                           ({"streaming": False, "shuffle_buffer": 10_000}, r"--streaming \(True then, False now\)")):  # fmt: skip
        with pytest.raises(TrainError, match=f"a run with another .*{message}"):
            run_in(home, out, max_steps=7, **{**STREAMED, **options})
    changed_home = shutil.copytree(home, tmp_path / "home")
    with (changed_home / "train.jsonl").open("a") as file:
        file.write('{"prompt": "one ", "response": "two"}\n')
    with pytest.raises(TrainError, match=r"another --data \(its content changed\)"):
        run_in(changed_home, out, max_steps=7, **STREAMED)
    run_in(home, out, max_steps=8, **STREAMED)
    assert summary(out)["steps"] == 8


def test_number_of_held_out_rows_is_limited(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streamed, "MOST_HELD_OUT", 3)

    def data(fraction: float) -> RunData:
        return read_data(settings_of(home, tmp_path, eval_fraction=fraction), make_tokenizer(), None, None, None)

    with pytest.warns(UserWarning, match=r"--eval-fraction 0.4 holds out more than 3 rows: the first are evaluated, the others left out"):
        read = data(0.4)
    assert len(read.held_out or ()) == 3
    trained = {example.where for item in read.train for example in item}
    held_out = {row.where for row in training_rows(home / "train.jsonl") if is_held_out(row, 0.4)}
    assert not trained & held_out
    assert len(trained | held_out) == runs.ROWS
    with pytest.raises(DataError, match="no row is left to train on: all are too long or held out"):
        data(0.999999)
    with pytest.raises(DataError, match="--eval-fraction 1e-09: no row is held out"):
        data(1e-9)


def test_rows_with_a_held_out_prompt_are_not_trained_on(home: Path, tmp_path: Path) -> None:
    prompts = ["one ", "two "] * 10 + ["four "]
    file = tmp_path / "keys.jsonl"
    file.write_text(
        "".join(json.dumps({"prompt": prompt, "response": "three", "key": key}) + "\n" for key, prompt in enumerate(prompts, 100))
    )
    read = read_data(settings_of(home, tmp_path, data=[str(file)], eval_fraction=0.3), make_tokenizer(), None, None, None)
    evaluated = {example.where for example in read.held_out or ()}
    assert 0 < len(evaluated) < 20
    assert {example.where for item in read.train for example in item} == {f"{file}, row 21"}


def test_plan_reads_only_the_first_rows(home: Path, tmp_path: Path) -> None:
    columns, output = "prompt=prompt,response=response,weight=wieght", io.StringIO()
    plan(settings_of(home, tmp_path, columns=columns), Console(file=output, width=500))
    assert "data: streamed; the first 28 examples in 28 rows" in output.getvalue()
    assert "steps: 7 of 4 rows each; logs" in output.getvalue()
    assert "--columns weight=wieght: none of the first rows has such a column" in output.getvalue()
    with pytest.raises(DataError, match="--columns weight=wieght: no row has such a column"):
        plan(settings_of(home, tmp_path, columns=columns, shuffle_buffer=100), Console(file=output, width=500))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_steps": -1}, "--streaming needs --max-steps: how many rows there are is not known before they are read"),
        ({"cache": "c", "teacher": []}, "--cache with --streaming: .* Leave --streaming out"),
        ({"dataloader_num_workers": 2}, "--dataloader-num-workers 2 with --streaming: .* Leave it 0"),
        ({"auto_find_batch_size": True}, "--auto-find-batch-size with --streaming: .* Give --per-device-train-batch-size"),
        ({"save_strategy": "epoch"}, "--save-strategy epoch with --streaming: no epoch is known. Choose steps, and --save-steps"),
        ({"eval_strategy": "epoch", "eval_data": ["e"]}, "--eval-strategy epoch with --streaming"),
        ({"sample_every": 2}, "--sample-every with --streaming takes its prompts from held-out rows: give --eval-data or --eval-fraction"),
        ({"shuffle_buffer": 0}, "--shuffle-buffer 0: it must be an integer >= 1"),
        ({"streaming": False, "shuffle_buffer": 5}, "--shuffle-buffer without --streaming: .* Leave it out"),
    ],
)
def test_options_that_need_all_rows_are_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    config = {"teacher": ["t"], "student": "s", "data": ["d.jsonl"], "output_dir": str(tmp_path), "max_steps": 3, **STREAMED, **options}
    with pytest.raises(TrainError, match=message):
        read_settings(config, {}, [])


def test_data_larger_than_memory_is_refused_before_loading(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "available_bytes", lambda: 1000)
    missing = str(tmp_path / "no-model")
    for options in (
        {},
        {"data": [str(home / "held-out.jsonl"), str(home / "train.jsonl")]},
        {**STREAMED, "eval_data": [str(home / "train.jsonl")]},
    ):
        with pytest.raises(DataError, match=r"train.jsonl: the examples of the data take at least .* --streaming --max-steps N"):
            run_in(home, tmp_path / "out", **{"student": missing, "teacher": [missing], **options})
    check_data(settings_of(home, tmp_path))


@pytest.mark.parametrize(
    "command",
    [
        ["evaluate", "--student", "no-model"], ["cache", "--teacher", "no-model", "--out", "cache", "--kind", "text"],
        ["cache", "--teacher", "no-model", "--out", "cache"], ["generate", "--model", "no-model", "--out", "rows.jsonl"],
    ],
)  # fmt: skip
def test_other_commands_refuse_data_larger_than_memory(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    monkeypatch.setattr(reading, "available_bytes", lambda: 1000)
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, [*command, "--data", str(home / "train.jsonl")])
    assert result.exit_code == 2
    assert "train.jsonl: the examples of the data take at least" in " ".join(result.output.split())
    assert not list(tmp_path.glob("[!.]*")), "nothing is written"
