"""``kdkernels evaluate``, ``sample``, ``chat`` and ``--sample-every``. Metrics equal those of a training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from runs import log, make_home, run_in, summary, weights, write_rows
from training import make_model, make_rows
from typer.testing import CliRunner

from kdkernels.cli import app


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_home(tmp_path_factory.mktemp("home"))


def invoke(*words: Any, **options: Any) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words], **options)


def rows_of(result: Any) -> list[dict[str, Any]]:
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)["rows"]


def test_metrics_equal_those_of_a_training(home: Path, tmp_path: Path) -> None:
    """Evaluate two students on two data sets. Each metric equals the one that the trainer reports."""
    held_out = home / "held-out.jsonl"
    run_in(home, tmp_path / "out", max_steps=2, divergence="jsd", temperature=2.0, eval_data=[str(held_out)], save_strategy="no")
    rows = rows_of(
        invoke(
            "evaluate", "--student", home / "student", "--student", tmp_path / "out", "--teacher", home / "teacher", "--data", held_out,
            "--data", home / "train.jsonl", "--divergence", "jsd", "--temperature", 2, "--device", "cpu", "--json",
        )
    )  # fmt: skip
    assert [(row["data"], row["student"]) for row in rows] == [
        (str(data), str(student)) for data in (held_out, home / "train.jsonl") for student in (home / "student", tmp_path / "out")
    ]
    for row, stage in zip(rows[:2], ("before", "after"), strict=True):
        trained = summary(tmp_path / "out")[stage]
        for name in ("divergence", "cross_entropy", "top1_agreement"):
            assert row[name] == pytest.approx(trained[f"eval_{name}"], rel=1e-5)
        assert row["tokens"] == trained["eval_tokens"]


def test_a_table_names_each_student_and_data_set(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)  # short names fit in the table's columns
    result = invoke("evaluate", "--student", "student", "--student", "teacher", "--data", "held-out.jsonl", "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert "cross-entropy" in result.output
    assert "divergence" not in result.output  # no teacher was given
    assert sum("held-out.jsonl" in line for line in result.output.splitlines()) == 2


def test_incompatible_models_and_options_are_refused(home: Path, tmp_path: Path) -> None:
    from training import WORDS, make_tokenizer

    make_model(8, 1, seed=1).save_pretrained(tmp_path / "other")
    make_tokenizer([*WORDS[::-1]]).save_pretrained(tmp_path / "other")
    common = ("evaluate", "--student", home / "student", "--data", home / "held-out.jsonl", "--device", "cpu")
    for options, message in (
        (("--teacher", tmp_path / "other"), "tokenizer"),
        (("--student", tmp_path / "other"), "tokenizer"),
        (("--teacher", "./gone"), "--teacher ./gone: no such folder"),
        (("--divergence", "kl"), "divergence 'kl' is unknown"),
        (("--max-length", "3"), "held-out.jsonl, row 1"),
    ):
        result = invoke(*common, *options)
        assert result.exit_code == 2, result.output
        assert message in result.output


def test_sample_shows_texts_of_each_model(home: Path) -> None:
    models = ("--student", home / "student", "--teacher", home / "teacher")
    arguments = ("sample", *models, "--data", home / "held-out.jsonl", "--max-new-tokens", 5, "--rows", 2, "--device", "cpu")
    result = invoke(*arguments, "--json")
    assert result.exit_code == 0, result.output
    samples = json.loads(result.stdout)
    rows = [json.loads(line) for line in (home / "held-out.jsonl").read_text().splitlines()[:2]]
    assert [row["prompt"].strip() for row in samples] == [row["prompt"].strip() for row in rows]
    assert [row["response"].strip() for row in samples] == [row["response"].strip() for row in rows]
    assert [[text["role"] for text in row["texts"]] for row in samples] == [["student", "teacher"]] * 2
    table = invoke(*arguments)
    assert table.exit_code == 0, table.output
    assert rows[0]["prompt"].strip() in table.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--rows", 0), "--rows 0: it must be an integer >= 1"),
        (("--max-new-tokens", 0), "--max-new-tokens 0: it must be an integer >= 1"),
        (("--temperature", "nan"), "--temperature nan: it must be finite and >= 0"),
        (("--data", "gone.jsonl"), "gone.jsonl: no such file"),
    ],
)
def test_invalid_options_of_sample_raise(home: Path, options: tuple[Any, ...], message: str) -> None:
    result = invoke("sample", "--student", home / "student", "--data", home / "held-out.jsonl", "--device", "cpu", *options)
    assert result.exit_code == 2, result.output
    assert message in result.output


def test_chat_remembers_turns_resets_and_exits(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts: list[list[int]] = []
    from kdkernels.cli import comparison

    def write(model: Any, tokenizer: Any, prompt: list[int], sampling: Any, streamer: Any) -> str:
        prompts.append(prompt)
        streamer.on_finalized_text(f"answer {len(prompts)}\x1b[2J", stream_end=True)
        return f"answer {len(prompts)}"

    monkeypatch.setattr(comparison, "_write", write)
    result = invoke("chat", "--student", home / "student", "--device", "cpu", input="red cat\nblue\n/reset\nred cat\n/exit\nlost\n")
    assert result.exit_code == 0, result.output
    assert len(prompts) == 3
    assert prompts[2] == prompts[0]
    assert len(prompts[1]) > len(prompts[0])
    assert "answer 2\\x1b[2J\n" in result.output


def test_chat_text_repeats_with_the_seed(home: Path) -> None:
    """Two chats with the same seed stream the same text."""
    from kdkernels.cli.comparison import Sampling, chat

    parts: list[str] = []
    chat(str(home / "teacher"), "", Sampling(6, temperature=1.0, seed=3, device="cpu"), iter(["red cat"]), parts.append)
    repeated: list[str] = []
    chat(str(home / "teacher"), "", Sampling(6, temperature=1.0, seed=3, device="cpu"), iter(["red cat"]), repeated.append)
    assert "".join(parts).strip()
    assert parts == repeated


def test_samples_during_training_are_logged_and_do_not_change_it(home: Path, tmp_path: Path) -> None:
    held_out = write_rows(tmp_path / "held-out.jsonl", make_rows(5, seed=4))
    common = {"max_steps": 4, "eval_data": [str(held_out)], "save_strategy": "no", "logging_steps": 4}
    run_in(home, tmp_path / "without", **common)
    printed = run_in(home, tmp_path / "with", **common, sample_every=2, sample_prompts=2, max_new_tokens=4)
    assert weights(tmp_path / "with") == weights(tmp_path / "without")
    samples = {line["step"]: line["samples"] for line in log(tmp_path / "with") if "samples" in line}
    assert samples.keys() == {2, 4}
    prompts = [json.loads(line)["prompt"].strip() for line in held_out.read_text().splitlines()[:2]]
    assert [sample["prompt"].strip() for sample in samples[2]] == prompts
    assert "step 4, sample: " in printed
    assert [line for line in log(tmp_path / "with") if "samples" not in line] == log(tmp_path / "without")


def test_lm_eval_task_of_a_local_folder_is_evaluated(home: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    rows = [{"prompt": f"{word} cat", "right": index % 2} for index, word in enumerate(["red", "blue", "green", "one"])]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    (tmp_path / "colours.yaml").write_text(
        f"task: colours\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {data}\ntest_split: test\n"
        "output_type: multiple_choice\ndoc_to_text: '{{prompt}}'\ndoc_to_choice: [' dog', ' bird']\ndoc_to_target: right\n"
        "metric_list:\n  - metric: acc\n"
    )
    words = ("evaluate", "--student", home / "student", "--tasks-dir", tmp_path, "--device", "cpu", "--batch-size", 1)
    result = invoke(*words, "--tasks", "colours", "--json")
    assert result.exit_code == 0, result.output
    (row,) = json.loads(result.stdout)["tasks"]
    assert (row["task"], row["student"]) == ("colours", str(home / "student"))
    assert 0 <= row["acc"] <= 1
    unknown = invoke(*words, "--tasks", "shapes")
    assert unknown.exit_code == 2
    assert "--tasks shapes: lm-eval has no such task" in unknown.output


def test_tasks_without_lm_eval_name_the_extra(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "lm_eval" else find(name, *rest))
    result = invoke("evaluate", "--student", home / "student", "--tasks", "arc_easy")
    assert result.exit_code == 2
    assert "--tasks needs lm-eval: pip install 'kdkernels[lm-eval]'" in result.output
    assert "--data is missing (or --tasks)" in invoke("evaluate", "--student", home / "student").output
