"""Read data sets of the Hugging Face hub, named ``org/name[:SPLIT[:CONFIG]]``, with ``datasets``."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

from .errors import DataError
from .files import SUFFIXES

__all__ = ["commit_of", "identity_of", "is_hub_name", "load", "stream"]

NAME = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(?::(?P<split>[^:\[\]]+(?:\[[^\]]*\])?))?(?::(?P<config>[^:]+))?")
COMMIT = re.compile(r"[0-9a-f]{40}")


def is_hub_name(text: str) -> bool:
    """Return True for the name of a hub data set: not an existing path, and not like a file name."""
    match = NAME.fullmatch(text)
    return match is not None and not Path(text).exists() and Path(match["name"]).suffix not in SUFFIXES


@functools.lru_cache(8)
def load(text: str) -> Any:
    """Return the ``datasets.Dataset`` of a name. The default split is ``train``.

    Raises:
        DataError: ``datasets`` is missing, the data set, split or configuration does not exist, or the hub cannot be reached.
    """
    return _loaded(text)


def stream(text: str) -> Any:
    """Return the ``datasets.IterableDataset`` of a name at the commit from ``commit_of``. It is downloaded while it is read.

    Raises:
        DataError: see ``load``.
    """
    return _loaded(text, streaming=True, revision=commit_of(text))


@functools.lru_cache(8)
def commit_of(text: str) -> str:
    """Return the commit of a hub data set. It does not change within a process.

    Raises:
        DataError: see ``load``.
    """
    from huggingface_hub import HfApi, constants

    name = _parts(text)["name"]
    try:
        return str(HfApi(endpoint=constants.ENDPOINT).dataset_info(name).sha)
    except Exception as error:  # of the hub, of the network
        raise DataError(f"{text}: no such file or folder, and the hub does not name its commit ({_line(error)})") from None


def _parts(text: str) -> re.Match[str]:
    match = NAME.fullmatch(text)
    assert match is not None
    return match


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _loaded(text: str, **options: Any) -> Any:
    match = _parts(text)
    try:
        import datasets
    except ImportError:
        raise DataError(f"{text} is not a file, and data sets of the hub need datasets: pip install datasets") from None
    try:
        return datasets.load_dataset(match["name"], match["config"], split=match["split"] or "train", **options)
    except datasets.exceptions.DatasetNotFoundError:
        reason = "no such file or folder, and no such data set on the hub (or it is private: run `hf auth login`)"
    except Exception as error:  # of the hub, of the network, of each format's reader
        reason = f"the data set can't be loaded ({_line(error)}): give NAME:SPLIT:CONFIG with a split and a " + (
            "configuration that it has"
        )
    raise DataError(f"{text}: {reason}")


def identity_of(text: str, streamed: bool = False) -> str:
    """Return split, configuration and commit of the data that ``load`` reads. If the commit is unknown, a fingerprint replaces it.

    Args:
        streamed: return the identity of the data that ``stream`` reads.

    Raises:
        DataError: see ``load``.
    """
    match = _parts(text)
    if streamed:
        commit = commit_of(text)
    else:
        dataset = load(text)
        folders = (part for file in dataset.cache_files for part in Path(file["filename"]).parts)
        commit = next((part for part in folders if COMMIT.fullmatch(part)), dataset._fingerprint)
    return f"{match['split'] or 'train'}:{match['config'] or ''}@{commit}"
