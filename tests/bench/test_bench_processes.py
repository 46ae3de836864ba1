"""Benchmarks in separate processes: crashes become rows, ended runs leave no processes, and two runs can be compared."""

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
    """Replace TRL with a library that prints to stdout, and dies after the number of calls in this file, if it exists."""
    file, package = tmp_path / "calls", tmp_path / "libraries" / "trl" / "kernels"
    package.mkdir(parents=True)
    for folder in (package, package.parent):
        (folder / "__init__.py").touch()
    (package / "chunked_divergence.py").write_text(f"TOO_MUCH = {str(file)!r}\n{OTHER}")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(package.parent.parent), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.syspath_prepend(str(package.parent.parent))
    return file


def test_visit_in_a_separate_process(calls: Path) -> None:
    job, told = Job(HEADS, ("floor", "trl", "torch", "no-such"), 5, False, "", 2), []
    measured = visits.new(job)
    visits.visit(measured, job, 1, "cpu", told.append)
    assert (measured["visits_done"], measured["complete"]) == (1, False)
    first = json.loads(json.dumps(measured["results"]))
    visits.visit(measured, job, 2, "cpu", told.append)
    assert measured["complete"]
    for before, row in zip(first[:3], measured["results"], strict=False):
        assert row["visit"] == [1, 1, 1, 2, 2]
        assert row["samples_ms"][:3] == before["samples_ms"]
        assert min(row["samples_ms"]) > 0
    assert [r.get("gradient_error", 1) < 1e-5 for r in measured["results"][1:3]] == [True, True]
    assert "variant 'no-such' is unknown" in measured["results"][3]["skipped"]
    assert told.count("timing trl") == (1 + 3) + (1 + 2)
    assert told.count("checking no-such") == 1, "what has failed is not tried again"


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
@pytest.mark.parametrize("survives", [0, 3], ids=["in its check", "in its second round"])
def test_a_variant_that_kills_its_process_takes_no_other_with_it(calls: Path, survives: int) -> None:
    job = Job(HEADS, ("floor", "trl", "torch"), 4, False, "", 2)
    measured = visits.new(job)
    visits.visit(measured, job, 1, "cpu")
    assert [len(row["samples_ms"]) for row in measured["results"]] == [2, 2, 2]
    calls.write_text(str(survives))  # calls: the check, a round to warm up, and two rounds
    visits.visit(measured, job, 2, "cpu")
    floor, trl, torch = measured["results"]
    assert trl["skipped"] == f"its process was killed by signal {signal.SIGSEGV:d}"
    assert not {"samples_ms", "visit"} & set(trl)
    assert floor["visit"] == torch["visit"] == [1, 1, 2, 2]
    assert measured["complete"]


def test_inputs_that_cannot_be_made_are_every_row_s_reason() -> None:
    job = Job(Case(1 << 40, 1 << 20), ("rows:torch", "torch"), 1, False)
    measured = visits.new(job)
    visits.visit(measured, job, 1, "cpu")
    reasons = [row["skipped"] for row in measured["results"]]
    assert reasons[0] == reasons[1] != ""
    assert measured["complete"]


def test_a_process_gives_up_at_its_deadline_but_leaves_a_sample() -> None:
    told: list[Event] = []
    job = {"case": vars(LOGITS), "variants": ["floor"], "samples": 9}
    processes.ask(
        {"task": "visit", "job": job, "names": ["floor"], "number": 1, "device": "cpu", "seconds_left": 0.0}, told.append
    )  # fmt: skip
    assert [len(event["samples"].get("floor", [])) for event in told if "samples" in event] == [0, 1]


def test_exceptions_of_the_listener_end_the_process() -> None:
    def full(event: Event) -> None:
        raise run.BenchError("no space left")

    job = Job(LOGITS, ("floor",), 1, False)
    with pytest.raises(run.BenchError, match="no space left"):
        processes.ask({"task": "visit", "job": run.dataclasses.asdict(job), "names": ["floor"], "number": 1, "device": "cpu"}, full)


# --- ends of a run

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
    """Return the processes of a session without zombies."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # it has just ended
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


def wait_until(holds: Callable[[], bool]) -> None:
    until = time.monotonic() + 180
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.02)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes as Linux lists them")
@pytest.mark.parametrize(
    ("signal_", "everyone", "status"),
    [(signal.SIGTERM, True, "interrupted"), (signal.SIGKILL, False, "running")],
    ids=["SIGTERM to all", "SIGKILL"],
)
def test_interrupted_visit_keeps_samples_and_leaves_no_process(
    tmp_path: Path, signal_: signal.Signals, everyone: bool, status: str
) -> None:
    process = subprocess.Popen([sys.executable, "-c", RUN, str(tmp_path)], start_new_session=True)

    def begun() -> bool:
        assert process.poll() is None
        cases = run.load(tmp_path)["cases"] if (tmp_path / run.FILE).exists() else []
        return bool(cases) and 2 in cases[0]["results"][0].get("visit", [])

    wait_until(begun)
    assert len(members(process.pid)) == 2
    (os.killpg if everyone else os.kill)(process.pid, signal_)
    process.wait(timeout=180)
    wait_until(lambda: not members(process.pid))
    kept = run.load(tmp_path)
    assert kept["status"] == status
    assert not any("skipped" in row for row in kept["cases"][0]["results"])
    assert all(12 < len(row["samples_ms"]) == len(row["visit"]) for row in kept["cases"][0]["results"])
    subprocess.run([sys.executable, "-c", RUN, str(tmp_path)], check=True)
    for before, row in zip(kept["cases"][0]["results"], run.load(tmp_path)["cases"][0]["results"], strict=True):
        assert row["visit"] == [1] * 12 + [2] * 12
        assert row["samples_ms"][:12] == before["samples_ms"][:12]
        assert len(row["samples_ms"]) == 24


# --- two runs


def record(**samples: list[float]) -> dict[str, Any]:
    rows = [{"variant": name, "samples_ms": ms} for name, ms in samples.items()] + [{"variant": "trl", "skipped": "no"}]
    environment = {"gpu": None, "cpu": "a CPU", "cores": 2, "torch": "2", "date": "2026-01-01", "commit": "0123456789"}
    cases = [{"case": vars(LOGITS), "curve": "", "results": rows}]
    return {"schema": run.SCHEMA, "status": "complete", "environment": environment, "settings": {}, "cases": cases}


def test_two_runs_agree_where_their_spreads_overlap(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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
