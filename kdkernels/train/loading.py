"""Models, tokenizers and caches by their paths, with errors that name the option."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..data.agreement import check_templates, check_tokenizers
from .settings import Settings, TrainError

__all__ = ["cache_of", "load", "model_of", "tokenizer_of"]

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")


def tokenizer_of(settings: Settings) -> Any:
    """The student's, once it is known that the teachers' agree with it; a folder that holds none is taken to have the others'."""
    paths = [("student", settings.student), *(("teacher", path) for path in settings.teacher)]
    having = [
        (role, path) for role, path in paths if not Path(path).is_dir() or any(Path(path, name).is_file() for name in TOKENIZER_FILES)
    ]
    if not having:
        raise TrainError(f"--student {settings.student}: the folder holds no tokenizer: save it there with tokenizer.save_pretrained")
    tokenizer = load(AutoTokenizer, having[0][1], having[0][0])
    for role, path in having[1:]:
        other = load(AutoTokenizer, path, role)
        check_tokenizers(tokenizer, other)
        check_templates(tokenizer, other, settings.data)
    return tokenizer


def cache_of(settings: Settings, tokenizer: Any) -> Any:
    from ..teachers.cache import CacheError, open_cache

    try:
        return open_cache(str(settings.cache), tokenizer)
    except CacheError as error:
        raise TrainError(f"--cache {settings.cache}: {error}") from error


def model_of(path: str, role: str, dtype: str) -> Any:
    return load(AutoModelForCausalLM, path, role, dtype=dtype if dtype == "auto" else getattr(torch, dtype))


def load(cls: Any, path: str, role: str, **options: Any) -> Any:
    if not Path(path).exists() and (path.startswith((".", "/", "~")) or path.count("/") > 1):
        raise TrainError(f"--{role} {path}: no such folder")
    try:
        return cls.from_pretrained(path, **options)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise TrainError(f"--{role} {path}: can't be loaded by {cls.__name__}: {' '.join(str(error).split())[:300]}") from error
