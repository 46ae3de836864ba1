"""What is particular to the Triton kernels: their numbers are in test_loss.py and its neighbours, with every other backend's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kdkernels import divergences
from kdkernels.backends.triton.launch import choose, choose_sample, choose_softmax

triton = pytest.importorskip("triton")


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_compiles_without_spills(arch: int) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    script = Path(__file__).with_name("triton_aot.py")
    run = subprocess.run([sys.executable, str(script), str(arch)], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr[-2000:]
    variants = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(variants) >= 4 * len(divergences.REGISTRY)
    spilling = [v for v in variants if v["STACK"] or v["LOCAL"]]
    assert not spilling
    assert all(0 < v["REG"] <= 255 and v["REG"] * v["threads"] <= 65536 for v in variants), "a multiprocessor has 65536 registers"


def test_every_divergence_has_a_twin() -> None:
    from kdkernels.backends.triton.divergences import FUNCTIONS

    assert FUNCTIONS.keys() == divergences.REGISTRY.keys()


@pytest.mark.parametrize("vocab", [1, 2, 127, 128, 4096, 4097, 50257, 151936, 262144])
def test_launch_covers_a_row_within_limits(vocab: int) -> None:
    launch = choose(vocab)
    assert launch.block & (launch.block - 1) == 0, "tl.arange wants a power of two"
    assert 128 <= launch.block <= 4096
    assert launch.num_warps in (1, 2, 4, 8)
    assert launch.block >= vocab or launch.block == 4096


@pytest.mark.parametrize("vocab", [1, 127, 512, 4097, 16384, 16385, 32768, 32769, 262144])
def test_launches_of_one_side(vocab: int) -> None:
    sample = choose_sample(vocab)
    assert sample.block % 128 == 0, "counters come in lanes of 128"
    assert 4 * sample.block >= vocab or sample.block == 512
    for inputs in (1, 2):
        launch = choose_softmax(vocab, inputs)
        assert launch.block & (launch.block - 1) == 0
        assert (launch.block >= vocab) == (vocab * inputs <= 32768) or vocab <= 4096
        assert launch.block * inputs <= 64 * 32 * launch.num_warps or launch.block == 128
        assert launch.options["maxnreg"] * 32 * launch.num_warps <= 65536


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="the interpreter only")
def test_jit_divergences_equal_the_torch_terms() -> None:
    """Value, slope and q of each column, apart from any kernel."""
    from triton_columns import columns

    from kdkernels.backends.triton.divergences import FUNCTIONS

    generator = torch.Generator().manual_seed(0)
    log_q, log_p = (torch.randn(256, generator=generator).mul_(4).log_softmax(0) for _ in range(2))
    log_q[3], log_p[4], log_q[5], log_p[5] = 4 * (-torch.inf,)
    log_p[6:60] = log_q[6:60] + 1e-3  # close columns: where digits are lost if they are
    for name, cls in divergences.REGISTRY.items():
        divergence = cls()
        a, b = divergence.kernel_parameters
        value, slope = torch.empty(256), torch.empty(256)
        columns[(1,)](log_q, log_p, value, slope, a, b, FUNCTION=FUNCTIONS[name])
        exact = divergence.terms(*(x.double() for x in (log_q, log_p, log_q.exp(), log_p.exp())))
        float32 = divergence.terms(log_q, log_p, log_q.exp(), log_p.exp())
        for ours, same, truth in zip((value, slope), float32, exact, strict=True):
            finite = torch.isfinite(truth)
            assert torch.equal(torch.isfinite(ours), finite), name
            error = (ours.double() - truth)[finite].abs().max()
            yardstick = (same.double() - truth)[finite].abs().max()
            assert error <= 2 * yardstick + 1e-7, f"{name}: error {error:.1e}, torch {yardstick:.1e}"
