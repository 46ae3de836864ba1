"""Load models, tokenizers and caches from paths. Errors name the option."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ...data.agreement import check_templates, check_tokenizers
from ...data.rows import check_fits
from ...teachers.adapters import find_adapter, quiet
from ...teachers.jobs import device_of
from ...teachers.loading import has_tokenizer, load, skeleton_of
from ...trainer.hooks import loaded_whole
from ...trainer.setup import seeded
from .options import MemoryOptions
from .settings import Settings, TrainError
from .streamed import first_rows

if TYPE_CHECKING:
    from ...teachers.cache import CachedTeacher

__all__ = ["cache_of", "check_data", "model_of", "student_of", "student_skeleton", "teachers_of", "tokenizer_of"]


def tokenizer_of(settings: Settings) -> Any:
    """Return the student's tokenizer after checking that the teachers' agree. A folder without a tokenizer counts as agreeing."""
    having = [(role, path) for role, path, _ in settings.models if has_tokenizer(path) or find_adapter(role, path) is not None]
    if not having:
        raise TrainError(f"--student {settings.student}: the folder has no tokenizer: save it there with tokenizer.save_pretrained")
    tokenizer = load(AutoTokenizer, *having[0])
    for role, path in having[1:]:
        other = load(AutoTokenizer, role, path)
        check_tokenizers(tokenizer, other)
        check_templates(tokenizer, other, first_rows(settings) if settings.rows.streaming else settings.sources, settings.args.columns)
    return tokenizer


def cache_of(settings: Settings, tokenizer: Any) -> CachedTeacher:
    """Return the cache after checking that it is complete and was made with this tokenizer."""
    from ...teachers.cache import CacheError, open_cache

    try:
        return open_cache(str(settings.cache), tokenizer)
    except CacheError as error:
        raise TrainError(f"--cache {settings.cache}: {error}") from error


def check_data(settings: Settings) -> None:
    """Check that data fits in memory unless it is streamed, and that a cache of text is complete.

    Raises:
        DataError, TrainError: it is not.
    """
    check_fits([*settings.eval_data, *([] if settings.rows.streaming else settings.sources)])
    from ...teachers.cache import CacheError, read_text
    from ...teachers.cache.manifest import MANIFEST

    for name, path in (*(("data", path) for path in settings.sources), *(("eval-data", path) for path in settings.eval_data)):
        if (Path(path) / MANIFEST).is_file():
            try:
                read_text(path)
            except CacheError as error:
                raise TrainError(f"--{name} {path}: {error}") from error


def model_of(role: str, path: str, dtype: str, **options: Any) -> Any:
    """Load a model with its weights, in its saved dtype for "auto". ``options`` are passed to ``load``."""
    with loaded_whole() if role == "teacher" else nullcontext():
        return load(AutoModelForCausalLM, role, path, dtype=dtype if dtype == "auto" else getattr(torch, dtype), **options)


def teachers_of(settings: Settings) -> list[Any]:
    """Load the teachers with their weights, quantised and placed according to the settings."""
    memory = settings.memory
    options = _options(settings, memory.teacher_quantization, _placed(memory))
    return [model_of(*model, **options) for model in settings.models[1:]]


def _options(settings: Settings, quantization: str | None, device_map: Any) -> dict[str, Any]:
    if quantization is not None and device_map is None and settings.args.device.type == "cuda":
        device_map = {"": settings.args.device}  # quantise on the device where it runs
    options = {"quantization": quantization, "device_map": device_map}
    return {name: value for name, value in options.items() if value is not None}


def _placed(memory: MemoryOptions) -> Any:
    """Move a teacher to its device.

    Raises:
        TrainError: torch does not have this device.
    """
    if memory.teacher_device is not None:
        try:
            device_of(memory.teacher_device)
        except ValueError as error:
            raise TrainError(f"--teacher-device {str(error).removeprefix('--device ')}") from None
    return memory.placement()


def student_skeleton(settings: Settings) -> Any:
    """Return the student without weights, with its adapter.

    Raises:
        ValueError, TrainError: the adapter is for another model, or the adapter options do not match this student.
    """
    role, path, _ = settings.models[0]
    model, options = skeleton_of(role, path), settings.adapter
    adapter, memory = find_adapter(role, path), settings.memory
    _placed(memory)
    if memory.student_quantization is not None and adapter is None and options.lora_r is None:
        raise TrainError(f"--student-quantization {memory.student_quantization}: quantised weights can't be trained. Add --lora-r 16")
    if used := [n for n in ("quantization", "device", "device_map") if getattr(memory, f"teacher_{n}") and not settings.teacher]:
        raise TrainError(f"--teacher-{used[0].replace('_', '-')}, but no --teacher runs: leave it out")
    if options.lora_r is None:
        if options.merge and adapter is None:
            raise TrainError("--merge, but no adapter is trained: give --lora-r, or an adapter as the --student")
        return model
    if adapter is not None:
        raise TrainError(
            f"--lora-r with --student {path}, which is an adapter already: leave the --lora options to train on it, or merge it first "
            f"(kdkernels merge {path} --out DIR)"
        )
    return with_lora(model, settings)


def student_of(settings: Settings, folder: Path | None = None) -> Any:
    """Return the model to train; for a finished training, the model of its last checkpoint, ``folder``."""
    role, path, dtype = settings.models[0]
    options = _options(settings, settings.memory.student_quantization, None)
    model = model_of(role, path if folder is None else str(folder), dtype, trainable=True, **options)
    return model if folder is not None or settings.adapter.lora_r is None else with_lora(model, settings)


def with_lora(model: Any, settings: Settings) -> Any:
    """Return ``model`` with a new LoRA, whose initial weights depend only on the seed.

    Raises:
        TrainError: the options do not match the model, for example a layer name that does not exist.
    """
    import peft

    config = settings.adapter.config()
    with seeded(settings.args.seed), quiet():
        try:
            adapted = peft.get_peft_model(model, config)
        except ValueError as error:
            raise TrainError(f"--lora-target-modules {' '.join(settings.adapter.lora_target_modules)}: {error}") from None
    config.base_model_name_or_path = settings.student
    config.revision = None if Path(settings.student).is_dir() else getattr(model.config, "_commit_hash", None)
    return adapted
