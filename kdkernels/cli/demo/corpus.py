"""Read text (the user's, or the sources of the Python standard library), split it into training and held-out files, and tokenise it."""

from __future__ import annotations

import codecs
import hashlib
import os
import platform
import random
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .settings import DemoError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["Corpus", "Document", "Tokens", "collect", "tokenize", "train_tokenizer"]

END_OF_TEXT = "<|endoftext|>"

MIN_BYTES = 100_000
"""Minimum size of the text. With less, there are too few pairs for a tokenizer and too few held-out windows."""

HELD_OUT_SHARE = 0.1
_FEWEST_HELD_OUT_SHARE = 0.05  # with less, the files are too few and too large to split by file
_SKIPPED_FOLDERS = {"__pycache__", "site-packages", "dist-packages", "node_modules"}
_TEST_FOLDERS = {"test", "tests", "idle_test"}  # of the standard library: random bytes and generated tables


@dataclass(frozen=True)
class Document:
    """A text file. ``name`` is its path within the data folder."""

    name: str
    text: str


@dataclass(frozen=True)
class Corpus:
    """Training and held-out text. ``split`` describes how the held-out text was selected."""

    source: str
    train: list[Document]
    held_out: list[Document]
    split: str

    @property
    def sha256(self) -> str:
        """Return the hash of all names and texts: equal hashes mean equal inputs to the training."""
        digest = hashlib.sha256()
        for document in (*self.train, *self.held_out):
            # A file's text is UTF-8, but its name may not be.
            digest.update(f"{document.name}\0{document.text}\0".encode(errors="surrogateescape"))
        return digest.hexdigest()


@dataclass(frozen=True)
class Tokens:
    """Ids of training and held-out text, ``[tokens]`` int64 each. Files are joined by an end-of-text token."""

    train: Tensor
    held_out: Tensor
    vocab: int


def collect(data: Path | None, max_bytes: int, seed: int) -> Corpus:
    """Return up to ``max_bytes`` of text from a folder or file; from the sources of the Python standard library for None.

    The selection of files, and of held-out files, depends only on the seed and the files. Hidden, binary, unreadable, empty and repeated
    files are left out.

    Raises:
        DemoError: the path does not exist, or has too little text.
    """
    advice = "Give a larger text file or folder, or leave --data out to train on the Python standard library"
    if data is None:
        root = Path(sysconfig.get_paths()["stdlib"])
        source = f"Python {platform.python_version()} standard library"
        advice = "This Python came without its sources: give a text file or a folder of text files"
        paths = [p for p in _walk(root) if p.suffix == ".py" and not _TEST_FOLDERS & set(p.relative_to(root).parts)]
    elif data.is_dir():
        root, source, paths = data, str(data), list(_walk(data))
    elif data.is_file():
        root, source, paths = data.parent, str(data), [data]
    else:
        raise DemoError(f"--data {data}: no such file or folder. Give a text file, a folder of text files, or leave --data out")

    random.Random(seed).shuffle(paths)
    documents = _read(root, paths, max_bytes)
    size = sum(map(_size, documents))
    if size < MIN_BYTES:
        text = f"{size:,} bytes of UTF-8 text in {len(documents)} of {len(paths)} file{'s' if len(paths) != 1 else ''}"
        raise DemoError(f"--data {source}: found {text}, and the demo needs at least {MIN_BYTES:,} bytes. {advice}")
    return _split(source, documents, size)


def _walk(root: Path) -> Iterator[Path]:
    """Yield the regular files below a folder, in an order that does not depend on the file system."""
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(f for f in folders if f not in _SKIPPED_FOLDERS and not f.startswith("."))
        for name in sorted(files):
            path = Path(folder, name)
            if not name.startswith(".") and path.is_file():
                yield path


def _read(root: Path, paths: list[Path], max_bytes: int) -> list[Document]:
    documents, seen, room = [], set(), max_bytes
    for path in paths:
        try:
            with path.open("rb") as file:
                raw = file.read(room)
                whole = not file.read(1)
            # If the file is cut off, its last character may be incomplete.
            text = codecs.getincrementaldecoder("utf-8")().decode(raw, final=whole)
        except (OSError, UnicodeDecodeError):
            continue
        # A repeated file could be in training and held-out text.
        if not text.strip() or "\0" in text or text in seen:
            continue
        seen.add(text)
        documents.append(Document(path.relative_to(root).as_posix(), text))
        room -= len(raw)
        if room <= 0:
            break
    return documents


def _size(document: Document) -> int:
    return len(document.text.encode())


def _split(source: str, documents: list[Document], size: int) -> Corpus:
    held_out: list[Document] = []
    taken = 0
    for document in documents:
        if taken + _size(document) <= HELD_OUT_SHARE * size:
            held_out.append(document)
            taken += _size(document)
    if taken >= _FEWEST_HELD_OUT_SHARE * size:
        names = {d.name for d in held_out}
        return Corpus(source, [d for d in documents if d.name not in names], held_out, "by file")
    *others, last = sorted(documents, key=_size)
    cut = last.text.rfind("\n", 0, int(len(last.text) * (1 - HELD_OUT_SHARE))) + 1 or int(len(last.text) * (1 - HELD_OUT_SHARE))
    head, tail = Document(f"{last.name} (start)", last.text[:cut]), Document(f"{last.name} (end)", last.text[cut:])
    return Corpus(source, [*others, head], [tail], "the end of the largest file: too few files to hold whole ones out")


def train_tokenizer(corpus: Corpus, vocab_size: int) -> Tokenizer:
    """Return a byte-level BPE of at most ``vocab_size`` tokens, including ``END_OF_TEXT``, trained on the training text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((d.text for d in corpus.train), trainer)
    return tokenizer


def tokenize(corpus: Corpus, tokenizer: Tokenizer) -> Tokens:
    """Tokenise training and held-out text."""
    end = tokenizer.token_to_id(END_OF_TEXT)

    def encode(documents: list[Document]) -> Tensor:
        encodings = tokenizer.encode_batch_fast([d.text for d in documents])
        return torch.tensor([i for encoding in encodings for i in (*encoding.ids, end)])

    return Tokens(encode(corpus.train), encode(corpus.held_out), tokenizer.get_vocab_size())
