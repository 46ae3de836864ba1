"""Replace attributes of another library after checking its version and source. Replacements can be undone."""

from __future__ import annotations

import hashlib
import importlib.metadata
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

__all__ = ["Framework", "Patch", "Source", "UnsupportedVersion", "Value", "active_patch", "digest"]

MARK = "kdkernels_patch"
"""Attribute of a replacement function that refers to its patch."""
_ABSENT = object()


class UnsupportedVersion(RuntimeError):
    """The installed version of a library was not tested with the patch."""


@dataclass(frozen=True)
class Source:
    """A function of another library that a patch depends on.

    Attributes:
        owner: the class or module of the function.
        name: its name in ``owner``.
        digests: digests of the source texts that the patch was tested with.
    """

    owner: Any
    name: str
    digests: tuple[str, ...]

    @property
    def label(self) -> str:
        return f"{getattr(self.owner, '__name__', self.owner)}.{self.name}"


@dataclass(frozen=True)
class Framework:
    """A library and the range of versions that its patch was tested with, inclusive."""

    distribution: str
    oldest: str
    newest: str

    @property
    def version(self) -> str:
        """Return the installed version.

        Raises:
            ModuleNotFoundError: the library is not installed.
        """
        try:
            return importlib.metadata.version(self.distribution)
        except importlib.metadata.PackageNotFoundError:
            raise ModuleNotFoundError(
                f"{self.distribution} is not installed: install {self.distribution}=={self.newest}", name=self.distribution
            ) from None

    @property
    def range(self) -> str:
        return self.oldest if self.oldest == self.newest else f"{self.oldest} to {self.newest}"

    def check_version(self, force: bool = False) -> None:
        """Check that the installed version is in the range.

        Raises:
            UnsupportedVersion: it is outside, and ``force`` is not set.
        """
        from packaging.version import Version

        if not force and not Version(self.oldest) <= Version(self.version) <= Version(self.newest):
            raise UnsupportedVersion(
                f"{self.distribution} {self.version} is installed, and this patch was checked with {self.range}: install one of these, "
                "or use patch(force=True) and compare a few steps with the unpatched trainer"
            )

    def check_sources(self, sources: Sequence[Source], force: bool = False) -> None:
        """Check that the library's source texts are those that the patch was tested with.

        Raises:
            UnsupportedVersion: a function is missing (even with ``force``), or its text differs.
        """
        for source in sources:
            function = getattr(source.owner, source.name, None)
            if function is None:
                raise UnsupportedVersion(f"{self.distribution} {self.version} has no {source.label}; this patch knows {self.range}")
            if not force and digest(function) not in source.digests:
                raise UnsupportedVersion(
                    f"{source.label} of {self.distribution} {self.version} is not the one of {self.range} that this patch was written "
                    "against (a fork, or a change by another patch?): undo the change, or use patch(force=True) and compare a few steps"
                )


def digest(function: Callable[..., Any]) -> str:
    """Return 16 hexadecimal digits of the SHA-256 of a function's source text, decorators included."""
    return hashlib.sha256(inspect.getsource(inspect.unwrap(function)).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Value:
    """An attribute to set: ``owner.name = value``."""

    owner: Any
    name: str
    value: Any


class Patch:
    """A set of replaced attributes. A ``with`` block undoes it at its end. ``str(patch)`` describes it in one line."""

    def __init__(self, description: str, values: Sequence[Value], options: object = None) -> None:
        """Set every value. Functions are marked, so that :func:`active_patch` can find the patch."""
        self.description = description
        self.options = options
        self._values = list(values)
        self._originals = [vars(value.owner).get(value.name, _ABSENT) for value in values]
        for value in values:
            if callable(value.value):
                setattr(value.value, MARK, self)
            setattr(value.owner, value.name, value.value)
        self.active = True

    def undo(self) -> None:
        """Restore the original attributes. A second call does nothing.

        Raises:
            RuntimeError: one of the attributes was replaced again after this patch.
        """
        if not self.active:
            return
        for value in self._values:
            if vars(value.owner).get(value.name, _ABSENT) is not value.value:
                raise RuntimeError(f"{value.name} has been replaced again after this patch: undo the later patch first")
        for value, original in zip(self._values, self._originals, strict=True):
            if original is _ABSENT:
                delattr(value.owner, value.name)
            else:
                setattr(value.owner, value.name, original)
        self.active = False

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.undo()

    def __str__(self) -> str:
        return self.description

    def __repr__(self) -> str:
        return f"<{self.description}{'' if self.active else ' (undone)'}>"


def active_patch(owner: Any, name: str, options: object) -> Patch | None:
    """Return the patch that has replaced ``owner.name``, or None.

    Raises:
        ValueError: the patch has other options.
    """
    patch = getattr(getattr(owner, name, None), MARK, None)
    if not isinstance(patch, Patch) or not patch.active:
        return None
    if patch.options != options:
        raise ValueError(f"{name} is patched already, with {patch.options}, not {options}: call undo() of that patch first")
    return patch
