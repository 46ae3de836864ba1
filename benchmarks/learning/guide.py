"""The commands of docs/guide.md, run one after the other: from a downloaded model to a student that answers.

Each is run as it stands there, in one folder, and recorded with what it prints and how long it takes.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
ROWS, STEPS = 64, 128
"""Held-out rows whose answers are compared; optimizer steps of the student."""


@dataclass(frozen=True)
class Step:
    """A command of the guide.

    Args:
        name: the block of docs/guide.md that shows it.
        command: for bash.
    """

    name: str
    command: str


def steps(layers: int, rows: int, rate: float) -> list[Step]:
    """Return the steps in order."""
    train = (
        "kdkernels train --cache hidden --student student --data train.jsonl --eval-data held-out.jsonl --output-dir out "
        f"--max-steps {STEPS} --per-device-train-batch-size {rows} --learning-rate {rate:g} --warmup-steps 4 "
        "--lr-scheduler-type constant_with_warmup --save-strategy no --use-cpu"
    )
    generate = "kdkernels generate --model teacher --data {0}-prompts.jsonl --out {0}.jsonl --max-tokens 16 --batch-size 32"
    return [
        Step("teacher", "python $CLONE/tests/real/model.py teacher"),
        Step("prompts", "python -m benchmarks.learning sentences ."),
        Step("student", f"python -m benchmarks.learning student teacher student --layers {layers}"),
        Step("answers", generate.format("train")),
        Step("held-out answers", generate.format("held-out")),
        Step("cache", "kdkernels cache --kind hidden --teacher teacher --data train.jsonl --data held-out.jsonl --out hidden"),
        Step("train", train),
        Step("evaluate", "kdkernels evaluate --student student --student out --teacher teacher --data held-out.jsonl"),
        Step("sample", "kdkernels sample --student out --student student --data held-out.jsonl --rows 2 --max-new-tokens 16"),
        Step(
            "answer all",
            f"kdkernels sample --student out --data held-out.jsonl --rows {ROWS} --max-new-tokens 16 --json > texts.json",
        ),
        Step("exact match", "python -m benchmarks.learning exact texts.json"),
        Step(
            "chat",
            "printf 'The red hat for Julia will arrive in Oslo on Friday.\\n/reset\\nAnna from Rome ordered a black desk on Monday.\\n' | "
            "kdkernels chat --student out --system 'Write the colour and the item as JSON.' --max-new-tokens 16",
        ),
    ]


def run(folder: Path, guide: list[Step], threads: int) -> Iterator[dict[str, Any]]:
    """Run the steps in ``folder`` and yield for each its command, output, and seconds by the clock and of CPU time.

    Steps that ``folder`` has a record of, with the same command, are not run again.

    Raises:
        RuntimeError: a command that failed; the message ends with what it printed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    modules = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    settings = {"PATH": path, "CLONE": str(ROOT), "PYTHONPATH": modules, "OMP_NUM_THREADS": str(threads)}
    settings |= {"COLUMNS": "110", "TERM": "dumb", "NO_COLOR": "1"}
    file = folder / "guide.json"
    records: dict[str, dict[str, Any]] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    for step in guide:
        if step.command not in records:
            records[step.command] = {"name": step.name, "command": step.command, **_run(step.command, folder, {**os.environ, **settings})}
            file.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
        yield records[step.command]


def _run(command: str, folder: Path, environment: Mapping[str, str]) -> dict[str, Any]:
    begun, before = time.perf_counter(), os.times()
    done = subprocess.run(["bash", "-c", command], cwd=folder, env=environment, capture_output=True, text=True, check=False)
    after = os.times()
    if done.returncode != 0:
        raise RuntimeError(f"{command}\nended with status {done.returncode}:\n{(done.stdout + done.stderr)[-2000:]}")
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return {"printed": printed(done.stdout), "seconds": round(time.perf_counter() - begun), "CPU seconds": round(cpu)}


def printed(output: str) -> str:
    """Return what a terminal shows of a command's output, without progress bars and trailing spaces."""
    lines = (line.split("\r")[-1].rstrip() for line in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", output).split("\n"))
    return "\n".join(line for line in lines if line and not line.startswith("━"))


def exact_match(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Return for each model the percentage of rows that it answers as the data does, from ``kdkernels sample --json``."""
    models = [text["model"] for text in rows[0]["texts"]]
    right = [sum(row["texts"][index]["text"].strip() == row["response"].strip() for row in rows) for index in range(len(models))]
    return {model: 100 * count / len(rows) for model, count in zip(models, right, strict=True)}


def transcript(record: Mapping[str, Any], name: str) -> str:
    """Return a step as docs/guide.md shows it: the command, what it printed, and how long it took.

    Of the lines that a training logs, the first two and the last are shown.
    """
    step = next(step for step in record["steps"] if step["name"] == name)
    shown = f"```sh\n{wrapped(step['command'])}\n```\n"
    if step["printed"]:
        lines = step["printed"].split("\n")
        logged = [index for index, line in enumerate(lines) if re.match(r"step \d+ of \d+:", line)]
        if len(logged) > 3:
            lines[logged[2] : logged[-1]] = ["..."]
        shown += "\n```text\n" + "\n".join(lines) + "\n```\n"
    return f"{shown}\n{step['seconds']} s by the clock, {step['CPU seconds']} s of CPU time."


def blocks(record: Mapping[str, Any]) -> dict[str, Callable[[], str]]:
    """Return the parts of docs/guide.md by name: every step, and the time of all."""
    steps_by_block = {f"guide {step['name']}": partial(transcript, record, step["name"]) for step in record["steps"]}
    return {**steps_by_block, "guide total": partial(total, record)}


def total(record: Mapping[str, Any]) -> str:
    """Return how long all steps took, and where."""
    clock, cpu = (round(sum(step[unit] for step in record["steps"]) / 60) for unit in ("seconds", "CPU seconds"))
    e = record["environment"]
    return (
        f"All steps together took {clock} minutes by the clock and {cpu} minutes of CPU time, {record['threads']} thread"
        f"{'s' * (record['threads'] > 1)} each; "
        f"{e['cpu']}, torch {e['torch']}, {e['date']}."
    )


def wrapped(command: str, width: int = 110) -> str:
    """Return a command over several lines, broken before options."""
    lines = [""]
    for part in re.split(r" (?=--|> |\| )", command):
        if lines[-1] and len(lines[-1]) + 1 + len(part) > width:
            lines[-1] += " \\"
            lines.append("    " + part)
        else:
            lines[-1] += (" " if lines[-1] else "") + part
    return "\n".join(lines)


def load(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a JSON file."""
    rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    return rows
