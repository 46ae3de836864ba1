"""Run students on tasks of lm-eval (https://github.com/EleutherAI/lm-evaluation-harness) for ``kdkernels evaluate --tasks``."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from ..teachers.jobs import device_of
from ..teachers.loading import load
from .comparison import model_of

__all__ = ["run_tasks"]


def run_tasks(
    students: Sequence[str], tasks: Sequence[str], folder: Path | None, limit: int | None, batch_size: int, dtype: str, device: str
) -> list[dict[str, Any]]:
    """Return one row per student and task, with the task's metrics.

    Args:
        folder: folder of further tasks, as YAML files.
        limit: maximum number of examples per task.

    Raises:
        ValueError: lm-eval is not installed, or does not have the task.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError("--tasks needs lm-eval: pip install 'kdkernels[lm-eval]'")
    if folder is not None and not folder.is_dir():
        raise ValueError(f"--tasks-dir {folder}: no such folder")
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=None if folder is None else str(folder))
    if unknown := [name for name in tasks if name not in manager.all_tasks]:
        raise ValueError(f"--tasks {unknown[0]}: lm-eval has no such task{'' if folder is None else f', nor has {folder}'}")
    rows = []
    for student in students:
        model = model_of("student", student, dtype, device_of(device))
        harness = HFLM(pretrained=model, tokenizer=load(AutoTokenizer, "student", student), batch_size=batch_size)
        results = simple_evaluate(
            model=harness, tasks=list(tasks), task_manager=manager, limit=limit, bootstrap_iters=0, log_samples=False
        )["results"]  # fmt: skip
        for task, metrics in results.items():
            values = {name.partition(",")[0]: value for name, value in metrics.items() if isinstance(value, float) and "stderr" not in name}
            rows.append({"task": task, "student": student, **values})
    return sorted(rows, key=lambda row: row["task"])
