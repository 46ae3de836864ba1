"""The report of a run: one self-contained HTML file, and the plots as files."""

from __future__ import annotations

import html
import importlib.util
from collections.abc import Iterator
from typing import Any

from ..support.files import Output
from ..support.terminal import shown
from . import figures, headline, table
from .plots import Plot, machine_line, plots

REPORT = "report.html"
STATUS = {
    "running": "The run is still going on, or was killed. The measurements so far are shown.",
    "interrupted": "The run was interrupted. The measurements so far are shown.",
    "out of time": "The time budget ran out. The measurements so far are shown.",
    "complete": "",
}
"""Text for each ``status`` of a record; empty if it is complete."""

_STYLE = """
:root { color-scheme: light dark; --page: #ffffff; --ink: #1f2937; --soft: #4b5563; --faint: #d1d5db; --card: #f6f7f9; --ours: #2563eb;
  --others: #b45309; --warn: #fef3c7; --warn-ink: #78350f; }
@media (prefers-color-scheme: dark) { :root { --page: #14171c; --ink: #e5e7eb; --soft: #a3abb8; --faint: #3f4753; --card: #1c2027;
  --ours: #7aa7ff; --others: #e8a663; --warn: #453411; --warn-ink: #fde68a; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.2rem 1rem 4rem; max-width: 68rem; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0 0 .4rem; } h2 { font-size: 1.15rem; line-height: 1.3; margin: 2.4rem 0 .6rem; }
p { margin: .4rem 0; } .soft { color: var(--soft); font-size: .9rem; } a { color: var(--ours); }
.cut { background: var(--warn); color: var(--warn-ink); padding: .6rem .8rem; border-radius: .5rem; margin: .8rem 0; }
.scroll { overflow-x: auto; margin: .5rem 0; border: 1px solid var(--faint); border-radius: .5rem; }
table { border-collapse: collapse; width: 100%; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .6rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--faint); }
tr:last-child td { border-bottom: 0; } th { color: var(--soft); font-weight: 600; white-space: normal; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: var(--page); }
td.why { text-align: left; white-space: normal; min-width: 14rem; color: var(--soft); }
@media (max-width: 40rem) { th:first-child, td:first-child { white-space: normal; max-width: 8.5rem; } th, td { padding: .3rem .45rem; } }
tr.ours td { color: var(--ours); font-weight: 600; }
dl { display: grid; grid-template-columns: minmax(5rem, max-content) minmax(55%, 1fr); gap: .15rem .9rem; font-size: .9rem; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
figure { margin: .6rem 0; } figure svg { width: 100%; max-width: 44rem; height: auto; display: block; }
details { margin: .5rem 0; } summary { cursor: pointer; color: var(--soft); }
"""

_COLUMNS = {
    "ms p50 [p20, p80]": "milliseconds: median, 20th and 80th percentile of the samples of all processes",
    "x of floor": "time divided by the time of the floor: the matrix products alone, or one pass over the logits",
    "x of best peer": "time divided by the time of the fastest other library",
    "eager / it": "time of the dense formula in plain PyTorch, divided by this time",
    "TFLOP/s, of copy bandwidth": "the floor's work divided by this time",
    "peak extra MiB": "peak memory beyond the inputs, including gradients",
    "gradient error": "largest relative error of a gradient against float64, on a small version of the case",
}


def write(output: Output, record: dict[str, Any]) -> None:
    """Write ``report.html`` and, if matplotlib is installed, ``plots/*.svg`` and ``*.png``."""
    drawn = [] if importlib.util.find_spec("matplotlib") is None or "rates" not in record else list(plots(record))
    for plot in drawn:
        svg, png = figures.draw(plot.kind, plot.data).encode(), figures.png(plot.kind, plot.data)
        output.write(f"plots/{plot.name}.svg", lambda temporary, content=svg: temporary.write_bytes(content))  # type: ignore[misc]
        output.write(f"plots/{plot.name}.png", lambda temporary, content=png: temporary.write_bytes(content))  # type: ignore[misc]
    output.write(REPORT, lambda temporary: temporary.write_text(page(record, drawn), encoding="utf-8"))


def page(record: dict[str, Any], drawn: list[Plot]) -> str:
    body = "\n".join(_body(record, drawn))
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<link rel="icon" href="data:,">\n<title>kdkernels benchmark: {_text(record["environment"]["machine"])}</title>\n'
        f"<style>{_STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def _text(value: object) -> str:
    return html.escape(shown(str(value)))


def _body(record: dict[str, Any], drawn: list[Plot]) -> Iterator[str]:
    rates, settings = record.get("rates"), record["settings"]
    yield f'<h1>kdkernels benchmark</h1>\n<p class="soft">{_text(machine_line(record))}</p>'
    if status := STATUS[record["status"]]:
        done = sum(measured["complete"] for measured in record["cases"])
        yield f'<p class="cut"><strong>Cut short.</strong> {_text(status)} {done} of {len(record["jobs"])} cases are complete.</p>'
    for warning in headline.warnings(record):
        yield f'<p class="cut">{_text(warning)}</p>'
    if sentence := headline.sentence(record):
        yield f"<p>{_text(sentence)}</p>"
    in_curves = {at for plot in drawn if plot.kind == "curve" for at in plot.cases}
    for at, measured in enumerate(record["cases"]):
        if not measured["curve"]:
            yield f"<h2>{_text(table.title(measured))}</h2>"
            yield from (_figure(plot) for plot in drawn if plot.cases == (at,))
            yield _table(measured, rates)
    curves = dict.fromkeys(measured["curve"] for measured in record["cases"] if measured["curve"])
    for curve in curves:
        yield f"<h2>{_text(curve.capitalize())}</h2>"
        members = [at for at, measured in enumerate(record["cases"]) if measured["curve"] == curve]
        yield from (_figure(plot) for plot in drawn if plot.kind == "curve" and set(plot.cases) <= set(members))
        inner = "".join(
            f"<p><strong>{_text(table.title(m))}</strong></p>{_table(m, rates)}" for m in (record["cases"][at] for at in members)
        )
        shown = "" if set(members) <= in_curves else " open"
        yield f"<details{shown}><summary>{len(members)} tables</summary>{inner}</details>"
    if not drawn:
        yield '<p class="soft">Plots need matplotlib: pip install "kdkernels[bench]".</p>'
    yield "<h2>What the columns mean</h2>" + _pairs(_COLUMNS)
    yield "<h2>How it was measured</h2>" + _pairs({**_environment(record), **{k: v for k, v in settings.items() if v is not None}})
    yield "<h2>Other libraries</h2>" + _pairs({table.name_of(name): state for name, state in record["peers"].items()})


def _figure(plot: Plot) -> str:
    label = _text(plot.data["title"].replace("\n", "; "))
    data = plot.data if plot.kind == "curve" else {**plot.data, "title": ""}  # the heading says it
    return f'<figure role="img" aria-label="{label}">{figures.inline(plot.kind, data)}</figure>'


def _table(measured: dict[str, Any], rates: dict[str, Any] | None) -> str:
    names = table.columns(measured)
    lines = ["<tr>" + "".join(f"<th>{_text(name)}</th>" for name in names) + "</tr>"]
    for row, cells in zip(measured["results"], table.rows(measured, rates), strict=True):
        mark = ' class="ours"' if table.is_ours(row["variant"]) else ""
        if "skipped" in row:
            shown = f'<td>{_text(table.name_of(cells[0]))}</td><td class="why" colspan="{len(names) - 1}">{_text(cells[1])}</td>'
        else:
            shown = "".join(f"<td>{_text(cell)}</td>" for cell in (table.name_of(cells[0]), *cells[1:]))
        lines.append(f"<tr{mark}>{shown}</tr>")
    below = "".join(f'<p class="soft">{_text(note)}</p>' for note in table.remarks(measured, table.name_of))
    if not measured["complete"]:
        done = f" after {measured['visits_done']} of {measured['visits']} processes" if measured["visits"] > 1 else ""
        below += f'<p class="soft">This case was cut short{done}: its samples so far are shown.</p>'
    return f'<div class="scroll"><table>{"".join(lines)}</table></div>{below}'


def _environment(record: dict[str, Any]) -> dict[str, Any]:
    shown = {k: v for k, v in record["environment"].items() if v is not None}
    shown["load average"] = ", ".join(map(str, shown.pop("load_average")))
    if rates := record.get("rates"):
        shown["copy bandwidth"] = f"{rates['copy_gb_s']:.1f} GB/s, read and written"
        for dtype, matrix in rates["matrix"].items():
            shown[f"matrix product, {dtype}"] = f"{matrix['tflop_s']:.3g} TFLOP/s at {matrix['size']} x {matrix['size']}"
    shown["seconds"] = record["seconds"]
    return shown


def _pairs(values: dict[str, Any]) -> str:
    return "<dl>" + "".join(f"<dt>{_text(str(k).replace('_', ' '))}</dt><dd>{_text(v)}</dd>" for k, v in values.items()) + "</dl>"
