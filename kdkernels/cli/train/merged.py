"""The whole model that an adapter and its base make: what ``--merge`` and ``kdkernels merge`` write."""

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
    """Base model and adapter as one model, and its tokenizer. The sum is made in float32 and rounded once.

    Raises:
        ValueError, TrainError: ``adapter`` is not an adapter, or one that can't be loaded or merged.
    """
    if find_adapter(role, adapter) is None:
        raise TrainError(f"--{role} {adapter}: there is no {CONFIG}: a whole model has nothing to merge")
    model = load(AutoModelForCausalLM, role, adapter, dtype=torch.float32)
    if not hasattr(model, "merge_and_unload"):
        raise TrainError(f"--{role} {adapter}: its kind of adapter can't be merged into the weights; LoRA can")
    merged = model.merge_and_unload(safe_merge=True).to(getattr(torch, dtype))
    return merged, load(AutoTokenizer, role, adapter)


def write_merged(settings: Settings, output: Output | None, console: Console) -> None:
    """Write the merged model of a finished training beside its adapter.

    Args:
        output: None in all processes but the first, which do nothing.
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
        FileError: files in ``out`` that this command did not make.
    """
    transformers.logging.disable_progress_bar()
    with Output(out, "merge") as output:
        output.check([path.name for path in out.iterdir() if path.name != MARKER], {"ADAPTER": adapter})
        put_in_place(_written(merged_model("adapter", adapter, dtype), output), output)
    console.print(f"merged model: {out}", soft_wrap=True)


def _written(parts: tuple[Any, Any], output: Output) -> Path:
    """Save model and tokenizer to an unfinished folder of the output."""
    folder = output.claim(UNFINISHED)
    output.remove(UNFINISHED)
    for part in parts:
        part.save_pretrained(folder)
    return folder
