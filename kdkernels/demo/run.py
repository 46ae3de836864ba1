"""The order of a demo: text, teacher, two students, comparison, results."""

from __future__ import annotations

import copy
import json
import os
import statistics
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from .. import dispatch, divergences
from . import corpus, report
from .settings import DemoError, Settings

__all__ = ["check", "run", "train_models"]

LABELS = {"teacher": "Teacher", "student_ce": "Student, CE only", "student_kd": "Student, CE + KD"}
_TEACHER_STREAM, _STUDENT_STREAM = 0, 1  # of training batches: the students share theirs


def check(settings: Settings, out: Path) -> None:
    """Everything that can be known to fail before minutes of training.

    Raises:
        DemoError: a package is missing, an option makes no sense here, or the results could not be written.
    """
    missing = [name for name in ("transformers", "tokenizers", "matplotlib") if find_spec(name) is None]
    if missing:
        raise DemoError(f'the demo needs {", ".join(missing)}: pip install "kdkernels[train,bench]"')
    for option, make in (
        ("--divergence", lambda: divergences.resolve(settings.divergence)),
        ("--backend", lambda: dispatch.select(settings.backend, settings.device, (torch.float32, torch.float32))),
    ):
        try:
            make()
        except (ValueError, dispatch.BackendUnavailable) as error:
            raise DemoError(f"{option}: {error}") from None
    folder = next(p for p in (out, *out.absolute().parents) if p.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise DemoError(f"--out {out}: {folder} is not a folder that can be written to. Give another folder")


def run(settings: Settings, data: Path | None, out: Path, environment: dict[str, Any], console: Console) -> dict[str, Any]:
    """Trains, measures, prints, and writes ``demo.json`` and ``demo.png`` into ``out``; returns what demo.json holds.

    Raises:
        DemoError: bad input; nothing has been written.
    """
    check(settings, out)
    with _progress(console) as progress:
        record = {"environment": environment, "settings": asdict(settings), **train_models(settings, data, progress)}
        record["loss_comparison"] = _compare_losses(settings, progress)
    from .figures import draw

    figure = draw(record)
    out.mkdir(parents=True, exist_ok=True)
    report.write_atomically(out / "demo.json", (json.dumps(record, indent=1, allow_nan=False) + "\n").encode())
    report.write_atomically(out / "demo.png", figure)
    report.print_tables(record, console)
    console.print(f"Wrote {out / 'demo.png'} and {out / 'demo.json'}", highlight=False, soft_wrap=True)
    return record


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
    )


def train_models(settings: Settings, data: Path | None, progress: Progress) -> dict[str, Any]:
    """Everything in demo.json that does not depend on the clock alone: corpus, models, and the difference between students."""
    from . import train

    text_task = progress.add_task("Text and tokenizer", total=2, note="")
    text = corpus.collect(data, settings.max_bytes, settings.seed)
    progress.update(text_task, advance=1, note=f"{len(text.train) + len(text.held_out)} files")
    tokens = corpus.tokenize(text, settings.vocab_size)
    batches = train.Batches(tokens.train, tokens.held_out, settings)
    progress.update(text_task, advance=1, note=f"{len(tokens.train) + len(tokens.held_out):,} tokens")

    teacher = train.build(settings.teacher, tokens.vocab, settings)
    student_ce = train.build(settings.student, tokens.vocab, settings)
    student_kd = copy.deepcopy(student_ce)
    teacher_batches = batches.training(settings.teacher_steps, _TEACHER_STREAM)
    student_batches = batches.training(settings.steps, _STUDENT_STREAM)
    models: dict[str, dict[str, Any]] = {}
    evaluations: dict[str, train.Evaluation] = {}
    for name, model, loss, its_batches, lr in (
        ("teacher", teacher, train.ce_loss, teacher_batches, settings.teacher_lr),
        ("student_ce", student_ce, train.ce_loss, student_batches, settings.student_lr),
        ("student_kd", student_kd, train.kd_loss(teacher, settings), student_batches, settings.student_lr),
    ):
        task = progress.add_task(LABELS[name], total=len(its_batches), note="")
        initial = train.fingerprint(model)
        curve = train.train(
            model, loss, its_batches, batches.held_out, lr, settings.evaluations,
            lambda held_out, task=task: progress.update(task, advance=1, note=f"held-out loss {held_out:.3f}"),
        )  # fmt: skip
        if name == "teacher":
            teacher.requires_grad_(False)
        else:
            evaluations[name] = train.compare_to_teacher(model, teacher, batches.held_out, settings.backend)
        evaluation = evaluations.get(name)
        models[name] = {
            "label": LABELS[name],
            "parameters": sum(p.numel() for p in model.parameters()),
            "steps": len(its_batches),
            "initial_weights_sha256": initial,
            "final_weights_sha256": train.fingerprint(model),
            "held_out_loss": curve.held_out[-1],
            "kl_to_teacher": evaluation and evaluation.kl_to_teacher.mean().item(),
            "top1_agreement": evaluation and evaluation.top1_agreement.mean().item(),
            "median_step_seconds": statistics.median(curve.step_seconds),
            "curve": asdict(curve),
        }
    difference = evaluations["student_kd"].cross_entropy - evaluations["student_ce"].cross_entropy
    return {
        "corpus": {
            "source": text.source,
            "split": text.split,
            "sha256": text.sha256,
            "train_files": [d.name for d in text.train],
            "held_out_files": [d.name for d in text.held_out],
            "train_tokens": len(tokens.train),
            "held_out_tokens": len(tokens.held_out),
            "held_out_windows_tokens": batches.held_out[:, 1:].numel(),
            "vocab_size": tokens.vocab,
        },
        "models": models,
        "student_difference": {
            "kd_minus_ce": difference.mean().item(),
            "standard_error": (difference.std() / len(difference) ** 0.5).item(),
            "windows": len(difference),
        },
    }


def _compare_losses(settings: Settings, progress: Progress) -> dict[str, dict[str, Any]]:
    from .compare import LOSSES, measure

    task = progress.add_task("Fused and dense loss", total=len(LOSSES), note="each in a fresh process")
    results = {}
    for loss in LOSSES:
        m = measure(loss, settings)
        results[loss] = {**asdict(m), "median_seconds": m.median}
        progress.advance(task)
    return results
