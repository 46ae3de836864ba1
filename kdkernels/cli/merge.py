"""``kdkernels merge``."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from ..support.terminal import console

__all__ = ["merge", "register"]

EPILOG = "Example: `kdkernels merge out --out merged` - after `kdkernels train --lora-r 16 --output-dir out`"


def register(app: typer.Typer) -> None:
    """Add the command to ``app``."""
    app.command(epilog=EPILOG)(merge)


class Dtype(str, Enum):
    """Dtype of the saved merged weights."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def merge(
    adapter: Annotated[str, typer.Argument(help="Folder or hub id of an adapter that `kdkernels train --lora-r` or peft saved.")],
    out: Annotated[Path, typer.Option(help="Folder of the merged model: a new one, or one that this command wrote.")],
    dtype: Annotated[Dtype, typer.Option(help="Dtype of the saved weights. They are summed in float32 and rounded once.")] = Dtype.float32,
) -> None:
    """Merge an adapter into its base model, and write the whole model with its tokenizer.

    The base model is the adapter's `base_model_name_or_path`.
    """
    from .train.merged import merge as write

    write(adapter, out, dtype.value, console())
