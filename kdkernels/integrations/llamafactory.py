"""LLaMA-Factory: a ``kdkernels:`` section in the YAML file of an SFT run adds a teacher.

LLaMA-Factory does not have logit distillation. Only the loss of its SFT trainer is replaced::

    kdkernels:
      teacher: path/to/teacher
      divergence: jsd(beta=0.3)
      temperature: 2.0
      ce_weight: 0.5

``python -m kdkernels.integrations.llamafactory train run.yaml`` is ``llamafactory-cli train run.yaml`` with the section.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

from .patches import Framework, Patch, Source, Value, active_patch
from .settings import SECTION, Settings

__all__ = ["main", "patch"]

FRAMEWORK = Framework("llamafactory", "0.9.5", "0.9.5")


def patch(*, force: bool = False) -> Patch:
    """Let LLaMA-Factory's training read a ``kdkernels`` section. A run without the section is not changed.

    Args:
        force: patch untested versions of LLaMA-Factory.

    Raises:
        ModuleNotFoundError: LLaMA-Factory is not installed.
        UnsupportedVersion: this version of LLaMA-Factory was not tested.

    Example::

        from kdkernels.integrations import llamafactory

        llamafactory.patch()
        run_exp(arguments)  # of llamafactory.train.tuner; arguments["kdkernels"] = {"teacher": ...}
    """
    FRAMEWORK.check_version(force)
    tuner = importlib.import_module("llamafactory.train.tuner")
    workflow = importlib.import_module("llamafactory.train.sft.workflow")
    if (patched := active_patch(tuner, "_training_function", None)) is not None:
        return patched
    trainer = workflow.CustomSeq2SeqTrainer
    FRAMEWORK.check_sources(
        (
            Source(tuner, "_training_function", ("73d6585e4355a03a",)),
            Source(trainer, "__init__", ("f5b5f7b4eae68ceb",)),
            Source(trainer, "compute_loss", ("c1102bcaea311b8c",)),
        ),
        force,
    )
    description = f"LLaMA-Factory {FRAMEWORK.version}: a {SECTION} section in the YAML file distils from its teacher, without [N, V] logits"
    return Patch(description, [Value(tuner, "_training_function", _training_function(tuner, trainer, force))])


def _training_function(tuner: Any, trainer: Any, force: bool) -> Any:
    original, initialise = tuner._training_function, trainer.__init__

    def training_function(config: dict[str, Any]) -> None:
        arguments = config["args"]
        if not isinstance(arguments, dict) or SECTION not in arguments:
            original(config)
            return
        settings = Settings.read(arguments[SECTION])
        if (stage := arguments.get("stage", "sft")) != "sft":
            raise ValueError(f"{SECTION} needs stage: sft, but the stage is {stage}: change the stage, or remove the section")

        def initialise_and_distil(self: Any, *args: Any, **kwargs: Any) -> None:
            initialise(self, *args, **kwargs)
            settings.apply(self, force)

        rest = {name: value for name, value in arguments.items() if name != SECTION}
        with Patch("the teacher of one run", [Value(trainer, "__init__", initialise_and_distil)]):
            original({**config, "args": rest})

    return training_function


def main() -> None:
    """Run ``llamafactory-cli`` with the patch. Under torchrun with only a YAML file as argument, run its training."""
    patch()
    if len(sys.argv) > 1 and sys.argv[1].endswith((".yaml", ".yml", ".json")):
        importlib.import_module("llamafactory.train.tuner").run_exp()
    else:
        importlib.import_module("llamafactory.cli").main()


if __name__ == "__main__":
    main()
