"""Files that survive a ``kill -9``: written whole or not at all, appended line by line, and held by one process at a time."""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from .errors import UserError

__all__ = ["FileError", "Lines", "Lock", "canonical", "digest", "digest_file", "drop_temporaries", "line_of", "write_jsonl", "write_whole"]

TEMPORARY = ".tmp"
_BLOCK = 1 << 20
_ESCAPED = re.compile("[\x7f-\x9f\u2028\u2029\ud800-\udfff]")


class FileError(UserError):
    """A folder or file that another process holds, or whose content is damaged."""


def canonical(value: Any) -> bytes:
    """The one JSON text of a value: sorted keys, no spaces, ASCII. What JSON does not have (dates, bytes) becomes text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), default=str).encode()


def digest(value: Any) -> str:
    """sha256 of a value's canonical JSON."""
    return hashlib.sha256(canonical(value)).hexdigest()


def digest_file(path: Path) -> str:
    """sha256 of a file's bytes."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            found.update(block)
    return found.hexdigest()


def sync_folder(folder: Path) -> None:
    """Makes renames in ``folder`` outlast a power cut. Windows opens no folder, and has no need to."""
    if sys.platform == "win32":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """``write`` fills a temporary file beside ``path``, which then takes its place in one step, on disk and not only in memory."""
    temporary = path.with_name(path.name + TEMPORARY)
    try:
        write(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def line_of(row: Mapping[str, Any], **options: Any) -> str:
    """The JSON of a row in one line of UTF-8; control characters, line separators and halves of surrogate pairs are escaped.

    What JSON does not have (dates, bytes) becomes text. ``options`` are those of ``json.dumps``.
    """
    text = json.dumps(row, ensure_ascii=False, default=str, **options)
    return _ESCAPED.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """All rows or nothing: a file that is there is whole, whenever the process was killed. What JSON does not have becomes text."""
    path.parent.mkdir(parents=True, exist_ok=True)

    def write(temporary: Path) -> None:
        with temporary.open("w", encoding="utf-8", newline="\n") as file:
            file.writelines(line_of(row) + "\n" for row in rows)

    write_whole(path, write)


def drop_temporaries(folder: Path) -> None:
    """Removes what a killed writer has left. Only while holding the folder's lock."""
    for path in folder.glob("*" + TEMPORARY):
        path.unlink()


class Lock:
    """Holds ``path`` for this process, as a context. The system lets go of it however the process ends, so none is ever stale.

    Raises:
        FileError: another process holds it; the message says which.
    """

    def __init__(self, path: Path, what: str) -> None:
        self._path, self._what, self._handle = path, what, -1

    def __enter__(self) -> Lock:
        import fcntl  # POSIX only: what does not write need not have it

        while True:
            handle = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                holder = os.read(handle, 32).decode(errors="replace").strip() or "unknown"
                os.close(handle)
                raise FileError(f"{self._what} is in use by process {holder}: wait for it to end, or take another place") from None
            try:
                current = os.stat(self._path).st_ino == os.fstat(handle).st_ino
            except FileNotFoundError:
                current = False
            if current:
                break
            os.close(handle)  # its holder removed it between our opening and our locking
        os.truncate(handle, 0)
        os.write(handle, f"{os.getpid()}\n".encode())
        self._handle = handle
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._path.unlink(missing_ok=True)
        os.close(self._handle)


class Lines:
    """A JSONL file that is appended to, as a context: one object a line, each written by one call.

    A line is in the system's hands when ``append`` returns, so that a killed process loses none; it is on disk after ``sync``, which
    the caller asks for as often as a power cut is feared. A last line that was cut short is removed on opening.

    Raises:
        FileError: another process holds the file, or a line before the last is no JSON object; the message names the line.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = Lock(path.with_name(path.name + ".lock"), f"the log {path.name}")
        self._handle = -1
        self._dirty = False

    def __enter__(self) -> Lines:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._lock.__enter__()
        try:
            self._handle = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
            os.ftruncate(self._handle, self._whole())
            sync_folder(self._path.parent)
        except BaseException:
            self._lock.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.sync()
        os.close(self._handle)
        self._lock.__exit__(kind, error, trace)

    def _whole(self) -> int:
        """Bytes up to the end of the last whole line."""
        size = 0
        with self._path.open("rb") as file:
            for line in file:
                if line.endswith(b"\n"):
                    size += len(line)
        return size

    def __iter__(self) -> Iterator[dict[str, Any]]:
        with self._path.open("rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    value = json.loads(line)
                except ValueError:
                    value = None
                if not isinstance(value, dict):
                    raise FileError(f"{self._path.name}, line {number}, is no JSON object: the file is damaged. Remove the line to go on")
                yield value

    def append(self, value: dict[str, Any]) -> None:
        line = line_of(value, separators=(",", ":")).encode() + b"\n"
        view = memoryview(line)
        while view:
            view = view[os.write(self._handle, view) :]
        self._dirty = True

    def sync(self) -> None:
        if self._dirty:
            os.fsync(self._handle)
            self._dirty = False
