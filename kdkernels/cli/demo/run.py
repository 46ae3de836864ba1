"""Run a demo: text, teacher, two students, comparison, results."""

from __future__ import annotations

import copy
import json
import math
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ... import divergences
from ...backends import selection
from ...support.files import Output
from . import corpus, report
from .settings import DemoError, Settings

if TYPE_CHECKING:
    from . import train

__all__ = ["check", "run", "train_models"]

FILES = ("demo.json", "demo.png")
LABELS = {"teacher": "Teacher", "student_ce": "Student, CE only", "student_kd": "Student, CE + KD"}
_SEEDS, _STEPS = (0, 2**31 - 1), (1, 1_000_000)
_VOCAB_SIZES = (300, 65536)  # a byte-level BPE begins with 257
_TEACHER_STREAM, _STUDENT_STREAM = 0, 1  # of training batches: the students share theirs


def check(settings: Settings, out: Path) -> None:
    """Check packages, options and output folder before minutes of training.

    Raises:
        DemoError: a package is missing, an option is invalid, or the folder cannot be written to.
    """
    missing = [name for name in ("transformers", "tokenizers", "matplotlib") if find_spec(name) is None]
    if missing:
        raise DemoError(f'the demo needs {", ".join(missing)}: pip install "kdkernels[train,bench]"')
    for option, value, (low, high) in (
        ("--seed", settings.seed, _SEEDS),
        ("--steps", settings.steps, _STEPS),
        ("--vocab-size", settings.vocab_size, _VOCAB_SIZES),
    ):
        if not low <= value <= high:
            raise DemoError(f"{option} {value}: it must be between {low} and {high}")
    if not 0 < settings.temperature < math.inf:
        raise DemoError(f"--temperature {settings.temperature:g}: it must be a finite number > 0, such as 1 or 2")
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise DemoError("--device cuda: torch sees no CUDA device here. Take --device cpu")
    with _option("--divergence"):
        divergences.resolve(settings.divergence)
    with _option("--backend"):
        selection.select(settings.backend, settings.device, (torch.float32, torch.float32))
    folder = next(p for p in (out, *out.absolute().parents) if p.exists())
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise DemoError(f"--out {out}: cannot write into {folder} ({error.strerror}). Give another folder") from None


@contextmanager
def _option(name: str) -> Iterator[None]:
    """Add the name of the option to errors of the library."""
    try:
        yield
    except ValueError as error:
        raise DemoError(f"{name}: {error}") from None
    except selection.BackendUnavailable as error:
        raise DemoError(f"{name}: {error}. Leave {name} out to use the best backend that can run") from None


def run(settings: Settings, data: Path | None, out: Path, environment: dict[str, Any], console: Console) -> dict[str, Any]:
    """Train, measure, print, and write ``demo.json`` and ``demo.png`` to ``out``. Returns the content of demo.json.

    Raises:
        DemoError: invalid input; nothing has been written.
    """
    check(settings, out)
    with Output(out, "demo") as output:
        output.check(FILES, {"--data": data})
        return _run(settings, data, output, environment, console)


def _run(settings: Settings, data: Path | None, output: Output, environment: dict[str, Any], console: Console) -> dict[str, Any]:
    with _progress(console) as progress:
        record = {"environment": environment, "settings": asdict(settings), **train_models(settings, data, progress)}
        record["loss_comparison"] = _compare_losses(settings, progress)
    console.print()
    report.print_tables(record, console)
    from .figures import draw

    out = output.path
    files = {FILES[0]: (json.dumps(record, indent=1, allow_nan=False) + "\n").encode(), FILES[1]: draw(record)}
    for name in files:
        output.claim(name)
    report.save(out, files)
    console.print(f"Wrote {' and '.join(str(out / name) for name in files)}", highlight=False, soft_wrap=True)
    return record


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=16),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
    )


def train_models(settings: Settings, data: Path | None, progress: Progress) -> dict[str, Any]:
    """Return the parts of demo.json about corpus, models, and the difference between the students."""
    from . import train

    task = progress.add_task("Text and tokenizer", total=2, note="")
    text = corpus.collect(data, settings.max_bytes, settings.seed)
    progress.update(task, advance=1, note=f"{len(text.train) + len(text.held_out)} files")
    tokens = corpus.tokenize(text, corpus.train_tokenizer(text, settings.vocab_size))
    batches = train.Batches(tokens.train, tokens.held_out, settings)
    progress.update(task, advance=1, note=f"{len(tokens.train) + len(tokens.held_out):,} tokens")

    teacher = train.build(settings.teacher, tokens.vocab, settings)
    student_ce = train.build(settings.student, tokens.vocab, settings)
    student_kd = copy.deepcopy(student_ce)
    student_batches = batches.training(settings.steps, _STUDENT_STREAM)
    kd_loss = train.kd_loss(teacher, settings)

    def trained(name: str, model: Any, loss: train.Loss, model_batches: list[torch.Tensor], lr: float) -> dict[str, Any]:
        task = progress.add_task(LABELS[name], total=len(model_batches), note="")
        initial = train.fingerprint(model)

        def on_step(held_out: float) -> None:
            progress.update(task, advance=1, note=f"held-out loss {held_out:.3f}")

        curve = train.train(model, loss, model_batches, batches.held_out, lr, settings.evaluations, on_step)
        return {
            "label": LABELS[name],
            "parameters": sum(p.numel() for p in model.parameters()),
            "steps": len(model_batches),
            "initial_weights_sha256": initial,
            "final_weights_sha256": train.fingerprint(model),
            "held_out_loss": curve.held_out[-1],
            "median_step_seconds": statistics.median(curve.step_seconds),
            "curve": asdict(curve),
        }

    teacher_batches = batches.training(settings.teacher_steps, _TEACHER_STREAM)
    models = {"teacher": trained("teacher", teacher, train.ce_loss, teacher_batches, settings.teacher_lr)}
    teacher.requires_grad_(False)
    evaluations = {}
    for name, model, loss in (("student_ce", student_ce, train.ce_loss), ("student_kd", student_kd, kd_loss)):
        models[name] = trained(name, model, loss, student_batches, settings.student_lr)
        evaluations[name] = train.compare_to_teacher(model, teacher, batches.held_out, settings.backend)
        models[name]["kl_to_teacher"] = evaluations[name].kl_to_teacher.mean().item()
        models[name]["top1_agreement"] = evaluations[name].top1_agreement.mean().item()
    difference = evaluations["student_kd"].cross_entropy - evaluations["student_ce"].cross_entropy
    return {
        "corpus": {**_record_of(text, tokens), "held_out_windows_tokens": batches.held_out[:, 1:].numel()},
        "models": models,
        "student_difference": {
            "kd_minus_ce": difference.mean().item(),
            "standard_error": (difference.std() / len(difference) ** 0.5).item(),
            "windows": len(difference),
        },
    }


def _record_of(text: corpus.Corpus, tokens: corpus.Tokens) -> dict[str, Any]:
    return {
        "source": text.source,
        "split": text.split,
        "sha256": text.sha256,
        "train_files": [d.name for d in text.train],
        "held_out_files": [d.name for d in text.held_out],
        "train_tokens": len(tokens.train),
        "held_out_tokens": len(tokens.held_out),
        "vocab_size": tokens.vocab,
    }


def _compare_losses(settings: Settings, progress: Progress) -> dict[str, dict[str, Any]]:
    from .compare import LOSSES, measure

    task = progress.add_task("Fused and dense loss", total=len(LOSSES) * settings.loss_shape.samples, note="each in a fresh process")
    return {loss: asdict(m) for loss, m in measure(settings, lambda: progress.advance(task)).items()}
