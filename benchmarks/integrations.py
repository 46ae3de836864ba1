"""Step time and peak memory of other trainers' losses with and without the patch, on a CPU, with a vocabulary of 131,072.

``python -m benchmarks.integrations NAME`` runs in the environment of a framework and writes ``results/integrations/NAME.json``.
``python -m benchmarks.integrations`` draws the table in docs/integrations.md from these files. A step is the framework's loss of one batch
and its backward. The rest of the trainer does not run. Each variant runs in a new process.
"""

from __future__ import annotations

import importlib.metadata
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from kdkernels.bench.environment import environment

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "integrations"
PAGE = ROOT / "docs" / "integrations.md"
START, END = "<!-- integrations: figures -->", "<!-- /integrations -->"

VOCAB, BATCH, LENGTH, BUDGET, STEPS = 131_072, 4, 128, 128 << 20, 4
STUDENT, TEACHER = 256, 512
MIB = 1 << 20

Step = Callable[[], Tensor]


def models() -> tuple[Any, Any]:
    """Return a student and a teacher of one layer, float32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    pair = []
    for seed, hidden in enumerate((STUDENT, TEACHER)):
        torch.manual_seed(seed)
        config = LlamaConfig(vocab_size=VOCAB, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=1, num_attention_heads=4)
        pair.append(LlamaForCausalLM(config))
    return pair[0].train(), pair[1].eval().requires_grad_(False)


def batch() -> dict[str, Tensor]:
    """Return a batch whose labels ignore the first quarter, the prompt."""
    ids = torch.randint(VOCAB, (BATCH, LENGTH), generator=torch.Generator().manual_seed(2))
    labels = ids.clone()
    labels[:, : LENGTH // 4] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def trl_gkd(student: Any, teacher: Any) -> tuple[Step, Any]:
    from trl.experimental.gkd import GKDTrainer

    from kdkernels.integrations import trl

    trainer = GKDTrainer.__new__(GKDTrainer)
    trainer.teacher_model, trainer.beta = teacher, 0.5
    return lambda: trainer.compute_loss(student, batch()), trl.patch


def trl_distillation(student: Any, teacher: Any) -> tuple[Step, Any]:
    from trl.trainer import distillation_trainer

    from kdkernels.integrations import trl

    def step() -> Tensor:
        inputs = batch()
        mask = inputs.pop("labels")[:, 1:] != -100
        hidden = student.model(**inputs).last_hidden_state[:, :-1]
        with torch.no_grad():
            teacher_hidden = teacher.model(**inputs).last_hidden_state[:, :-1]
        heads = student.lm_head.weight, teacher.lm_head.weight
        loss: Tensor = distillation_trainer._chunked_divergence_loss(hidden, teacher_hidden, *heads, mask, 0.5)[0]
        return loss

    return step, trl.patch


def modelopt(student: Any, teacher: Any) -> tuple[Step, Any]:
    from modelopt.torch.distill.losses import LogitsDistillationLoss
    from modelopt.torch.distill.plugins.huggingface import KDTrainer

    from kdkernels.integrations import modelopt as patches

    trainer = KDTrainer.__new__(KDTrainer)
    trainer._teacher_model, trainer._teacher_prepared, trainer.use_liger_kernel = teacher, True, False
    trainer._kd_criterion, trainer.is_deepspeed_enabled = LogitsDistillationLoss(temperature=2.0, reduction="none"), False
    return lambda: trainer.compute_loss(student, batch()), patches.patch


def ms_swift(student: Any, teacher: Any) -> tuple[Step, Any]:
    from accelerate import Accelerator
    from swift.rl_core.data import GKDBatch
    from swift.rlhf_trainers.gkd_loss import DataSource
    from swift.rlhf_trainers.gkd_trainer import GKDTrainer

    from kdkernels.integrations import ms_swift as patches

    trainer = GKDTrainer.__new__(GKDTrainer)
    trainer.accelerator, trainer.model, trainer.teacher_model = Accelerator(cpu=True), student, teacher
    trainer.use_teacher_api = trainer._is_self_distillation = trainer._teacher_use_disable_adapter = trainer.use_liger_gkd_loss = False
    trainer.beta, trainer.temperature, trainer.gkd_logits_topk = 0.5, 1.0, None
    trainer.template, trainer.get_use_logits_to_keep = SimpleNamespace(sequence_parallel_size=1), lambda default: False
    trainer.args = SimpleNamespace(sft_alpha=0.0, report_to=[], offload_teacher_model=False, gradient_checkpointing_kwargs=None)

    def step() -> Tensor:
        data = GKDBatch(data_source=DataSource.DATASET)
        loss: Tensor = trainer.compute_loss(student, {"model_inputs": batch(), "teacher_model_inputs": batch(), "gkd_batch": data})
        return loss

    return step, patches.patch


CASES: dict[str, tuple[str, str, Callable[[Any, Any], tuple[Step, Any]]]] = {
    "trl_gkd": ("TRL `GKDTrainer`, JSD", "trl", trl_gkd),
    "trl_distillation": ("TRL `DistillationTrainer`, JSD, chunked", "trl", trl_distillation),
    "modelopt": ("ModelOpt `KDTrainer`, forward KL", "nvidia-modelopt", modelopt),
    "ms_swift": ("ms-swift `GKDTrainer`, JSD", "ms-swift", ms_swift),
}
"""Title, distribution and builder, by name."""


def peak() -> int:
    """Return the peak of resident memory so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(name: str, patched: bool) -> dict[str, Any]:
    """Run the steps of one variant in this process."""
    student, teacher = models()
    step, patch = CASES[name][2](student, teacher)
    with patch(memory_budget=BUDGET) if patched else nullcontext():
        before, seconds, losses = peak(), [], []
        for _ in range(STEPS):
            start = time.perf_counter()
            loss = step()
            loss.backward()
            seconds.append(time.perf_counter() - start)
            losses.append(loss.item())
            student.zero_grad()
    return {"seconds": seconds[1:], "peak_bytes": peak() - before, "loss": losses[0]}


def record(name: str) -> None:
    """Measure both variants, each in a new process, and write the case's file."""
    results = {}
    for variant in ("unpatched", "patched"):
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks.integrations", name, variant]
        printed = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
        results[variant] = json.loads(printed.splitlines()[-1])
    distribution = CASES[name][1]
    case = {"vocab": VOCAB, "tokens": BATCH * LENGTH, "student": STUDENT, "teacher": TEACHER, "memory_budget": BUDGET, "dtype": "float32"}
    versions = {package: importlib.metadata.version(package) for package in (distribution, "transformers", "torch")}
    RESULTS.mkdir(exist_ok=True)
    text = json.dumps({"case": case, "versions": versions, "machine": environment("cpu"), **results}, indent=1)
    (RESULTS / f"{name}.json").write_text(text + "\n", encoding="utf-8")


def table() -> str:
    """Return the table of docs/integrations.md."""
    lines = ["| loss | time of a step | with kdkernels | peak memory | with kdkernels |", "| --- | ---: | ---: | ---: | ---: |"]
    for name, (title, distribution, _) in CASES.items():
        file = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
        cells = [f"{title} ({distribution} {file['versions'][distribution]})"]
        both = [file[variant] for variant in ("unpatched", "patched")]
        cells += [f"{min(variant['seconds']):.2f} s" for variant in both]
        cells += [f"{variant['peak_bytes'] / MIB:,.0f} MiB" for variant in both]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def page(text: str) -> str:
    """Return the page with a new table."""
    head, _, rest = text.partition(START)
    _, _, tail = rest.partition(END)
    return f"{head}{START}\n{table()}\n{END}{tail}"


def main(arguments: list[str]) -> None:
    if not arguments:
        PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    elif len(arguments) == 1:
        record(arguments[0])
    else:
        print(json.dumps(measure(arguments[0], arguments[1] == "patched")))


if __name__ == "__main__":
    main(sys.argv[1:])
