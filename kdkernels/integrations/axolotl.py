"""Axolotl: a plugin that distils from a live teacher.

In the YAML file of a run::

    plugins:
      - kdkernels.integrations.axolotl.DistillationPlugin
    kdkernels:
      teacher: path/to/teacher
      divergence: jsd(beta=0.3)
      temperature: 2.0
"""

from __future__ import annotations

from typing import Any

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel, field_validator

from .patches import Framework
from .settings import SECTION, Settings

__all__ = ["DistillationArgs", "DistillationPlugin"]

FRAMEWORK = Framework("axolotl", "0.19.0", "0.19.0")


class DistillationArgs(BaseModel):
    """The keys that the plugin adds to Axolotl's configuration: :class:`~kdkernels.integrations.settings.Settings` as a mapping."""

    kdkernels: dict[str, Any] | None = None

    @field_validator("kdkernels")
    @classmethod
    def check(cls, section: dict[str, Any] | None) -> dict[str, Any] | None:
        """Raise for an invalid section before models are loaded."""
        if section is not None:
            Settings.read(section)
        return section


class DistillationPlugin(BasePlugin):  # type: ignore[misc]
    """Replace the loss of Axolotl's trainer after the trainer is created.

    Raises:
        UnsupportedVersion: this version of Axolotl was not tested.
    """

    def __init__(self) -> None:
        super().__init__()
        FRAMEWORK.check_version()

    def get_input_args(self) -> str:
        return f"{__name__}.DistillationArgs"

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        """Give the trainer its teacher if the configuration has a ``kdkernels`` section."""
        if cfg.get(SECTION):
            Settings.read(cfg[SECTION]).apply(trainer)
