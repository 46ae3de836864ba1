"""Time and peak memory of one distillation loss, forward and backward, against its floor and the dense formula.

``python -m benchmarks.loss`` is the run that the README's table comes from; ``--help`` says how to measure something else.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import Progress, TimeElapsedColumn
from rich.table import Table

import kdkernels as kd

from . import variants
from .cases import Case, Inputs, build
from .measure import OutOfProcessError, first_line, peak_extra_bytes, quantile, time_interleaved
from .results import RESULTS, environment, save

CASES = {
    "cpu": [
        "2048,32000,512,1024:float32:forward_kl",
        "2048,32000,512,1024:float32:jsd",
        "2048,32000,512,1024:bfloat16:forward_kl",
        "2048,32000:float32:forward_kl",
        "2048,32000:float32:jsd",
    ],
    "cuda": [
        "8192,128256,2048,4096:bfloat16:forward_kl",
        "8192,128256,2048,4096:bfloat16:jsd",
        "8192,128256,4096,4096:bfloat16:forward_kl",
        "16384,151936,2048,4096:bfloat16:forward_kl",
        "16384,32000,2048,4096:bfloat16:forward_kl",
        *(f"8192,{v}:bfloat16:{divergence}" for v in (32000, 128256, 151936, 256000) for divergence in ("forward_kl", "jsd")),
    ],
}
"""What is measured on a kind of device if nobody says otherwise. The first is the one that the README opens with."""

console = Console(width=None if sys.stdout.isatty() else 120)

NO_MEMORY = {"floor": "it is no loss", "compile": "the compiler's own memory cannot be told from the loss's"}
"""Variants whose peak memory would mislead, with the reason."""

COLUMNS = ("loss", "ms p50 [p20, p80]", "x of floor", "eager / it", "peak extra MiB", "of eager's", "gradient error")


def measure(case: Case, device: str, names: list[str], samples: int, progress: Progress) -> dict[str, Any]:
    """One case. A variant that cannot run keeps its row, with the reason."""
    task = progress.add_task(str(case), total=len(names) * (samples + 2))
    inputs = build(case, device)
    steps: dict[str, variants.Step] = {}
    skipped: dict[str, str] = {}
    errors: dict[str, float | None] = {}
    for name in names:
        progress.update(task, description=f"{case}: checking {name}")
        try:
            errors[name] = variants.check(name, case, device)
            steps[name] = variants.build(name, case, inputs)
        except Exception as error:  # whatever a compiler, a driver or a peer comes up with is this row's result
            skipped[name] = first_line(error)
            progress.advance(task, samples + 2)

    def advance(name: str) -> None:
        progress.update(task, description=f"{case}: timing {name}", advance=1)

    taken, failed = time_interleaved(steps, inputs, samples, progress=advance)
    skipped |= failed
    plans = {name: plan(name, case, inputs) for name in taken if name.partition("/")[0] in variants.BACKENDS}
    del inputs
    steps.clear()  # so that the processes that measure memory have the machine's to themselves
    if device != "cpu":
        torch.cuda.empty_cache()
    results = []
    for name in names:
        row: dict[str, Any] = {"variant": name}
        if name in skipped:
            results.append({**row, "skipped": skipped[name]})
            continue
        progress.update(task, description=f"{case}: memory of {name}", advance=1)
        row["samples_ms"] = taken[name]
        row["gradient_error"] = errors[name]
        try:
            row["peak_extra_bytes"] = None if name in NO_MEMORY else peak_extra_bytes(name, case, device)
        except OutOfProcessError as error:
            row["peak_extra_bytes"], row["no_memory_because"] = None, str(error)
        results.append({**row, **({"plan": plans[name]} if name in plans else {})})
    progress.update(task, description=str(case))
    sizes = {"flop": case.flop, "floor_bytes": case.floor_bytes, "input_bytes": case.input_bytes}
    return {"case": asdict(case), **sizes, "results": results}


def plan(name: str, case: Case, inputs: Inputs) -> dict[str, int]:
    backend, _, logits_dtype = name.partition("/")
    p = kd.plan(
        inputs.student, inputs.teacher, divergence=case.divergence, temperature=case.temperature,
        backend=backend, logits_dtype=getattr(torch, logits_dtype) if logits_dtype else None,
    )  # fmt: skip
    return {"rows_per_chunk": p.rows_per_chunk, "num_chunks": p.num_chunks, "buffer_bytes": p.buffer_bytes}


def median(measured: dict[str, Any], name: str) -> float | None:
    """Milliseconds; None if that variant did not run."""
    samples = next((r.get("samples_ms") for r in measured["results"] if r["variant"] == name), None)
    return quantile(samples, 0.5) if samples else None


def number(value: float) -> str:
    """With three digits that mean something."""
    return f"{value:,.0f}" if value >= 99.95 else f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"


def rows(measured: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """The table of one case, as text; also what the documentation shows."""
    floor, eager = median(measured, "floor"), median(measured, "eager")
    eager_peak = next((r.get("peak_extra_bytes") for r in measured["results"] if r["variant"] == "eager"), None)
    for r in measured["results"]:
        name = r["variant"]
        if "skipped" in r:
            yield (name, f"did not run: {r['skipped']}", *("" for _ in COLUMNS[2:]))
            continue
        low, mid, high = (quantile(r["samples_ms"], q) for q in (0.2, 0.5, 0.8))
        peak, error = r["peak_extra_bytes"], r["gradient_error"]
        yield (
            name,
            f"{number(mid)} [{number(low)}, {number(high)}]",
            f"{mid / floor:.2f}" if floor else "",
            f"{eager / mid:.2f}" if eager else "",
            f"{peak / 2**20:,.0f}" if peak is not None else "",
            f"{peak / eager_peak:.0%}" if peak is not None and eager_peak else "",
            f"{error:.1e}" if error is not None else "",
        )


def show(measured: dict[str, Any]) -> None:
    table = Table(title=str(Case(**measured["case"])), title_justify="left")
    for at, column in enumerate(COLUMNS):
        table.add_column(column, justify="right" if at else "left", no_wrap=True)
    for row in rows(measured):
        table.add_row(*row)
    console.print(table)


@contextmanager
def bars() -> Iterator[Progress]:
    with Progress(*Progress.get_default_columns(), TimeElapsedColumn(), console=console, transient=True) as progress:
        yield progress


def main(
    case: Annotated[
        list[str] | None, typer.Option(help="N,V,Ds,Dt:dtype:divergence with heads, N,V:dtype:divergence of logits; may be repeated.")
    ] = None,
    temperature: Annotated[float, typer.Option()] = 2.0,
    device: Annotated[str, typer.Option(help=" or ".join(CASES))] = "cpu",
    variant: Annotated[list[str] | None, typer.Option(help="Such as floor, eager, native, torch/bfloat16; default: all that run.")] = None,
    samples: Annotated[int, typer.Option(help="Timed rounds per case, after one that warms up.")] = 5,
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = RESULTS,
) -> None:
    """Measures time and peak memory and writes OUT/MACHINE/loss.json."""
    if device not in CASES:
        raise typer.BadParameter(f"--device is one of {', '.join(CASES)}, got {device!r}")
    try:
        cases = [Case.parse(text, temperature) for text in case or CASES[device]]  # a typo is found before hours of work
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    where = environment(device)  # first: later the load is our own
    console.print(f"{where['machine']}: torch {where['torch']}, {where['threads']} threads, load average {where['load_average']}")
    record: dict[str, Any] = {"environment": where, "settings": {"device": device, "samples": samples, "warmup": 1}, "cases": []}
    with bars() as progress:
        for each in cases:
            measured = measure(each, device, variant or variants.default_variants(each, device), samples, progress)
            record["cases"].append(measured)
            show(measured)
            path = save(out, "loss", record)  # after every case: a run cut short keeps what it has
    console.print(f"written: {path}")


if __name__ == "__main__":
    typer.run(main)
