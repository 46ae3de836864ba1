"""``kdkernels bench``. The benchmarks are imported when the command runs."""

from __future__ import annotations

import math
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from ..support.terminal import console, fail
from .options import DIVERGENCE, Device

__all__ = ["register"]

DTYPE_CHOICES = ("float32", "bfloat16", "float16")


class Suite(str, Enum):
    """Suites of ``bench``."""

    smoke = "smoke"
    standard = "standard"
    full = "full"
    headline = "headline"
    rows = "rows"


EXAMPLES = """
Examples:

- `kdkernels bench --suite smoke` - two minutes on two cores, to see that everything runs

- `kdkernels bench --device cuda --budget-minutes 20` - the standard suite, or as much of it as fits

- `kdkernels bench --shape 4096,151936,1024,2560 --divergence jsd --dtype bfloat16` - your own models: N,V,Ds,Dt

- `kdkernels bench --resume` - continue the interrupted run in bench-out
"""


def register(app: typer.Typer) -> None:
    """Add the command to ``app``."""
    app.command(epilog=EXAMPLES)(bench)


def bench(
    suite: Annotated[
        Suite,
        typer.Option(
            help="smoke: a few small cases. standard: the usual ones. full: every divergence and all scaling curves, hours. "
            "headline: the loss at the README's sizes, without torch.compile. rows: the row kernels alone."
        ),
    ] = Suite.standard,
    shape: Annotated[
        list[str] | None,
        typer.Option(
            help="Tokens, vocabulary and both hidden sizes, N,V,Ds,Dt; or N,V for plain logits. May be repeated; replaces the suite's."
        ),
    ] = None,
    divergence: Annotated[list[str] | None, typer.Option(help=f"{DIVERGENCE} May be repeated; replaces the suite's.")] = None,
    dtype: Annotated[
        list[str] | None, typer.Option(help="float32, bfloat16 or float16. May be repeated. Default: bfloat16 on a GPU, float32 on a CPU.")
    ] = None,
    temperature: Annotated[float, typer.Option(help="T > 0.")] = 2.0,
    backends: Annotated[str, typer.Option(help="auto, or some of cuda,triton,native,torch.")] = "auto",
    peers: Annotated[
        str, typer.Option(help="Other libraries: auto (all that are installed and run here), none, or some by name.")
    ] = "auto",
    device: Annotated[Device, typer.Option(help="auto takes a CUDA device if there is one.")] = Device.auto,
    out: Annotated[Path, typer.Option(help="Folder for results.json, report.html and plots.")] = Path("bench-out"),
    budget_minutes: Annotated[float | None, typer.Option(help="Stop after this time and keep what has been measured.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Finish the run in --out, with the settings it was started with.")] = False,
) -> None:
    """Measure time, memory and accuracy against the floor, PyTorch eager, torch.compile, and other libraries.

    Shows a table for each case, and writes `results.json` (every sample, the machine, versions, commit), plots, and `report.html`, which
    needs no network. A run that ends early keeps its measurements, and `--resume` continues it.
    """
    import torch

    from ..bench import run, suites
    from ..bench.cases import Case
    from ..bench.peers import PEERS
    from ..bench.variants import BACKENDS
    from ..divergences import REGISTRY

    def chosen(option: str, text: str, valid: tuple[str, ...]) -> list[str] | None:
        names = [] if text == "none" else text.split(",")
        if unknown := [name for name in names if name not in valid]:
            fail(f"--{option} {text}: unknown {', '.join(unknown)}; valid names: auto, {', '.join(valid)}")
        return names

    where = device.resolved()
    if where == "cuda" and not torch.cuda.is_available():
        fail("--device cuda: torch sees no CUDA device here. Take --device cpu")
    for name in divergence or []:
        if name not in REGISTRY:
            fail(f"--divergence {name!r} is unknown; valid names: {', '.join(REGISTRY)}")
    for name in dtype or []:
        if name not in DTYPE_CHOICES:
            fail(f"--dtype {name!r} is unknown; valid names: {', '.join(DTYPE_CHOICES)}")
    if not (0 < temperature < math.inf):
        fail(f"--temperature {temperature}: it must be finite and > 0, such as 2")
    if budget_minutes is not None and not budget_minutes > 0:
        fail(f"--budget-minutes {budget_minutes}: it must be > 0")
    if resume:
        record = run.resume(out)
    else:
        jobs = suites.jobs(
            suite.value, where,
            shapes=[Case.parse_shape(text) for text in shape or []], divergences=divergence or [], dtypes=dtype or [],
            temperature=temperature,
            backends=None if backends == "auto" else chosen("backends", backends, BACKENDS),
            peers=None if peers == "auto" else chosen("peers", peers, tuple(PEERS)),
        )  # fmt: skip
        settings = {"suite": suite.value, "backends": backends, "peers": peers, "temperature": temperature}
        record = run.begin(jobs, where, settings, out)
    record = run.run(record, out, console(), budget_minutes)
    if record["status"] == "interrupted":
        raise typer.Exit(130)
