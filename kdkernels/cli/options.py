"""Options that several commands share. This module must not import torch, so that ``--help`` is fast.

A command can take a group of options as one dataclass argument. ``grouped`` presents the dataclass's fields to typer as options.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from enum import Enum
from typing import Any, get_type_hints

__all__ = ["COLUMNS", "DIVERGENCE", "Device", "grouped"]

COLUMNS = "Column names of a row's fields, such as prompt=question,response=answer."
DIVERGENCE = "A name such as forward_kl, reverse_kl or jsd; the error for an unknown name lists all."
"""Help of ``--divergence``: the names are defined in ``kdkernels.divergences``, which imports torch."""


class Device(str, Enum):
    """Device that a command runs on."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"

    def resolved(self) -> str:
        """Return ``cpu`` or ``cuda``; for ``auto``, ``cuda`` if torch sees a CUDA device."""
        if self is not Device.auto:
            return str(self.value)
        import torch

        return "cuda" if torch.cuda.is_available() else "cpu"


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """Return ``command`` with every dataclass parameter replaced by an option for each of its fields."""
    hints = get_type_hints(command, include_extras=True)
    shown: dict[str, inspect.Parameter] = {}
    groups: dict[str, tuple[type, list[str]]] = {}

    def show(name: str, hint: Any, default: Any) -> None:
        if name in shown:
            raise TypeError(f"{command.__name__} has the option {name} twice")
        shown[name] = inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hint)

    for parameter in inspect.signature(command).parameters.values():
        hint = hints[parameter.name]
        if not (isinstance(hint, type) and dataclasses.is_dataclass(hint)):
            show(parameter.name, hint, parameter.default)
            continue
        types = get_type_hints(hint, include_extras=True)
        fields = dataclasses.fields(hint)
        for field in fields:
            show(field.name, types[field.name], inspect.Parameter.empty if field.default is dataclasses.MISSING else field.default)
        groups[parameter.name] = hint, [field.name for field in fields]

    @functools.wraps(command)
    def flat(**options: Any) -> None:
        records = {name: cls(**{field: options.pop(field) for field in fields}) for name, (cls, fields) in groups.items()}
        command(**records, **options)

    flat.__signature__ = inspect.Signature(list(shown.values()))  # type: ignore[attr-defined]
    flat.__annotations__ = {name: parameter.annotation for name, parameter in shown.items()}
    return flat
