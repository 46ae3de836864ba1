"""Draw the figure: held-out losses during training, and time and memory of the fused and the dense loss."""

from __future__ import annotations

import io
from typing import Any

__all__ = ["draw"]

_COLORS = {"teacher": "#6b7280", "student_ce": "#d97706", "student_kd": "#2563eb", "dense": "#9ca3af", "fused": "#2563eb"}
_INK, _FAINT = "#1f2937", "#e5e7eb"


def draw(record: dict[str, Any]) -> bytes:
    """Return the figure of a run as PNG, drawn from its demo.json."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.style import context

    style = {
        "font.size": 10, "axes.titlesize": 11, "axes.titleweight": "bold", "axes.titlelocation": "left", "axes.titlepad": 12,
        "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#9ca3af", "axes.labelcolor": _INK,
        "text.color": _INK, "xtick.color": _INK, "ytick.color": _INK,
    }  # fmt: skip
    with context(style):
        figure = Figure(figsize=(11, 4.4), dpi=160, layout="constrained")
        FigureCanvasAgg(figure)
        grid = figure.add_gridspec(1, 3, width_ratios=[2.3, 1, 1], wspace=0.08)
        _curves(figure.add_subplot(grid[0]), record)
        shape, losses = record["settings"]["loss_shape"], record["loss_comparison"]
        where = f"{shape['rows']:,} tokens x {shape['vocab']:,} vocab"
        _bars(
            figure.add_subplot(grid[1]),
            {name: m["peak_bytes"] and m["peak_bytes"] / 2**20 for name, m in losses.items()},
            "Peak memory of the loss",
            f"beyond the inputs\n{where}",
            "{:,.0f} MiB",
        )
        _bars(
            figure.add_subplot(grid[2]),
            {name: m["median_seconds"] for name, m in losses.items()},
            "Time of the loss",
            f"forward + backward\n{where}",
            "{:.2f} s",
        )
        out = io.BytesIO()
        figure.savefig(out, format="png", facecolor="white", metadata={"Software": "kdkernels demo"})
    return out.getvalue()


def _curves(axes: Any, record: dict[str, Any]) -> None:
    models = record["models"]
    curves = {name: models[name]["curve"] for name in ("teacher", "student_ce", "student_kd")}
    for name, curve in curves.items():
        label = f"{models[name]['label']}: {curve['held_out'][-1]:.3f}"
        axes.plot(curve["step"], curve["held_out"], color=_COLORS[name], marker="o", markersize=3.5, linewidth=1.8, label=label)
    # The axis leaves out the untrained loss, log(vocabulary) for all models, which would compress the differences.
    top = max(curve["held_out"][1] for curve in curves.values())
    bottom = min(min(curve["held_out"]) for curve in curves.values())
    margin = 0.06 * (top - bottom) + 1e-3
    axes.set(
        title="Held-out loss while training",
        xlabel="training steps",
        ylabel="cross-entropy (nats per token)",
        xlim=(0, None),
        ylim=(bottom - margin, top + margin),
    )
    axes.grid(axis="y", color=_FAINT, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.legend(frameon=False, title="at the last step", alignment="left")


def _bars(axes: Any, values: dict[str, float | None], title: str, label: str, number: str) -> None:
    names = list(values)
    heights = [values[name] or 0.0 for name in names]
    bars = axes.bar(names, heights, width=0.6, color=[_COLORS[name] for name in names])
    axes.bar_label(bars, [number.format(v) if v is not None else "not measured" for v in values.values()], padding=3)
    axes.set(title=title, xlabel=label, yticks=[], ylim=(0, 1.12 * max(heights) or 1.0))
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="x", length=0)
