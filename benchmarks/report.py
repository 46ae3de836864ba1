"""Tables and figures of README.md and docs/, from the committed results: ``python -m benchmarks.report [--check]``.

A block of generated text stands between two comments, ``<!-- bench: NAME -->`` and ``<!-- /bench -->``; NAME is one of ``BLOCKS``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from . import figures, loss, memory_scaling
from .cases import Case
from .measure import quantile
from .results import ROOT, load
from .variants import BACKENDS, PEERS

Records = dict[str, dict[str, dict[str, Any]]]
"""Benchmark -> machine -> record."""

NAMES = {"floor": "floor", "eager": "PyTorch eager", "compile": "torch.compile", "trl": "TRL", "liger": "Liger"}
DIVERGENCE_NAMES = {"forward_kl": "forward KL", "reverse_kl": "reverse KL", "jsd": "JSD"}

_BLOCK = re.compile(r"(<!-- bench: (?P<name>[^>]*?) -->\n).*?(<!-- (?P<end>/bench|bench: [^>]*?) -->)", re.DOTALL)


class ReportError(RuntimeError):
    """Nothing can be drawn; the message says where and why."""


def name_of(variant: str) -> str:
    """For readers."""
    backend, _, logits_dtype = variant.partition("/")
    return NAMES.get(variant) or f"kdkernels {backend}" + (f", {logits_dtype} logits" if logits_dtype else "")


def ours(measured: dict[str, Any]) -> dict[str, Any] | None:
    """What ``backend="auto"`` would take: backends are measured in its order."""
    return next((r for r in measured["results"] if r["variant"] in BACKENDS and "samples_ms" in r), None)


def variant(measured: dict[str, Any], name: str) -> dict[str, Any] | None:
    """The results of a variant that ran."""
    return next((r for r in measured["results"] if r["variant"] == name and "samples_ms" in r), None)


def featured(records: dict[str, dict[str, Any]]) -> tuple[str, dict[str, Any]]:
    """The machine that the README shows: a GPU where there is one."""
    return min(records.items(), key=lambda item: (item[1]["environment"]["gpu"] is None, item[0]))


def machine_line(record: dict[str, Any]) -> str:
    e = record["environment"]
    device = e["gpu"] or f"{e['cpu']}, {e['cores']} cores"
    return f"{device}, torch {e['torch']}, {e['date']}"


def shape_line(case: Case) -> str:
    return f"N={case.n:,} V={case.v:,} " + (f"Ds={case.ds:,} Dt={case.dt:,}" if case.has_heads else "(logits given)")


def table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Markdown; all columns but the first are numbers."""
    rule = ["---", *("---:" for _ in header[1:])]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, tuple(rule), *rows))


def mib(value: int | None) -> str:
    return "" if value is None else f"{value / 2**20:,.0f}"


# --- blocks: (records, folder of figures as the file sees it) -> text


def headline(records: Records, figures_at: str) -> str:
    _, record = featured(records["loss"])
    measured = next(m for m in record["cases"] if m["case"]["ds"])
    case, own, eager = Case(**measured["case"]), ours(measured), variant(measured, "eager")
    floor = loss.median(measured, "floor")
    if own is None or eager is None or floor is None:
        raise ReportError("the first case of loss.json must have floor, eager and a backend of ours: it is what the README opens with")
    ms = {r["variant"]: loss.number(quantile(r["samples_ms"], 0.5)) for r in (own, eager)}
    return (
        f"Measured ({machine_line(record)}; {DIVERGENCE_NAMES[case.divergence]} of {case.n:,} tokens over a vocabulary of {case.v:,}, "
        f"{case.dtype}, forward and backward): **{ms[own['variant']]} ms**, where PyTorch eager takes {ms['eager']} ms and the matrix "
        f"products alone {loss.number(floor)} ms; **{mib(own['peak_extra_bytes'])} MiB** beyond the inputs, where eager takes "
        f"{mib(eager['peak_extra_bytes'])} MiB."
    )


def loss_figure(records: Records, figures_at: str) -> str:
    machine, record = featured(records["loss"])
    return f"![Time and peak memory of the loss: {machine_line(record)}]({figures_at}/{machine}-loss.svg)"


def memory_figure(records: Records, figures_at: str) -> str:
    machine, record = featured(records["memory_scaling"])
    return f"![Peak memory against the number of tokens: {machine_line(record)}]({figures_at}/{machine}-memory.svg)"


def summary(records: Records, figures_at: str) -> str:
    """One line per case and logits dtype of the backend that "auto" takes."""
    _, record = featured(records["loss"])
    header = ("loss", "floor", "eager", "torch.compile", "kdkernels", "eager / kdkernels", "memory: eager", "kdkernels")
    lines: list[tuple[str, ...]] = []
    for measured in record["cases"]:
        case, own, eager = Case(**measured["case"]), ours(measured), variant(measured, "eager")
        for r in measured["results"]:
            name, _, logits_dtype = r["variant"].partition("/")
            if own is None or name != own["variant"] or "samples_ms" not in r:
                continue
            mid = quantile(r["samples_ms"], 0.5)
            others = [loss.median(measured, other) for other in ("floor", "eager", "compile")]
            what = f"{DIVERGENCE_NAMES[case.divergence]}, {case.dtype}" + (f", `logits_dtype={logits_dtype}`" if logits_dtype else "")
            lines.append((
                f"{what}; {shape_line(case)}",
                *("" if x is None else f"{loss.number(x)} ms" for x in (*others, mid)),
                "" if others[1] is None else f"{others[1] / mid:.2f}",
                *("" if x is None or x["peak_extra_bytes"] is None else f"{mib(x['peak_extra_bytes'])} MiB" for x in (eager, r)),
            ))  # fmt: skip
    caption = f"Medians of {record['settings']['samples']} samples, forward and backward, T = 2. {machine_line(record)}."
    return table(header, lines) + "\n\n" + caption


def machines(records: Records, figures_at: str) -> str:
    header = ("machine", "date", "CPU or GPU", "threads", "torch", "triton", "kdkernels", "commit", "load before")
    rows: list[tuple[str, ...]] = []
    for machine, record in records["loss"].items():
        e = record["environment"]
        rows.append((
            f"`{machine}`", e["date"], e["gpu"] or f"{e['cpu']}, {e['cores']} cores, {e['cpu_capability']}", str(e["threads"]), e["torch"],
            e["triton"] or "", e["kdkernels"], f"`{e['commit']}`", str(e["load_average"][0]),
        ))  # fmt: skip
    return table(header, rows)


def loss_tables(records: Records, figures_at: str) -> str:
    parts = []
    for machine, record in records["loss"].items():
        parts.append(f"### {machine}")
        for measured in record["cases"]:
            case, floor = Case(**measured["case"]), loss.median(measured, "floor")
            parts.append(f"**{DIVERGENCE_NAMES[case.divergence]}, {case.dtype}, {shape_line(case)}, T = {case.temperature:g}**")
            parts.append(table(loss.COLUMNS, [(f"`{name}`", *cells) for name, *cells in loss.rows(measured)]))
            if floor:
                rate = f"{case.flop / floor / 1e6:,.0f} GFLOP/s" if case.has_heads else f"{case.floor_bytes / floor / 1e6:,.0f} GB/s"
                parts.append(f"The floor runs at {rate}.")
    return "\n\n".join(parts)


def memory_tables(records: Records, figures_at: str) -> str:
    parts = []
    for machine, record in records["memory_scaling"].items():
        case = record["case"]
        parts.append(f"### {machine}: memory against N")
        parts.append(f"V={case['v']:,} Ds={case['ds']} Dt={case['dt']} {case['dtype']}, {DIVERGENCE_NAMES[case['divergence']]}; MiB.")
        tokens = sorted({p["n"] for curve in record["curves"] for p in curve["points"]})
        for key, title in (("peak_extra_bytes", "peak beyond the inputs"), ("unaccounted_bytes", "of it not accounted for")):
            rows = []
            for curve in record["curves"]:
                values = {p["n"]: p[key] for p in curve["points"] if key in p}
                if values:
                    rows.append((memory_scaling.label(curve), *("" if n not in values else f"{values[n] / 2**20:,.1f}" for n in tokens)))
            parts.append(table((title, *(f"N={n:,}" for n in tokens)), rows))
    return "\n\n".join(parts)


def not_better(records: Records, figures_at: str) -> str:
    """Every case in which something else beats what "auto" takes with default settings."""
    found, cases = [], 0
    for machine, record in records["loss"].items():
        for measured in record["cases"]:
            if (own := ours(measured)) is None:
                continue
            cases += 1
            for rival in measured["results"]:
                if rival["variant"] in ("eager", "compile", *PEERS) and "samples_ms" in rival:
                    where = f"{machine}, {Case(**measured['case'])}: {name_of(rival['variant'])}"
                    found += [f"- {where} {theirs}, kdkernels {mine}." for theirs, mine in _where_better(rival, own)]
    if found:
        return f"In {cases} cases, with default settings:\n\n" + "\n".join(found)
    return f"In none of the {cases} cases above was anything else that was measured faster, smaller or more exact."


def _where_better(rival: dict[str, Any], own: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Figures of a rival that are better than ours, and ours."""
    theirs, mine = (quantile(r["samples_ms"], 0.5) for r in (rival, own))
    if theirs < mine:
        yield f"{loss.number(theirs)} ms", f"{loss.number(mine)} ms"
    theirs, mine = rival["peak_extra_bytes"], own["peak_extra_bytes"]
    if theirs is not None and mine is not None and theirs < mine:
        yield f"{mib(theirs)} MiB", f"{mib(mine)} MiB"
    theirs, mine = rival["gradient_error"], own["gradient_error"]
    # Among float32 errors of a few rounding steps nothing is better than anything.
    if theirs < mine and mine > 2e-6:
        yield f"gradient error {theirs:.1e}", f"{mine:.1e}"


BLOCKS: dict[str, tuple[str, Callable[[Records, str], str]]] = {
    "headline": ("loss", headline),
    "loss figure": ("loss", loss_figure),
    "summary": ("loss", summary),
    "machines": ("loss", machines),
    "loss tables": ("loss", loss_tables),
    "not better": ("loss", not_better),
    "memory figure": ("memory_scaling", memory_figure),
    "memory tables": ("memory_scaling", memory_tables),
}
"""Name -> (the benchmark it is drawn from, its text)."""


def loss_figure_data(record: dict[str, Any]) -> dict[str, Any]:
    """Of the record's first case with heads."""
    measured = next(m for m in record["cases"] if m["case"]["ds"])
    case = Case(**measured["case"])
    bars = [
        {
            "name": name_of(r["variant"]),
            "ours": r["variant"].partition("/")[0] in BACKENDS,
            "ms": loss.median(measured, r["variant"]),
            "mib": None if r["peak_extra_bytes"] is None else round(r["peak_extra_bytes"] / 2**20, 1),
        }
        for r in measured["results"]
        if r["variant"] != "floor" and "samples_ms" in r
    ]
    title = f"{DIVERGENCE_NAMES[case.divergence]}, {case.dtype}, {shape_line(case)}\n{machine_line(record)}"
    return {"title": title, "floor": loss.median(measured, "floor"), "floor_is": "matrix products alone", "bars": bars}


def memory_figure_data(record: dict[str, Any]) -> dict[str, Any]:
    """Eager, and the backend that "auto" takes with each budget."""
    case, own = record["case"], next(c["variant"] for c in record["curves"] if c["variant"] in BACKENDS)
    curves = []
    for curve in record["curves"]:
        points = [p for p in curve["points"] if "peak_extra_bytes" in p]
        if curve["variant"] in ("eager", own) and points:
            budget = curve["memory_budget"]
            curves.append({
                "name": name_of(curve["variant"]) if budget is None else f"kdkernels, budget {budget >> 20} MiB",
                "ours": budget is not None,
                "tokens": [p["n"] for p in points],
                "mib": [round(p["peak_extra_bytes"] / 2**20, 1) for p in points],
            })  # fmt: skip
    title = (
        f"V={case['v']:,} Ds={case['ds']} Dt={case['dt']} {case['dtype']}, {DIVERGENCE_NAMES[case['divergence']]}\n{machine_line(record)}"
    )
    return {"title": title, "curves": curves}


def expected_figures(records: Records) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(file name, kind, data)."""
    for machine, record in records["loss"].items():
        yield f"{machine}-loss.svg", "loss", loss_figure_data(record)
    for machine, record in records["memory_scaling"].items():
        yield f"{machine}-memory.svg", "memory", memory_figure_data(record)


def redraw_text(path: str, text: str, records: Records) -> tuple[str, list[str]]:
    """A file's text with every block as it should be, and the names of the blocks that were not.

    Args:
        path: relative to the root; errors name it.
    """
    figures_at, stale = ("figures" if path.startswith("docs/") else "docs/figures"), []

    def replace(match: re.Match[str]) -> str:
        name = match["name"]
        if match["end"] != "/bench":
            raise ReportError(f"{path}: the block {name!r} has no end, <!-- /bench -->")
        if name not in BLOCKS:
            raise ReportError(f"{path}: there is no block {name!r}; there are {', '.join(BLOCKS)}")
        source, block = BLOCKS[name]
        if not records[source]:
            raise ReportError(
                f"{path}: the block {name!r} needs benchmarks/results/<machine>/{source}.json, and there is none: run `make bench`"
            )
        new = f"{match[1]}{block(records, figures_at)}\n{match[3]}"
        if new != match[0]:
            stale.append(name)
        return new

    redrawn = _BLOCK.sub(replace, text)
    if text.count("<!-- bench: ") != text.count("<!-- /bench -->"):
        raise ReportError(f"{path}: a block has no end, <!-- /bench -->")
    return redrawn, stale


def report(root: Path, check: bool) -> list[str]:
    """Brings every table and figure under ``root`` up to date, or with ``check`` only says what is not.

    Returns:
        What was, or is, stale, as ``file: block``.

    Raises:
        ReportError: there are no results, or a marker makes no sense.
    """
    results = root / "benchmarks" / "results"
    records: Records = {name: load(name, results) for name in ("loss", "memory_scaling")}
    if not any(records.values()):
        raise ReportError("benchmarks/results is empty, so nothing can be drawn or checked: run `make bench` and commit what it writes")
    stale = []
    for file in (root / "README.md", *sorted((root / "docs").glob("*.md"))):
        path = file.relative_to(root).as_posix()
        text = file.read_text(encoding="utf-8")
        redrawn, blocks = redraw_text(path, text, records)
        stale += [f"{path}: {name}" for name in blocks]
        if redrawn != text and not check:
            file.write_text(redrawn, encoding="utf-8")
    folder = root / "docs" / "figures"
    wanted = set()
    for name, kind, data in expected_figures(records):
        file = folder / name
        wanted.add(name)
        if file.exists() and figures.is_current(file.read_text(encoding="utf-8"), kind, data):
            continue
        stale.append(f"docs/figures/{name}: {kind} figure")
        if not check:
            folder.mkdir(parents=True, exist_ok=True)
            file.write_text(figures.draw(kind, data), encoding="utf-8")
    for kind in figures.KINDS:
        for file in sorted(folder.glob(f"*-{kind}.svg")):
            if file.name not in wanted:
                stale.append(f"docs/figures/{file.name}: no results belong to it")
                if not check:
                    file.unlink()
    return stale


def main(check: Annotated[bool, typer.Option("--check", help="Change nothing; exit with 1 if something is stale.")] = False) -> None:
    """Redraws what README.md and docs/ show of benchmarks/results."""
    try:
        stale = report(ROOT, check)
    except ReportError as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(1) from None
    for line in stale:
        typer.echo(f"{'stale' if check else 'redrawn'}: {line}", err=check)
    if check and stale:
        typer.echo("Run `python -m benchmarks.report` and commit what it changes.", err=True)
        raise typer.Exit(1)
    if not stale:
        typer.echo("Every table and figure is up to date.")


if __name__ == "__main__":
    typer.run(main)
