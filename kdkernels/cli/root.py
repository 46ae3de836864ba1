"""The ``kdkernels`` command. Packages that only one command needs are imported inside it."""

from __future__ import annotations

import io
import json
import math
import os
import platform
import re
import sys
import warnings
from enum import Enum
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from .. import __version__
from ..backends import native, selection
from ..bench.environment import cpu_model
from ..divergences import REGISTRY
from ..support.terminal import Commands, console, fail, shown
from . import recipes, teachers
from .demo.settings import Settings
from .train import command as training

__all__ = ["app", "environment", "main"]

PACKAGES = ("torch", "triton", "transformers", "accelerate", "tokenizers", "safetensors", "numpy", "matplotlib", "typer", "rich")
VARIABLES = {
    "TRITON_INTERPRET": "1 runs the triton backend in Triton's interpreter: on the CPU, slow, for checks",
    "KDKERNELS_CUDA": "read when building: auto, 0 (leave the CUDA kernels out), 1 (an error without nvcc)",
    "KDKERNELS_CUDA_ARCHS": 'read when building: CUDA targets, as "80;90a"; not set: of 80, 86, 89, 90a, 100, 120 all that nvcc knows',
}
"""Every environment variable that the project reads, and what it does."""

DTYPE_CHOICES = ("float32", "bfloat16", "float16")

_FOLDERS = re.compile(r"(?<!\w)(?:[A-Za-z]:)?[/\\](?:[^\s:'\"()/\\]+[/\\])*(?=[^\s/\\])")

app = typer.Typer(
    name="kdkernels",
    cls=Commands,
    help="Fused knowledge-distillation losses at vocabulary scale, without [N, V] logits.",
    epilog="Start with `kdkernels demo --quick`, which shows in seconds that everything runs.",
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    add_completion=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"kdkernels {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")] = False,
) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def _version_of(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _cuda_devices() -> list[str]:
    devices = []
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        devices.append(f"{p.name}, compute capability {p.major}.{p.minor}, {p.total_memory / 2**30:.0f} GiB")
    return devices


def _backends(device_type: str) -> dict[str, str]:
    """For float32 logits on such a device: what "auto" takes, and for every backend whether it can run."""
    dtypes = (torch.float32, torch.float32)
    status = {"auto": selection.select("auto", device_type, dtypes)}
    for name in selection.NAMES:
        reason = selection.unavailable(name, device_type, dtypes)
        status[name] = "available" if reason is None else f"not available: {_without_folders(reason)}"
    return status


def _without_folders(text: str) -> str:
    """Absolute paths, which an import error may hold and a bug report should not, cut down to the file's name."""
    return _FOLDERS.sub("", text)


def environment() -> dict[str, Any]:
    """Versions, platform, devices, backends and environment variables: what a bug report needs, and no path or secret."""
    cuda = _cuda_devices()
    return {
        "versions": {
            "kdkernels": __version__,
            "python": platform.python_version(),
            **{package: _version_of(package) for package in PACKAGES},
            "cuda (of torch)": torch.version.cuda or "none",
        },
        "platform": {
            "system": platform.platform(),
            "processor": cpu_model(),
            "cpus": os.cpu_count(),
            "torch threads": torch.get_num_threads(),
        },
        "devices": {"cpu": "always", **{f"cuda:{i}": name for i, name in enumerate(cuda)}},
        "compiled extension": {what: " ".join(names) or "none" for what, names in native.contents().items()} or {"_C": "not there"},
        "backends": {device_type: _backends(device_type) for device_type in ("cpu", *(["cuda"] if cuda else []))},
        "environment variables": {name: os.environ.get(name, "not set") for name in VARIABLES},
    }


@app.command(epilog="Example: `kdkernels env --json > environment.json`")
def env(as_json: Annotated[bool, typer.Option("--json", help="As JSON, for programs.")] = False) -> None:
    """Show versions, devices, and which backends can run here and why not the others.

    Paste its output into a bug report. It holds no user name, host name or path.
    """
    found = environment()
    if as_json:
        typer.echo(json.dumps(found, indent=1))
        return
    backends: dict[str, dict[str, str]] = found.pop("backends")
    sections = {**found, **{f"backends on {device_type}": status for device_type, status in backends.items()}}
    for title, rows in sections.items():
        typer.echo(title)
        width = max(map(len, rows)) + 2
        for name, value in rows.items():
            typer.echo(f"  {name:<{width}}{value}")
            if name in VARIABLES:
                typer.echo(f"  {'':<{width}}({VARIABLES[name]})")


class Device(str, Enum):
    """Where a command runs."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


_DEFAULT, _QUICK = Settings(), Settings.quick()
_DEMO_EXAMPLES = """
Examples:

- `kdkernels demo` - the Python standard library as text, about four minutes on two cores

- `kdkernels demo --quick` - the same steps in seconds, too little training to learn from

- `kdkernels demo --data my-notes/ --out notes-demo --seed 1` - your own text files

- `kdkernels demo --divergence jsd --temperature 2` - another divergence
"""


@app.command(epilog=_DEMO_EXAMPLES)
def demo(
    data: Annotated[
        Path | None,
        typer.Option(
            help="Folder of text files, or one text file; up to 8 MB of UTF-8 are used. Default: the Python standard library's sources."
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for demo.png and demo.json.")] = Path("demo-out"),
    seed: Annotated[
        int,
        typer.Option(
            help="Of weights, batches and the choice of held-out files: the same seed repeats the training, on a CPU bit for bit."
        ),
    ] = 0,
    steps: Annotated[
        int | None,
        typer.Option(help=f"Training steps of each student; the teacher's scale along. Default: {_DEFAULT.steps}, quick {_QUICK.steps}."),
    ] = None,
    vocab_size: Annotated[
        int | None,
        typer.Option(
            help=f"Tokens of the byte-level BPE, at most. Default: {_DEFAULT.vocab_size}, quick {_QUICK.vocab_size}.",
        ),
    ] = None,
    backend: Annotated[str, typer.Option(help=f"auto, {', '.join(selection.NAMES)}; see `kdkernels env`.")] = "auto",
    divergence: Annotated[str, typer.Option(help=f"{', '.join(REGISTRY)}.")] = _DEFAULT.divergence,
    temperature: Annotated[
        float, typer.Option(help="T > 0 of the distillation term: above 1, unlikely tokens count more.")
    ] = _DEFAULT.temperature,
    device: Annotated[Device, typer.Option(help="auto takes a CUDA device if there is one.")] = Device.auto,
    quick: Annotated[bool, typer.Option("--quick", help="Tiny models and few steps: seconds, to see that everything runs.")] = False,
) -> None:
    """Distil a small language model on real text, and measure the fused loss against a dense one.

    Trains a tokenizer and a Llama teacher, then two smaller students from the same initial weights, on the same batches,
    for the same number of steps: one with cross-entropy (CE) only, one with CE and distillation (KD) through
    `kdkernels.distillation_loss`. Prints held-out losses, times and memory, and writes a figure and a JSON with all of it.
    """
    # Light: the packages of the extras are looked for before anything imports them.
    from .demo import run

    settings = (_QUICK if quick else _DEFAULT).changed(
        steps=steps,
        vocab_size=vocab_size,
        seed=seed,
        backend=backend,
        divergence=divergence,
        temperature=temperature,
        device=device.value if device is not Device.auto else "cuda" if torch.cuda.is_available() else "cpu",
    )
    try:
        run.run(settings, data, out, environment(), console())
    except KeyboardInterrupt:
        typer.echo("\nInterrupted.", err=True)
        raise typer.Exit(130) from None


class Suite(str, Enum):
    """How much ``bench`` measures."""

    smoke = "smoke"
    standard = "standard"
    full = "full"
    headline = "headline"
    rows = "rows"


_BENCH_EXAMPLES = """
Examples:

- `kdkernels bench --suite smoke` - two minutes on two cores, to see that everything runs

- `kdkernels bench --device cuda --budget-minutes 20` - the standard suite, or as much of it as fits

- `kdkernels bench --shape 4096,151936,1024,2560 --divergence jsd --dtype bfloat16` - your own models: N,V,Ds,Dt

- `kdkernels bench --resume` - goes on where bench-out was cut short
"""


@app.command(epilog=_BENCH_EXAMPLES)
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
            help="Tokens, vocabulary and both hidden sizes, N,V,Ds,Dt; or N,V for given logits. May be repeated; replaces the suite's."
        ),
    ] = None,
    divergence: Annotated[list[str] | None, typer.Option(help=f"{', '.join(REGISTRY)}. May be repeated; replaces the suite's.")] = None,
    dtype: Annotated[
        list[str] | None, typer.Option(help="float32, bfloat16 or float16. May be repeated. Default: bfloat16 on a GPU, float32 on a CPU.")
    ] = None,
    temperature: Annotated[float, typer.Option(help="T > 0.")] = 2.0,
    backends: Annotated[str, typer.Option(help="auto (those that it may take), or some of cuda,triton,native,torch.")] = "auto",
    peers: Annotated[
        str, typer.Option(help="Other libraries: auto (all that are installed and run here), none, or some by name.")
    ] = "auto",
    device: Annotated[Device, typer.Option(help="auto takes a CUDA device if there is one.")] = Device.auto,
    out: Annotated[Path, typer.Option(help="Folder for results.json, report.html and plots.")] = Path("bench-out"),
    budget_minutes: Annotated[float | None, typer.Option(help="Stop after that; what is measured by then is kept.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Finish the run in --out, with the settings that it was begun with.")] = False,
) -> None:
    """Measure time, memory and accuracy against the floor, PyTorch eager, torch.compile, and other libraries.

    Shows a table per case, and writes `results.json` (every sample, the machine, versions, commit), plots, and `report.html`, which needs
    no network. Whatever ends a run early, what it has measured stays, and `--resume` goes on.
    """
    from ..bench import run, suites
    from ..bench.cases import Case
    from ..bench.peers import PEERS
    from ..bench.variants import BACKENDS

    def chosen(option: str, text: str, valid: tuple[str, ...]) -> list[str] | None:
        names = [] if text == "none" else text.split(",")
        if unknown := [name for name in names if name not in valid]:
            fail(f"--{option} {text}: unknown {', '.join(unknown)}; valid names: auto, {', '.join(valid)}")
        return names

    where = device.value if device is not Device.auto else "cuda" if torch.cuda.is_available() else "cpu"
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


teachers.register(app)
app.add_typer(recipes.app)
app.command(epilog=training.EPILOG, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(training.train)


def main() -> None:
    """Entry point of the ``kdkernels`` script."""
    warnings.formatwarning = lambda message, *_, **__: f"Warning: {shown(' '.join(str(message).split()))}\n"
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a name need not be in the terminal's encoding
    app()
