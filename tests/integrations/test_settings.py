"""The section for a teacher in LLaMA-Factory's and Axolotl's files."""

from __future__ import annotations

import pytest

from kdkernels import JSD
from kdkernels.integrations.settings import Settings


def test_a_section_is_read() -> None:
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
def test_a_wrong_section_is_refused(section: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Settings.read(section)
