"""What a run leaves behind: tables on the terminal, files in a folder."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

__all__ = ["print_tables", "write_atomically"]


def print_tables(record: dict[str, Any], console: Console) -> None:
    """The results of a demo.json, as measured."""
    console.print(_models(record))
    difference = record["student_difference"]
    console.print(
        f"Held-out loss, CE + KD minus CE only: {difference['kd_minus_ce']:+.4f} ± {difference['standard_error']:.4f} nats/token "
        f"(standard error over {difference['windows']} held-out windows; one training seed)\n",
        highlight=False,
    )
    console.print(_losses(record))
    fused, dense = (record["loss_comparison"][name] for name in ("fused", "dense"))
    ratios = [
        f"{fused[key] / dense[key]:.2f} x the {what}"
        for key, what in (("median_seconds", "time"), ("peak_bytes", "peak memory"))
        if fused[key] is not None and dense[key]
    ]
    if ratios:
        console.print(f"Fused takes {' and '.join(ratios)} of dense.\n", highlight=False)


def _models(record: dict[str, Any]) -> Table:
    table = Table(title=f"Held out: {record['corpus']['held_out_windows_tokens']:,} tokens", title_justify="left")
    table.add_column("Model")
    for column in ("Parameters", "Steps", "Loss\n(nats/token)", "KL to teacher\n(nats/token)", "Top-1 as teacher", "Time/step"):
        table.add_column(column, justify="right")
    for model in record["models"].values():
        kl, top1 = model["kl_to_teacher"], model["top1_agreement"]
        table.add_row(
            model["label"],
            f"{model['parameters'] / 1e6:.2f} M",
            str(model["steps"]),
            f"{model['held_out_loss']:.4f}",
            "" if kl is None else f"{kl:.4f}",
            "" if top1 is None else f"{top1:.1%}",
            f"{1e3 * model['median_step_seconds']:.0f} ms",
        )
    return table


def _losses(record: dict[str, Any]) -> Table:
    shape = record["settings"]["loss_shape"]
    table = Table(
        title=f"One loss, forward + backward: {shape['rows']:,} tokens, vocabulary {shape['vocab']:,}, hidden sizes "
        f"{shape['student_hidden']} and {shape['teacher_hidden']}, forward KL and cross-entropy, float32",
        title_justify="left",
    )
    table.add_column("Loss")
    for column in ("Step time, median (s)", "Peak memory (MiB)", "Value"):
        table.add_column(column, justify="right")
    for name, m in record["loss_comparison"].items():
        label = f"fused ({m['backend']})" if m["backend"] else f"{name} (eager)" if name == "dense" else name
        if m["error"]:
            table.add_row(label, "failed", "", m["error"])
            continue
        peak = "not measured" if m["peak_bytes"] is None else f"{m['peak_bytes'] / 2**20:,.0f}"
        table.add_row(label, f"{m['median_seconds']:.3f}", peak, f"{m['value']:.6f}")
    return table


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a whole file or none: a temporary file in the same folder, then a rename."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        os.chmod(temporary, 0o644)  # mkstemp makes it readable by its owner alone
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
