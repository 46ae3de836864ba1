"""Draw figures from plain data, as SVG or PNG. They have their own background, so that they are legible on light and dark pages; with
``inline``, the page chooses the colours.

Each file ends with a comment with two digests: of its inputs (data and this module's source), and of the drawing. Checking whether a
committed figure is current therefore does not need drawing it, and works on any platform and with any version of matplotlib.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

INK, AXIS, FAINT, OURS, OTHERS = "#1f2937", "#9ca3af", "#d1d5db", "#2563eb", "#c2762e"

STYLE = {
    "font.size": 12, "axes.titlesize": 13, "axes.titleweight": "bold", "axes.titlelocation": "left", "axes.titlepad": 10,
    "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": AXIS, "axes.labelcolor": INK, "text.color": INK,
    "xtick.color": INK, "ytick.color": INK, "svg.fonttype": "path", "svg.hashsalt": "kdkernels",
}  # fmt: skip
LABEL_PADDING = 4
"""Points between a bar and its label."""
TITLE_WIDTH = 72
"""Maximum number of characters in a line of a figure's title."""


def digest(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


def signature(kind: str, data: Mapping[str, Any]) -> str:
    """Return a hash of the data that a figure is drawn from."""
    return digest(kind, json.dumps(data, sort_keys=True), Path(__file__).read_text(encoding="utf-8"))


def is_current(svg: str, kind: str, data: Mapping[str, Any]) -> bool:
    """Return whether a figure was drawn from this data by this code, and has not been edited."""
    body, _, _ = svg.rpartition("<!--")
    return svg == body + _seal(body, signature(kind, data))


def _seal(body: str, source: str) -> str:
    return f"<!-- source {source} drawing {digest(body)} -->\n"


def draw(kind: str, data: Mapping[str, Any]) -> str:
    """Return the SVG of one of ``KINDS``."""
    body = KINDS[kind](data)
    return body + _seal(body, signature(kind, data))


def inline(kind: str, data: Mapping[str, Any]) -> str:
    """Return an ``<svg>`` element for a page that defines the colours ``--ink``, ``--faint``, ``--page``, ``--ours`` and ``--others``."""
    text = KINDS[kind](data)
    text = text[text.index("<svg") :]
    for color, name in ((INK, "ink"), (AXIS, "faint"), (FAINT, "faint"), (OURS, "ours"), (OTHERS, "others"), ("#ffffff", "page")):
        text = text.replace(color, f"var(--{name})")
    # The page sets the width; the height follows.
    return re.sub(
        r'<svg ([^>]*?)width="[^"]*" height="[^"]*"|<svg ([^>]*?)height="[^"]*"([^>]*?)width="[^"]*"', r"<svg \1\2\3", text, count=1
    )


def png(kind: str, data: Mapping[str, Any]) -> bytes:
    content = io.BytesIO()
    KINDS[kind](data, content)
    return content.getvalue()


@contextmanager
def _figure(width: float, height: float, png_file: IO[bytes] | None) -> Iterator[tuple[Any, io.StringIO]]:
    """Yield a figure (sizes in inches) and a buffer that gets its SVG at the end. With ``png_file``, its PNG is written there instead."""
    from matplotlib.figure import Figure
    from matplotlib.style import context

    with context(STYLE):
        figure, text = Figure(figsize=(width, height), layout="constrained"), io.StringIO()
        yield figure, text
        if png_file is not None:
            figure.savefig(png_file, format="png", facecolor="white", dpi=160)
        else:
            figure.savefig(text, format="svg", facecolor="white", metadata={"Date": None, "Creator": None})


def loss(data: Mapping[str, Any], png_file: IO[bytes] | None = None) -> str:
    """Draw bars of time, with the floor as a line, and bars of peak memory if it was measured.

    ``{"title", "floor": ms or None, "floor_is": text, "bars": [{"name", "ours", "ms", "mib" or None}]}``
    """
    bars, floor = data["bars"], data["floor"]
    with_memory = [bar for bar in bars if bar["mib"] is not None]
    heights = [len(bars) + 0.6, *([len(with_memory)] if with_memory else [])]
    title = max(2, len(_title_lines(data["title"])))
    height = 0.74 + 0.18 * title + 0.42 * (len(bars) + len(with_memory)) + 0.65 * len(heights)
    with _figure(6.4, height, png_file) as (figure, text):
        axes = figure.subplots(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
        _title(figure, data["title"])
        _bars(axes[0], [(b["name"], b["ms"], b["ours"]) for b in bars], "Time, forward + backward", "ms", floor or 0)
        if floor is not None:
            axes[0].axvline(floor, color=INK, linestyle=(0, (4, 3)), linewidth=1.2)
            floor_label = axes[0].annotate(
                f"{data['floor_is']}: {number(floor)} ms", (floor, len(bars) - 0.45), xytext=(5, -1),
                textcoords="offset points", fontsize=10.5, va="center", ha="left",
            )  # fmt: skip
            floor_label.set_in_layout(False)
        axes[0].set_ylim(len(bars) - 0.1, -0.6)
        if with_memory:
            _bars(axes[1], [(b["name"], b["mib"], b["ours"]) for b in with_memory], "Peak memory beyond the inputs", "MiB")
        figure.draw_without_rendering()
        for each in axes:
            _make_room(each)
        if floor is not None:
            figure.draw_without_rendering()
            if floor_label.get_window_extent().x1 > axes[0].get_window_extent().x1:
                floor_label.set(ha="right", position=(-5, -1))
    return text.getvalue()


def _title_lines(text: str) -> list[str]:
    return [part for line in text.split("\n") for part in textwrap.wrap(line, TITLE_WIDTH)]


def _title(figure: Any, text: str) -> None:
    if text:
        figure.suptitle("\n".join(_title_lines(text)), fontsize=11, x=0.01, ha="left")


def number(value: float) -> str:
    """Return a value with three significant digits, or all those before the point."""
    return f"{value:,.0f}" if value >= 99.95 else f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"


def _bars(axes: Any, bars: list[tuple[str, float, bool]], title: str, unit: str, at_least: float = 0) -> None:
    """Draw a panel whose range ends at the longest bar or at ``at_least``; ``_make_room`` adds what the labels need."""
    names, values, ours = zip(*bars, strict=True)
    drawn = axes.barh(names, values, height=0.68, color=[OURS if own else OTHERS for own in ours])
    # The box keeps the line of the floor out of the text. It is smaller than the padding, so that it does not cut the bar.
    box = {"facecolor": "#ffffff", "edgecolor": "none", "pad": 1}
    labels = axes.bar_label(drawn, [f"{number(value)} {unit}" for value in values], padding=LABEL_PADDING, fontweight="bold", bbox=box)
    for label in labels:
        label.set_in_layout(False)
    axes.set(title=title, xticks=[], xlim=(0, max(*values, at_least) or 1))
    axes.invert_yaxis()
    axes.spines[["bottom", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)


def _make_room(axes: Any) -> None:
    """Widen the range of a drawn panel of bars until the label of the longest bar lies inside."""
    points = axes.figure.dpi / 72
    room = max(label.get_window_extent().width for label in axes.texts if label.get_fontweight() == "bold") + 2 * LABEL_PADDING * points
    axes.set_xlim(0, axes.get_xlim()[1] / max(0.2, 1 - room / axes.get_window_extent().width))


MARKERS = "osD^vPX*"


def curve(data: Mapping[str, Any], png_file: IO[bytes] | None = None) -> str:
    """Draw lines over a logarithmic axis: ours in one colour, the others in another, distinguished by marker and dash.

    ``{"title", "x", "y", "log": bool, "percent": bool, "curves": [{"name", "ours", "x": [...], "y": [...]}]}``; x and y name the axes.
    """
    with _figure(6.4, 4.6, png_file) as (figure, text):
        axes = figure.add_subplot()
        drawn = {True: 0, False: 0}
        for line in data["curves"]:
            own = bool(line["ours"])
            at = drawn[own]
            drawn[own] += 1
            axes.plot(
                line["x"], line["y"], color=OURS if own else OTHERS, marker=MARKERS[at % len(MARKERS)], markersize=6, linewidth=2,
                linestyle=("-", "--", ":", "-.")[at % 4], label=line["name"],
            )  # fmt: skip
        axes.set_xscale("log", base=2)
        if data["log"]:
            axes.set_yscale("log", base=10 if data["y"].endswith("error") else 2)
        ticks = sorted({x for line in data["curves"] for x in line["x"]})
        axes.set_xticks(ticks, [_short(x) for x in ticks])
        axes.minorticks_off()
        if data["percent"]:
            axes.yaxis.set_major_formatter(lambda y, _: f"{y:.0%}")
            axes.set_ylim(0, max(1.05, 1.05 * max(y for line in data["curves"] for y in line["y"])))
        elif not data["y"].endswith("error"):
            axes.yaxis.set_major_formatter(lambda y, _: f"{y:,.0f}" if y >= 10 else f"{y:.2g}")
        axes.set_xlabel(data["x"])
        axes.set_title(data["y"])
        axes.grid(color=FAINT, linewidth=0.7)
        axes.set_axisbelow(True)
        axes.legend(fontsize=10, frameon=True, facecolor="#ffffff", edgecolor=FAINT)
        _title(figure, data["title"])
    return text.getvalue()


def _short(x: float) -> str:
    return f"{x:g}" if x < 1024 or x != int(x) else f"{x / 1024:g}k" if x % 1024 == 0 else f"{x / 1000:.0f}k"


KINDS: dict[str, Callable[..., str]] = {"loss": loss, "curve": curve}
