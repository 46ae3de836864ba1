"""Models, tokenizers and caches by their paths, with errors that name the option."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.integrations import deepspeed as zero

from ...data.agreement import check_templates, check_tokenizers
from ...teachers.loading import load
from .settings import Settings, TrainError

if TYPE_CHECKING:
    from ...teachers.cache import CachedTeacher

__all__ = ["cache_of", "check_data", "model_of", "tokenizer_of"]

FSDP_LOADING = "FSDP_CPU_RAM_EFFICIENT_LOADING"  # accelerate sets it, transformers reads it
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")


def tokenizer_of(settings: Settings) -> Any:
    """The student's, once it is known that the teachers' agree with it; a folder that holds none is taken to have the others'."""
    having = [
        (role, path)
        for role, path, _ in settings.models
        if not Path(path).is_dir() or any(Path(path, name).is_file() for name in TOKENIZER_FILES)
    ]
    if not having:
        raise TrainError(f"--student {settings.student}: the folder holds no tokenizer: save it there with tokenizer.save_pretrained")
    tokenizer = load(AutoTokenizer, *having[0])
    for role, path in having[1:]:
        other = load(AutoTokenizer, role, path)
        check_tokenizers(tokenizer, other)
        check_templates(tokenizer, other, settings.data, settings.args.columns)
    return tokenizer


def cache_of(settings: Settings, tokenizer: Any) -> CachedTeacher:
    """The cache in the teacher's place, once it is known to be whole and made with this tokenizer."""
    from ...teachers.cache import CacheError, open_cache

    try:
        return open_cache(str(settings.cache), tokenizer)
    except CacheError as error:
        raise TrainError(f"--cache {settings.cache}: {error}") from error


def check_data(settings: Settings) -> None:
    """Where the data is a cache of text, it is whole."""
    from ...teachers.cache import CacheError, read_text
    from ...teachers.cache.manifest import MANIFEST

    for name, path in (*(("data", path) for path in settings.data), *(("eval-data", path) for path in settings.eval_data)):
        if (Path(path) / MANIFEST).is_file():
            try:
                read_text(path)
            except CacheError as error:
                raise TrainError(f"--{name} {path}: {error}") from error


def model_of(role: str, path: str, dtype: str) -> Any:
    """A model with its weights, in its own dtype with "auto"."""
    with _whole() if role == "teacher" else nullcontext():
        return load(AutoModelForCausalLM, role, path, dtype=dtype if dtype == "auto" else getattr(torch, dtype))


@contextmanager
def _whole() -> Iterator[None]:
    """Models that are loaded in the block have all their weights on each rank.

    Under ZeRO-3 and FSDP a model is loaded in parts, or on one rank, and put together when it is wrapped. Nothing wraps a teacher.
    """
    of_rank_0, partitioned = os.environ.get(FSDP_LOADING), zero._hf_deepspeed_config_weak_ref
    os.environ[FSDP_LOADING] = "false"
    zero.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        zero._hf_deepspeed_config_weak_ref = partitioned
        if of_rank_0 is None:
            del os.environ[FSDP_LOADING]
        else:
            os.environ[FSDP_LOADING] = of_rank_0
