"""What a run of ``kdkernels train`` has come to: held-out losses before and after, the log, a figure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from ..files import Output
from .output import FIGURE

__all__ = ["figure_of", "finite", "show", "training_log"]

SHOWN = {
    "eval_loss": "loss", "eval_divergence": "divergence", "eval_cross_entropy": "cross-entropy", "eval_feature_loss": "feature loss",
    "eval_top1_agreement": "same top token",
}  # fmt: skip


def finite(metrics: dict[str, float]) -> dict[str, Any]:
    """JSON has no infinities."""
    return {
        name: value if math.isfinite(value) else str(value) for name, value in metrics.items() if name in SHOWN or name == "eval_tokens"
    }


def training_log(history: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """First and last of the logged training losses; None if there was none."""
    logs = [{"step": entry["step"], "loss": entry["loss"]} for entry in history if "loss" in entry]
    return {"first": logs[0], "last": logs[-1]} if logs else None


def show(summary: dict[str, Any], console: Console) -> None:
    """Prints what ``summary.json`` holds."""
    before, after, log = summary["before"], summary["after"], summary["log"]
    console.print(f"Trained {summary['steps']:,} steps.")
    if before is not None and after is not None:
        table = Table("held-out data", "before", "after", box=None)
        for name, label in SHOWN.items():
            if name in before and name in after:
                table.add_row(label, *(f"{v:.4f}" if isinstance(v, float) else str(v) for v in (before[name], after[name])))
        console.print(table)
        console.print(f"Per token, over {after['eval_tokens']:,.0f} held-out tokens.")
    else:
        ends = [] if log is None else [f"{log[which]['loss']:.4f} at step {log[which]['step']}" for which in ("first", "last")]
        console.print("No held-out loss: no --eval-data was given." + (f" Training loss {', '.join(ends)}." if ends else ""))
    for name in ("model", "checkpoint", "figure"):
        if summary[name]:
            console.print(f"{name}: {summary[name]}", soft_wrap=True)


def figure_of(output: Output, history: Sequence[dict[str, Any]], before: Any, after: Any) -> str | None:
    """Losses over steps, if matplotlib is there."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    training = [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
    held_out = {entry["step"]: entry["eval_loss"] for entry in history if "eval_loss" in entry}
    if before is not None and isinstance(before.get("eval_loss"), float):
        held_out = {0: before["eval_loss"], **held_out}
    if training:
        axes.plot(*zip(*training, strict=True), label="training")
    if held_out:
        axes.plot(*zip(*sorted(held_out.items()), strict=True), "o-", label="held-out")
    axes.set(xlabel="step", ylabel="loss per token")
    axes.grid(alpha=0.3)
    if training or held_out:
        axes.legend()
    return str(output.write(FIGURE, lambda temporary: figure.savefig(temporary, format="png", dpi=120)))
