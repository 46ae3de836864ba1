"""What a command's option names: models and tokenizers of transformers, in a folder or on the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def load(cls: Any, role: str, path: str, **options: Any) -> Any:
    """What ``cls.from_pretrained`` makes of a folder or hub name. Code that comes with a model is never run.

    Raises:
        ValueError: naming the option, ``--role``.
    """
    if not Path(path).exists() and (path.startswith((".", "/", "~")) or path.count("/") > 1):
        raise ValueError(f"--{role} {path}: no such folder")
    try:
        return cls.from_pretrained(path, trust_remote_code=False, **options)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ValueError(f"--{role} {path}: can't be loaded by {cls.__name__}: {' '.join(str(error).split())[:300]}") from error
