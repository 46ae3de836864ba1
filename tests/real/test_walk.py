"""Every command with a real model: ``make real``, or ``KDKERNELS_REAL_MODEL=FOLDER pytest -m real -s tests/real``.

``tests/real/model.py`` makes FOLDER. Commands run in this process and are printed with their output. Tests check rows, losses and files;
other tests check values with small models.
"""

from __future__ import annotations

import json
import math
import os
import shlex
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import killed_at, summary, weights, write_rows
from typer.testing import CliRunner

from kdkernels import cli
from real.servers import llama_server, transformers_serve

pytestmark = pytest.mark.real

MODEL = os.environ.get("KDKERNELS_REAL_MODEL")
runner = CliRunner(env={"COLUMNS": "150", "TERM": "dumb", "NO_COLOR": "1"})

QUESTIONS = {
    "What is the capital of France?": "The capital of France is Paris.",
    "Name a primary colour.": "Red is a primary colour.",
    "Write one word that rhymes with cat.": "Hat.",
    "Is the sun a star or a planet?": "The sun is a star.",
    "Translate 'good morning' into Spanish.": "Buenos días.",
    "What do bees make?": "Bees make honey.",
    "How many legs does a spider have?": "A spider has eight legs.",
    "Give the opposite of hot.": "Cold.",
    "Which ocean is the largest?": "The Pacific Ocean is the largest.",
    "What is water made of?": "Hydrogen and oxygen: H₂O.",
}
SUMS = {"What is 2 + 3?": "5", "What is 10 - 4?": "6", "Tom has 3 apples and buys 4. How many apples has he?": "7"}
REVIEWS = [("A wonderful film with great actors.", "good"), ("The food was cold and the waiter was rude.", "bad")]

LIMITS = ["--max-length", 96, "--learning-rate", "1e-4", "--per-device-train-batch-size", 4, "--logging-steps", 1, "--use-cpu"]
EVALUATED = ["--eval-data", "held-out.jsonl", "--eval-strategy", "steps", "--eval-steps", 2, "--per-device-eval-batch-size", 4]
HARD = ["--kd-weight", 0, "--ce-weight", 1]
"""Options to train on text without a teacher: cross-entropy only."""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the teacher, a student made of its first three layers, and rows."""
    if MODEL is None:
        pytest.skip("KDKERNELS_REAL_MODEL is not set: make the folder with tests/real/model.py, or run make real")
    folder = tmp_path_factory.mktemp("real")
    (folder / "teacher").symlink_to(Path(MODEL).resolve())
    make_student(folder / "teacher", folder / "student", layers=3)
    rows = [{"prompt": question, "response": answer} for question, answer in QUESTIONS.items()]
    write_rows(folder / "rows.jsonl", rows[:8])
    write_rows(folder / "held-out.jsonl", rows[8:])
    write_rows(folder / "openings.jsonl", [{"prompt": " ".join(answer.split()[:3])} for answer in QUESTIONS.values()])
    write_rows(folder / "sums.jsonl", [{"prompt": question, "response": answer} for question, answer in SUMS.items()])
    write_rows(folder / "reviews.jsonl", [{"text": text, "label": label} for text, label in REVIEWS])
    return folder


@pytest.fixture(autouse=True)
def in_home(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)


def make_student(teacher: Path, student: Path, layers: int) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
    model.model.layers = model.model.layers[:layers]
    model.config.num_hidden_layers = layers
    model.save_pretrained(student)
    AutoTokenizer.from_pretrained(teacher).save_pretrained(student)


def walk(*arguments: object, refused: bool = False) -> str:
    """Run a command, print it with its output, and return the output."""
    words = [str(argument) for argument in arguments]
    start = time.perf_counter()
    result = runner.invoke(cli.app, words)
    print(f"\n$ kdkernels {shlex.join(words)}\n{result.output.rstrip()}\n[{time.perf_counter() - start:.0f} s]", flush=True)
    assert result.exception is None or isinstance(result.exception, SystemExit), "a traceback instead of an error"
    assert (result.exit_code != 0) == refused, result.output
    return result.output


def read(path: str | Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def train(out: str, *arguments: object) -> str:
    """Train the student. Check that every loss is finite and that the folder has a model. Return the output."""
    saves = [] if "--save-strategy" in arguments else ["--save-strategy", "no"]
    output = walk("train", "--student", "student", "--output-dir", out, "--max-steps", 2, *LIMITS, *arguments, *saves)
    losses = [line["loss"] for line in read(Path(out, "log.jsonl")) if "loss" in line]
    assert losses
    assert all(math.isfinite(loss) and loss > 0 for loss in losses)
    assert Path(out, "model.safetensors").exists()
    return output


GENERATE = ["generate", "--model", "teacher", "--data", "rows.jsonl", "--out", "local.jsonl", "--max-tokens", 12]


def test_generate_in_this_process() -> None:
    walk(*GENERATE)
    rows = read("local.jsonl")
    assert [row["prompt"] for row in rows] == list(QUESTIONS)[:8]
    assert "Paris" in rows[0]["response"]
    before = Path("local.jsonl").read_bytes()
    walk(*GENERATE)
    assert Path("local.jsonl").read_bytes() == before


def test_train_from_the_live_teacher_killed_and_resumed(home: Path) -> None:
    live = ["--teacher", "teacher", "--data", "rows.jsonl", *EVALUATED, "--save-strategy", "steps", "--save-steps", 1]
    walk("train", "--student", "student", "--output-dir", "live", "--max-steps", 2, *LIMITS, *live, "--plan")
    train("live", *live)
    before, after = summary(home / "live")["before"], summary(home / "live")["after"]
    assert after["eval_divergence"] < before["eval_divergence"], "two steps bring the student closer to the teacher"
    uninterrupted = weights(home / "live")
    (home / "live").rename("finished")
    killed_at(1, home / "finished", home / "live")
    train("live", *live)
    assert weights(home / "live") == uninterrupted, "a resumed run ends with the same weights"


def test_train_on_responses_of_the_student() -> None:
    train("policy", "--teacher", "teacher", "--data", "rows.jsonl", "--on-policy-fraction", 1, "--max-new-tokens", 6)


@pytest.mark.parametrize(
    ("kind", "options", "loss"),
    [
        ("topk", ["-k", 16], EVALUATED),
        ("sampled", ["-k", 8], EVALUATED),
        ("hidden", ["--dtype", "bfloat16"], [*EVALUATED, "--divergence", "jsd(beta=0.5)", "--temperature", 2]),
    ],
)
def test_cache_and_train_from_it(kind: str, options: list[object], loss: list[object]) -> None:
    data = ["--data", "rows.jsonl", "--data", "held-out.jsonl"]
    walk("cache", "--teacher", "teacher", *data, "--kind", kind, *options, "--max-length", 96, "--out", kind)
    train(f"from-{kind}", "--cache", kind, "--data", "rows.jsonl", *loss)


def test_cache_text_and_train_on_it() -> None:
    walk("cache", "--teacher", "teacher", "--data", "rows.jsonl", "--kind", "text", "--max-new-tokens", 12, "--out", "text")
    train("from-text", "--data", "text", *HARD)


def test_recipe_sequence() -> None:
    walk("recipe", "sequence", "--data", "rows.jsonl", "--out", "seq", "--teacher", "teacher", "--max-tokens", 12)
    train("from-seq", "--data", "seq/rows.jsonl", *HARD)


def test_recipe_in_context() -> None:
    walk("recipe", "in-context", "--data", "rows.jsonl", "--out", "icl", "-k", 2, "--teacher", "teacher", "--max-tokens", 12)
    train("from-icl", "--teacher", "teacher", "--data", "icl/rows.jsonl", "--overlong", "drop", "--max-length", 200)


@pytest.mark.parametrize("style", ["fine-tune", "step-by-step", "mt-cot"])
def test_recipe_chain_of_thought(style: str) -> None:
    """All styles ask for the same texts. A model of 135M parameters gets few sums right, and the others are dropped with a reason."""
    options = ["--data", "sums.jsonl", "--teacher", "teacher", "--samples", 2, "--temperature", 0.7, "--max-tokens", 48]
    output = walk("recipe", "chain-of-thought", *options, "--out", style, "--style", style, "--student", "student")
    assert "rows" in output
    assert Path(style, "rows.jsonl").exists()


def test_recipe_scott() -> None:
    limits = ["--max-tokens", 32, "--student", "student"]
    walk("recipe", "scott", "--data", "sums.jsonl", "--out", "scott", "--teacher", "teacher", *limits)
    if Path("scott/rows.jsonl").stat().st_size:
        train("from-scott", "--data", "scott/rows.jsonl", *HARD, "--max-length", 256)


def test_recipe_socratic() -> None:
    """A model of 135M parameters answers without sub-questions. The error names the options that may help."""
    limits = ["--max-tokens", 64]
    command = ["recipe", "socratic", "--data", "sums.jsonl", "--out", "socratic", "--teacher", "teacher", *limits]
    assert "no alternating questions and answers" in walk(*command, refused=True)
    assert not Path("socratic/rows.jsonl").exists()


def test_recipe_disco() -> None:
    """A model of 135M parameters names no label as a judge, so no text is kept. The error names the options that may help."""
    limits = ["--samples", 2, "--max-tokens", 12]
    command = ["recipe", "disco", "--data", "reviews.jsonl", "--labels", "good,bad", "--out", "disco", "--teacher", "teacher", *limits]
    assert "--judge" in walk(*command, refused=True)
    assert not Path("disco/rows.jsonl").exists()


def test_recipe_lion() -> None:
    command = ["recipe", "lion", "--data", "sums.jsonl", "--out", "lion", "--teacher", "teacher", "--count", 2, "--max-tokens", 48]
    walk(*command)
    train("lion-0", "--data", "lion/round-0/imitate.jsonl", *HARD, "--max-length", 200)
    output = walk(*command, "--student", "lion-0", refused=True)
    assert "--referee" in output, "a model of 135M parameters does not rate; the error suggests another referee"


@pytest.fixture(scope="module")
def llama(home: Path) -> Iterator[str]:
    with llama_server(home / "teacher") as url:
        yield url


@pytest.fixture(scope="module")
def serve(home: Path) -> Iterator[str]:
    with transformers_serve(home / "teacher") as url:
        yield url


@pytest.mark.parametrize(("api", "data"), [("chat", "rows.jsonl"), ("completions", "openings.jsonl")])
def test_generate_with_llama_server_and_train_on_its_logprobs(llama: str, api: str, data: str) -> None:
    options = ["--base-url", llama, "--model", "smollm2", "--data", data, "--max-tokens", 12, "--logprobs", 5, "--api", api]
    walk("generate", *options, "--out", f"llama-{api}.jsonl")
    rows = read(f"llama-{api}.jsonl")
    assert all(row["response"] and row["teacher_logprobs"] for row in rows)
    replies = ["--from-replies", "--tokenizer", "teacher", "--data", f"llama-{api}.jsonl"]
    walk("cache", *replies, "-k", 5, "--max-length", 96, "--out", f"top5-{api}")
    train(f"from-llama-{api}", "--cache", f"top5-{api}", "--data", f"llama-{api}.jsonl")


def test_llama_server_has_no_prompt_logprobs(llama: str) -> None:
    options = ["--teacher", "smollm2", "--base-url", llama, "--tokenizer", "teacher", "--data", "rows.jsonl", "-k", 5]
    assert "prompt_logprobs" in walk("cache", *options, "--out", "remote", refused=True)


def test_recipe_sequence_with_llama_server(llama: str) -> None:
    walk("recipe", "sequence", "--data", "rows.jsonl", "--out", "llama-seq", "--base-url", llama, "--model", "smollm2", "--max-tokens", 12)
    assert Path("llama-seq/rows.jsonl").exists()


@pytest.mark.parametrize(("api", "data"), [("chat", "rows.jsonl"), ("completions", "openings.jsonl")])
def test_generate_with_transformers_serve(serve: str, home: Path, api: str, data: str) -> None:
    """Greedy chat text equals that of the model in this process. Completions get the prompt without a template."""
    options = ["--base-url", serve, "--model", home / "teacher", "--data", data, "--max-tokens", 12, "--concurrency", 2, "--api", api]
    walk("generate", *options, "--out", f"serve-{api}.jsonl")
    if api == "chat":
        walk(*GENERATE)
        assert [row["response"] for row in read("serve-chat.jsonl")] == [row["response"] for row in read("local.jsonl")]
    train(f"from-serve-{api}", "--data", f"serve-{api}.jsonl", *HARD)


def test_transformers_serve_has_no_logprobs(serve: str, home: Path) -> None:
    options = ["--base-url", serve, "--model", home / "teacher", "--data", "rows.jsonl", "--max-tokens", 12, "--logprobs", 5]
    assert "log-probabilities" in walk("generate", *options, "--out", "serve-logprobs.jsonl", refused=True)


def test_bench_writes_results() -> None:
    sizes = ["--shape", "64,4000,48,64", "--divergence", "forward_kl", "--dtype", "float32", "--peers", "none", "--budget-minutes", 1]
    walk("bench", "--suite", "smoke", *sizes, "--out", "bench")
    assert {path.name for path in Path("bench").iterdir()} >= {"results.json", "report.html"}
