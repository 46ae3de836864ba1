"""One case as a table: the same cells on a terminal, in the report and in the documentation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from rich.table import Table
from rich.text import Text

from ..terminal import shown
from .cases import Case
from .figures import number
from .measure import quantile
from .peers import PEERS
from .variants import BACKENDS, Variant, operation_of
from .visits import Measured

NAMES = {"floor": "floor", "eager": "PyTorch eager", "compile": "torch.compile"}
DIVERGENCE_NAMES = {"forward_kl": "forward KL", "reverse_kl": "reverse KL", "jsd": "JSD"}


def name_of(variant: str) -> str:
    """For readers."""
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
    if case.operation != "distillation":
        return str(case).replace("_", "-", 1)
    return str(case).replace(case.divergence, DIVERGENCE_NAMES.get(case.divergence, case.divergence.replace("_", " ")), 1)


def median(measured: Measured, name: str) -> float | None:
    """Milliseconds; None if that variant did not run."""
    samples = next((r.get("samples_ms") for r in measured["results"] if r["variant"] == name), None)
    return quantile(samples, 0.5) if samples else None


def is_rival(variant: str, case: Case) -> bool:
    """Whether it is another library's way to compute this very case, not a bound of it."""
    return variant in PEERS and operation_of(variant, case) == case.operation


def best_peer(measured: Measured) -> tuple[str, float] | None:
    """The fastest other library, and its milliseconds."""
    case = Case(**measured["case"])
    found = [(ms, r["variant"]) for r in measured["results"] if is_rival(r["variant"], case) and (ms := median(measured, r["variant"]))]
    return (lambda best: (best[1], best[0]))(min(found)) if found else None


def columns(measured: Measured) -> tuple[str, ...]:
    if not any("samples_ms" in r for r in measured["results"]) and any("loss_error" in r for r in measured["results"]):
        return ("loss", "loss error", "gradient error")
    rate = "TFLOP/s" if measured["flop"] else "of copy bandwidth"
    return ("loss", "ms p50 [p20, p80]", "x of floor", "x of best peer", "eager / it", rate, "peak extra MiB", "gradient error")


def largest_error(row: dict[str, Any]) -> float | None:
    """Of a gradient."""
    if row.get("gradient_error") is not None:
        return float(row["gradient_error"])
    return max((v for k, v in row.items() if k.startswith("gradient_of_")), default=None)


def rows(measured: Measured, rates: dict[str, Any] | None) -> Iterator[tuple[str, ...]]:
    """The cells, a variant a row, as text."""
    eager, peer, width = median(measured, "eager"), best_peer(measured), len(columns(measured))
    for r in measured["results"]:
        name, error = r["variant"], largest_error(r)
        if "skipped" in r:
            yield (name, f"did not run: {r['skipped']}", *("" for _ in range(width - 2)))
            continue
        shown = f"{error:.1e}" if error is not None else ""
        if width == 3:
            yield (name, f"{r['loss_error']:.1e}" if "loss_error" in r else "not measured", shown)
            continue
        if "samples_ms" not in r:
            yield (name, "not measured", *("" for _ in range(width - 2)))
            continue
        floor = median(measured, Variant.parse(name).floor)
        low, mid, high = (quantile(r["samples_ms"], q) for q in (0.2, 0.5, 0.8))
        peak = r.get("peak_extra_bytes")
        yield (
            name,
            f"{number(mid)} [{number(low)}, {number(high)}]",
            f"{mid / floor:.2f}" if floor else "",
            f"{mid / peer[1]:.2f}" if peer else "",
            f"{eager / mid:.2f}" if eager else "",
            rate(measured, name, mid, rates),
            f"{peak / 2**20:,.0f}" if peak is not None else "",
            shown,
        )


def rate(measured: Measured, variant: str, ms: float, rates: dict[str, Any] | None) -> str:
    """The floor's operations or bytes over that time: what else a variant does counts for nothing."""
    if measured["flop"]:
        return f"{measured['flop'] / ms / 1e9:.3g}"
    return f"{share_of_bandwidth(measured, variant, ms, rates):.0%}" if rates else ""


def share_of_bandwidth(measured: Measured, variant: str, ms: float, rates: dict[str, Any]) -> float:
    """The bytes that the variant has to move over that time, as a share of the copy bandwidth measured in the same run."""
    moved = Variant.parse(variant).floor_bytes(Case(**measured["case"]))
    return float(moved / ms / 1e6 / rates["copy_gb_s"])


def notes(measured: Measured, name: Callable[[str], str] = str) -> list[str]:
    """Where a variant, by the name that its row bears, does something else than the case asks."""
    return [f"{name(r['variant'])}: {r['note']}." for r in measured["results"] if "note" in r and "samples_ms" in r]


def rich_table(measured: Measured, rates: dict[str, Any] | None) -> Table:
    # Text, not str: "[p20, p80]" or an error's "[Errno 12]" would be taken for markup.
    table = Table(
        title=Text(shown(title(measured))),
        title_justify="left",
        caption=Text("\n".join(map(shown, notes(measured)))),
        caption_justify="left",
    )
    for at, column in enumerate(columns(measured)):
        table.add_column(Text(column), justify="right" if at else "left", no_wrap=at != 1)
    for row in rows(measured, rates):
        table.add_row(*(Text(shown(cell)) for cell in row))
    return table
