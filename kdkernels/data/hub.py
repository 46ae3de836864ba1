"""Data sets of the Hugging Face hub, as ``org/name[:SPLIT[:CONFIG]]``, read through ``datasets``."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

from .errors import DataError
from .files import SUFFIXES

__all__ = ["identity_of", "is_hub_name", "load"]

NAME = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(?::(?P<split>[^:\[\]]+(?:\[[^\]]*\])?))?(?::(?P<config>[^:]+))?")
COMMIT = re.compile(r"[0-9a-f]{40}")


def is_hub_name(text: str) -> bool:
    """True for the name of a data set on the hub: not an existing path, and not the name of a file."""
    match = NAME.fullmatch(text)
    return match is not None and not Path(text).exists() and Path(match["name"]).suffix not in SUFFIXES


@functools.lru_cache(8)
def load(text: str) -> Any:
    """The ``datasets.Dataset`` of a name; its split is ``train`` by default.

    Raises:
        DataError: ``datasets`` is missing; no such data set, split or configuration; the hub can't be reached.
    """
    match = NAME.fullmatch(text)
    assert match is not None
    try:
        import datasets
    except ImportError:
        raise DataError(f"{text} is not a file, and data sets of the hub need datasets: pip install datasets") from None
    try:
        return datasets.load_dataset(match["name"], match["config"], split=match["split"] or "train")
    except datasets.exceptions.DatasetNotFoundError:
        reason = "no such file or folder, and no such data set on the hub (or it is private: run `hf auth login`)"
    except Exception as error:  # of the hub, of the network, of each format's reader
        reason = f"the data set can't be loaded ({' '.join(str(error).split())[:300]}): give NAME:SPLIT:CONFIG with a split and a " + (
            "configuration that it has"
        )
    raise DataError(f"{text}: {reason}")


def identity_of(text: str) -> str:
    """Split, configuration and commit of the data that ``load`` reads; where the commit is not known, the fingerprint of its content.

    Raises:
        DataError: see ``load``.
    """
    dataset = load(text)
    folders = (part for file in dataset.cache_files for part in Path(file["filename"]).parts)
    commit = next((part for part in folders if COMMIT.fullmatch(part)), dataset._fingerprint)
    match = NAME.fullmatch(text)
    assert match is not None
    return f"{match['split'] or 'train'}:{match['config'] or ''}@{commit}"
