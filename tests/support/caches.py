"""A batch's view for reading a cache, and the bytes of a folder's files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kdkernels.data.collator import Collator, View, pack, view_of
from kdkernels.data.example import Example


def view(examples: Sequence[Example], salt: str | None = None, packed: int | None = None) -> View:
    items = [(example,) for example in examples] if packed is None else pack(examples, packed)
    return view_of(Collator(salt=salt, packed=packed is not None, multiple=16)(items), "teacher_")


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}
