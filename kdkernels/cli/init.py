"""``kdkernels init``: a commented config for ``kdkernels train``."""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ..support.terminal import failing, say

__all__ = ["init", "register"]

EPILOG = """
Examples:

- `kdkernels init` - asks for student, teacher and data, and writes run.yaml

- `kdkernels init --student small/ --teacher big/ --data rows.jsonl --memory 24 --out run.yaml` - asks nothing
"""

FULL, LORA, LORA_CACHED = "all weights", "a LoRA", "a LoRA, from a cache"
USABLE = 0.8
"""Share of the memory for weights, gradients and optimizer states. Activations and loss buffers use the rest."""


def register(app: typer.Typer) -> None:
    """Add the command to ``app``."""
    app.command(epilog=EPILOG)(init)


def init(
    student: Annotated[str, typer.Option(help="Folder or hub id of the model to train, or of an adapter.")] = "",
    teacher: Annotated[str, typer.Option(help="Folder or hub id of the model to learn from.")] = "",
    data: Annotated[list[str] | None, typer.Option(help="Rows to train on, as for `kdkernels train`. May be repeated.")] = None,
    eval_data: Annotated[list[str] | None, typer.Option(help="Held-out rows. May be repeated.")] = None,
    memory: Annotated[
        float | None, typer.Option(help="Memory for training, in GiB. Default: that of the GPU, else of this machine.")
    ] = None,
    output_dir: Annotated[str, typer.Option(help="Folder of the run.")] = "out",
    out: Annotated[Path, typer.Option(help="The config to write: a new file that ends in .yaml.")] = Path("run.yaml"),
) -> None:
    """Write a commented config for `kdkernels train`, from a few questions or from these options.

    The sizes of the models decide whether all weights or a LoRA are trained. Only configs are read, not weights.
    """
    with failing():
        if out.suffix not in (".yaml", ".yml"):
            raise ValueError(f"--out {out}: the name of a config ends in .yaml")
        if os.path.lexists(out):
            raise ValueError(f"--out {out} already exists: choose another name, or move it away")
        answers = {"student": student, "teacher": teacher, "data": data or []}
        for name, question in (("student", "Model to train"), ("teacher", "Model to learn from"), ("data", "File of rows to train on")):
            if not answers[name]:
                answer = _ask(name, question)
                answers[name] = [answer] if name == "data" else answer
        if memory is not None and not 0 < memory < float("inf"):
            raise ValueError(f"--memory {memory:g}: it must be finite and > 0, in GiB")
        from ..support.files import write_whole

        sizes = _sizes(str(answers["student"]), str(answers["teacher"]))
        text = config_text({**answers, "eval_data": eval_data or [], "output_dir": output_dir}, *sizes, memory or _memory())
        write_whole(out, lambda temporary: temporary.write_text(text, encoding="utf-8"))
        say(f"{out}: written. Look at it, then: kdkernels train --config {out} --plan")


def _ask(name: str, question: str) -> str:
    if not sys.stdin.isatty():
        raise ValueError(f"--{name} is missing (on a terminal, kdkernels init asks for it)")
    return str(typer.prompt(f"{question} (--{name})"))


def _sizes(student: str, teacher: str) -> tuple[int, int]:
    """Return the number of parameters of the student, and the bytes of the teacher in its saved dtype."""
    import torch

    from ..teachers.loading import skeleton_of

    student_model, teacher_model = skeleton_of("student", student), skeleton_of("teacher", teacher)
    dtype = getattr(teacher_model.config, "dtype", None) or torch.float32
    return sum(p.numel() for p in student_model.parameters()), sum(p.numel() for p in teacher_model.parameters()) * dtype.itemsize


def _memory() -> float:
    """Return the GiB of torch's current GPU, or of this machine without a GPU."""
    import torch

    from ..support.memory import total_bytes

    device = total_bytes(torch.device("cuda", 0)) if torch.cuda.is_available() else None
    return (device or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")) / 2**30


def choose(parameters: int, teacher_bytes: int, memory: float) -> str | None:
    """Return how the student can be trained in this memory; None if it does not fit.

    Training all weights takes 16 bytes per parameter: float32 weight, gradient and two Adam states. A LoRA takes 2 bytes per frozen
    bfloat16 parameter, and trains about a hundredth of the number of parameters.
    """
    usable = memory * USABLE * 2**30
    adapter = parameters * 2 + parameters * 16 / 100
    if parameters * 16 + teacher_bytes <= usable:
        return FULL
    if adapter + teacher_bytes <= usable:
        return LORA
    return LORA_CACHED if adapter <= usable else None


def config_text(answers: dict[str, Any], parameters: int, teacher_bytes: int, memory: float) -> str:
    """Return the text of a config.

    Raises:
        ValueError: the student does not fit, not even with a LoRA.
    """
    import yaml

    way = choose(parameters, teacher_bytes, memory)
    gib = f"{memory:,.1f} GiB"
    if way is None:
        raise ValueError(
            f"--student {answers['student']}: {parameters / 1e6:,.1f} M parameters do not fit in {gib} as bfloat16: take a smaller one, "
            "or give the --memory of the device that it will be trained on"
        )

    def line(name: str, value: Any, comment: str = "") -> str:
        text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=math.inf).removesuffix("...\n").rstrip()
        return f"{name}: {text}" + (f"  # {comment}" if comment else "")

    teacher_size = f"{teacher_bytes / 2**30:,.2f} GiB as it is saved"
    parts = [
        "# For `kdkernels train --config THIS FILE`; `--plan` shows steps and memory first. Options are in docs/trainer.md.",
        "",
        line("student", answers["student"], f"{parameters / 1e6:,.1f} M parameters"),
    ]
    if way == LORA_CACHED:
        parts += [
            f"# The teacher ({teacher_size}) does not fit beside the student in {gib}. Make a cache first, and train from it:",
            f"# kdkernels cache --teacher {answers['teacher']} --data ... --out cache",
            line("cache", "cache"),
        ]
    else:
        parts.append(line("teacher", answers["teacher"], teacher_size))
    parts.append(line("data", answers["data"]))
    held_out = answers["eval_data"]
    parts += [line("eval-data", held_out)] if held_out else ["# eval-data: held-out.jsonl  # rows that are evaluated before and after"]
    parts += [line("output-dir", answers["output_dir"], "checkpoints, the trained model, log and summary"), ""]
    parts += [
        line("divergence", "forward_kl", "the best of those compared from random weights: docs/learning.md"),
        line("temperature", 1.0, "above 1, unlikely tokens count more"),
        line("ce-weight", 0.0, "weight of the cross-entropy of the data's own tokens"),
        "",
        line("num-train-epochs", 3),
        line("per-device-train-batch-size", 8),
        line("learning-rate", 5e-5 if way == FULL else 2e-4, "a usual start, not measured on your data"),
        line("lr-scheduler-type", "cosine"),
        line("warmup-steps", 0.03, "below 1: a share of all steps"),
        line("logging-steps", 10),
        line("save-total-limit", 2, "checkpoints that are kept"),
    ]
    if way == FULL:
        parts += ["", f"# All weights are trained: {parameters * 16 / 2**30:,.2f} GiB of weights, gradients and Adam states fit in {gib}."]
        parts += ["# lora-r: 16  # a LoRA would take less"]
    else:
        parts += ["", f"# A LoRA: all weights would take {parameters * 16 / 2**30:,.2f} GiB of {gib}."]
        parts += [line("lora-r", 16), line("student-dtype", "bfloat16", "of the frozen weights; the LoRA is float32")]
        parts += [line("gradient-checkpointing", True, "activations are computed twice, and not kept")]
    return "\n".join(parts) + "\n"
