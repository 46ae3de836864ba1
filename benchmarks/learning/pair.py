"""One teacher, one student, one narrow task, several losses: the table of docs/guide.md.

The teacher is SmolLM2-135M-Instruct, the student some of its layers, the data the teacher's answers (``sentences.py``, ``guide.py``). All
students see the same rows in the same order for a seed. Held-out figures are taken along each run, with the process's CPU time, so that
runs can be compared at equal steps and at equal time.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback, logging

from kdkernels.data.example import Example
from kdkernels.data.tokenization import load_examples
from kdkernels.teachers.cache import CachedTeacher, open_cache
from kdkernels.trainer import DistillationArguments, DistillationTrainer

from .comparison import CE, CPU, EXACT, KL
from .sentences import make_student, spread

LAYERS, STEPS, ROWS, RATE = 6, 128, 4, 5e-4
"""Layers of the student; optimizer steps, rows per step and learning rate of a run."""
RATES, TEMPERATURES = (1.25e-4, 2.5e-4, 5e-4, 1e-3, 2e-3), (1.0, 2.0, 4.0)
"""Values of the sweeps."""
LOOK = 64
"""Steps of the runs that choose the number of layers."""
EVERY = 32
"""Steps between two held-out measurements."""
WARM = STEPS // 2
"""Steps of forward KL of a warm start."""

BASE = "forward KL"
"""The method of the sweeps."""


@dataclass(frozen=True)
class Method:
    """A way to train a student.

    Args:
        options: of DistillationArguments, beside the common ones.
        live: the teacher runs beside the student; else its hidden states come from a cache, where the loss needs them.
        warm: these steps of forward KL come first.
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    live: bool = False
    warm: int = 0


def methods(layers: int = LAYERS, teacher_layers: int = 30) -> dict[str, Method]:
    """Return the methods by name."""
    origins = ",".join(f"{index}:{origin}" for index, origin in enumerate(spread(layers, teacher_layers)))
    features = {"feature_weight": 1.0, "feature_loss": "cosine", "feature_layers": origins}
    return {
        "cross-entropy": Method({"kd_weight": 0.0, "ce_weight": 1.0}),
        BASE: Method(),
        "T = 2 with labels": Method({"temperature": 2.0, "kd_weight": 0.5, "ce_weight": 0.5}),
        "JSD": Method({"divergence": "jsd"}),
        "skew KL": Method({"divergence": "skew_kl"}),
        "JSD, warm start": Method({"divergence": "jsd"}, warm=WARM),
        "skew KL, warm start": Method({"divergence": "skew_kl"}, warm=WARM),
        "forward KL and features": Method(features, live=True),
        "half on-policy, warm start": Method({"on_policy_fraction": 0.5, "max_new_tokens": 16}, live=True, warm=WARM),
    }


@dataclass(frozen=True)
class Run:
    """A run of a sweep, with one seed."""

    student: str = "student"
    method: Method = field(default_factory=Method)
    steps: int = STEPS
    options: Mapping[str, Any] = field(default_factory=dict)


def sweeps() -> dict[str, dict[str, Run]]:
    """Return the runs of each sweep by the value that they try. All learn by forward KL, but for the first look at the number of layers."""
    labels = methods()["cross-entropy"]
    return {
        "learning rate": {f"{rate:g}": Run(options={"learning_rate": rate} if rate != RATE else {}) for rate in RATES},
        "temperature": {f"{value:g}": Run(method=Method({"temperature": value} if value != 1 else {})) for value in TEMPERATURES},
        "layers": {
            "4 layers, learning rate 1e-3": Run("student-4", labels, LOOK, {"learning_rate": 1e-3}),
            "6 layers, learning rate 5e-4": Run("student", labels, LOOK),
        },
        "steps": {f"{steps}": Run(steps=steps) for steps in (STEPS // 4, STEPS // 2, STEPS, 2 * STEPS)},
    }


def planned(seeds: int) -> Iterator[tuple[str, Run, int]]:
    """Yield file name, run and seed: each method with each seed, then the sweeps with one."""
    for seed in range(seeds):
        for name, method in methods().items():
            yield name_of(name, seed), Run(method=method), seed
    for sweep, runs in sweeps().items():
        for value, run in runs.items():
            yield name_of(sweep, value, run), run, 0


def name_of(what: str, value: object, run: Run | None = None) -> str:
    """Return the file name of a run: of a method and a seed, or of a sweep and a value."""
    return f"{BASE} 0.json" if run == Run() else f"{what} {value}.json"


class HeldOut:
    """Held-out rows, with the teacher's log-probabilities of their scored tokens."""

    def __init__(self, examples: Sequence[Example], teacher: Any) -> None:
        self.examples = examples
        self.teacher = torch.cat([self.logits(teacher, part, "teacher").log_softmax(-1) for part in self.parts()])

    def parts(self) -> list[Sequence[Example]]:
        """Return the examples a few at a time."""
        return [self.examples[start : start + 16] for start in range(0, len(self.examples), 16)]

    @staticmethod
    @torch.no_grad()
    def logits(model: Any, examples: Sequence[Example], view: Literal["student", "teacher"]) -> Tensor:
        """Return the logits ``[tokens, V]`` of all scored tokens."""
        rows = [list(getattr(example, f"{view}_ids")) for example in examples]
        ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
        for row, tokens in zip(ids, rows, strict=True):
            row[: len(tokens)] = torch.tensor(tokens)
        states = model.model(input_ids=ids).last_hidden_state  # causal: padding on the right changes nothing before it
        scored = [list(getattr(example, f"{view}_scored")) for example in examples]
        hidden = torch.cat([row[places] for row, places in zip(states, scored, strict=True)])
        return F.linear(hidden, model.get_output_embeddings().weight)

    @torch.no_grad()
    def measure(self, student: Any) -> dict[str, float]:
        """Return the share of rows that the student answers as the teacher does, token by token, and means over tokens in nats.

        Greedy decoding writes the teacher's answer exactly where each of its tokens is the student's likeliest after those before it.
        """
        training = student.training
        student.eval()
        exact, tokens, sums = 0, 0, torch.zeros(2, dtype=torch.float64)
        for examples in self.parts():
            labels = torch.tensor([e.student_ids[t + 1] for e in examples for t in e.student_scored])
            q = self.logits(student, examples, "student").log_softmax(-1)
            p = self.teacher[tokens : tokens + len(labels)]
            sums += torch.stack([F.nll_loss(q, labels, reduction="sum"), F.kl_div(q, p, reduction="sum", log_target=True)]).double()
            right = torch.split(q.argmax(-1) == labels, [len(e.student_scored) for e in examples])
            exact += sum(bool(row.all()) for row in right)
            tokens += len(labels)
        student.train(training)
        means = sums / tokens
        return {EXACT: round(100 * exact / len(self.examples), 2), CE: round(float(means[0]), 4), KL: round(float(means[1]), 4)}


class Curve(TrainerCallback):  # type: ignore[misc]
    """Measures the student as it learns, and does not count the time for it."""

    def __init__(self, held_out: HeldOut) -> None:
        self.held_out, self.points = held_out, [{"step": 0.0, CPU: 0.0}]
        self.spent, self.steps, self.begun = 0.0, 0, 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps, self.begun = int(self.points[-1]["step"]), time.process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step = self.steps + state.global_step
        if step % EVERY == 0:
            self.spent += time.process_time() - self.begun
            self.points.append({"step": float(step), CPU: round(self.spent, 2), **self.held_out.measure(kwargs["model"])})
            self.begun = time.process_time()


class Pair:
    """Teacher, data and caches in one folder, as ``guide.py`` makes them."""

    def __init__(self, folder: Path) -> None:
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        self.folder = folder
        self.tokenizer = AutoTokenizer.from_pretrained(folder / "teacher")
        self.teacher = AutoModelForCausalLM.from_pretrained(folder / "teacher", dtype=torch.float32).requires_grad_(False).eval()
        self.untrained: dict[str, dict[str, float]] = {}  # held-out figures by student
        self.held_out = HeldOut(load_examples([str(folder / "held-out.jsonl")], self.tokenizer), self.teacher)

    def train(self, run: Run, seed: int) -> list[dict[str, float]]:
        """Return the curve of one run: step, CPU seconds and held-out figures, the untrained student first."""
        method, options = run.method, dict(run.options)
        model = AutoModelForCausalLM.from_pretrained(self.student(run.student), dtype=torch.float32)
        curve = Curve(self.held_out)
        if run.student not in self.untrained:
            self.untrained[run.student] = self.held_out.measure(model)
        curve.points[0] |= self.untrained[run.student]
        if method.warm:
            self._phase(model, Method(), curve, seed, method.warm, options)
        self._phase(model, method, curve, seed + 1000 * bool(method.warm), run.steps - method.warm, options)
        return curve.points

    @cached_property
    def cache(self) -> CachedTeacher:
        """The teacher's hidden states of all rows."""
        return open_cache(str(self.folder / "hidden"), self.tokenizer)

    def student(self, name: str) -> Path:
        """Return the folder of a student; ``student-N``, one of N layers, is made where it is missing."""
        folder = self.folder / name
        if not folder.exists():
            make_student(self.folder / "teacher", folder, int(name.rpartition("-")[2]))
        return folder

    def _phase(self, model: Any, method: Method, curve: Curve, seed: int, steps: int, options: dict[str, Any]) -> None:
        common = {
            "max_steps": steps, "per_device_train_batch_size": ROWS, "learning_rate": RATE, "lr_scheduler_type": "constant_with_warmup",
            "warmup_steps": 4, "seed": seed, "save_strategy": "no", "report_to": [], "logging_strategy": "no", "use_cpu": True,
            "disable_tqdm": True, "dataloader_pin_memory": False,
        }  # fmt: skip
        teacher = self.teacher if method.live else None if method.options.get("kd_weight") == 0 else self.cache
        with tempfile.TemporaryDirectory() as scratch:
            trainer = DistillationTrainer(
                model=model, teacher=teacher,
                args=DistillationArguments(output_dir=scratch, **{**common, **method.options, **options}),
                train_dataset=[str(self.folder / "train.jsonl")], processing_class=self.tokenizer, callbacks=[curve],
            )  # fmt: skip
            trainer.remove_callback(PrinterCallback)
            trainer.train()


def read(file: Path) -> list[dict[str, float]]:
    """Return a curve."""
    curve: list[dict[str, float]] = json.loads(file.read_text(encoding="utf-8"))
    return curve


def settings() -> dict[str, Any]:
    """Return what all runs of the table share."""
    return {"layers": LAYERS, "steps": STEPS, "rows a step": ROWS, "learning rate": RATE, "warm steps": WARM, "threads": 1}


def collect(folder: Path, seeds: int) -> dict[str, Any]:
    """Return the curves of the runs that are done: ``curves``, by seed and method, and ``sweeps``, by what is tried and its value."""
    curves = []
    for seed in range(seeds):
        files = {name: folder / name_of(name, seed) for name in methods()}
        curves.append({name: read(file) for name, file in files.items() if file.exists()})
    tried = {
        sweep: {value: read(folder / name) for value, run in runs.items() if (folder / (name := name_of(sweep, value, run))).exists()}
        for sweep, runs in sweeps().items()
    }
    return {"curves": [run for run in curves if run], "sweeps": tried}
