"""Peak memory against the number of tokens, each point in a fresh process: does what is not accounted for stay flat?

What a pass of ours may hold on top of its inputs, and when:

    in forward    the chunk buffers (``plan().buffer_bytes``) and the gradients as forward saves them, unscaled:
                  hidden ``[N, Ds]`` in its own dtype, head ``[V, Ds]`` in float32
    in backward   those saved gradients and the ones that it returns, in the parameters' dtypes; no chunk buffer any more

So ``accounted = saved + max(buffers, returned)``, and ``unaccounted = measured - accounted`` is what has to stay flat.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table

import kdkernels as kd

from . import loss, variants
from .cases import Case
from .measure import OutOfProcessError, peak_extra_bytes
from .results import RESULTS, environment, save

TOKENS = [1024, 4096, 8192, 16384, 65536]
BUDGETS_MIB = [128, 1024]
DENSE_BYTES_PER_LOGIT = 28
"""More than eager's measured peak per logit: enough to decide what not to try."""


def accounted(case: Case, device: str, backend: str, budget: int) -> dict[str, int]:
    """Bytes that a pass of ours holds by design, as the module's docstring says."""

    def side(width: int) -> kd.LMHead:
        # Only planned, never read: one row of memory stands for all of them.
        row = torch.empty(1, width, dtype=case.torch_dtype, device=device)
        return kd.LMHead(row.expand(case.n, width), row.expand(case.v, width))

    plan = kd.plan(
        side(case.ds), side(case.dt), divergence=case.divergence, temperature=case.temperature, backend=backend, memory_budget=budget
    )
    hidden, head, size = case.n * case.ds, case.v * case.ds, case.torch_dtype.itemsize
    saved = hidden * size + head * max(size, 4)
    returned = (hidden + head) * size
    return {
        "buffer_bytes": plan.buffer_bytes,
        "saved_gradient_bytes": saved,
        "returned_gradient_bytes": returned,
        "accounted_bytes": saved + max(plan.buffer_bytes, returned),
    }


def main(
    tokens: Annotated[list[int], typer.Option(help="Numbers of tokens; may be repeated.")] = TOKENS,
    vocab: Annotated[int, typer.Option()] = 32000,
    student_hidden: Annotated[int, typer.Option(help="Small, so that a CPU gets through: memory does not care.")] = 64,
    teacher_hidden: Annotated[int, typer.Option()] = 128,
    dtype: Annotated[str, typer.Option()] = "float32",
    divergence: Annotated[str, typer.Option()] = "forward_kl",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    variant: Annotated[list[str] | None, typer.Option(help="A backend; may be repeated. Default: what auto takes.")] = None,
    budget_mib: Annotated[list[int], typer.Option(help="memory_budget; may be repeated.")] = BUDGETS_MIB,
    dense_limit_gib: Annotated[float, typer.Option(help="Eager is left out where it would need more.")] = 8.0,
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = RESULTS,
) -> None:
    """Measures peak memory against N and writes OUT/MACHINE/memory_scaling.json."""
    case = Case(0, vocab, student_hidden, teacher_hidden, dtype, divergence)
    backends = variant or [next(name for name in variants.default_variants(case, device) if name in variants.BACKENDS)]
    curves: list[dict[str, Any]] = [{"variant": "eager", "memory_budget": None, "points": []}]
    curves += [{"variant": b, "memory_budget": m << 20, "points": []} for b in backends for m in budget_mib]
    record = {"environment": environment(device), "case": asdict(case), "curves": curves}
    with loss.bars() as progress:
        task = progress.add_task("memory", total=len(curves) * len(tokens))
        for n in tokens:
            at = replace(case, n=n)
            for curve in curves:
                name, budget = curve["variant"], curve["memory_budget"]
                progress.update(task, description=f"N={n} {name}", advance=1)
                if name == "eager" and n * vocab * DENSE_BYTES_PER_LOGIT > dense_limit_gib * 2**30:
                    continue
                options = {} if budget is None else {"memory_budget": budget}
                try:
                    peak = peak_extra_bytes(name, at, device, **options)
                except OutOfProcessError as error:
                    curve["points"].append({"n": n, "failed": str(error)})
                    continue
                point: dict[str, Any] = {"n": n, "peak_extra_bytes": peak}
                if budget is not None:
                    point |= accounted(at, device, name, budget)
                    point["unaccounted_bytes"] = peak - point["accounted_bytes"]
                curve["points"].append(point)
            path = save(out, "memory_scaling", record)
    show(record, tokens)
    loss.console.print(f"written: {path}")


def label(curve: dict[str, Any]) -> str:
    budget = curve["memory_budget"]
    return curve["variant"] if budget is None else f"{curve['variant']}, budget {budget >> 20} MiB"


def show(record: dict[str, Any], tokens: list[int]) -> None:
    for key, title in (("peak_extra_bytes", "Peak beyond the inputs, MiB"), ("unaccounted_bytes", "Unaccounted, MiB")):
        table = Table("loss", title=title, title_justify="left")
        for n in tokens:
            table.add_column(f"N={n}", justify="right")
        for curve in record["curves"]:
            values = {p["n"]: p.get(key) for p in curve["points"]}
            cells = [values.get(n) for n in tokens]
            if any(cell is not None for cell in cells):
                table.add_row(label(curve), *("" if cell is None else f"{cell / 2**20:,.1f}" for cell in cells))
        loss.console.print(table)


if __name__ == "__main__":
    typer.run(main)
