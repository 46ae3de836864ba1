"""The head tap in two processes (gloo, on the CPU): DDP and FSDP2 give the gradients of the mean over both ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
if not torch.distributed.is_available():
    pytest.skip("torch was built without distributed", allow_module_level=True)

from tap_ranks import cases

SUPPORT = Path(__file__).parents[1] / "support"


@pytest.fixture(scope="module")
def errors(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    """Return for each rank and case the largest error, relative to the largest gradient."""
    folder = tmp_path_factory.mktemp("ranks")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(SUPPORT.parents[1]), str(SUPPORT)])}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launch, str(SUPPORT / "tap_ranks.py"), str(folder)], env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("case", cases(0))
def test_gradients_equal_those_of_one_process(errors: list[dict[str, float]], case: str) -> None:
    print([e[case] for e in errors])
    assert max(e[case] for e in errors) <= 1e-5  # float32 sums have another order
