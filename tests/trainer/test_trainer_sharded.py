"""Two processes with a sharded student (FSDP2 or DeepSpeed ZeRO-3; gloo, on the CPU) take the same steps as one."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
if not torch.distributed.is_available():
    pytest.skip("torch was built without distributed", allow_module_level=True)

from safetensors.torch import load_file
from sharded_ranks import CASES, dtype_of, make, weights

SUPPORT = Path(__file__).parents[1] / "support"
NO_DEEPSPEED = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed: it compiles its CPU communication at first use"
)
KINDS = ["fsdp", pytest.param("zero3", marks=NO_DEEPSPEED)]


@pytest.fixture(scope="module", params=KINDS)
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, torch.Tensor], dict[str, Any]]:
    """Run two processes. Return ``fsdp`` or ``zero3``, their weights and their results."""
    folder = tmp_path_factory.mktemp("ranks")
    path = os.pathsep.join([str(SUPPORT.parents[1]), str(SUPPORT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "DS_ACCELERATOR": "cpu"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launch, str(SUPPORT / "sharded_ranks.py"), request.param, str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return request.param, load_file(folder / "weights.safetensors"), json.loads((folder / "results.json").read_text())


def test_steps_and_evaluations_equal_one_process(ranks: Any, tmp_path: Path) -> None:
    kind, sharded, results = ranks
    exact = dtype_of(kind) == torch.float64
    for name, case in CASES[kind].items():
        alone = make(kind, tmp_path, **case)
        before = alone.evaluate()["eval_loss"]
        alone.train()
        expected = weights(alone)
        prefix = f"{name}."
        assert {key.removeprefix(prefix) for key in sharded if key.startswith(prefix)} == expected.keys()
        for parameter, weight in expected.items():
            error = (sharded[prefix + parameter] - weight).abs().max().item() / weight.abs().max().item()
            assert error <= (1e-12 if exact else 1e-6), f"{name}, {parameter}: {error:.1e}"  # float32 sums have another order
        assert results[name] == pytest.approx([before, alone.evaluate()["eval_loss"]], rel=1e-10 if exact else 1e-6), name


def test_a_resumed_training_ends_with_the_same_weights(ranks: Any) -> None:
    assert all(result["resumed"] for name, result in ranks[2].items() if name.startswith("resume"))


def test_final_model_is_complete(ranks: Any) -> None:
    assert all(result["saved"] for name, result in ranks[2].items() if name.startswith("resume"))


def test_rollouts_of_different_lengths(ranks: Any) -> None:
    assert ranks[2]["rollouts"] == 2


def test_mixed_precision_does_not_round_the_loss(ranks: Any, tmp_path: Path) -> None:
    if ranks[0] != "fsdp":
        pytest.skip("DeepSpeed does not cast a model's outputs")
    exact = make("fsdp", tmp_path).evaluate()["eval_loss"]
    # In bfloat16 a sum of about 220 is rounded to a multiple of 1, an error near 1e-3 of it.
    assert ranks[2]["bf16"] == pytest.approx(exact, rel=2e-4)
