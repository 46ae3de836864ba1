"""The section ``kdkernels`` in configuration files of LLaMA-Factory and Axolotl."""

from __future__ import annotations

import pytest

from kdkernels import JSD
from kdkernels.integrations.settings import Settings


def test_section_is_read() -> None:
    settings = Settings.read({"teacher": "big", "divergence": "jsd(beta=0.3)", "temperature": 2.0})
    assert settings == Settings("big", divergence=JSD(beta=0.3), temperature=2.0)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("big", "must be a mapping"),
        ({"divergence": "jsd"}, r"kdkernels\.teacher is missing"),
        ({"teacher": "big", "temprature": 2.0}, r"kdkernels\.temprature is unknown; the keys are .*temperature"),
        ({"teacher": "big", "divergence": "jds"}, "'jds' is unknown"),
    ],
)
def test_invalid_section_raises(section: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Settings.read(section)
