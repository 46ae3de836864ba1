"""Print as JSON the large modules that each way to start kdkernels imports: ``python imported.py``."""

from __future__ import annotations

import json
import sys

from typer.main import get_command
from typer.testing import CliRunner

import kdkernels
from kdkernels.cli.root import app

LARGE = {
    "accelerate", "datasets", "matplotlib", "numpy", "pandas", "peft", "pyarrow", "safetensors", "tokenizers", "torch", "transformers",
    "triton",
}  # fmt: skip


def paths(command: object, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Return the words of every command and subcommand."""
    subcommands = getattr(command, "commands", {})
    return [path, *(words for name, part in subcommands.items() for words in paths(part, (*path, name)))]


def main() -> None:
    imported: dict[str, list[str]] = {"dir(kdkernels)": dir(kdkernels) and sorted(LARGE & sys.modules.keys())}
    statuses = {}
    commands = paths(get_command(app))
    calls = [("--version",), ("nothing",), ("--nothing",), ("train",), ("recipe", "nothing"), ("cache", "--kind", "all")]
    calls += [(*words, "--help") for words in commands] + [(*words, "--nothing") for words in commands if words != ("train",)]
    completed = "kdkernels recipe soc"
    for words in [*calls, completed]:
        completion = {"_KDKERNELS_COMPLETE": "complete_bash", "COMP_WORDS": completed, "COMP_CWORD": "2"} if words is completed else {}
        result = CliRunner().invoke(app, [] if completion else list(words), env=completion, prog_name="kdkernels")
        label = words if isinstance(words, str) else " ".join(words)
        imported[label], statuses[label] = sorted(LARGE & sys.modules.keys()), [result.exit_code, result.output]
    import torch  # noqa: F401

    before = set(sys.modules)
    from kdkernels import distillation_loss  # noqa: F401

    beside = {name for name in sys.modules.keys() - before if name.partition(".")[0] != "kdkernels"}
    print(json.dumps({"imported": imported, "statuses": statuses, "beside_torch": sorted(beside)}))


main()
