"""Launch parameters as pure functions of the shape. Without autotuning, the first call is as fast as later calls."""

from __future__ import annotations

from dataclasses import dataclass

import torch

AMD = torch.version.hip is not None
LANES = 64 if AMD else 32
"""Threads of a warp."""

COLUMNS = 8
"""Adjacent columns read by one thread: 16 bytes of 16-bit logits. With fewer, Triton would distribute a block's rows over warps, and
reducing along rows would need barriers."""


@dataclass(frozen=True)
class Launch:
    """A block of ``rows`` times ``width`` columns, warps per program, and compiler options."""

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
        """Compiler options: register limit (NVIDIA only) and contraction to FMA, which is Triton's default only up to 3.9."""
        options: dict[str, int | bool] = {"num_warps": self.num_warps, "enable_fp_fusion": True}
        if not AMD:
            options["maxnreg"] = min(self.registers, 65536 // (LANES * self.num_warps))
        return options


def choose(vocab: int, features: bool = False, block_rows: tuple[int, int] = (2, 2)) -> Launch:
    """Choose eight columns per thread and row of a block, at most 4096 per block. ``block_rows``: rows without and with features.

    Without features (bias, softcap, labels, statistics) every divergence fits in 128 registers, so that two programs of 256 threads
    run on a multiprocessor: one computes while the other waits for memory. With features, some divergences would spill at 128.
    """
    threads = LANES * max(1, min(256 // LANES, 1 << (-(-vocab // (16 * LANES)) - 1).bit_length()))
    width = COLUMNS * threads
    return Launch(1 if vocab <= width else block_rows[features], width, threads // LANES, 255 if features else 128)


def choose_sample(vocab: int) -> Launch:
    """Choose the block of ``sample`` in counters of four columns each. The float64 values of 2048 columns fit in registers."""
    return Launch(1, max(128, min(512, 1 << (-(-vocab // 4) - 1).bit_length())), 128 // LANES)


ONE_READ = 32768
"""Columns that a softmax can hold in registers: 64 for each of 512 threads, with room for temporaries. More would spill."""


def choose_softmax(vocab: int, inputs: int) -> Launch:
    """Choose a block that covers a whole row of each of ``inputs`` matrices if they fit in registers. Otherwise return ``choose``'s
    block; the second read then comes from L2."""
    if vocab * inputs > ONE_READ:
        return choose(vocab)
    block = max(128, 1 << (vocab - 1).bit_length())
    return Launch(1, block, max(1, min(512 // LANES, block // (16 * LANES))))
