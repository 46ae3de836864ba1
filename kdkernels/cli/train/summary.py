"""The summary of ``kdkernels train``: held-out losses before and after, training losses, and a figure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ...support.errors import counted
from ...support.files import Output
from ...trainer import DistillationArguments
from .callbacks import number
from .output import FIGURE

__all__ = ["figure_of", "finite", "name_of_loss", "show", "training_log"]

SHOWN = {
    "eval_loss": "loss", "eval_divergence": "divergence", "eval_cross_entropy": "cross-entropy", "eval_feature_loss": "feature loss",
    "eval_top1_agreement": "same top token",
}  # fmt: skip


def finite(metrics: dict[str, float]) -> dict[str, Any]:
    """Return the metrics that a summary shows, with NaN and infinity as text, because JSON does not have them."""
    return {name: number(value) for name, value in metrics.items() if name in SHOWN or name == "eval_tokens"}


def training_log(history: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Return the first and the last logged training loss; None without logs."""
    logs = [{"step": entry["step"], "loss": number(entry["loss"])} for entry in history if "loss" in entry]
    return {"first": logs[0], "last": logs[-1]} if logs else None


def show(summary: dict[str, Any], console: Console) -> None:
    """Print the summary."""
    before, after, log = summary["before"], summary["after"], summary["log"]
    console.print(f"Trained {counted(summary['steps'], 'step')}.")
    if summary["best"] is not None:
        best = summary["best"]
        console.print(f"The model is the best by {best['metric']}, {best['value']:.4f}: {Path(best['checkpoint']).name}.")
    if before is not None and after is not None:
        table = Table("held-out data", "before", "after", box=None)
        for name, label in SHOWN.items():
            if name in before and name in after:
                table.add_row(label, *(f"{v:.4f}" if isinstance(v, float) else str(v) for v in (before[name], after[name])))
        console.print(table)
        console.print(f"Per token, over {counted(int(after['eval_tokens']), 'held-out token')}.")
    else:
        ends = [] if log is None else [f"{float(log[which]['loss']):.4f} at step {log[which]['step']}" for which in ("first", "last")]
        console.print(
            "No held-out loss: neither --eval-data nor --eval-fraction was given." + (f" Training loss {', '.join(ends)}." if ends else "")
        )
    for name in ("model", "checkpoint", "figure"):
        if summary[name]:
            console.print(f"{name}: {summary[name]}", soft_wrap=True)


def name_of_loss(args: DistillationArguments) -> str:
    """Return the terms of the training loss with their weights, such as ``1 x jsd(beta=0.3) at T = 2 + 0.5 x cross-entropy``."""
    terms = (
        (args.kd_weight, f"{args.divergence} at T = {args.temperature:g}"),
        (args.ce_weight, "cross-entropy"),
        (args.feature_weight, "feature loss"),
    )
    changes = "" if args.ce_weight_last is None else f", cross-entropy ends at {args.ce_weight_last:g}"
    return " + ".join(f"{weight:g} x {term}" for weight, term in terms if weight) + changes


def figure_of(
    output: Output, history: Sequence[dict[str, Any]], before: Any, after: Any, not_finite: int | None = None, loss: str = ""
) -> str | None:
    """Plot losses over steps, with a mark at the step ``not_finite``. Return None without matplotlib. ``loss`` is the title."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
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
    if not_finite is not None:
        axes.axvline(not_finite, color="tab:red", label=f"not finite at step {not_finite}")
    axes.set(xlabel="step", ylabel="loss per token")
    axes.set_title(loss, fontsize=10, loc="left", wrap=True)
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1))  # steps are whole
    axes.grid(alpha=0.3)
    if training or held_out or not_finite is not None:
        axes.legend()
    return str(output.write(FIGURE, lambda temporary: figure.savefig(temporary, format="png", dpi=120)))
