"""The output folder of ``kdkernels train``: which files and checkpoints in it are the run's own, and how they are replaced and deleted."""

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
"""Patterns of the files that a model and its tokenizer are saved as."""
MERGED = "merged"
"""Folder of the whole model, where an adapter was trained."""
CARD = "README.md"
"""The model's card, written by peft and for the hub; one of the user's stays."""
UNFINISHED = ".model.unfinished"


def step_of(name: str) -> int | None:
    """The step of a checkpoint by its name, as transformers names them; None for any other name."""
    match = re.fullmatch("checkpoint-(0|[1-9][0-9]*)", name)
    return None if match is None else int(match[1])


def open_output(settings: Settings) -> Output:
    """The folder of a run, to be entered as a context by its first process."""
    out = Path(settings.args.output_dir)
    return Output(out, "train", adopt=lambda: _unmarked(out))


def check_output(output: Output, settings: Settings) -> None:
    """Check that nothing that the run may write or delete belongs to the user.

    Raises:
        TrainError: a file, model or checkpoint that no run of this command made; an input that is in the run's own files.
    """
    names = [path.name for path in sorted(output.folder.iterdir()) if _is_own_name(path.name)]
    names += [MERGED] if settings.adapter.merge else []
    if (strange := [name for name in names if step_of(name) is not None and name not in output]) and RECORD not in names:
        raise TrainError(
            f"--output-dir {output.path} holds checkpoints but no {RECORD}: {strange[0]} is of another program. Give another folder"
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
    """The files and whole checkpoints of a run without a marker, which is known by its record."""
    try:
        settings = json.loads((out / RECORD).read_bytes())["settings"]
        if not {"student", "teacher", "ranks"} <= set(settings):
            return []
    except (OSError, ValueError, KeyError, TypeError):
        return []
    found = [path for path in sorted(out.iterdir()) if _is_own_name(path.name) and not path.is_symlink()]
    return [path.name for path in found if path.is_file() or _has_state(path)]


def begun_checkpoints(output: Output) -> list[str]:
    """The run's own checkpoints that a killed process left unfinished."""
    own = [path for path in output.folder.glob("checkpoint-*") if step_of(path.name) is not None and path.name in output]
    return [path.name for path in own if is_unfinished(path) or not _has_state(path)]


def _has_state(checkpoint: Path) -> bool:
    try:
        return isinstance(json.loads((checkpoint / "trainer_state.json").read_bytes()), dict)
    except (OSError, ValueError):
        return False


class OwnedTrainer(DistillationTrainer):
    """A trainer whose checkpoints are files of the command: named in its marker before they are made, and deleted only if named there.

    Attributes:
        output: None in all processes but the first.
    """

    output: Output | None = None

    def claim_checkpoint(self, folder: Path) -> None:
        if self.output is not None:
            self.output.claim(folder.name)

    def remove_checkpoint(self, folder: Path) -> None:
        if self.output is not None:
            self.output.remove(folder.name)


def save_model(trainer: DistillationTrainer, output: Output | None, out: Path) -> None:
    """Save the model beside its place, then put its files there one by one: an existing model is never half overwritten.

    Args:
        output: None in all processes but the first.
    """
    if output is not None:
        output.claim(UNFINISHED)
        output.remove(UNFINISHED)
    trainer.accelerator.wait_for_everyone()
    folder = out / UNFINISHED
    trainer.save_model(str(folder))
    trainer.accelerator.wait_for_everyone()  # each process adds its random state to the last checkpoint, too
    if output is not None:
        if (adapter := find_adapter("output-dir", str(folder))) is not None:
            (folder / BASE).write_text(describe_base(adapter), encoding="utf-8")
        put_in_place(folder, output)
    trainer.accelerator.wait_for_everyone()


def put_in_place(folder: Path, output: Output) -> None:
    """Move every file of the unfinished ``folder`` to its place in the output, one by one; a card of the user's stays."""
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = file.relative_to(folder).as_posix()
        if name == CARD and os.path.lexists(output.folder / CARD) and CARD not in output:
            continue
        place = output.claim(name)
        place.parent.mkdir(parents=True, exist_ok=True)
        os.replace(file, place)
    output.remove(folder.name)
