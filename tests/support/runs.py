"""Run ``kdkernels train`` in this process on small models and a few rows, and read its output."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

from rich.console import Console
from training import make_model, make_rows, make_tokenizer

ROWS = 24


def make_home(folder: Path) -> Path:
    """Write a student, two teachers, training rows and held-out rows into a folder."""
    tokenizer = make_tokenizer()
    for name, hidden, seed in (("student", 8, 1), ("teacher", 12, 2), ("teacher2", 12, 3)):
        spread = 0.05 if name == "student" else 0.5
        make_model(hidden, 1, seed=seed, initializer_range=spread, attention_dropout=0.1).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    for name, count, seed in (("train", ROWS, 0), ("held-out", 7, 1)):
        write_rows(folder / f"{name}.jsonl", make_rows(count, seed))
    return folder


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run_in(home: Path, out: Path, **options: Any) -> str:
    """Return the output of ``kdkernels train``. Defaults: 6 steps, a checkpoint after each. ``teacher`` and ``data`` are paths."""
    from kdkernels.cli.train.run import run
    from kdkernels.cli.train.settings import read_settings

    paths = {"teacher": [str(home / "teacher")], "student": str(home / "student"), "data": [str(home / "train.jsonl")]}
    defaults = {
        "output_dir": str(out), "max_steps": 6, "save_steps": 1, "learning_rate": 1e-2, "logging_steps": 2, "use_cpu": True,
        "per_device_train_batch_size": 4,
    }  # fmt: skip
    output = io.StringIO()
    run(read_settings({**paths, **defaults, **options}, {}, []), Console(file=output, width=500, force_terminal=False))
    return output.getvalue()


def killed_at(step: int, finished: Path, out: Path) -> Path:
    """Copy a finished run and remove what would be missing if it had been killed just after the checkpoint of ``step``."""
    shutil.copytree(finished, out)
    for path in out.iterdir():
        number = path.name.removeprefix("checkpoint-")
        if number.isdigit() and int(number) > step:
            shutil.rmtree(path)
        elif path.name in ("summary.json", "model.safetensors", "training.png"):
            path.unlink()
    return out


def weights(out: Path) -> bytes:
    return (out / "model.safetensors").read_bytes()


def summary(out: Path) -> dict[str, Any]:
    return json.loads((out / "summary.json").read_text())


def log(out: Path) -> list[dict[str, Any]]:
    """Return the lines of ``log.jsonl`` without times, rates and memory."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    measured = ("per_second", "time", "memory", "total_flos", "train_loss")
    return [{name: value for name, value in line.items() if not any(part in name for part in measured)} for line in lines]
