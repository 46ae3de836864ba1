"""The headline of a benchmark, warnings about unreliable times, tables and figures, from records written by hand."""

from __future__ import annotations

import io
from typing import Any

import pytest
from benching import HEADS, LOGITS, fake_case, fake_record
from rich.console import Console

from benchmarks import report
from kdkernels.bench import figures, headline, page, plots, run, suites, table, visits
from kdkernels.bench.cases import Case
from kdkernels.bench.measure import Job, Spread


def end_of_terminal(record: dict[str, Any]) -> str:
    console = Console(record=True, width=1000, file=io.StringIO())
    run.print_headline(console, record)
    return console.export_text()


def headlines(record: dict[str, Any]) -> list[str]:
    """Return the headline on the terminal, in the report and in the README."""
    readme = report.headline({"machine": record}, "docs/figures")
    return [end_of_terminal(record), page.page(record, []).partition("<h2>")[0], readme]


def test_times_and_ratios_are_in_every_headline() -> None:
    record = fake_record(fake_case(HEADS, floor=[8, 8.1], eager=[20, 20.2], liger_chunked=[15, 15.2], native=[10, 10.1]))
    assert headline.warnings(record) == []
    for text in headlines(record):
        assert "kdkernels native takes 10.1 ms, 1.25 x the matrix products alone (8.05 ms)" in text
        assert "2.00 times as fast as PyTorch eager (20.1 ms)" in text
        assert "1.50 times as fast as Liger chunked JSD (15.1 ms)" in text
        assert "not to be relied on" not in text


@pytest.mark.parametrize(
    ("load", "cores", "message"), [(8.0, 2, "load 8.0 on 2 cores"), (1.3, 1, "load 1.3 on 1 core"), (65.0, 64, "load 65.0")]
)
def test_high_load_replaces_times_in_the_headline(load: float, cores: int, message: str) -> None:
    record = fake_record(fake_case(HEADS, floor=[8, 8.1], eager=[20, 20.2], native=[10, 10.1], mib=3), load=load, cores=cores)
    for text in headlines(record):
        assert message in text
        assert "not to be relied on" in text
        assert "times as fast" not in text
        assert "10.1 ms" not in text
        assert "3 MiB beyond the inputs" in text, "memory does not depend on the load"
    (plot,) = plots.plots(record)
    assert message in plot.data["title"]


@pytest.mark.parametrize(("load", "cores"), [(2.0, 2), (0.0, 1), (30.0, 64)])
def test_load_below_the_core_count_is_not_mentioned(load: float, cores: int) -> None:
    record = fake_record(fake_case(HEADS, floor=[8, 8.1], native=[10, 10.1]), load=load, cores=cores)
    assert headline.busy(record) == ""
    assert "not to be relied on" not in headline.headline(record)


def test_headline_without_heads_uses_logits_and_warns() -> None:
    case = fake_case(LOGITS, floor=[1, 1.1], eager=[9, 9.1], native=[3, 3.1])
    assert "2.90 x one pass over memory alone (1.05 ms)" in headline.headline(fake_record(case))
    assert "load 5.0 on 2 cores" in headline.headline(fake_record(case, load=5.0))
    assert "load 5.0 on 2 cores" in headline.headline(fake_record(load=5.0)), "a record without cases"


@pytest.mark.parametrize(
    ("native", "peers"),
    [([10, 10.4, 10.8], [10.2, 10.6, 11]), ([10.2, 10.6, 11], [10, 10.4, 10.8]), ([10, 10, 10], [10.01, 10.01, 10.01]), ([10], [20])],
    ids=["a little faster", "a little slower", "equal in the digits shown", "one sample each"],
)
def test_overlapping_spreads_are_not_a_difference(native: list[float], peers: list[float]) -> None:
    record = fake_record(fake_case(HEADS, floor=[4, 4, 4], eager=peers, liger_chunked=peers, native=native))
    for text in headlines(record):
        assert "no difference from PyTorch eager" in text
        assert "no difference from Liger chunked JSD" in text
        assert "times as fast" not in text
    assert "| no difference |" in report.summary({"machine": record}, "")
    assert "In none of the 1 cases" in report.not_better({"machine": record}, "")


def test_time_at_the_floor_is_not_a_difference() -> None:
    record = fake_record(fake_case(HEADS, floor=[9.9, 10, 10.4], eager=[20, 20, 20], native=[10, 10.2, 10.6]))
    assert "no difference from the matrix products alone (10.0 ms)" in headline.headline(record)
    assert headline.warnings(record) == []


@pytest.mark.parametrize("variant", ["native", "eager", "liger_chunked"])
def test_time_below_its_floor_makes_the_measurement_unsound(variant: str) -> None:
    times: dict[str, list[float]] = {"floor": [10, 10.1], "eager": [20, 20.2], "liger_chunked": [15, 15.2], "native": [12, 12.1]}
    case = fake_case(HEADS, **{**times, variant: [9, 9.1]})
    record = fake_record(case)
    assert table.below_floor(case) == [variant]
    for text in headlines(record):
        assert f"{table.name_of(variant)} takes 9.05 ms, its floor 10.1 ms" in text
        assert "The measurement is unsound." in text
        assert "times as fast" not in text
    assert any("unsound" in note for note in table.remarks(case))
    assert ("| unsound: below the floor |" in report.summary({"machine": record}, "")) == (variant != "liger_chunked")


def test_times_below_the_floor_of_other_cases_and_curves_are_named() -> None:
    sound = fake_case(HEADS, floor=[8, 8.1], eager=[20, 20.2], native=[10, 10.1])
    point = {**fake_case(Case(64, 512, 8, 16), floor=[8, 8], native=[7, 7], torch=[6, 6]), "curve": "tokens"}
    logits = fake_case(LOGITS, floor=[8, 8], native=[7, 7], torch=[6, 6])
    (warning,) = headline.warnings(fake_record(sound, point, logits))
    assert warning.count("its floor") == 3
    assert "and 1 more. The measurement is unsound." in warning
    assert "2.00 times as fast as PyTorch eager" in headline.sentence(fake_record(sound, point, logits))


def test_bound_that_computes_less_may_be_below_the_floor() -> None:
    assert table.below_floor(fake_case(HEADS, floor=[8, 8], torch_ce=[5, 5], native=[9, 9])) == []


def test_touching_spreads_overlap() -> None:
    assert Spread.of([1, 2, 3]).overlaps(Spread.of([2, 3, 4]))
    assert not Spread.of([1, 1, 1]).overlaps(Spread.of([2, 2, 2]))
    assert Spread.of([1]).overlaps(Spread.of([2])), "one sample shows no difference"


def test_resumed_run_records_the_higher_load(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.getloadavg", lambda: (0.5, 0.5, 0.5))
    run.begin([Job(HEADS, ("floor",), 1)], "cpu", {}, tmp_path)
    monkeypatch.setattr("os.getloadavg", lambda: (900.0, 0.5, 0.5))
    assert headline.busy(run.resume(tmp_path)).startswith("load 900.0 on ")


# --- cells and figures


def test_cells_are_never_empty_and_missing_memory_has_a_reason() -> None:
    jsd = next(job for job in suites.jobs("smoke", "cpu", backends=["torch"], peers=[]) if job.case.divergence == "jsd")
    measured = visits.new(jsd)
    for row in measured["results"]:
        row.update(samples_ms=[1.0, 2.0], gradient_error=None if row["variant"] == "floor" else 1e-7)
    cells = {row[0]: row for row in table.rows(measured, None)}
    assert all(all(row) for row in cells.values())
    assert cells["torch"][-2] == "not measured"
    assert "Peak memory: this suite does not measure it for this case." in table.remarks(measured)
    assert "this suite does not measure it" in page._table(measured, None)


def test_cells_without_a_floor_or_peer_say_so() -> None:
    for case in (fake_case(HEADS, native=[1, 2]), fake_case(LOGITS, compile=[1, 2], native=[1, 2], skipped=["eager"])):
        rows = list(table.rows(case, None))
        assert all(all(row) for row in rows)
        assert {"no floor", "no peer", "no eager"} <= set(rows[-1])
    assert any("compile: peak memory not measured, because the compiler's own memory" in note for note in table.remarks(case))


@pytest.mark.parametrize("width", [60, 80, 200])
def test_table_fits_the_terminal_and_keeps_every_digit(width: int) -> None:
    case = fake_case(HEADS, floor=[1234.5, 1240], **{"native/bfloat16": [1635.0, 1702.0]}, skipped=["compile"])
    console = Console(record=True, width=width, file=io.StringIO())
    console.print(table.rich_table(case, None))
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    assert "compile: did not run" in text


@pytest.mark.parametrize(("ms", "floor"), [((10.0, 4509.0), 9.0), ((4508.0, 4509.0), 6000.0), ((0.01, 0.02), 0.019)])
def test_labels_are_beside_their_bars_and_inside_the_figure(ms: tuple[float, float], floor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    all_axes: list[Any] = []
    make_room = figures._make_room
    monkeypatch.setattr(figures, "_make_room", lambda axes: (make_room(axes), all_axes.append(axes)))
    names = ("PyTorch eager", "kdkernels native, bfloat16 logits, 512 rows")
    bars = [{"name": name, "ours": bool(number), "ms": ms[number], "mib": 2838.4} for number, name in enumerate(names)]
    figures.draw("loss", {"title": "a title of many words, " * 8, "floor": floor, "floor_is": "matrix products alone", "bars": bars})
    all_axes[0].figure.draw_without_rendering()
    assert len(all_axes) == 2
    for axes in all_axes:
        figure = axes.figure.bbox
        for text, bar in zip((text for text in axes.texts if text.get_fontweight() == "bold"), axes.patches, strict=True):
            box = text.get_bbox_patch().get_window_extent()
            assert box.x0 >= bar.get_window_extent().x1
            assert box.x1 <= figure.x1
        for text in axes.texts:
            assert figure.x0 <= text.get_window_extent().x0 <= text.get_window_extent().x1 <= figure.x1
