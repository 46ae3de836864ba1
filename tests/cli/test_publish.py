"""``--push-to-hub`` with a stub of the hub: which files are pushed, and the model card."""

from __future__ import annotations

from pathlib import Path

import hub
import pytest
from huggingface_hub import ModelCard
from runs import make_home, run_in, summary

HELD_OUT = "held-out.jsonl"
TOKEN = "hf_secret"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_home(tmp_path_factory.mktemp("home"))


def test_the_finished_model_is_pushed_with_a_card(home: Path, tmp_path: Path) -> None:
    out = tmp_path / "small-model"
    options = {"max_steps": 2, "push_to_hub": True, "hub_token": TOKEN, "divergence": "jsd", "eval_data": [str(home / HELD_OUT)]}
    with hub.taking() as server:
        printed = run_in(home, out, **options)
    pushed = server.pushed["me/small-model"]
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md", "training.png"} <= pushed.keys()
    assert not {"run.json", "log.jsonl", "resolved.yaml", "training_args.bin", ".kdkernels"} & pushed.keys()
    assert not any("checkpoint" in name for name in pushed)
    assert pushed["model.safetensors"] == (out / "model.safetensors").read_bytes()
    card = ModelCard(pushed["README.md"].decode())
    assert card.data.to_dict()["library_name"] == "transformers"
    assert "knowledge-distillation" in card.data.tags
    after = summary(out)["after"]
    for words in ("| teacher | teacher |", "| data | train.jsonl |", "jsd", "![losses over steps](training.png)", "| steps | 2 |"):
        assert words in card.text
    assert f"{after['eval_loss']:.4f} |" in card.text
    assert server.tokens == {f"Bearer {TOKEN}"}
    assert not any(str(tmp_path).encode() in content or TOKEN.encode() in content for content in pushed.values())
    assert "pushed: " in printed


def test_adapter_of_a_finished_run_is_pushed_later(home: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run_in(home, out, max_steps=1, lora_r=2)
    with hub.taking() as server:
        printed = run_in(home, out, max_steps=1, lora_r=2, push_to_hub=True, hub_model_id="adapter", hub_token=TOKEN)
    assert "This run is finished" in printed
    pushed = server.pushed["me/adapter"]
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} <= pushed.keys()
    card = ModelCard(pushed["README.md"].decode())
    assert card.data.to_dict()["library_name"] == "peft"
    assert "LoRA, r = 2" in card.text


def test_existing_readme_is_pushed_unchanged(home: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "README.md").write_text("mine\n")
    with hub.taking() as server:
        run_in(home, out, max_steps=1, push_to_hub=True, hub_token=TOKEN)
    assert (out / "README.md").read_text() == "mine\n"
    assert server.pushed["me/out"]["README.md"] == b"mine\n"


def test_refusal_by_the_hub_ends_the_run_before_training(home: Path, tmp_path: Path) -> None:
    with hub.taking(), pytest.raises(ValueError, match=r"--push-to-hub: refused can't be made on the hub: .*hf auth login"):
        run_in(home, tmp_path / "out", push_to_hub=True, hub_model_id="refused", hub_token=TOKEN)
    assert not (tmp_path / "out" / "run.json").exists()
    with pytest.raises(ValueError, match="--hub-strategy checkpoint: checkpoints are not pushed"):
        run_in(home, tmp_path / "out", push_to_hub=True, hub_strategy="checkpoint", hub_token=TOKEN)
