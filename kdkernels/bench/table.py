"""One case as a table: the same cells on a terminal, in the report and in the documentation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from ..support.terminal import shown
from .cases import Case
from .figures import number
from .measure import Spread, no_memory
from .peers import PEERS
from .variants import BACKENDS, Variant, operation_of
from .visits import Measured

NAMES = {"floor": "floor", "eager": "PyTorch eager", "compile": "torch.compile"}
DIVERGENCE_NAMES = {"forward_kl": "forward KL", "reverse_kl": "reverse KL", "jsd": "JSD"}


def loss_of(case: Case) -> str:
    """Return the name of a case's operation, for readers."""
    if case.operation != "distillation":
        return case.operation.replace("_", "-")
    return DIVERGENCE_NAMES.get(case.divergence, case.divergence.replace("_", " "))


def name_of(variant: str) -> str:
    """Return the name of a variant, for readers."""
    if variant in PEERS:
        return PEERS[variant].title
    v = Variant.parse(variant)
    rest = [f"{v.logits_dtype} logits"] * bool(v.logits_dtype) + [f"{v.chunk_rows} rows"] * bool(v.chunk_rows)
    rest += [f"budget {v.budget_mib} MiB"] * bool(v.budget_mib) + ["row kernels"] * v.rows_only
    return ", ".join([NAMES.get(v.name, f"kdkernels {v.name}"), *rest])


def is_ours(variant: str) -> bool:
    return Variant.parse(variant).name in BACKENDS


def title(measured: Measured) -> str:
    case = Case(**measured["case"])
    return str(case).replace(case.divergence if case.operation == "distillation" else case.operation, loss_of(case), 1)


def spread(measured: Measured, name: str) -> Spread | None:
    """Return the milliseconds of a variant; None if it did not run."""
    samples = next((r.get("samples_ms") for r in measured["results"] if r["variant"] == name), None)
    return Spread.of(samples) if samples else None


def median(measured: Measured, name: str) -> float | None:
    """Return the median milliseconds of a variant; None if it did not run."""
    times = spread(measured, name)
    return times.mid if times is not None else None


def times_as_fast(ours: Spread, other: Spread) -> str | None:
    """Return how many times as fast as the other we are; None if the spreads overlap, or the factor rounds to 1."""
    factor = f"{other.mid / ours.mid:.2f}"
    return None if ours.overlaps(other) or factor == "1.00" else factor


def below_floor(measured: Measured) -> list[str]:
    """Return the variants whose median is less than that of their floor, which is impossible: the measurement is unsound.

    Bounds are left out, because they compute less than the case.
    """
    case, names = Case(**measured["case"]), []
    for name in (row["variant"] for row in measured["results"]):
        variant = Variant.parse(name)
        if variant.name != "floor" and operation_of(name, case) == case.operation:
            ms, floor = median(measured, name), median(measured, variant.floor)
            if ms is not None and floor is not None and ms < floor:
                names.append(name)
    return names


def is_rival(variant: str, case: Case) -> bool:
    """Return whether a variant is another library's computation of this case, not a bound of it."""
    return variant in PEERS and operation_of(variant, case) == case.operation


def best_peer(measured: Measured) -> tuple[str, float] | None:
    """Return the fastest other library and its milliseconds; None without one."""
    case = Case(**measured["case"])
    rivals = [(r["variant"], ms) for r in measured["results"] if is_rival(r["variant"], case) and (ms := median(measured, r["variant"]))]
    return min(rivals, key=lambda rival: rival[::-1], default=None)


def columns(measured: Measured) -> tuple[str, ...]:
    if not any("samples_ms" in r for r in measured["results"]) and any("loss_error" in r for r in measured["results"]):
        return ("loss", "loss error", "gradient error")
    rate = "TFLOP/s" if measured["flop"] else "of copy bandwidth"
    return ("loss", "ms p50 [p20, p80]", "x of floor", "x of best peer", "eager / it", rate, "peak extra MiB", "gradient error")


def largest_error(row: dict[str, Any]) -> float | None:
    """Return the largest error of a gradient."""
    if row.get("gradient_error") is not None:
        return float(row["gradient_error"])
    return max((v for k, v in row.items() if k.startswith("gradient_of_")), default=None)


NOTHING = "-"
"""Text of the cells in a row whose second cell is the reason why it has no figures."""


def rows(measured: Measured, rates: dict[str, Any] | None) -> Iterator[tuple[str, ...]]:
    """Yield the cells of each variant's row as text. No cell is empty: a missing figure is named, and ``remarks`` give the reason."""
    eager, peer, width = median(measured, "eager"), best_peer(measured), len(columns(measured))
    for r in measured["results"]:
        name, error = r["variant"], largest_error(r)
        if "skipped" in r:
            yield (name, f"did not run: {r['skipped']}", *(NOTHING for _ in range(width - 2)))
            continue
        error_cell = f"{error:.1e}" if error is not None else "no gradient" if Variant.parse(name).name == "floor" else "not measured"
        if width == 3:
            yield (name, f"{r['loss_error']:.1e}" if "loss_error" in r else "not measured", error_cell)
            continue
        times = spread(measured, name)
        if times is None:
            yield (name, "not measured", *(NOTHING for _ in range(width - 2)))
            continue
        floor = median(measured, Variant.parse(name).floor)
        peak = r.get("peak_extra_bytes")
        yield (
            name,
            f"{number(times.mid)} [{number(times.low)}, {number(times.high)}]",
            f"{times.mid / floor:.2f}" if floor else "no floor",
            f"{times.mid / peer[1]:.2f}" if peer else "no peer",
            f"{eager / times.mid:.2f}" if eager else "no eager",
            rate(measured, name, times.mid, rates),
            f"{peak / 2**20:,.0f}" if peak is not None else "not measured",
            error_cell,
        )


def rate(measured: Measured, variant: str, ms: float, rates: dict[str, Any] | None) -> str:
    """Return the floor's operations or bytes per time. Any other work of a variant is not counted."""
    if measured["flop"]:
        return f"{measured['flop'] / ms / 1e9:.3g}"
    return f"{share_of_bandwidth(measured, variant, ms, rates):.0%}" if rates else "not measured"


def share_of_bandwidth(measured: Measured, variant: str, ms: float, rates: dict[str, Any]) -> float:
    """Return the bytes that the variant must move per time, as a share of the copy bandwidth measured in the same run."""
    moved = Variant.parse(variant).floor_bytes(Case(**measured["case"]))
    return float(moved / ms / 1e6 / rates["copy_gb_s"])


def notes(measured: Measured, name: Callable[[str], str] = str) -> list[str]:
    """Return a sentence for each variant whose work differs from the case's. ``name`` returns a variant's name."""
    return [f"{name(row['variant'])}: {row['note']}." for row in _timed(measured) if "note" in row]


def remarks(measured: Measured, name: Callable[[str], str] = str) -> list[str]:
    """Return the lines below the table: impossible times, ``notes``, and reasons why memory was not measured."""
    unsound = [f"{name(variant)}: faster than its floor, so this measurement is unsound." for variant in below_floor(measured)]
    return [*unsound, *notes(measured, name), *_memory_notes(measured, _timed(measured), name)]


def _timed(measured: Measured) -> list[dict[str, Any]]:
    return [row for row in measured["results"] if row.get("samples_ms") and "skipped" not in row]


def _memory_notes(measured: Measured, timed: list[dict[str, Any]], name: Callable[[str], str]) -> list[str]:
    without = [row["variant"] for row in timed if row.get("peak_extra_bytes") is None]
    if not measured.get("memory", True) and len(without) == len(timed) > 0:
        return ["Peak memory: this suite does not measure it for this case."]
    reasons = [(variant, reason) for variant in without if (reason := no_memory(variant)) is not None]
    return [f"{name(variant)}: peak memory not measured, because {reason}." for variant, reason in reasons]


def rich_table(measured: Measured, rates: dict[str, Any] | None) -> Table:
    """Return the table for a terminal. Reasons are below it, because in a narrow cell they would be a column of single words."""
    skipped = [f"{r['variant']}: did not run: {r['skipped']}" for r in measured["results"] if "skipped" in r]
    # Text, not str: "[p20, p80]" or an error's "[Errno 12]" would be read as markup.
    table = Table(
        title=Text("\n" + shown(title(measured))),
        title_justify="left",
        caption=Text("\n".join(map(shown, [*skipped, *remarks(measured)]))),
        caption_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    for at, column in enumerate(columns(measured)):
        # All columns but the first wrap, so that the table fits a terminal of 80 columns. Folding never drops a digit.
        table.add_column(Text(column), justify="right" if at else "left", no_wrap=not at, overflow="fold")
    for row, cells in zip(measured["results"], rows(measured, rates), strict=True):
        if "skipped" in row:
            cells = (cells[0], "did not run", *cells[2:])
        table.add_row(*(Text(shown(cell)) for cell in cells))
    return table
