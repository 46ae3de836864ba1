"""The figures of the documentation: plain data in, an SVG out. It paints its own background, so that it reads on light and on dark pages.

Each file ends in a comment with two digests, of what it was drawn from (data and this module's source) and of the drawing itself. So
whether a committed figure is current can be told without drawing it again, on any platform and with any version of matplotlib.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

INK, FAINT, OURS, OTHERS = "#1f2937", "#d1d5db", "#2563eb", "#c2762e"

STYLE = {
    "font.size": 12, "axes.titlesize": 13, "axes.titleweight": "bold", "axes.titlelocation": "left", "axes.titlepad": 10,
    "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#9ca3af", "axes.labelcolor": INK, "text.color": INK,
    "xtick.color": INK, "ytick.color": INK, "svg.fonttype": "path", "svg.hashsalt": "kdkernels",
}  # fmt: skip


def digest(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


def signature(kind: str, data: Mapping[str, Any]) -> str:
    """Of what a figure is drawn from."""
    return digest(kind, json.dumps(data, sort_keys=True), Path(__file__).read_text(encoding="utf-8"))


def is_current(svg: str, kind: str, data: Mapping[str, Any]) -> bool:
    """Whether a drawing is of these data, by this code, and has not been touched since."""
    body, _, _ = svg.rpartition("<!--")
    return svg == body + _seal(body, signature(kind, data))


def _seal(body: str, source: str) -> str:
    return f"<!-- source {source} drawing {digest(body)} -->\n"


def draw(kind: str, data: Mapping[str, Any]) -> str:
    """The SVG of one of ``KINDS``."""
    body = KINDS[kind](data)
    return body + _seal(body, signature(kind, data))


@contextmanager
def _figure(width: float, height: float) -> Iterator[tuple[Any, io.StringIO]]:
    """A figure in inches, and the text that it is written to in the end."""
    from matplotlib.figure import Figure
    from matplotlib.style import context

    with context(STYLE):
        figure, text = Figure(figsize=(width, height), layout="constrained"), io.StringIO()
        yield figure, text
        figure.savefig(text, format="svg", facecolor="white", metadata={"Date": None, "Creator": None})


def loss(data: Mapping[str, Any]) -> str:
    """Two rows of bars: time with the floor as a line, and peak memory.

    ``{"title", "floor": ms, "floor_is": text, "bars": [{"name", "ours", "ms", "mib" or None}]}``
    """
    bars = data["bars"]
    with_memory = [bar for bar in bars if bar["mib"] is not None]
    with _figure(6.4, 1.5 + 0.42 * (len(bars) + len(with_memory)) + 0.9) as (figure, text):
        time, memory = figure.subplots(2, 1, height_ratios=(len(bars) + 0.6, len(with_memory)))
        figure.suptitle(data["title"], fontsize=11, x=0.01, ha="left")
        _bars(time, [(b["name"], b["ms"], b["ours"]) for b in bars], "Time, forward + backward", "{:,.0f} ms")
        time.axvline(data["floor"], color=INK, linestyle=(0, (4, 3)), linewidth=1.2)
        side = 1 if data["floor"] < 0.55 * max(bar["ms"] for bar in bars) else -1  # where there is room
        time.annotate(
            f"{data['floor_is']}: {data['floor']:,.0f} ms", (data["floor"], len(bars) - 0.45), xytext=(5 * side, -1),
            textcoords="offset points", fontsize=10.5, va="center", ha="left" if side > 0 else "right",
        )  # fmt: skip
        time.set_ylim(len(bars) - 0.1, -0.6)
        _bars(memory, [(b["name"], b["mib"], b["ours"]) for b in with_memory], "Peak memory beyond the inputs", "{:,.0f} MiB")
    return text.getvalue()


def _bars(axes: Any, bars: list[tuple[str, float, bool]], title: str, form: str) -> None:
    names, values, ours = zip(*bars, strict=True)
    drawn = axes.barh(names, values, height=0.68, color=[OURS if own else OTHERS for own in ours])
    axes.bar_label(drawn, [form.format(value) for value in values], padding=4, fontweight="bold", backgroundcolor="white")
    axes.set(title=title, xticks=[], xlim=(0, 1.24 * max(values)))
    axes.invert_yaxis()
    axes.spines[["bottom", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)


def memory(data: Mapping[str, Any]) -> str:
    """Peak memory against tokens, both logarithmic, each line labelled at its end.

    ``{"title", "curves": [{"name", "ours", "tokens": [...], "mib": [...]}]}``
    """
    with _figure(6.4, 4.6) as (figure, text):
        axes = figure.add_subplot()
        for curve in data["curves"]:
            color = OURS if curve["ours"] else OTHERS
            axes.plot(curve["tokens"], curve["mib"], color=color, marker="o", markersize=5, linewidth=2.2)
            axes.annotate(
                f"{curve['name']}: {curve['mib'][-1]:,.0f} MiB", (curve["tokens"][-1], curve["mib"][-1]), xytext=(0, 9),
                textcoords="offset points", color=color, ha="right", va="bottom", fontweight="bold", fontsize=11,
            )  # fmt: skip
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        tokens = sorted({n for curve in data["curves"] for n in curve["tokens"]})
        axes.set_xticks(tokens, [f"{n // 1024}k" if n % 1024 == 0 else str(n) for n in tokens])
        axes.yaxis.set_major_formatter(lambda mib, _: f"{mib:,.0f}")
        low, high = axes.get_ylim()
        axes.set_ylim(low, high * 1.6)
        axes.set_xlabel("tokens")
        axes.set_title("Peak memory beyond the inputs (MiB)")
        axes.grid(color=FAINT, linewidth=0.7)
        axes.set_axisbelow(True)
        figure.suptitle(data["title"], fontsize=11, x=0.01, ha="left")
    return text.getvalue()


KINDS: dict[str, Callable[[Mapping[str, Any]], str]] = {"loss": loss, "memory": memory}
