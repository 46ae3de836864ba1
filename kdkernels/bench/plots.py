"""Select the figures of a record, as plain data for ``figures``. The report of a run and the documentation draw the same figures."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from ..support.terminal import shown
from .cases import Case
from .figures import number
from .headline import busy
from .table import is_ours, largest_error, median, name_of, share_of_bandwidth, title
from .variants import Variant
from .visits import Measured


@dataclass(frozen=True)
class Plot:
    """The data of a figure. ``cases`` are the indices in ``record["cases"]`` that it shows."""

    name: str
    kind: str
    data: dict[str, Any]
    cases: tuple[int, ...]


def machine_line(record: dict[str, Any]) -> str:
    """Return the device, version and date of a run in one line, and the load if it was above the number of cores."""
    e = record["environment"]
    device = e["gpu"] or f"{e['cpu']}, {e['cores']} cores"
    load = f", {busy(record)}: times not to be relied on" if busy(record) else ""
    return shown(f"{device}, torch {e['torch']}, {e['date']}{load}")


def plots(record: dict[str, Any]) -> Iterator[Plot]:
    """Yield bars for each case of its own, then the curves."""
    single = 0
    for at, measured in enumerate(record["cases"]):
        if not measured["curve"]:
            single += 1
            if (data := bars(measured, machine_line(record))) is not None:
                yield Plot(f"loss-{single}", "loss", data, (at,))
    for curve in dict.fromkeys(m["curve"] for m in record["cases"] if m["curve"]):
        yield from _curve(record, curve)


def bars(measured: Measured, machine: str) -> dict[str, Any] | None:
    """Return the times and memory of one case; None if only the floor ran."""
    measurements = [
        {
            "name": name_of(r["variant"]),
            "ours": is_ours(r["variant"]),
            "ms": median(measured, r["variant"]),
            "mib": None if r.get("peak_extra_bytes") is None else round(r["peak_extra_bytes"] / 2**20, 1),
        }
        for r in measured["results"]
        if Variant.parse(r["variant"]).name != "floor" and "samples_ms" in r and "skipped" not in r
    ]
    if not measurements:
        return None
    floor_is = "matrix products alone" if measured["flop"] else "one pass over memory"
    return {"title": f"{title(measured)}\n{machine}", "floor": median(measured, "floor"), "floor_is": floor_is, "bars": measurements}


def _ms(measured: Measured, row: dict[str, Any], rates: dict[str, Any]) -> float | None:
    return median(measured, row["variant"]) if "skipped" not in row else None


def _mib(measured: Measured, row: dict[str, Any], rates: dict[str, Any]) -> float | None:
    peak = row.get("peak_extra_bytes")
    return None if peak is None or "skipped" in row else max(peak / 2**20, 0.1)


def _error(measured: Measured, row: dict[str, Any], rates: dict[str, Any]) -> float | None:
    return largest_error(row)


def _bandwidth(measured: Measured, row: dict[str, Any], rates: dict[str, Any]) -> float | None:
    ms = _ms(measured, row, rates)
    return None if ms is None else share_of_bandwidth(measured, row["variant"], ms, rates)


Value = Callable[[Measured, dict[str, Any], dict[str, Any]], float | None]
TIME: tuple[str, Value] = ("Time, forward + backward (ms)", _ms)
MEMORY: tuple[str, Value] = ("Peak memory beyond the inputs (MiB)", _mib)

CURVES: dict[str, tuple[str, Callable[[Case], float], list[tuple[str, Value]]]] = {
    "tokens": ("tokens", lambda case: case.n, [TIME, MEMORY]),
    "vocabulary": ("vocabulary", lambda case: case.v, [TIME, MEMORY]),
    "student width": ("student's hidden size", lambda case: case.ds, [TIME]),
    "gap": ("distance of the student from the teacher", lambda case: case.gap or 0.0, [("Gradient error", _error)]),
    "row kernels": ("vocabulary", lambda case: case.v, [("Share of copy bandwidth", _bandwidth)]),
}
"""Name -> (x axis, x value of a case, y axes). The points of "rows per chunk" are variants instead of cases."""


def _curve(record: dict[str, Any], curve: str) -> Iterator[Plot]:
    members = [(at, m) for at, m in enumerate(record["cases"]) if m["curve"] == curve]
    if curve == "rows per chunk":
        yield from _chunks(record, members)
        return
    x_name, x_of, values = CURVES[curve]
    by_divergence = {
        d: [(at, m) for at, m in members if m["case"]["divergence"] == d]
        for d in dict.fromkeys(m["case"]["divergence"] for _, m in members)
    }
    for divergence, points in by_divergence.items():
        for y_name, value in values:
            lines: dict[str, dict[str, Any]] = {}
            for _, measured in points:
                for row in measured["results"]:
                    if (y := value(measured, row, record["rates"])) is not None:
                        variant = row["variant"]
                        line = lines.setdefault(variant, {"name": name_of(variant), "ours": is_ours(variant), "x": [], "y": []})
                        line["x"].append(x_of(Case(**measured["case"])))
                        line["y"].append(float(f"{y:.5g}"))
            if lines:
                percent = value is _bandwidth
                data = {
                    "title": f"{_fixed(points[0][1], curve)}\n{machine_line(record)}",
                    "x": x_name, "y": y_name, "log": not percent, "percent": percent, "curves": list(lines.values()),
                }  # fmt: skip
                name = "-".join([curve.replace(" ", "-"), *([divergence] if len(by_divergence) > 1 else []), value.__name__.strip("_")])
                yield Plot(name, "curve", data, tuple(at for at, _ in points))


def _fixed(measured: Measured, curve: str) -> str:
    """Return the case's title without the quantity on the x axis."""
    varied = {"tokens": "N=", "vocabulary": "V=", "row kernels": "V=", "student width": "Ds=", "gap": "gap "}[curve]
    words = title(measured).split(" ")
    if curve == "gap":
        return title(measured).partition(", gap ")[0]
    return " ".join(word for word in words if not word.startswith(varied))


def _chunks(record: dict[str, Any], members: list[tuple[int, Measured]]) -> Iterator[Plot]:
    for at, measured in members:
        for y_name, value in (TIME, MEMORY):
            points = [
                (v.chunk_rows, y) for r in measured["results"]
                if (v := Variant.parse(r["variant"])).chunk_rows and (y := value(measured, r, record["rates"])) is not None
            ]  # fmt: skip
            if points:
                xs, ys = [x for x, _ in points], [float(f"{y:.5g}") for _, y in points]
                lines = [{"name": "kdkernels", "ours": True, "x": xs, "y": ys}]
                floor = median(measured, "floor")
                if value is _ms and floor:
                    lines.append({"name": f"floor: {number(floor)} ms", "ours": False, "x": [xs[0], xs[-1]], "y": [floor, floor]})
                data = {
                    "title": f"{title(measured)}\n{machine_line(record)}",
                    "x": "rows per chunk",
                    "y": y_name,
                    "log": True,
                    "percent": False,
                    "curves": lines,
                }
                yield Plot(f"rows-per-chunk-{value.__name__.strip('_')}", "curve", data, (at,))
