"""Merge an adapter into its base model, for ``--merge`` and ``kdkernels merge``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from ...support.files import MARKER, Output
from ...teachers.adapters import CONFIG, find_adapter
from ...teachers.loading import load
from .output import MERGED, put_in_place
from .settings import Settings, TrainError

__all__ = ["merge", "merged_model", "write_merged"]

UNFINISHED = ".merged.unfinished"


def merged_model(role: str, adapter: str, dtype: str) -> tuple[Any, Any]:
    """Return base model and adapter as one model, and its tokenizer. The weights are summed in float32 and rounded once.

    Raises:
        ValueError, TrainError: ``adapter`` is not an adapter, or cannot be loaded or merged.
    """
    if find_adapter(role, adapter) is None:
        raise TrainError(f"--{role} {adapter}: there is no {CONFIG}: a whole model has nothing to merge")
    model = load(AutoModelForCausalLM, role, adapter, dtype=torch.float32)
    if not hasattr(model, "merge_and_unload"):
        raise TrainError(f"--{role} {adapter}: its kind of adapter can't be merged into the weights; LoRA can")
    merged = model.merge_and_unload(safe_merge=True).to(getattr(torch, dtype))
    return merged, load(AutoTokenizer, role, adapter)


def write_merged(settings: Settings, output: Output | None, console: Console) -> None:
    """Write the merged model of a finished training to the folder of its adapter.

    Args:
        output: the output folder in the first process; None in the others, which do nothing.
    """
    if output is None:
        return
    parts = merged_model("output-dir", str(output.folder), settings.models[0][2])
    unfinished, place = _written(parts, output), output.claim(MERGED)
    output.remove(MERGED)
    os.replace(unfinished, place)
    console.print(f"merged model: {place}", soft_wrap=True)


def merge(adapter: str, out: Path, dtype: str, console: Console) -> None:
    """Write the merged model of an adapter to the folder ``out``.

    Raises:
        FileError: ``out`` has files that this command did not create.
    """
    transformers.logging.disable_progress_bar()
    with Output(out, "merge") as output:
        output.check([path.name for path in out.iterdir() if path.name != MARKER], {"ADAPTER": adapter})
        put_in_place(_written(merged_model("adapter", adapter, dtype), output), output)
    console.print(f"merged model: {out}", soft_wrap=True)


def _written(parts: tuple[Any, Any], output: Output) -> Path:
    """Save model and tokenizer to a temporary folder in the output."""
    folder = output.claim(UNFINISHED)
    output.remove(UNFINISHED)
    for part in parts:
        part.save_pretrained(folder)
    return folder
