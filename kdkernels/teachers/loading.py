"""What a command's option names: models and tokenizers of transformers, in a folder or on the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def load(cls: Any, role: str, path: str, **options: Any) -> Any:
    """The config, tokenizer or model of a folder or hub name, by ``cls.from_pretrained``. Code that comes with a model is never run.

    Raises:
        ValueError: there is none, it can't be loaded, or weights of the model are missing. The message names the option, ``--role``.
    """
    if not Path(path).exists() and (path.startswith((".", "/", "~")) or path.count("/") > 1):
        raise ValueError(f"--{role} {path}: no such folder")
    of_model = cls.__name__.startswith("AutoModel")
    if of_model:  # transformers draws weights at random that it does not find
        options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    try:
        loaded = cls.from_pretrained(path, trust_remote_code=False, **options)
    except MemoryError:
        raise
    except Exception as error:  # transformers raises errors of any type for broken files
        raise ValueError(f"--{role} {path}: can't be loaded by {cls.__name__}: {' '.join(str(error).split())[:300]}") from error
    if not of_model:
        return loaded
    model, report = loaded
    if absent := sorted({*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])}):
        more = f" and {len(absent) - 3} more" if len(absent) > 3 else ""
        raise ValueError(
            f"--{role} {path}: the weights {', '.join(absent[:3])}{more} are missing or not of the shape in config.json, and would be "
            "drawn at random: give the folder of a whole model, as save_pretrained writes it"
        )
    return model
