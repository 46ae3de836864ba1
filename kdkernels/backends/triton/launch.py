"""Launch parameters as a pure function of shape. No autotuning: the first call is as fast as the hundredth."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Launch:
    """Columns per block, warps per program, and the compiler options that the kernels are measured with."""

    block: int
    num_warps: int

    @property
    def options(self) -> dict[str, int | bool]:
        """Register limit and contraction to FMA, both stated outright.

        Left alone, ptxas spills a few registers to fit one more block on a multiprocessor; more rows in flight only push each
        other's second read out of L2. Contraction is Triton's default up to 3.9 and no longer.
        """
        return {"num_warps": self.num_warps, "maxnreg": min(255, 65536 // (32 * self.num_warps)), "enable_fp_fusion": True}


def choose(vocab: int) -> Launch:
    """Sixteen columns a thread, at most 4096 a block.

    Sixteen because a warp then reads 2 KB of float32 a side at a time, and because every divergence with every feature still
    fits the registers of 256 threads (8192 columns on 512 threads spill, with 128 registers each).
    """
    block = max(128, min(4096, 1 << (vocab - 1).bit_length()))
    return Launch(block, max(1, min(8, block // 512)))


def choose_sample(vocab: int) -> Launch:
    """In counters, of which each is good for four columns: a block of 2048 columns keeps their float64 within the registers."""
    return Launch(max(128, min(512, 1 << (-(-vocab // 4) - 1).bit_length())), 4)


ONE_READ = 32768
"""Columns that a softmax holds in registers: 64 a thread of 512, with room for what is computed of them; more spill."""


def choose_softmax(vocab: int, inputs: int) -> Launch:
    """A whole row of each of ``inputs`` matrices where they fit (the block then covers it), else what ``choose`` says, with the
    second read from L2."""
    if vocab * inputs > ONE_READ:
        return choose(vocab)
    block = max(128, 1 << (vocab - 1).bit_length())
    return Launch(block, max(1, min(16, block // 512)))
