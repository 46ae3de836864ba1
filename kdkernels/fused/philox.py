"""Counter-based random numbers in plain torch. csrc/philox.h and the Triton kernel implement the same definition.

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): a draw depends only on the seed, its row, its
column and its index, so chunking and backends do not change it. 32-bit words are stored in int64.
"""

from __future__ import annotations

import torch
from torch import Tensor

LANES = 128
"""Number of neighbouring counters in a group: column 512 g + 128 w + lane uses word w of counter 128 g + lane."""

_MASK = 0xFFFFFFFF

_AT_ONCE = 1 << 18
"""Elements processed at once: many draws of short rows share each torch operation, and the temporaries stay in cache."""


def philox(key: Tensor, counter: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return four words per counter. ``key`` is a 64-bit integer; the counter's words are in [0, 2^32)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key & _MASK, (key >> 32) & _MASK
    for _ in range(10):
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # modulo 2^64: the low 64 bits are correct for either sign
        c0, c1 = ((b >> 32) & _MASK) ^ c1 ^ k0, b & _MASK
        c2, c3 = ((a >> 32) & _MASK) ^ c3 ^ k1, a & _MASK
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return c0, c1, c2, c3


def uniform(seed: Tensor, rows: Tensor, draws: Tensor, vocab: int) -> Tensor:
    """Return uniform numbers ``[R, V]`` float64 in (0, 1), each with a relative precision of 53 bits.

    Args:
        seed: [] int64, on the device of the result.
        rows, draws: ``[R]`` int64: indices of a row within the call and of a draw within that row.
    """
    groups, lanes = -(-vocab // (4 * LANES)), min(LANES, vocab)  # with fewer columns than lanes, only first words are used
    slots = torch.arange(groups * lanes, device=rows.device).unsqueeze(0)
    row, draw = rows.unsqueeze(1), draws.unsqueeze(1)
    low_row, high_row = row & _MASK, row >> 32

    def halves(part: int) -> Tensor:
        words = philox(seed, (slots, low_row, draw, high_row * 2 + part))
        columns = torch.stack([w.view(len(rows), groups, lanes) for w in words], 2)  # [R, G, 4, lanes]
        return columns.flatten(1)[:, :vocab].to(torch.float64)

    return halves(0).mul_(2.0**-32).add_(halves(1).add_(0.5).mul_(2.0**-64))


def draw(x: Tensor, seed: Tensor, first_row: int, num_draws: int) -> Tensor:
    """Return ``[C, S]`` int64 exact draws from ``softmax(x)``, x ``[C, V]`` float64, by an exponential race (Gumbel-max).

    Column v arrives at time ``E_v / exp(x_v)`` with E_v exponential, and the first arrival wins. Times are compared in float64: rounding
    differs between backends, but the two best times are almost never that close, so all backends draw the same ids.
    """
    count, vocab = x.shape
    rows = torch.arange(first_row, first_row + count, device=x.device)
    together = max(1, _AT_ONCE // max(1, x.numel()))
    winners = []
    for start in range(0, num_draws, together):
        draws = torch.arange(start, min(start + together, num_draws), device=x.device)
        numbers = uniform(seed, rows.repeat_interleave(len(draws)), draws.repeat(count), vocab).view(count, len(draws), vocab)
        winners.append((x.unsqueeze(1) - torch.log(-torch.log1p(-numbers))).argmax(-1))
    return torch.cat(winners, 1)
