"""The Axolotl plugin in Axolotl's plugin manager and configuration, with a transformers Trainer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
from patched import ARGUMENTS, BUDGET, ROWS, encoded, needs, run
from training import make_model, make_tokenizer

pytestmark = [needs("axolotl"), pytest.mark.filterwarnings("ignore")]
VOCAB = 192
PLUGIN = "kdkernels.integrations.axolotl.DistillationPlugin"


@pytest.fixture
def manager() -> Iterator[Any]:
    from axolotl.integrations.base import PluginManager

    plugins = PluginManager.get_instance()
    plugins.register(PLUGIN)
    yield plugins
    plugins.plugins.clear()


def build(folder: Path) -> Any:
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

    args = TrainingArguments(**{**ARGUMENTS, "output_dir": str(folder)})
    model = make_model(16, 1, VOCAB, seed=1, initializer_range=0.2)
    return Trainer(model, args, data_collator=DataCollatorForSeq2Seq(make_tokenizer()), train_dataset=encoded())


def test_plugin_distils_like_the_patched_trainer(manager: Any, tmp_path: Path) -> None:
    from axolotl.utils.dict import DictDefault

    from kdkernels.integrations.transformers import distill

    teacher = make_model(24, 1, VOCAB, seed=2, initializer_range=0.4)
    teacher.save_pretrained(tmp_path / "teacher")
    expected = build(tmp_path)
    distill(expected, teacher, divergence="jsd", temperature=2.0)
    manager.cfg = DictDefault(
        {"kdkernels": {"teacher": str(tmp_path / "teacher"), "divergence": "jsd", "temperature": 2.0, "memory_budget": BUDGET}}
    )
    trainer = build(tmp_path)
    manager.post_trainer_create(manager.cfg, trainer)
    actual, expected_run = run(trainer, VOCAB), run(expected, VOCAB)
    assert actual.losses == pytest.approx(expected_run.losses, rel=1e-5)
    assert actual.rows_of_logits <= ROWS


def test_axolotl_run_without_the_section_is_unchanged(manager: Any, tmp_path: Path) -> None:
    from axolotl.utils.dict import DictDefault

    trainer = build(tmp_path)
    manager.post_trainer_create(DictDefault({}), trainer)
    assert "compute_loss" not in vars(trainer)


def test_configuration_accepts_a_valid_section_only(manager: Any, tmp_path: Path) -> None:
    from axolotl.integrations.config import merge_input_args
    from pydantic import ValidationError

    _, config = merge_input_args()
    assert "kdkernels" in config.model_fields
    minimal = {"base_model": str(tiny.save(tmp_path)), "datasets": [{"path": "x", "type": "alpaca"}], "micro_batch_size": 1}
    minimal |= {"gradient_accumulation_steps": 1, "learning_rate": 1e-3}
    assert config.model_validate({**minimal, "kdkernels": {"teacher": "big"}}).kdkernels == {"teacher": "big"}
    with pytest.raises(ValidationError, match=r"kdkernels\.techer is unknown"):
        config.model_validate({**minimal, "kdkernels": {"techer": "big"}})


def test_unknown_version_of_axolotl_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    from kdkernels.integrations import UnsupportedVersion
    from kdkernels.integrations.axolotl import DistillationPlugin

    monkeypatch.setattr("importlib.metadata.version", lambda name: "99.0")
    with pytest.raises(UnsupportedVersion, match=r"axolotl 99\.0 .* 0\.19\.0"):
        DistillationPlugin()
