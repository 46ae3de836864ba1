"""Benchmark runs: output files, interruption, resuming and time budgets."""

from __future__ import annotations

import io
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from benching import HEADS, LOGITS, QUIET, measure_small, small_jobs
from rich.console import Console

from kdkernels.bench import measure, page, processes, run, table, variants
from kdkernels.bench.measure import Job


@pytest.fixture(autouse=True)
def visits_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run visits in this process, so that tests can patch them. test_bench_processes.py covers separate processes."""
    monkeypatch.setattr(processes, "ask", processes.answer)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bench") / "out"
    measure_small(out)
    return out


def test_run_writes_results_plots_and_one_page(measured: Path) -> None:
    record = run.load(measured)
    assert record["status"] == "complete"
    assert [Job.load(saved) for saved in record["jobs"]] == small_jobs()
    assert all(m["complete"] for m in record["cases"])
    heads = record["cases"][0]
    for r in heads["results"][:4]:
        assert len(r["samples_ms"]) == 2
        assert (r["gradient_error"] is None) == (r["variant"] == "floor")
    assert heads["results"][4]["skipped"] == "ModuleNotFoundError: No module named 'trl'"
    assert record["environment"]["torch"] == torch.__version__
    names = {file.name for file in (measured / "plots").iterdir()}
    expected = {"loss-1", "loss-4", "tokens-ms", "tokens-mib", "gap-error", "row-kernels-bandwidth", "rows-per-chunk-ms"}
    assert {f"{name}.{ext}" for name in expected for ext in ("svg", "png")} <= names
    text = (measured / "report.html").read_text()
    assert "Cut short" not in text
    assert "No module named &#x27;trl&#x27;" in text
    assert text.count("<svg") == len(names) // 2


def test_report_page_is_self_contained(measured: Path) -> None:
    text = (measured / "report.html").read_text()
    names = re.sub(
        r'xmlns(:\w+)?="[^"]*"|<metadata>.*?</metadata>', "", text, flags=re.DOTALL
    )  # remove namespaces, which are not addresses
    assert not re.search(r"https?://|<script|@import|<img", names)
    assert not re.search(r'(?:src|href)="(?!#|data:)', names)
    assert "#2563eb" not in text.partition("</style>")[2], "figures use the page's colours"


def interrupted_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Raise KeyboardInterrupt at the given use of the clock."""
    timer, count = measure.milliseconds, iter(range(10**6))

    def milliseconds(s: variants.Step, device: torch.device) -> float:
        if next(count) == step:
            raise KeyboardInterrupt
        return timer(s, device)

    monkeypatch.setattr(measure, "milliseconds", milliseconds)


def test_interrupted_run_keeps_its_samples_and_can_be_resumed(measured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "rates", lambda *_: {"copy_gb_s": 10.0, "matrix": {}})
    jobs = [Job(HEADS, ("floor", "eager"), 3, memory=False), Job(LOGITS, ("floor", "eager", "torch"), 3, memory=False)]
    with monkeypatch.context() as patch:
        interrupted_at(patch, 2 * 4 + 3 * 2 + 1)  # in the second case, after its first round
        record = run.run(run.begin(jobs, "cpu", {"suite": "smoke"}, tmp_path), tmp_path, QUIET)
    assert record["status"] == "interrupted"
    saved = run.load(tmp_path)
    assert [m["complete"] for m in saved["cases"]] == [True, False]
    assert sorted(len(r["samples_ms"]) for r in saved["cases"][1]["results"]) == [1, 1, 1]
    text = (tmp_path / "report.html").read_text()
    assert "Cut short" in text
    assert "1 of 2 cases" in text
    with pytest.raises(run.BenchError, match="--resume finishes it"):
        run.begin(jobs, "cpu", {}, tmp_path)
    finished = run.run(run.resume(tmp_path), tmp_path, QUIET)
    assert finished["status"] == "complete"
    assert finished["cases"][0] == saved["cases"][0]
    assert [len(r["samples_ms"]) for r in finished["cases"][1]["results"]] == [3, 3, 3]
    assert "Cut short" not in (tmp_path / "report.html").read_text()


def test_cases_are_visited_in_rounds_and_resumed_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "rates", lambda *_: {"copy_gb_s": 10.0, "matrix": {}})
    jobs = [Job(HEADS, ("floor", "torch"), 5, False, "", 3), Job(LOGITS, ("floor", "torch"), 2, False, "", 2), Job(LOGITS, ("floor",), 1)]
    visited: list[tuple[int, int]] = []
    answer = processes.answer

    def ask(request: processes.Request, emit: measure.Emit) -> None:
        visited.append((request["number"], [run.dataclasses.asdict(job) for job in jobs].index(request["job"])))
        answer(request, emit)

    monkeypatch.setattr(processes, "ask", ask)
    with monkeypatch.context() as patch:
        # After 3, 2 and 2 rounds of the first visits, in the second timed round of the first job's second visit.
        interrupted_at(patch, 2 * 3 + 2 * 2 + 2 + 2 * 2 + 1)
        record = run.run(run.begin(jobs, "cpu", {"suite": "smoke"}, tmp_path), tmp_path, QUIET)
    assert visited == [(1, 0), (1, 1), (1, 2), (2, 0)]
    saved_cases = run.load(tmp_path)["cases"]
    assert [(m["visits_done"], m["complete"]) for m in saved_cases] == [(1, False), (1, False), (1, True)]
    assert {tuple(r["visit"]) for r in saved_cases[0]["results"]} == {(1, 1, 2)}
    assert "cut short after 1 of 3 processes" in (tmp_path / "report.html").read_text()
    visited.clear()
    record = run.run(run.resume(tmp_path), tmp_path, QUIET)
    assert visited == [(2, 0), (2, 1), (3, 0)]
    assert (record["status"], [m["complete"] for m in record["cases"]]) == ("complete", [True] * 3)
    for before, m, rounds in zip(saved_cases, record["cases"], ([1, 1, 2, 2, 3], [1, 2], [1]), strict=True):
        for old, row in zip(before["results"], m["results"], strict=True):
            assert row["visit"] == rounds
            assert len(row["samples_ms"]) == len(rounds)
            first = [ms for ms, visit in zip(old["samples_ms"], old["visit"], strict=True) if visit == 1]
            assert row["samples_ms"][: len(first)] == first


def test_time_budget_ends_a_run_between_cases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "rates", lambda *_: {"copy_gb_s": 10.0, "matrix": {}})
    jobs = [Job(HEADS, ("floor",), 1, memory=False)] * 2
    record = run.run(run.begin(jobs, "cpu", {"suite": "smoke"}, tmp_path), tmp_path, QUIET, budget_minutes=1e-9)
    assert (record["status"], record["cases"]) == ("out of time", [])
    assert run.run(run.resume(tmp_path), tmp_path, QUIET)["status"] == "complete"


def test_interrupted_command_saves_a_record(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "kdkernels.cli", "bench", "--suite", "smoke", "--shape", "64,512,8,16", "--backends", "torch"]
    process = subprocess.Popen(
        [*command, "--peers", "none", "--device", "cpu", "--out", str(tmp_path / "out")],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    file = tmp_path / "out" / run.FILE
    deadline = time.monotonic() + 120
    while not (file.exists() and "rates" in json.loads(file.read_text())):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    record = run.load(tmp_path / "out")
    assert record["status"] == "interrupted"
    assert process.returncode == 130, output
    assert "--resume" in output
    assert "Cut short" in (tmp_path / "out" / "report.html").read_text()


def test_resume_raises_for_incomparable_settings(tmp_path: Path) -> None:
    with pytest.raises(run.BenchError, match=r"holds no results\.json"):
        run.resume(tmp_path)
    record = run.begin([Job(HEADS, ("floor",), 1)], "cpu", {}, tmp_path)
    record["environment"]["commit"] = "0123456789"
    run.save(tmp_path, record)
    with pytest.raises(run.BenchError, match="measured with commit 0123456789"):
        run.resume(tmp_path)
    for text, word in (("{", "not a record"), ("[]", "not a record"), ('{"schema": 99}', "schema 99")):
        (tmp_path / run.FILE).write_text(text)
        with pytest.raises(run.BenchError, match=word):
            run.load(tmp_path)


def test_page_without_plots_names_matplotlib(measured: Path) -> None:
    text = page.page(run.load(measured), [])
    assert "Plots need matplotlib" in text
    assert "<svg" not in text


def test_markup_in_text_is_not_interpreted() -> None:
    results = [{"variant": "floor", "samples_ms": [1.0, 2.0]}, {"variant": "eager", "skipped": "OSError: [Errno 12] no [bold]memory"}]
    console = Console(record=True, width=160, file=io.StringIO())
    console.print(table.rich_table({"case": vars(LOGITS), "flop": 0, "floor_bytes": 1, "results": results}, None))
    text = console.export_text()
    assert "ms p50 [p20, p80]" in text
    assert "[Errno 12] no [bold]memory" in text
