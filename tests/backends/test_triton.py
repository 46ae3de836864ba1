"""The Triton kernels: compiled without a GPU, launches, and divergences. tests/fused compares the results of all backends."""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from kdkernels import divergences
from kdkernels.backends.triton.launch import COLUMNS, LANES, choose, choose_sample, choose_softmax

triton = pytest.importorskip("triton")


def compile_all(arch: str, *arguments: str) -> list[dict[str, Any]]:
    """Compile every kernel for a GPU architecture and return its resources. No GPU is needed."""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    script = Path(__file__).parents[1] / "support" / "triton_aot.py"
    run = subprocess.run([sys.executable, str(script), arch, *arguments], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr[-2000:]
    variants = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(variants) >= 2 * len(divergences.REGISTRY)
    return variants


@pytest.mark.parametrize("arch", ["80", "90", "100"])
def test_kernels_compile_without_spills(arch: str) -> None:
    variants = compile_all(arch)
    assert not [v for v in variants if v["STACK"] or v["LOCAL"]]
    assert all(0 < v["REG"] <= 255 and v["REG"] * v["threads"] <= 65536 for v in variants), "a multiprocessor has 65536 registers"
    plain = [v for v in variants if v["kernel"] == "kd_rows_kernel" and not v["features"]]
    assert len(plain) > 2 * len(divergences.REGISTRY)
    assert all(v["REG"] * v["threads"] <= 32768 for v in plain), "two programs fit on a multiprocessor"


@pytest.mark.parametrize("arch", ["gfx90a", "gfx942"])
def test_kernels_compile_for_amd_without_spills(arch: str) -> None:
    assert not [v for v in compile_all(arch, "--third") if v["STACK"] or v["LOCAL"]]


def test_supported_amd_gpus_are_available(monkeypatch: pytest.MonkeyPatch) -> None:
    from kdkernels.backends import triton as backend

    monkeypatch.setattr(backend, "_INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    for capability, runs in (((9, 4), True), ((9, 0), True), ((11, 0), False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, capability=capability: capability)
        reason = backend.unavailable(torch.device("cuda", 0), (torch.float32,))
        assert reason is None if runs else "gfx9" in str(reason)


def test_every_divergence_has_triton_functions() -> None:
    from kdkernels.backends.triton.divergences import FUNCTIONS

    assert FUNCTIONS.keys() == divergences.REGISTRY.keys()


@pytest.mark.parametrize("vocab", [1, 2, 127, 128, 4096, 4097, 50257, 151936, 262144])
def test_launch_covers_a_row_within_limits(vocab: int) -> None:
    for features, rows in itertools.product((False, True), (1, 2)):
        launch = choose(vocab, features, (rows, rows))
        assert launch.block & (launch.block - 1) == 0, "tl.arange needs a power of two"
        assert launch.num_warps in (1, 2, 4, 8)
        assert launch.width == COLUMNS * LANES * launch.num_warps, "sums along a row stay within a thread"
        assert launch.block >= vocab or launch.block == 2048 * rows
        assert launch.options["maxnreg"] == (255 if features else 128)


@pytest.mark.parametrize("vocab", [1, 127, 512, 4097, 16384, 16385, 32768, 32769, 262144])
def test_launches_of_one_side_are_within_limits(vocab: int) -> None:
    sample = choose_sample(vocab)
    assert sample.block % 128 == 0, "counters come in lanes of 128"
    assert 4 * sample.block >= vocab or sample.block == 512
    for inputs in (1, 2):
        launch = choose_softmax(vocab, inputs)
        assert launch.block & (launch.block - 1) == 0
        assert (launch.block >= vocab) == (vocab * inputs <= 32768) or vocab <= 4096
        assert launch.block * inputs <= 64 * 32 * launch.num_warps or launch.block == 128
        assert launch.options["maxnreg"] * 32 * launch.num_warps <= 65536


NEARLY_ONE = (0.9, 0.99, 0.999, 0.9999)
LIGHT = [
    *(divergences.JSD(beta) for near in NEARLY_ONE for beta in (near, 1 - near)),
    *(divergences.SkewKL(alpha) for alpha in NEARLY_ONE),
    *(divergences.SkewReverseKL(alpha) for alpha in NEARLY_ONE),
]
"""Mixtures that are nearly q or nearly p, so that values are small."""

interpreted = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs Triton's interpreter")


@interpreted
def test_jit_divergences_equal_the_torch_terms() -> None:
    """Compare value, slope and gradient of single columns, outside the row kernel."""
    from triton_columns import columns

    from kdkernels.backends.triton.divergences import functions_of

    generator = torch.Generator().manual_seed(0)
    log_q, log_p = (torch.randn(256, generator=generator).mul_(4).log_softmax(0) for _ in range(2))
    log_q[3], log_p[4], log_q[5], log_p[5] = 4 * (-torch.inf,)
    log_p[6:60] = log_q[6:60] + 1e-3  # columns near p = q, where digits are easily lost
    for divergence in (*(cls() for cls in divergences.REGISTRY.values()), *LIGHT):
        name, functions = divergence.name, functions_of(divergence)
        unit = math.log2(math.e) if divergence.normalizer == "softmax" else 1.0
        logarithms = [x * unit for x in (log_q, log_p)]
        value, slope, gradient = torch.empty(256), torch.empty(256), torch.empty(256)
        columns[(1,)](
            *logarithms, value, slope, gradient, 0.3, 2.0, *divergence.kernel_parameters,
            TERMS=functions.terms, GRADIENT=functions.gradient,
        )  # fmt: skip
        natural = [x.double() / unit for x in logarithms]
        if functions.gradient is not None:
            coefficient = 0.3 * (math.log(2) if name == "reverse_kl" else 1.0)  # Triton's reverse KL sums its slopes in log2
            torch.testing.assert_close(gradient, 2.0 * (slope - coefficient * natural[0].exp().float()), rtol=1e-5, atol=1e-7)
        exact = divergence.terms(*(x.clone() for x in natural), *(x.exp() for x in natural))
        natural = [x.float() for x in natural]
        float32 = divergence.terms(*natural, *(x.exp() for x in natural))
        for actual, same, truth in zip((value, slope), float32, exact, strict=True):
            finite = torch.isfinite(truth)
            assert torch.equal(torch.isfinite(actual), finite), name
            error = (actual.double() - truth)[finite].abs().max()
            yardstick = (same.double() - truth)[finite].abs().max()
            step = 2.0**-23 * max(1.0, truth[finite].abs().max().item())
            assert error <= 2 * yardstick + step, f"{name}: error {error:.1e}, torch {yardstick:.1e}"
        if isinstance(divergence, divergences.JSD):
            close = slice(6, 60)
            torch.testing.assert_close(value[close].double().sum(), exact[0][close].sum(), rtol=1e-3, atol=0.0)


@interpreted
@pytest.mark.parametrize("noise", [4.0, 0.2, 0.01])
def test_values_and_slopes_keep_their_digits_with_a_light_weight(noise: float) -> None:
    """Hold the error of a row's values to the 2x rule, with a floor relative to their sum: it is as small as the weight or its square."""
    from triton_columns import columns

    from kdkernels.backends.triton.divergences import functions_of

    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(256, generator=generator).mul_(4)
    noisy = logits + noise * torch.randn(256, generator=generator)
    log_q, log_p = ((z.double().log_softmax(0) * math.log2(math.e)).float() for z in (logits, noisy))
    natural = [x.double() * math.log(2.0) for x in (log_q, log_p)]
    for divergence in LIGHT:
        value, slope = torch.empty(256), torch.empty(256)
        columns[(1,)](
            log_q, log_p, value, slope, slope, 0.0, 1.0, *divergence.kernel_parameters,
            TERMS=functions_of(divergence).terms, GRADIENT=None,
        )  # fmt: skip
        exact = divergence.terms(*(x.clone() for x in natural), *(x.exp() for x in natural))
        float32 = divergence.terms(*(x.float() for x in natural), *(x.float().exp() for x in natural))
        for actual, same, truth in zip((value, slope), float32, exact, strict=True):
            error, yardstick, floor = ((x - truth).abs().sum() for x in (actual, same, truth * (1 + 2.0**-17)))
            assert error <= 2 * yardstick + floor, f"{divergence}: error {error:.1e}, torch {yardstick:.1e}, floor {floor:.1e}"
