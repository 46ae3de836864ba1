"""Draw the tables and figures of README.md and docs/ from the committed results: ``python -m benchmarks.report [--check]``.

Generated text is between the comments ``<!-- bench: NAME -->`` and ``<!-- /bench -->``. NAME is one of ``BLOCKS``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from kdkernels.bench import figures, plots, run, table
from kdkernels.bench import headline as headlines
from kdkernels.bench.cases import Case
from kdkernels.bench.environment import ROOT
from kdkernels.bench.figures import number
from kdkernels.bench.measure import Spread, quantile
from kdkernels.bench.plots import machine_line
from kdkernels.bench.table import DIVERGENCE_NAMES, best_peer, is_ours, is_rival, median, name_of

from . import model
from .learning import comparison, guide
from .learning.table import table as learning_table

Records = dict[str, dict[str, Any]]
"""Machine -> record."""

_BLOCK = re.compile(r"(<!-- bench: (?P<name>[^>]*?) -->\n).*?(<!-- (?P<end>/bench|bench: [^>]*?) -->)", re.DOTALL)


class ReportError(RuntimeError):
    """A block or figure can't be drawn. The message says where and why."""


def ours(measured: dict[str, Any]) -> dict[str, Any] | None:
    """Return the results of the backend that ``backend="auto"`` would select. Backends are measured in its order."""
    return next((r for r in measured["results"] if is_ours(r["variant"]) and "samples_ms" in r), None)


def ran(measured: dict[str, Any], name: str) -> dict[str, Any] | None:
    """Return the results of a variant, if it ran."""
    return next((r for r in measured["results"] if r["variant"] == name and "samples_ms" in r), None)


def featured(records: Records) -> tuple[str, dict[str, Any]]:
    """Return the machine that the README shows: a GPU, if there is one."""
    return min(records.items(), key=lambda item: (item[1]["environment"]["gpu"] is None, item[0]))


def single(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the cases that are not points of a curve."""
    return [measured for measured in record["cases"] if not measured["curve"]]


def markdown(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Return a table whose columns after the first are numbers."""
    rule = ["---", *("---:" for _ in header[1:])]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, tuple(rule), *rows))


def mib(value: int | None) -> str:
    return "not measured" if value is None else f"{value / 2**20:,.0f}"


# --- blocks: (records, path from the file to the folder of figures) -> text


def headline(records: Records, figures_at: str) -> str:
    """Return the headline of the machine that the README shows, as in its report."""
    _, record = featured(records)
    measured = next((m for m in single(record) if m["case"]["ds"]), None)
    if measured is None or ours(measured) is None or ran(measured, "eager") is None or median(measured, "floor") is None:
        raise ReportError("the first case of results.json must have floor, eager and a backend of ours: it is what the README opens with")
    return f"Measured on {machine_line(record)}. {headlines.headline(record)}"


def loss_figure(records: Records, figures_at: str) -> str:
    machine, record = featured(records)
    return f"![Time and peak memory of the loss: {machine_line(record)}]({figures_at}/{machine}-loss-1.svg)"


def memory_figure(records: Records, figures_at: str) -> str:
    machine, record = featured(records)
    return f"![Peak memory against the number of tokens: {machine_line(record)}]({figures_at}/{machine}-tokens-mib.svg)"


def summary(records: Records, figures_at: str) -> str:
    """Return a table with a line for each case and logits dtype of the backend that "auto" selects."""
    _, record = featured(records)
    header = (
        "loss",
        "floor",
        "eager",
        "torch.compile",
        "best other library",
        "kdkernels",
        "eager / kdkernels",
        "memory: eager",
        "kdkernels",
    )
    lines: list[tuple[str, ...]] = []
    for measured in single(record):
        case, own, eager, peer = Case(**measured["case"]), ours(measured), ran(measured, "eager"), best_peer(measured)
        for r in measured["results"]:
            name, _, logits_dtype = r["variant"].partition("/")
            if own is None or name != own["variant"] or "samples_ms" not in r:
                continue
            taken = Spread.of(r["samples_ms"])
            others = [table.spread(measured, other) for other in ("floor", "eager", "compile")]
            what = f"{table.loss_of(case)}, {case.dtype}"
            what += f", `logits_dtype={logits_dtype}`" if logits_dtype else ""
            lines.append((
                f"{what}; {case.shape}",
                *("did not run" if x is None else f"{number(x.mid)} ms" for x in others),
                "none ran" if peer is None else f"{number(peer[1])} ms ({name_of(peer[0])})",
                f"{number(taken.mid)} ms",
                _speed(measured, r["variant"], taken, others[1]),
                *(_peak(x) for x in (eager, r)),
            ))  # fmt: skip
    timed = [r for m in single(record) for r in m["results"] if "samples_ms" in r]
    samples, processes = max(len(r["samples_ms"]) for r in timed), max(len(set(r.get("visit", [1]))) for r in timed)
    taken = f"{samples} samples" + (f" of {processes} processes" if processes > 1 else "")
    caption = f"Medians of {taken}, forward and backward, T = {record['settings']['temperature']:g}. {machine_line(record)}."
    return markdown(header, lines) + "\n\n" + caption


def _speed(measured: dict[str, Any], variant: str, taken: Spread, eager: Spread | None) -> str:
    if eager is None:
        return "eager did not run"
    if {variant, "eager"} & set(table.below_floor(measured)):
        return "unsound: below the floor"
    return table.times_as_fast(taken, eager) or "no difference"


def _peak(row: dict[str, Any] | None) -> str:
    if row is None:
        return "did not run"
    peak = row.get("peak_extra_bytes")
    return "not measured" if peak is None else f"{mib(peak)} MiB"


def machines(records: Records, figures_at: str) -> str:
    header = (
        "machine",
        "date",
        "CPU or GPU",
        "threads",
        "torch",
        "triton",
        "kdkernels",
        "commit",
        "load before",
        "copy bandwidth",
        "matrix products",
    )
    rows: list[tuple[str, ...]] = []
    for machine, record in records.items():
        e, rates = record["environment"], record["rates"]
        rows.append((
            f"`{machine}`", e["date"], e["gpu"] or f"{e['cpu']}, {e['cores']} cores, {e['cpu_capability']}", str(e["threads"]), e["torch"],
            e["triton"] or "not installed", e["kdkernels"], f"`{e['commit']}`", str(e["load_average"][0]),
            f"{rates['copy_gb_s']:,.1f} GB/s", ", ".join(f"{dtype} {m['tflop_s']:.3g} TFLOP/s" for dtype, m in rates["matrix"].items()),
        ))  # fmt: skip
    return markdown(header, rows)


def loss_tables(records: Records, figures_at: str) -> str:
    parts = []
    for machine, record in records.items():
        parts.append(f"### {machine}")
        for measured in single(record):
            floor = median(measured, "floor")
            parts.append(f"**{table.title(measured)}**")
            cells = [(f"`{name}`", *rest) for name, *rest in table.rows(measured, record["rates"])]
            parts.append(markdown(table.columns(measured), cells))
            parts += [" ".join(table.remarks(measured))] * bool(table.remarks(measured))
            if floor:
                rate = measured["flop"] / floor / 1e6 or measured["floor_bytes"] / floor / 1e6
                parts.append(f"The floor runs at {rate:,.0f} {'GFLOP/s' if measured['flop'] else 'GB/s'}.")
    return "\n\n".join(parts)


def memory_tables(records: Records, figures_at: str) -> str:
    """Return tables of peak memory over tokens, and of the part that docs/memory.md does not account for."""
    parts = []
    for machine, record in records.items():
        points = [m for m in record["cases"] if m["curve"] == "tokens"]
        if not points:
            continue
        case = Case(**points[0]["case"])
        parts.append(f"### {machine}: memory against N")
        parts.append(f"V={case.v:,} Ds={case.ds} Dt={case.dt} {case.dtype}, {DIVERGENCE_NAMES[case.divergence]}; MiB.")
        rows_by_variant = {(r["variant"], m["case"]["n"]): r for m in points for r in m["results"] if r.get("peak_extra_bytes") is not None}
        tokens = sorted({n for _, n in rows_by_variant})
        for title, value in (("peak beyond the inputs", lambda r: r["peak_extra_bytes"]), ("of it not accounted for", unaccounted)):
            rows = []
            for variant in dict.fromkeys(name for name, _ in rows_by_variant):
                values = [value(rows_by_variant[variant, n]) if (variant, n) in rows_by_variant else None for n in tokens]
                if any(v is not None for v in values):
                    rows.append((name_of(variant), *("not measured" if v is None else f"{v / 2**20:,.1f}" for v in values)))
            parts.append(markdown((title, *(f"N={n:,}" for n in tokens)), rows))
    return "\n\n".join(parts)


def unaccounted(row: dict[str, Any]) -> int | None:
    return int(row["peak_extra_bytes"] - row["plan"]["accounted_bytes"]) if "plan" in row else None


def not_better(records: Records, figures_at: str) -> str:
    """List every case in which another variant beats the backend that "auto" selects with default settings."""
    found, cases = [], 0
    for machine, record in records.items():
        for measured in single(record):
            if (own := ours(measured)) is None:
                continue
            cases += 1
            case = Case(**measured["case"])
            for rival in measured["results"]:
                if (rival["variant"] in ("eager", "compile") or is_rival(rival["variant"], case)) and "samples_ms" in rival:
                    where = f"{machine}, {table.title(measured)}: {name_of(rival['variant'])}"
                    found += [f"- {where} {theirs}, kdkernels {mine}." for theirs, mine in _where_better(rival, own)]
    if found:
        return f"In {cases} cases, with default settings:\n\n" + "\n".join(found)
    return f"In none of the {cases} cases above was anything else that was measured faster, smaller or more exact."


def _where_better(rival: dict[str, Any], own: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield a rival's better figures and ours. A time is better only if the spreads do not overlap."""
    their_times, my_times = (Spread.of(r["samples_ms"]) for r in (rival, own))
    if their_times.mid < my_times.mid and not their_times.overlaps(my_times):
        yield f"{number(their_times.mid)} ms", f"{number(my_times.mid)} ms"
    theirs, mine = rival.get("peak_extra_bytes"), own.get("peak_extra_bytes")
    if theirs is not None and mine is not None and theirs < mine:
        yield f"{mib(theirs)} MiB", f"{mib(mine)} MiB"
    theirs, mine = rival["gradient_error"], own["gradient_error"]
    # float32 errors of a few ulp are considered equal.
    if theirs < mine and mine > 2e-6:
        yield f"gradient error {theirs:.1e}", f"{mine:.1e}"


def curves(records: Records, figures_at: str) -> str:
    """Return every curve of every machine as a figure."""
    parts = []
    for machine, record in records.items():
        curve_plots = [plot for plot in plots.plots(record) if plot.kind == "curve"]
        if curve_plots:
            parts.append(f"### {machine}: curves")
            parts += [f"![{plot.data['title'].replace(chr(10), '; ')}]({figures_at}/{machine}-{plot.name}.svg)" for plot in curve_plots]
    return "\n\n".join(parts)


BLOCKS: dict[str, Callable[[Records, str], str]] = {
    "headline": headline,
    "loss figure": loss_figure,
    "summary": summary,
    "machines": machines,
    "loss tables": loss_tables,
    "not better": not_better,
    "memory figure": memory_figure,
    "memory tables": memory_tables,
    "curves": curves,
}
"""Functions by name: (records, path from the file to the folder of figures) -> text."""


def primitives_table(measured: dict[str, dict[str, Any]]) -> str:
    """Return a table for each machine's record of benchmarks.primitives."""
    parts = []
    for machine, record in measured.items():
        s, rows = record["settings"], []
        for group in record["groups"]:
            yardstick = quantile(group["samples_ms"][group["yardstick"]], 0.5)
            for name, samples in group["samples_ms"].items():
                low, mid, high = (quantile(samples, q) for q in (0.2, 0.5, 0.8))
                rows.append((group["name"], name, f"{number(mid)} [{number(low)}, {number(high)}]", f"{mid / yardstick:.2f}"))
        parts.append(f"`{machine}`, {record['environment']['date']}, N={s['n']:,} V={s['v']:,} D={s['d']:,}:")
        parts.append(markdown(("what", "variant", "ms p50 [p20, p80]", "x of the first"), rows))
    return "\n\n".join(parts)


def instructions_table(counts: list[dict[str, Any]]) -> str:
    """Return a table of instructions per column pair: rows are divergences and dtypes, columns kernels and vocabularies."""
    columns = list(dict.fromkeys((c["kernel"], c["vocab"]) for c in counts))
    cells = {(c["divergence"], c["dtype"], c["kernel"], c["vocab"]): c for c in counts}
    rows = []
    for divergence, dtype in dict.fromkeys((c["divergence"], c["dtype"]) for c in counts):
        row = [f"{DIVERGENCE_NAMES.get(divergence, divergence.replace('_', ' '))}, {dtype}"]
        for column in columns:
            entry = cells.get((divergence, dtype, *column))
            row.append(f"{sum(entry['sweeps']):.0f} ({entry['registers']})" if entry else "")
        rows.append(tuple(row))
    header = (
        "instructions (registers)",
        *(kernel.replace("_", "-") if vocab is None else f"{kernel}, V={vocab:,}" for kernel, vocab in columns),
    )
    spilling = [c for c in counts if c["spilled_bytes"] or c["local_bytes"]]
    note = f"{len(counts) - len(spilling)} of {len(counts)} kernels spill nothing and use no local memory."
    return f"{markdown(header, rows)}\n\n{note}"


def modelled_table(counts: list[dict[str, Any]]) -> str:
    """Return a table of modelled times of the loss."""
    newest = next((c["kernel"] for c in counts if c["kernel"].startswith("triton")), "")
    cells = {(c["kernel"], c["dtype"], c["divergence"]): c for c in counts if c["vocab"] in (None, 128256)}
    header = ["modelled ms (x of floor)"]
    floors = ["floor"]
    for shape in model.SHAPES:
        label = f"{shape.tokens // 1024}k / {shape.vocab:,} / {shape.student} / {shape.teacher}"
        header += [f"{label}, {name}" for name in ("forward KL", "reverse KL", "JSD")]
        floors += 3 * [f"{model.floor_ms(shape):.1f}"]
    rows = [tuple(floors)]
    for kernel, dtype in ((newest, "float32"), (newest, "bfloat16"), ("cuda one_read", "float32"), ("cuda one_read", "bfloat16")):
        row = [f"{kernel.replace('_', '-')}, {dtype} logits"]
        for shape in model.SHAPES:
            for divergence in ("forward_kl", "reverse_kl", "jsd"):
                entry = cells[kernel, dtype, divergence]
                low, high = model.loss_ms(shape, kernel, dtype, sum(entry["sweeps"]), len(entry["sweeps"]))
                row.append(f"{low:.1f}-{high:.1f} ({(low + high) / 2 / model.floor_ms(shape):.2f})")
        rows.append(tuple(row))
    return f"{model.ASSUMPTIONS}\n\n{markdown(tuple(header), rows)}"


def other_blocks(results: Path) -> dict[str, Callable[[Records, str], str]]:
    """Return the blocks that are drawn from other records."""
    experiments = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(results.glob("learning/*.json"))}
    primitives = {path.parent.name: json.loads(path.read_text(encoding="utf-8")) for path in sorted(results.glob("*/primitives.json"))}
    counts = json.loads((results / "instructions.json").read_text(encoding="utf-8")) if (results / "instructions.json").exists() else []
    blocks: dict[str, Callable[[Records, str], str]] = {
        "primitives": lambda *_: primitives_table(primitives),
        "instructions": lambda *_: instructions_table(counts),
        "modelled": lambda *_: modelled_table(counts),
    }
    for name, record in experiments.items():
        blocks[f"learning {name}"] = lambda *_, record=record: learning_table(record)
    for source, name in ((guide, "steps"), (comparison, "pair")):
        file = results / "guide" / f"{name}.json"
        if file.exists():
            guide_blocks = source.blocks(json.loads(file.read_text(encoding="utf-8")))
            blocks |= {block: lambda *_, draw=draw: draw() for block, draw in guide_blocks.items()}
    return blocks


def expected_figures(records: Records) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield file name, kind and data of the README's bars and of every curve."""
    for machine, record in records.items():
        for plot in plots.plots(record):
            if plot.kind == "curve" or plot.name == "loss-1":
                yield f"{machine}-{plot.name}.svg", plot.kind, plot.data


def redraw_text(
    path: str, text: str, records: Records, others: dict[str, Callable[[Records, str], str]] | None = None
) -> tuple[str, list[str]]:
    """Return a file's text with every block redrawn, and the names of the blocks that were stale.

    Args:
        path: path relative to the root, for errors.
        others: additional blocks.
    """
    blocks = BLOCKS | (others or {})
    figures_at, stale = ("figures" if path.startswith("docs/") else "docs/figures"), []

    def replace(match: re.Match[str]) -> str:
        name = match["name"]
        if match["end"] != "/bench":
            raise ReportError(f"{path}: the block {name!r} has no end, <!-- /bench -->")
        if name not in blocks:
            raise ReportError(f"{path}: there is no block {name!r}; there are {', '.join(blocks)}")
        new = f"{match[1]}{blocks[name](records, figures_at)}\n{match[3]}"
        if new != match[0]:
            stale.append(name)
        return new

    redrawn = _BLOCK.sub(replace, text)
    if text.count("<!-- bench: ") != text.count("<!-- /bench -->"):
        raise ReportError(f"{path}: a block has no end, <!-- /bench -->")
    return redrawn, stale


def report(root: Path, check: bool) -> list[str]:
    """Redraw every table and figure under ``root``, or with ``check`` only find the stale ones.

    Returns:
        The stale ones, as ``file: block``.

    Raises:
        ReportError: there are no results, or a marker is invalid.
    """
    results = root / "benchmarks" / "results"
    records: Records = {path.parent.name: run.load(path.parent) for path in sorted(results.glob(f"*/{run.FILE}"))}
    if not records:
        raise ReportError("benchmarks/results is empty, so nothing can be drawn or checked: run `make results` and commit what it writes")
    for machine, record in records.items():
        if record["status"] != "complete":
            raise ReportError(f"benchmarks/results/{machine} is from an interrupted run: finish it with `kdkernels bench --resume`")
    stale = []
    for file in (root / "README.md", *sorted((root / "docs").glob("*.md"))):
        path = file.relative_to(root).as_posix()
        text = file.read_text(encoding="utf-8")
        redrawn, names = redraw_text(path, text, records, other_blocks(results))
        stale += [f"{path}: {name}" for name in names]
        if redrawn != text and not check:
            file.write_text(redrawn, encoding="utf-8")
    folder = root / "docs" / "figures"
    expected = set()
    for name, kind, data in expected_figures(records):
        file = folder / name
        expected.add(name)
        if file.exists() and figures.is_current(file.read_text(encoding="utf-8"), kind, data):
            continue
        stale.append(f"docs/figures/{name}: {kind} figure")
        if not check:
            folder.mkdir(parents=True, exist_ok=True)
            file.write_text(figures.draw(kind, data), encoding="utf-8")
    for file in sorted(folder.glob("*.svg")):
        if file.name not in expected:
            stale.append(f"docs/figures/{file.name}: no results belong to it")
            if not check:
                file.unlink()
    return stale


def main(check: Annotated[bool, typer.Option("--check", help="Change nothing; exit with 1 if something is stale.")] = False) -> None:
    """Redraw the blocks and figures of README.md and docs/ from benchmarks/results."""
    try:
        stale = report(ROOT, check)
    except (ReportError, run.BenchError) as error:
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
