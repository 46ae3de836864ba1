"""LLaMA-Factory's command with a teacher in its YAML file, compared with the dense formula in its trainer."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from patched import BUDGET, ROWS, Allocations, lines_for, needs
from torch.nn import functional as F

from kdkernels.integrations import UnsupportedVersion, llamafactory
from kdkernels.integrations.settings import Settings

pytestmark = [needs("llamafactory"), pytest.mark.filterwarnings("ignore")]
SECTION = {"divergence": "reverse_kl", "temperature": 2.0, "ce_weight": 0.5, "memory_budget": BUDGET}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llamafactory")
    tiny.save(path / "student", seed=1)
    tiny.save(path / "teacher", seed=2)
    rows = [
        {"instruction": f"{i} {word}", "input": "", "output": " ".join(tiny.WORDS[: 2 + i % 5])} for i, word in enumerate(tiny.WORDS[:12])
    ]
    (path / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    (path / "dataset_info.json").write_text(json.dumps({"rows": {"file_name": "rows.json"}}), encoding="utf-8")
    return path


def options(folder: Path, output: Path) -> dict[str, Any]:
    return {
        "model_name_or_path": str(folder / "student"), "stage": "sft", "do_train": True, "finetuning_type": "full", "template": "default",
        "dataset": "rows", "dataset_dir": str(folder), "cutoff_len": 64, "output_dir": str(output), "max_steps": 3, "optim": "sgd",
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "learning_rate": 0.1, "lr_scheduler_type": "constant",
        "logging_steps": 1, "max_grad_norm": 0.0, "seed": 3, "report_to": "none", "save_strategy": "no", "use_cpu": True,
        "preprocessing_num_workers": 1, "dataloader_num_workers": 0, "infer_dtype": "float32", "disable_gradient_checkpointing": True,
    }  # fmt: skip


def results(output: Path) -> tuple[list[float], dict[str, torch.Tensor]]:
    from safetensors.torch import load_file

    history = json.loads((output / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry], load_file(output / "model.safetensors")


def dense(teacher: Any) -> Any:
    def compute_loss(self: Any, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        labels = inputs.pop("labels")[:, 1:]
        mask = labels != -100
        z = model(**inputs).logits[:, :-1][mask].float()
        with torch.no_grad():
            u = teacher(**inputs).logits[:, :-1][mask].float()
        log_q, log_p = F.log_softmax(z / 2, -1), F.log_softmax(u / 2, -1)
        distance = 4 * (log_q.exp() * (log_q - log_p)).sum()
        return (distance + 0.5 * F.cross_entropy(z, labels[mask], reduction="sum")) / num_items_in_batch

    return compute_loss


def test_command_distils_like_the_dense_formula(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import yaml
    from llamafactory.train.sft.trainer import CustomSeq2SeqTrainer
    from llamafactory.train.tuner import run_exp

    settings = Settings.read({"teacher": str(folder / "teacher")})
    with monkeypatch.context() as patched:
        patched.setattr(CustomSeq2SeqTrainer, "compute_loss", dense(settings.load_teacher().eval()))
        run_exp(options(folder, tmp_path / "dense"))
    losses, weights = results(tmp_path / "dense")

    file = tmp_path / "run.yaml"
    section = {"teacher": str(folder / "teacher"), **SECTION}
    file.write_text(yaml.safe_dump({**options(folder, tmp_path / "fused"), "kdkernels": section}), encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["llamafactory-cli", "train", str(file)])
    vocabulary = len(tiny.tokenizer())
    try:
        with Allocations(vocabulary) as allocations:
            llamafactory.main()
    finally:
        llamafactory.patch().undo()
    fused_losses, fused_weights = results(tmp_path / "fused")
    assert len(fused_losses) == 3
    assert fused_losses == pytest.approx(losses, rel=1e-5, abs=1e-4)  # some versions log four digits
    assert allocations.rows <= ROWS
    for name, expected in weights.items():
        torch.testing.assert_close(fused_weights[name], expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def test_llamafactory_run_without_the_section_is_unchanged(folder: Path, tmp_path: Path) -> None:
    from llamafactory.train.tuner import run_exp

    run_exp(options(folder, tmp_path / "plain"))
    with llamafactory.patch():
        run_exp(options(folder, tmp_path / "patched"))
    assert results(tmp_path / "patched")[0] == results(tmp_path / "plain")[0]


def test_undo_restores_llamafactory_and_unknown_versions_raise(monkeypatch: pytest.MonkeyPatch) -> None:
    from llamafactory.train import tuner

    before = tuner._training_function
    patch = llamafactory.patch()
    assert llamafactory.patch() is patch
    patch.undo()
    assert tuner._training_function is before
    monkeypatch.setattr("importlib.metadata.version", lambda name: "99.0")
    with pytest.raises(UnsupportedVersion, match=r"llamafactory 99\.0 .* 0\.9\.5"):
        llamafactory.patch()


def test_other_stages_are_refused(folder: Path, tmp_path: Path) -> None:
    from llamafactory.train.tuner import run_exp

    with llamafactory.patch(), pytest.raises(ValueError, match="stage is dpo"):
        run_exp({**options(folder, tmp_path), "stage": "dpo", "kdkernels": {"teacher": "x"}})


def test_documented_lines_for_llamafactory_run(folder: Path, tmp_path: Path) -> None:
    arguments = {**options(folder, tmp_path), "kdkernels": {"teacher": str(folder / "teacher"), **SECTION}}
    try:
        exec(lines_for("LLaMA-Factory"), {"arguments": arguments})
    finally:
        llamafactory.patch().undo()
    assert len(results(tmp_path)[0]) == 3
