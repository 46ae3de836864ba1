"""Launch parameters as a pure function of shape. No autotuning: the first call is as fast as the hundredth."""

from __future__ import annotations

from dataclasses import dataclass

import torch

AMD = torch.version.hip is not None
LANES = 64 if AMD else 32
"""Threads of a warp."""

COLUMNS = 8
"""Columns that a thread reads next to each other: 16 bytes of 16-bit logits. With fewer, Triton would spread a block's rows over warps,
and reducing along them would take barriers."""


@dataclass(frozen=True)
class Launch:
    """A block of ``rows`` times ``width`` columns, warps per program, and the compiler options that the kernels are measured with."""

    rows: int
    width: int
    num_warps: int
    registers: int = 255

    @property
    def block(self) -> int:
        """Columns per block."""
        return self.rows * self.width

    @property
    def options(self) -> dict[str, int | bool]:
        """Register limit (NVIDIA's alone) and contraction to FMA, which is Triton's default up to 3.9 and no longer."""
        options: dict[str, int | bool] = {"num_warps": self.num_warps, "enable_fp_fusion": True}
        if not AMD:
            options["maxnreg"] = min(self.registers, 65536 // (LANES * self.num_warps))
        return options


def choose(vocab: int, features: bool = False, block_rows: tuple[int, int] = (2, 2)) -> Launch:
    """Eight columns a thread and row of a block, at most 4096 a block. ``block_rows``: without and with features.

    Without features (bias, softcap, labels, statistics) every divergence fits into 128 registers, so that two programs of 256 threads
    run on a multiprocessor: one computes while the other waits for memory. With features some would spill there.
    """
    threads = LANES * max(1, min(256 // LANES, 1 << (-(-vocab // (16 * LANES)) - 1).bit_length()))
    width = COLUMNS * threads
    return Launch(1 if vocab <= width else block_rows[features], width, threads // LANES, 255 if features else 128)


def choose_sample(vocab: int) -> Launch:
    """In counters, of which each is good for four columns: a block of 2048 columns keeps their float64 within the registers."""
    return Launch(1, max(128, min(512, 1 << (-(-vocab // 4) - 1).bit_length())), 128 // LANES)


ONE_READ = 32768
"""Columns that a softmax holds in registers: 64 a thread of 512, with room for what is computed of them; more spill."""


def choose_softmax(vocab: int, inputs: int) -> Launch:
    """A whole row of each of ``inputs`` matrices where they fit (the block then covers it), else what ``choose`` says, with the
    second read from L2."""
    if vocab * inputs > ONE_READ:
        return choose(vocab)
    block = max(128, 1 << (vocab - 1).bit_length())
    return Launch(1, block, max(1, min(512 // LANES, block // (16 * LANES))))
