"""Compare models on data: the work of ``kdkernels evaluate``, ``kdkernels sample`` and ``kdkernels chat``."""

from __future__ import annotations

import math
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback

from ..data.agreement import check_templates, check_tokenizers
from ..data.layouts import training_rows
from ..data.rows import check_fits
from ..data.tokenization import load_examples
from ..support.files import digest
from ..support.terminal import shown
from ..teachers.jobs import device_of
from ..teachers.loading import load
from ..teachers.local import generate, prompt_ids
from ..teachers.replies import seed_of
from ..trainer import DistillationArguments, DistillationTrainer

__all__ = ["Evaluation", "Sampling", "chat", "evaluate", "model_of", "sample"]

FIGURES = {"divergence": "divergence", "cross_entropy": "cross-entropy", "top1_agreement": "same top token"}
"""Metrics of a student on a data set, and their names in a table."""


@dataclass(frozen=True)
class Evaluation:
    """Options of ``kdkernels evaluate``. Its help describes them."""

    students: Sequence[str]
    teachers: Sequence[str]
    data: Sequence[str]
    arguments: dict[str, Any]
    """Arguments of DistillationArguments."""
    student_dtype: str = "float32"
    teacher_dtype: str = "auto"
    device: str = "auto"


def evaluate(options: Evaluation) -> list[dict[str, Any]]:
    """Return one row per student and data set, with means over all scored tokens, computed with the training's loss.

    Raises:
        ValueError: models do not match, rows cannot be read, or metrics are not finite.
    """
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    device = device_of(options.device)
    check_fits(options.data)
    roles = [*(("student", path) for path in options.students), *(("teacher", path) for path in options.teachers)]
    tokenizer, *others = [load(AutoTokenizer, role, path) for role, path in roles]
    for other in others:
        check_tokenizers(tokenizer, other)
        check_templates(tokenizer, other, list(options.data))
    teachers = [model_of("teacher", path, options.teacher_dtype, "cpu") for path in options.teachers]
    rows: list[dict[str, Any]] = []
    for student in options.students:
        model = model_of("student", student, options.student_dtype, device)
        with tempfile.TemporaryDirectory() as folder:
            weights = {"kd_weight": 1.0, "ce_weight": 0.0} if teachers else {"kd_weight": 0.0, "ce_weight": 1.0}
            fixed = {"output_dir": folder, "use_cpu": device == "cpu", "report_to": "none", "disable_tqdm": True}
            args = DistillationArguments(**{**options.arguments, **weights, **fixed, "dataloader_pin_memory": device != "cpu"})
            args._n_gpu = min(args.n_gpu, 1)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*trainable weights are")  # nothing is trained
                trainer = DistillationTrainer(model, teachers or None, args, processing_class=tokenizer)
            trainer.remove_callback(PrinterCallback)
            for path in options.data:
                metrics = trainer.evaluate([path])
                figures = {name: metrics[f"eval_{name}"] for name in FIGURES if f"eval_{name}" in metrics}
                if bad := [name for name, value in figures.items() if not math.isfinite(value)]:
                    raise ValueError(
                        f"--student {student} on {path}: {FIGURES[bad[0]]} is {figures[bad[0]]}: look at the weights and dtypes"
                    )
                rows.append({"data": path, "student": student, **figures, "tokens": int(metrics["eval_tokens"])})
        del model, trainer
    return sorted(rows, key=lambda row: options.data.index(row["data"]))


def model_of(role: str, path: str, dtype: str, device: str) -> Any:
    """Load a model in eval mode on a device."""
    return load(AutoModelForCausalLM, role, path, dtype=dtype if dtype == "auto" else getattr(torch, dtype)).to(device).eval()


@dataclass(frozen=True)
class Sampling:
    """Options of text generation."""

    max_new_tokens: int
    temperature: float = 0.0
    seed: int = 0
    dtype: str = "auto"
    device: str = "auto"

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"--max-new-tokens {self.max_new_tokens}: it must be an integer >= 1")
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"--temperature {self.temperature:g}: it must be finite and >= 0; 0 is greedy")


def sample(
    roles: Sequence[tuple[str, str]], data: Sequence[str], rows: int, how: Sampling, columns: str | None = None
) -> list[dict[str, Any]]:
    """Return prompt, response, and each model's own response for the first ``rows`` rows of each data set.

    Args:
        roles: option name and path of each model, in order. Teachers read the teacher's view of a row.
    """
    if rows < 1:
        raise ValueError(f"--rows {rows}: it must be an integer >= 1")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    device = device_of(how.device)
    raw_rows = [dict(row.fields) for path in data for row in islice(training_rows([path], columns), rows)]
    made: list[dict[str, Any]] = [{} for _ in raw_rows]
    for role, path in roles:
        tokenizer = load(AutoTokenizer, role, path)
        examples = load_examples(raw_rows, tokenizer, prompts=True)
        model = model_of(role, path, how.dtype, device)
        for row, example, fields in zip(made, examples, raw_rows, strict=True):
            view = role == "teacher"
            ids = example.teacher_ids if view else example.student_ids
            prompt = ids[: example.prompts()[view]]
            row.setdefault("prompt", tokenizer.decode(prompt, skip_special_tokens=True))
            if any(name in fields for name in ("response", "completion", "messages", "text")):
                row.setdefault("response", tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True))
            row.setdefault("texts", []).append({"model": path, "role": role, "text": _write(model, tokenizer, prompt, how)})
        del model
    return made


def _write(model: Any, tokenizer: Any, prompt: Sequence[int], how: Sampling, streamer: Any = None) -> str:
    seed = seed_of(how.seed, digest(list(prompt)))
    written = generate(
        model, tokenizer, [prompt], [seed], max_tokens=how.max_new_tokens, temperature=how.temperature, streamer=streamer
    )  # fmt: skip
    return written[0].text


def chat(student: str, system: str, how: Sampling, turns: Iterator[str], write: Callable[[str], object]) -> None:
    """Answer each of ``turns`` in one conversation. ``/reset`` clears the conversation, ``/exit`` ends it.

    Args:
        write: receives parts of the answers as they are generated, with terminal control characters escaped.
    """
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    device = device_of(how.device)
    tokenizer = load(AutoTokenizer, "student", student)
    model = model_of("student", student, how.dtype, device)
    begin = [{"role": "system", "content": system}] if system else []
    messages = list(begin)
    for turn in turns:
        if turn.strip() == "/exit":
            return
        if turn.strip() == "/reset":
            messages = list(begin)
        elif turn.strip():
            messages.append({"role": "user", "content": turn})
            prompt = prompt_ids(tokenizer, messages)
            text = _write(model, tokenizer, prompt, how, _streamer(tokenizer, write))
            messages.append({"role": "assistant", "content": text})


def _streamer(tokenizer: Any, write: Callable[[str], object]) -> Any:
    class Streamer(transformers.TextStreamer):  # type: ignore[misc]
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            write("\n".join(map(shown, text.split("\n"))) + ("\n" if stream_end else ""))

    return Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
