"""Two processes take the same step as one (gloo, on the CPU): DDP with the trainer, FSDP2 with its loss."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from training import make_rows

pytest.importorskip("transformers")
if not torch.distributed.is_available():
    pytest.skip("torch was built without distributed", allow_module_level=True)

from safetensors.torch import load_file
from training_ranks import make_trainer, step

SUPPORT = Path(__file__).parents[1] / "support"


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Run two processes and return their gradients and metrics."""
    folder = tmp_path_factory.mktemp("ranks")
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(SUPPORT.parents[1]), str(SUPPORT), os.environ.get("PYTHONPATH", "")]),
    }
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        str(SUPPORT / "training_ranks.py"),
        str(folder),
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return load_file(folder / "gradients.safetensors"), json.loads((folder / "metrics.json").read_text())


def assert_same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        scale = gradient.abs().max().item()
        torch.testing.assert_close(actual[name], gradient, rtol=0, atol=1e-12 * scale, msg=lambda text, n=name: f"{n}: {text}")


def with_prefix(prefix: str, gradients: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): g for name, g in gradients.items() if name.startswith(prefix)}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_ddp_step_equals_one_process(ranks: Any, tied: bool, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, tied, per_device_train_batch_size=8)
    alone = step(trainer)
    assert_same(with_prefix(f"ddp.{tied}.", ranks[0]), alone)
    (log,) = [entry for entry in trainer.state.log_history if "loss" in entry]
    for name in ("loss", "divergence", "cross_entropy", "valid_tokens", "top1_agreement"):
        assert ranks[1][f"log.{tied}"][name] == pytest.approx(log[name], rel=1e-6), name


def test_evaluation_counts_each_row_once(ranks: Any, tmp_path: Path) -> None:
    alone = make_trainer(tmp_path, False).evaluate()
    for name in ("eval_loss", "eval_divergence", "eval_tokens"):
        assert ranks[1]["eval"][name] == pytest.approx(alone[name], rel=1e-10), name


@pytest.mark.parametrize("reshard", [False, True], ids=["root_kept", "root_resharded"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_fsdp2_step_equals_one_process(ranks: Any, tied: bool, reshard: bool, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, tied)
    items = trainer.items(make_rows(8))
    batch = trainer.data_collator(items)
    trainer.compute_loss(trainer.model, batch, num_items_in_batch=batch["scored"].numel()).backward()
    alone = {name: p.grad for name, p in trainer.model.named_parameters()}
    assert_same(with_prefix(f"fsdp.{tied}.{reshard}.", ranks[0]), alone)
