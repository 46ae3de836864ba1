"""Write files that survive a ``kill -9``, and decide which files and folders kdkernels may replace or delete.

A marker lists the files and folders that kdkernels made: ``.kdkernels`` in a folder, ``.NAME.kdkernels`` beside a file ``NAME``. Its first
line has the kind of the contents. Each further line names one file or folder, and is written before that is created. All other files
belong to the user.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
import stat
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path, PurePath
from types import TracebackType
from typing import Any

from .errors import UserError

__all__ = [
    "MARKER", "FileError", "Lines", "Lock", "Output", "canonical", "digest", "digest_file", "line_of", "sample_digest", "write_jsonl",
    "write_whole",
]  # fmt: skip

MARKER = ".kdkernels"
_BLOCK = 1 << 20
WHOLE_DIGEST = 256
"""Maximum number of blocks of 1 MiB that ``sample_digest`` reads."""
_ESCAPED = re.compile("[\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Characters that JSON does not escape, but that control a terminal or that UTF-8 cannot encode."""


class FileError(UserError):
    """A folder or file was not made by kdkernels, is locked by another process, or is damaged."""


def canonical(value: Any) -> bytes:
    """Return the canonical JSON of a value: sorted keys, no spaces, ASCII. Types that JSON lacks (dates, bytes) become text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), default=str).encode()


def digest(value: Any) -> str:
    """Return the sha256 of a value's canonical JSON."""
    return hashlib.sha256(canonical(value)).hexdigest()


def digest_file(path: Path) -> str:
    """Return the sha256 of a file's bytes."""
    content = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            content.update(block)
    return content.hexdigest()


def sample_digest(path: Path) -> str:
    """Return the sha256 of a file's size and content; for a large file, of ``WHOLE_DIGEST`` evenly spaced blocks, including both ends."""
    size = path.stat().st_size
    blocks = -(-size // _BLOCK)
    content = hashlib.sha256(str(size).encode())
    chosen: Sequence[int] = range(blocks)
    if blocks > WHOLE_DIGEST:
        chosen = [i * (blocks - 1) // (WHOLE_DIGEST - 1) for i in range(WHOLE_DIGEST)]
    with path.open("rb") as file:
        for block in chosen:
            file.seek(block * _BLOCK)
            content.update(file.read(_BLOCK))
    return content.hexdigest()


def sync_folder(folder: Path) -> None:
    """Make renames in ``folder`` survive a power cut. Not necessary on Windows, which cannot open folders."""
    if sys.platform == "win32":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_whole(path: Path, write: Callable[[Path], object], ready: Callable[[Path], object] = lambda temporary: None) -> None:
    """Write a temporary file beside ``path`` with ``write``, then atomically replace ``path`` by it.

    Args:
        ready: called with the temporary file after it is on disk, before it replaces ``path``.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.unfinished")
    os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))  # never an existing file, never through a link
    try:
        write(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        ready(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def line_of(row: Mapping[str, Any], **options: Any) -> str:
    """Return a row's JSON in one line. Control characters, line separators and halves of surrogate pairs are escaped.

    Types that JSON lacks (dates, bytes) become text. ``options`` are those of ``json.dumps``.
    """
    text = json.dumps(row, ensure_ascii=False, default=str, **options)
    return _ESCAPED.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write all rows atomically: a killed process leaves no incomplete file. Types that JSON lacks become text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda temporary: fill_jsonl(temporary, rows))


def fill_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows to an existing or new file."""
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(line_of(row) + "\n" for row in rows)


class Lock:
    """Lock a file of kdkernels for this process, as a context manager. The system releases the lock when the process ends in any way.

    The file is created if it does not exist, and removed on exit if it is empty.

    Raises:
        FileError: another process has locked ``what``, or the path is a symbolic link, a hard link or not a regular file.
    """

    def __init__(self, path: Path, what: str) -> None:
        self.path, self._what, self.handle = path, what, -1

    def __enter__(self) -> Lock:
        import fcntl  # POSIX only; imported here, so that commands that only read work elsewhere

        while True:
            handle = _open_own(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                os.close(handle)
                raise FileError(f"{self._what} is in use by another process: wait for it to end, or give another place") from None
            if _is_at(self.path, handle):
                self.handle = handle
                return self
            os.close(handle)  # the previous holder removed it after we opened it, before we locked it

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.handle >= 0:
            if not os.fstat(self.handle).st_size and _is_at(self.path, self.handle):
                self.path.unlink()
            os.close(self.handle)
            self.handle = -1


class Output:
    """The output of one command, in a folder or a file: a context manager with the marker and a lock that ends with the process.

    If no file was made, the marker and the folders that were created for it are removed on exit.

    Args:
        path: the folder, or with ``beside`` the file.
        kind: the command that makes the contents.
        beside: ``path`` is a file; the marker is beside it, and names are those of files in the same folder.
        adopt: called if there is no marker. Returns the names of files that an earlier version of kdkernels made.

    Raises:
        FileError: another process has locked the output, it is the output of another command, or another file has the marker's name.
    """

    def __init__(self, path: Path, kind: str, *, beside: bool = False, adopt: Callable[[], Iterable[str]] = tuple) -> None:
        self.path, self.kind, self._adopt = path, kind, adopt
        self.folder = path.parent if beside else path
        self._lock = Lock(path.with_name(f".{path.name}{MARKER}") if beside else path / MARKER, str(path))
        self._sound = False
        self._created: list[Path] = []
        self._made: dict[str, set[str]] = {}

    def __enter__(self) -> Output:
        self._created = _make_folders(self.folder)
        try:
            self._lock.__enter__()
            self._read()
            self._sound = True
        except BaseException:
            self._leave()
            raise
        for name in self._made:
            self._drop_unfinished(name)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._leave()

    def _read(self) -> None:
        """Read the names in the marker; write its first line if it is new."""
        handle, marker = self._lock.handle, self._lock.path
        content = b"".join(iter(lambda: os.read(handle, _BLOCK), b""))
        whole, _, torn = content.rpartition(b"\n")
        header = canonical({"kdkernels": 1, "kind": self.kind})
        if not whole:
            if not header.startswith(torn):
                raise FileError(f"{marker} is not a marker of kdkernels: move it away, or give another place")
            os.ftruncate(handle, 0)
            adopted = [name for name in self._adopt() if os.path.lexists(self.folder / name)]
            self._note(header)
            for name in adopted:
                self._name(name)
            return
        lines: list[Any] = []
        with suppress(ValueError):
            lines = [json.loads(line) for line in whole.split(b"\n")]
        if not lines or not all(isinstance(line, dict) for line in lines) or lines[0].get("kdkernels") != 1:
            raise FileError(f"{marker} is not a marker of kdkernels, or is damaged: move it away, or give another place")
        if lines[0].get("kind") != self.kind:
            raise FileError(f"{self.path} holds the output of `kdkernels {lines[0].get('kind')}`: give another place")
        if torn:
            os.ftruncate(handle, len(content) - len(torn))
        for line in lines[1:]:
            self._made.setdefault(str(line.get("made")), set()).update([line["sha256"]] if "sha256" in line else [])

    def _note(self, line: bytes) -> None:
        _write_all(self._lock.handle, line + b"\n")
        os.fsync(self._lock.handle)

    def _name(self, name: str, sha256: str = "") -> None:
        """Add a name, and the sha256 of its future content, to the marker, unless they are already there."""
        known = self._made.get(name)
        if known is None or (sha256 and sha256 not in known):
            self._made.setdefault(name, set()).update([sha256] if sha256 else [])
            self._note(canonical({"made": name, **({"sha256": sha256} if sha256 else {})}))

    def _leave(self) -> None:
        if self._sound and not self._made:
            os.ftruncate(self._lock.handle, 0)
        self._lock.__exit__(None, None, None)
        for folder in reversed(self._created):
            with suppress(OSError):  # not empty
                folder.rmdir()

    def _drop_unfinished(self, name: str) -> None:
        """Remove temporary files that a killed writer of ``name`` left."""
        path = self.folder / name
        unfinished = re.compile(re.escape(f".{path.name}.") + r"[0-9a-f]{16}\.unfinished")
        if path.parent.is_dir() and not _links_below(self.folder, name):
            for other in path.parent.iterdir():
                if unfinished.fullmatch(other.name) and other.is_file() and not other.is_symlink():
                    other.unlink()

    def __contains__(self, name: str) -> bool:
        """Return whether the marker lists the name, and the file or folder is still the one that was made."""
        path = self.folder / name
        if name not in self._made or _links_below(self.folder, name) or path.is_symlink() or not (path.is_file() or path.is_dir()):
            return False
        return not self._made[name] or (path.is_file() and digest_file(path) in self._made[name])

    def check(self, names: Iterable[str], inputs: Mapping[str, str | Path | None] | None = None) -> None:
        """Check that files of these names may be written.

        Args:
            inputs: inputs of the command, by the option that names them.

        Raises:
            FileError: a file with such a name was not made by kdkernels or was changed since, or an input is such a file or its folder.
        """
        for name in names:
            path = self.folder / name
            if PurePath(name).is_absolute() or ".." in PurePath(name).parts:
                raise FileError(f"{name} is not the name of a file in {self.folder}")
            if (os.path.lexists(path) or _links_below(self.folder, name)) and name not in self:
                changed = ", or was changed since" if self._made.get(name) else ""
                raise FileError(f"{path} is not of this command{changed}: it would be overwritten. Move it away, or give another place")
            for option, source in (inputs or {}).items():
                if source is not None and _within(Path(source), path):
                    raise FileError(f"{option} {source} is what this command writes ({path}): it would be overwritten. Give another place")
                if (
                    source is not None
                    and option.endswith("data")
                    and Path(source).is_dir()
                    and path.parent.resolve() == Path(source).resolve()
                ):
                    raise FileError(f"{path} is in the folder of {option}: the next run would read it as input. Give another place")

    def claim(self, name: str) -> Path:
        """Add the name of a file or folder to the marker before it is made, and return its path.

        Raises:
            FileError: see ``check``.
        """
        self.check([name])
        self._name(name)
        return self.folder / name

    def write(self, name: str, write: Callable[[Path], object], *, keep_edits: bool = False) -> Path:
        """Write a file atomically, see ``write_whole``.

        Args:
            keep_edits: record the sha256 of the content, so that later calls do not overwrite the user's changes to the file.
        """
        path = self.claim(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, write, (lambda temporary: self._name(name, digest_file(temporary))) if keep_edits else lambda temporary: None)
        return path

    def write_rows(self, name: str, rows: Iterable[Mapping[str, Any]]) -> Path:
        """Write rows atomically, see ``write_jsonl``. The user's changes to them are not overwritten."""
        return self.write(name, lambda temporary: fill_jsonl(temporary, rows), keep_edits=True)

    def remove(self, name: str) -> None:
        """Delete a file or folder if kdkernels made it."""
        path = self.folder / name
        if name not in self:
            return
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


class Lines:
    """A JSONL file for appending, as a context manager: one object per line, each written by one call.

    After ``append``, the operating system has the line, so that a killed process loses none. After ``sync`` it is on disk and survives a
    power cut. An incomplete last line is removed on opening.

    Args:
        recognize: returns whether the first line of a file without a marker shows that kdkernels wrote it.

    Raises:
        FileError: another process has locked the file, kdkernels did not make it, or a line other than the last is not a JSON object (the
            message names the line).
    """

    def __init__(self, path: Path, recognize: Callable[[Mapping[str, Any]], bool] = lambda line: False) -> None:
        self._path = path
        self._recognize = recognize
        self._output = Output(path, "log", beside=True, adopt=self.unmarked)
        self._handle = -1
        self._dirty = False

    def __enter__(self) -> Lines:
        self._output.__enter__()
        try:
            self._output.claim(self._path.name)
            self._handle = _open_own(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
            os.ftruncate(self._handle, self._whole())
            sync_folder(self._path.parent)
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self.sync()
        finally:
            self._close()

    def _close(self) -> None:
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1
        self._output.__exit__(None, None, None)

    def unmarked(self) -> list[str]:
        """Return the file's name in a list if its first line is recognized, else an empty list."""
        if self._path.is_symlink() or not self._path.is_file():
            return []
        with self._path.open("rb") as file:
            try:
                first = json.loads(file.readline())
            except (ValueError, RecursionError):
                return []
        return [self._path.name] if isinstance(first, dict) and self._recognize(first) else []

    def _whole(self) -> int:
        """Return the number of bytes up to the end of the last complete line."""
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
                except (ValueError, RecursionError):
                    value = None
                if not isinstance(value, dict):
                    raise FileError(
                        f"{self._path.name}, line {number}, is not a JSON object: the file is damaged. Remove the line to continue"
                    )
                yield value

    def append(self, value: dict[str, Any]) -> None:
        """Write a line."""
        _write_all(self._handle, line_of(value, separators=(",", ":")).encode() + b"\n")
        self._dirty = True

    def sync(self) -> None:
        """Write all lines to disk."""
        if self._dirty:
            os.fsync(self._handle)
            self._dirty = False


def _write_all(handle: int, content: bytes) -> None:
    view = memoryview(content)
    while view:
        view = view[os.write(handle, view) :]


def _open_own(path: Path, flags: int) -> int:
    """Open a regular file that is not a link.

    Raises:
        FileError: it is a symbolic link, has a second name (a hard link), or is not a regular file.
    """
    try:
        handle = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o644)
    except OSError as error:
        if path.is_symlink() or path.is_dir():
            raise FileError(f"{path} is not a regular file: move it away, or give another place") from None
        raise error
    status = os.fstat(handle)
    if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
        os.close(handle)
        why = "has a second name (a hard link), which would be changed with it" if stat.S_ISREG(status.st_mode) else "is not a regular file"
        raise FileError(f"{path} {why}: move it away, or give another place")
    return handle


def _is_at(path: Path, handle: int) -> bool:
    try:
        return os.path.samestat(os.lstat(path), os.fstat(handle))
    except FileNotFoundError:
        return False


def _make_folders(folder: Path) -> list[Path]:
    """Create a folder and its parents. Return the created ones, outermost first."""
    created = []
    for part in [*reversed(folder.parents), folder]:
        if part.is_dir():
            continue
        try:
            part.mkdir()
            created.append(part)
        except FileExistsError:
            if not part.is_dir():
                raise NotADirectoryError(f"{part} is not a folder: give another place") from None
    return created


def _links_below(folder: Path, name: str) -> bool:
    """Return whether a folder between ``folder`` and its file ``name`` is a symbolic link."""
    return any((folder / part).is_symlink() for part in PurePath(name).parents if part.name)


def _within(inner: Path, outer: Path) -> bool:
    place, target = outer.parent.resolve() / outer.name, inner.resolve()
    return place == target or place in target.parents
