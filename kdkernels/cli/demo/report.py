"""Write the output of a run: tables on the terminal, files in a folder."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from .settings import DemoError

__all__ = ["print_tables", "save"]


def print_tables(record: dict[str, Any], console: Console) -> None:
    """Print the results of a demo.json."""
    console.print(_models(record))
    difference = record["student_difference"]
    console.print(
        f"Held-out loss, CE + KD minus CE only: {difference['kd_minus_ce']:+.4f} ± {difference['standard_error']:.4f} nats per token\n"
        f"(standard error over {difference['windows']} held-out windows; one training seed). "
        "A step with KD includes the teacher's forward pass.\n",
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
    corpus = record["corpus"]
    table = Table(
        title=f"{corpus['source']}, {corpus['held_out_windows_tokens']:,} held-out tokens; loss and KL in nats per token, T = 1",
        title_justify="left",
    )
    table.add_column("Model", no_wrap=True)
    for column in ("Params", "Steps", "Held-out\nloss", "KL to\nteacher", "Top-1 as\nteacher", "Time per\nstep"):
        table.add_column(column, justify="right", no_wrap=True)
    for model in record["models"].values():
        table.add_row(
            model["label"],
            f"{model['parameters'] / 1e6:.2f} M",
            str(model["steps"]),
            f"{model['held_out_loss']:.4f}",
            f"{model['kl_to_teacher']:.4f}" if "kl_to_teacher" in model else "",
            f"{model['top1_agreement']:.1%}" if "top1_agreement" in model else "",
            f"{1e3 * model['median_step_seconds']:.0f} ms",
        )
    return table


def _losses(record: dict[str, Any]) -> Table:
    shape = record["settings"]["loss_shape"]
    table = Table(
        title=f"One loss, forward + backward: {shape['rows']:,} tokens, vocabulary {shape['vocab']:,}, hidden sizes "
        f"{shape['student_hidden']} and {shape['teacher_hidden']}, forward KL + cross-entropy, float32, fresh processes",
        title_justify="left",
    )
    table.add_column("Loss", no_wrap=True)
    for column in ("Step time\n(median)", "Peak memory\nbeyond inputs", "Value"):
        table.add_column(column, justify="right")
    for name, m in record["loss_comparison"].items():
        label = f"{name} ({m['backend'] or 'eager'})" if not m["error"] else name
        if m["error"]:
            table.add_row(label, "failed", "failed", m["error"])
            continue
        peak = "not measured" if m["peak_bytes"] is None else f"{m['peak_bytes'] / 2**20:,.0f} MiB"
        table.add_row(label, f"{m['median_seconds']:.3f} s", peak, f"{m['value']:.6f}")
    return table


def save(folder: Path, files: dict[str, bytes]) -> None:
    """Write all files, or none if the disk is full: they are first written to a temporary folder. Creates ``folder``.

    Raises:
        DemoError: the folder cannot be written to. Existing files are unchanged.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".unfinished-") as unfinished:
            for name, content in files.items():
                Path(unfinished, name).write_bytes(content)
            for name in files:
                os.replace(Path(unfinished, name), folder / name)
    except OSError as error:
        raise DemoError(f"--out {folder}: {error.strerror} ({Path(error.filename or folder).name}). Give another folder") from None
