"""``kdkernels demo``. Its implementation is imported when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ...support.terminal import console
from ..options import DIVERGENCE, Device
from .settings import Settings

__all__ = ["register"]

_DEFAULT, _QUICK = Settings(), Settings.quick()
EXAMPLES = """
Examples:

- `kdkernels demo` - the Python standard library as text, about four minutes on two cores

- `kdkernels demo --quick` - the same steps in seconds, too little training to learn from

- `kdkernels demo --data my-notes/ --out notes-demo --seed 1` - your own text files

- `kdkernels demo --divergence jsd --temperature 2` - another divergence
"""


def register(app: typer.Typer) -> None:
    """Add the command to ``app``."""
    app.command(epilog=EXAMPLES)(demo)


def demo(
    data: Annotated[
        Path | None,
        typer.Option(
            help="Text file, or folder of text files. Up to 8 MB of UTF-8 are used. Default: sources of the Python standard library."
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for demo.png and demo.json.")] = Path("demo-out"),
    seed: Annotated[
        int,
        typer.Option(help="Random seed of weights, batches and held-out files. The same seed repeats the training, on a CPU bit for bit."),
    ] = 0,
    steps: Annotated[
        int | None,
        typer.Option(
            help=f"Training steps of each student; the teacher's steps scale with them. Default: {_DEFAULT.steps}, quick {_QUICK.steps}."
        ),
    ] = None,
    vocab_size: Annotated[
        int | None,
        typer.Option(
            help=f"Maximum size of the byte-level BPE vocabulary. Default: {_DEFAULT.vocab_size}, quick {_QUICK.vocab_size}.",
        ),
    ] = None,
    backend: Annotated[str, typer.Option(help="auto, or a backend that `kdkernels env` lists, such as native.")] = "auto",
    divergence: Annotated[str, typer.Option(help=DIVERGENCE)] = _DEFAULT.divergence,
    temperature: Annotated[
        float, typer.Option(help="T > 0 of the distillation term: above 1, unlikely tokens count more.")
    ] = _DEFAULT.temperature,
    device: Annotated[Device, typer.Option(help="auto takes a CUDA device if there is one.")] = Device.auto,
    quick: Annotated[bool, typer.Option("--quick", help="Tiny models and few steps, to see in seconds that everything runs.")] = False,
) -> None:
    """Distil a small language model on real text, and measure the fused loss against a dense one.

    Trains a tokenizer and a Llama teacher, then two smaller students from the same initial weights, on the same batches,
    for the same number of steps: one with cross-entropy (CE) only, one with CE and distillation (KD) through
    `kdkernels.distillation_loss`. Prints held-out losses, times and memory, and writes them to a figure and a JSON file.
    """
    from ..environment import environment
    from . import run

    settings = (_QUICK if quick else _DEFAULT).changed(
        steps=steps,
        vocab_size=vocab_size,
        seed=seed,
        backend=backend,
        divergence=divergence,
        temperature=temperature,
        device=device.resolved(),
    )
    try:
        run.run(settings, data, out, environment(), console())
    except KeyboardInterrupt:
        typer.echo("\nInterrupted.", err=True)
        raise typer.Exit(130) from None
