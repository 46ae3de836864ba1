"""The output folder of ``kdkernels train``: track the files and checkpoints of the run, and replace and delete only those."""

from __future__ import annotations

import json
import os
import re
from fnmatch import fnmatchcase
from pathlib import Path

from ...support.files import FileError, Output
from ...teachers.adapters import BASE, describe_base, find_adapter
from ...trainer.checkpoints import is_unfinished
from ...trainer.trainer import DistillationTrainer
from .settings import RESOLVED, Settings, TrainError

__all__ = [
    "CARD",
    "FIGURE",
    "LOG",
    "MERGED",
    "MODEL_FILES",
    "RECORD",
    "SUMMARY",
    "OwnedTrainer",
    "begun_checkpoints",
    "check_output",
    "open_output",
    "put_in_place",
    "save_model",
    "step_of",
]

RECORD, SUMMARY, FIGURE, LOG = "run.json", "summary.json", "training.png", "log.jsonl"
MODEL_FILES = (
    "config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json", "pytorch_model*", "adapter_config.json",
    "adapter_model.*", "base_model.json", "projector.safetensors", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*",
    "merges.txt", "spiece.model", "chat_template*", "training_args.bin",
)  # fmt: skip
"""Patterns of the files of a saved model and tokenizer."""
MERGED = "merged"
"""Folder of the merged model, if an adapter was trained."""
CARD = "README.md"
"""The model card, written by peft and for the hub. A card written by the user is not replaced."""
UNFINISHED = ".model.unfinished"


def step_of(name: str) -> int | None:
    """Return the step of a folder named like transformers' checkpoints; None for any other name."""
    match = re.fullmatch("checkpoint-(0|[1-9][0-9]*)", name)
    return None if match is None else int(match[1])


def open_output(settings: Settings) -> Output:
    """Return the folder of a run, a context for its first process."""
    out = Path(settings.args.output_dir)
    return Output(out, "train", adopt=lambda: _unmarked(out))


def check_output(output: Output, settings: Settings) -> None:
    """Check that the run will not overwrite or delete files of the user.

    Raises:
        TrainError: a file, model or checkpoint was not created by a run of this command, or an input is among the run's files.
    """
    names = [path.name for path in sorted(output.folder.iterdir()) if _is_own_name(path.name)]
    names += [MERGED] if settings.adapter.merge else []
    if (strange := [name for name in names if step_of(name) is not None and name not in output]) and RECORD not in names:
        raise TrainError(
            f"--output-dir {output.path} holds checkpoints but no {RECORD}: another program wrote {strange[0]}. Give another folder"
        )
    inputs = {f"--{role}": path for role, path, _ in settings.models} | {"--cache": settings.cache}
    for option, paths in (("--data", settings.sources), ("--eval-data", settings.eval_data)):
        for path in paths:
            inputs[option] = path
            _check(output, names, inputs)
    _check(output, names, inputs)


def _check(output: Output, names: list[str], inputs: dict[str, str | None]) -> None:
    try:
        output.check(names, inputs)
    except FileError as error:
        raise TrainError(f"--output-dir {output.path}: {error}") from None


def _is_own_name(name: str) -> bool:
    return name in (RECORD, SUMMARY, FIGURE, LOG, RESOLVED) or step_of(name) is not None or any(fnmatchcase(name, p) for p in MODEL_FILES)


def _unmarked(out: Path) -> list[str]:
    """Return files and complete checkpoints of a run that has a record but no marker."""
    try:
        settings = json.loads((out / RECORD).read_bytes())["settings"]
        if not {"student", "teacher", "ranks"} <= set(settings):
            return []
    except (OSError, ValueError, KeyError, TypeError):
        return []
    paths = [path for path in sorted(out.iterdir()) if _is_own_name(path.name) and not path.is_symlink()]
    return [path.name for path in paths if path.is_file() or _has_state(path)]


def begun_checkpoints(output: Output) -> list[str]:
    """Return the run's incomplete checkpoints, left by a killed process."""
    paths = [path for path in output.folder.glob("checkpoint-*") if step_of(path.name) is not None and path.name in output]
    return [path.name for path in paths if is_unfinished(path) or not _has_state(path)]


def _has_state(checkpoint: Path) -> bool:
    try:
        return isinstance(json.loads((checkpoint / "trainer_state.json").read_bytes()), dict)
    except (OSError, ValueError):
        return False


class OwnedTrainer(DistillationTrainer):
    """A trainer that records checkpoints in the output's marker before writing them, and deletes only recorded ones.

    Attributes:
        output: the output folder in the first process; None in the others.
    """

    output: Output | None = None

    def claim_checkpoint(self, folder: Path) -> None:
        if self.output is not None:
            self.output.claim(folder.name)

    def remove_checkpoint(self, folder: Path) -> None:
        if self.output is not None:
            self.output.remove(folder.name)


def save_model(trainer: DistillationTrainer, output: Output | None, out: Path) -> None:
    """Save the model to a temporary folder, then move its files into place one by one, so that no file is half written.

    Args:
        output: the output folder in the first process; None in the others.
    """
    if output is not None:
        output.claim(UNFINISHED)
        output.remove(UNFINISHED)
    trainer.accelerator.wait_for_everyone()
    folder = out / UNFINISHED
    trainer.save_model(str(folder))
    trainer.accelerator.wait_for_everyone()  # each process also adds its random state to the last checkpoint
    if output is not None:
        if (adapter := find_adapter("output-dir", str(folder))) is not None:
            (folder / BASE).write_text(describe_base(adapter), encoding="utf-8")
        put_in_place(folder, output)
    trainer.accelerator.wait_for_everyone()


def put_in_place(folder: Path, output: Output) -> None:
    """Move the files of the temporary ``folder`` into the output one by one. A model card written by the user is not replaced."""
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = file.relative_to(folder).as_posix()
        if name == CARD and os.path.lexists(output.folder / CARD) and CARD not in output:
            continue
        place = output.claim(name)
        place.parent.mkdir(parents=True, exist_ok=True)
        os.replace(file, place)
    output.remove(folder.name)
