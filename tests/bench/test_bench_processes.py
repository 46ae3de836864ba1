"""Benchmarks in separate processes: crashes become rows, killed runs leave no processes, and two runs can be compared."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer

pytest.importorskip("benchmarks", reason="run from the root of the repository: python -m pytest")

from benchmarks import agree
from kdkernels.bench import processes, run, visits
from kdkernels.bench.cases import Case
from kdkernels.bench.measure import Event, Job

HEADS, LOGITS = Case(32, 256, 8, 16), Case(32, 256)

OTHER = """
import os, signal
print('{"samples": {"floor": [0.0]}}')
CALLS = 0

class ChunkedDivergenceFunction:
    @staticmethod
    def apply(h_s, w_s, b_s, h_t, w_t, b_t, beta, temperature):
        global CALLS
        CALLS += 1
        if os.path.exists(TOO_MUCH) and CALLS > int(open(TOO_MUCH).read()):
            os.kill(os.getpid(), signal.SIGSEGV)
        log_q, log_p = ((h @ w.t() / temperature).log_softmax(-1) for h, w in ((h_s, w_s), (h_t, w_t)))
        return (log_p.exp() * (log_p - log_q)).sum(-1), None
"""


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Replace TRL with a library that prints to stdout. If the returned file exists, it crashes after the number of calls in it."""
    file, package = tmp_path / "calls", tmp_path / "libraries" / "trl" / "kernels"
    package.mkdir(parents=True)
    for folder in (package, package.parent):
        (folder / "__init__.py").touch()
    (package / "chunked_divergence.py").write_text(f"TOO_MUCH = {str(file)!r}\n{OTHER}")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(package.parent.parent), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.syspath_prepend(str(package.parent.parent))
    return file


def test_visits_add_samples_and_skip_failed_variants(calls: Path) -> None:
    job, events = Job(HEADS, ("floor", "trl", "torch", "no-such"), 5, False, "", 2), []
    measured = visits.new(job)
    visits.visit(measured, job, 1, "cpu", events.append)
    assert (measured["visits_done"], measured["complete"]) == (1, False)
    first = json.loads(json.dumps(measured["results"]))
    visits.visit(measured, job, 2, "cpu", events.append)
    assert measured["complete"]
    for before, row in zip(first[:3], measured["results"], strict=False):
        assert row["visit"] == [1, 1, 1, 2, 2]
        assert row["samples_ms"][:3] == before["samples_ms"]
        assert min(row["samples_ms"]) > 0
    assert [r.get("gradient_error", 1) < 1e-5 for r in measured["results"][1:3]] == [True, True]
    assert "variant 'no-such' is unknown" in measured["results"][3]["skipped"]
    assert events.count("timing trl") == (1 + 3) + (1 + 2)
    assert events.count("checking no-such") == 1, "a failed variant is not tried again"


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
@pytest.mark.parametrize("survives", [0, 3], ids=["in its check", "in its second round"])
def test_variant_that_kills_its_process_does_not_stop_others(calls: Path, survives: int) -> None:
    job = Job(HEADS, ("floor", "trl", "torch"), 4, False, "", 2)
    measured = visits.new(job)
    visits.visit(measured, job, 1, "cpu")
    assert [len(row["samples_ms"]) for row in measured["results"]] == [2, 2, 2]
    calls.write_text(str(survives))  # a visit calls it for the check, one warm-up round and two rounds
    visits.visit(measured, job, 2, "cpu")
    floor, trl, torch = measured["results"]
    assert trl["skipped"] == f"its process was killed by signal {signal.SIGSEGV:d}"
    assert not {"samples_ms", "visit"} & set(trl)
    assert floor["visit"] == torch["visit"] == [1, 1, 2, 2]
    assert measured["complete"]


def test_inputs_larger_than_memory_skip_every_row() -> None:
    job = Job(Case(1 << 40, 1 << 20), ("rows:torch", "torch"), 1, False)
    measured = visits.new(job)
    visits.visit(measured, job, 1, "cpu")
    reasons = [row["skipped"] for row in measured["results"]]
    assert reasons[0] == reasons[1] != ""
    assert measured["complete"]


def test_process_stops_at_its_deadline_after_one_sample() -> None:
    events: list[Event] = []
    job = {"case": vars(LOGITS), "variants": ["floor"], "samples": 9}
    processes.ask(
        {"task": "visit", "job": job, "names": ["floor"], "number": 1, "device": "cpu", "seconds_left": 0.0}, events.append
    )  # fmt: skip
    assert [len(event["samples"].get("floor", [])) for event in events if "samples" in event] == [0, 1]


def test_exceptions_of_the_listener_end_the_process() -> None:
    def raise_error(event: Event) -> None:
        raise run.BenchError("no space left")

    job = Job(LOGITS, ("floor",), 1, False)
    with pytest.raises(run.BenchError, match="no space left"):
        processes.ask({"task": "visit", "job": run.dataclasses.asdict(job), "names": ["floor"], "number": 1, "device": "cpu"}, raise_error)


# --- interrupted runs

RUN = """
import sys
from pathlib import Path
import torch
from rich.console import Console
from kdkernels.bench import run
from kdkernels.bench.cases import Case
from kdkernels.bench.measure import Job

torch.set_num_threads(1)
out = Path(sys.argv[1])
jobs = [Job(Case(256, 4096), ("floor", "eager", "torch"), 24, False, "", 2)]
record = run.resume(out) if (out / run.FILE).exists() else run.begin(jobs, "cpu", {"suite": "smoke", "temperature": 2.0}, out)
record["rates"] = {"copy_gb_s": 10.0, "matrix": {}}
sys.exit(run.run(record, out, Console(quiet=True))["status"] != "complete")
"""


def members(session: int) -> list[int]:
    """Return the ids of a session's processes, without zombies."""
    ids = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # the process has ended
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            ids.append(int(stat.parent.name))
    return ids


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 180
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
@pytest.mark.parametrize(
    ("signal_", "to_group", "status"),
    [(signal.SIGTERM, True, "interrupted"), (signal.SIGKILL, False, "running")],
    ids=["SIGTERM to all", "SIGKILL"],
)
def test_interrupted_visit_keeps_samples_and_leaves_no_process(
    tmp_path: Path, signal_: signal.Signals, to_group: bool, status: str
) -> None:
    process = subprocess.Popen([sys.executable, "-c", RUN, str(tmp_path)], start_new_session=True)

    def second_visit_started() -> bool:
        assert process.poll() is None
        cases = run.load(tmp_path)["cases"] if (tmp_path / run.FILE).exists() else []
        return bool(cases) and 2 in cases[0]["results"][0].get("visit", [])

    wait_until(second_visit_started)
    assert len(members(process.pid)) == 2
    (os.killpg if to_group else os.kill)(process.pid, signal_)
    process.wait(timeout=180)
    wait_until(lambda: not members(process.pid))
    saved = run.load(tmp_path)
    assert saved["status"] == status
    assert not any("skipped" in row for row in saved["cases"][0]["results"])
    assert all(12 < len(row["samples_ms"]) == len(row["visit"]) for row in saved["cases"][0]["results"])
    subprocess.run([sys.executable, "-c", RUN, str(tmp_path)], check=True)
    for before, row in zip(saved["cases"][0]["results"], run.load(tmp_path)["cases"][0]["results"], strict=True):
        assert row["visit"] == [1] * 12 + [2] * 12
        assert row["samples_ms"][:12] == before["samples_ms"][:12]
        assert len(row["samples_ms"]) == 24


# --- two runs


def record(**samples: list[float]) -> dict[str, Any]:
    rows = [{"variant": name, "samples_ms": ms} for name, ms in samples.items()] + [{"variant": "trl", "skipped": "no"}]
    environment = {"gpu": None, "cpu": "a CPU", "cores": 2, "torch": "2", "date": "2026-01-01", "commit": "0123456789"}
    cases = [{"case": vars(LOGITS), "curve": "", "results": rows}]
    return {"schema": run.SCHEMA, "status": "complete", "environment": environment, "settings": {}, "cases": cases}


def test_two_runs_are_compared_by_their_spreads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = record(floor=[1.0, 2.0, 9.0], eager=[5.0, 6.0]), record(floor=[4.0, 5.0, 5.0], eager=[6.0, 7.0], native=[1.0])
    pairs, alone = agree.compare(first, second)
    assert [(pair.variant, pair.overlaps, pair.first[1], pair.second[1]) for pair in pairs] == [
        ("floor", True, 2.0, 5.0),
        ("eager", False, 5.5, 6.5),  # [5.2, 5.8] and [6.2, 6.8]
    ]
    assert alone == 1
    for name, saved in (("a", first), ("b", second)):
        run.save(tmp_path / name, saved)
    with pytest.raises(typer.Exit) as differ:
        agree.main(tmp_path / "a", tmp_path / "b" / run.FILE)
    assert differ.value.exit_code == 1
    assert "1 of 2 rows overlap; 1 are in one run only." in capsys.readouterr().out
    agree.main(tmp_path / "a", tmp_path / "a")
    assert "2 of 2 rows overlap." in capsys.readouterr().out
    with pytest.raises(typer.Exit) as missing:
        agree.main(tmp_path, tmp_path / "a")
    assert missing.value.exit_code == 2
    assert "is not a record" in capsys.readouterr().err
