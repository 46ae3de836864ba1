"""Run the jobs of a suite. ``results.json`` is saved after every round, so that an interrupted run loses little.

All cases are visited once, most important first, then all again. A case's samples are thus distributed over the run, and their spread
includes drift over minutes.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

from ..support.errors import UserError
from ..support.files import Output, write_whole
from ..support.terminal import shown
from . import environment, headline, measure, page, table, visits
from .measure import Job
from .peers import PEERS

SCHEMA = 1
FILE = "results.json"

Record = dict[str, Any]
"""Content of ``results.json``: ``environment``, ``settings``, ``rates``, the planned ``jobs``, and the measured ``cases`` in order."""


class BenchError(UserError):
    """The run cannot begin; the message says why, and what to do."""


def begin(jobs: Sequence[Job], device: str, settings: dict[str, Any], out: Path) -> Record:
    """Write and return a new record.

    Raises:
        BenchError: ``out`` has an unfinished run, or cannot be written to.
    """
    with output_of(out) as output:
        output.check([FILE, page.REPORT])
        if (out / FILE).exists() and load(out)["status"] != "complete":
            raise BenchError(f"{out} holds an unfinished run: --resume finishes it, or give another --out")
        record = _record(jobs, device, settings)
        output.claim(FILE)
        save(out, record)
    return record


def output_of(out: Path) -> Output:
    """Return the folder of a run, as a context manager that locks it."""
    return Output(out, "bench", adopt=lambda: _unmarked(out))


def _unmarked(out: Path) -> list[str]:
    """Return the files of a run that has a record but no marker."""
    try:
        load(out)
    except BenchError:
        return []
    drawn = [path for path in (out / "plots").glob("*") if path.suffix in (".svg", ".png")]
    return [FILE, page.REPORT, *sorted(f"plots/{path.name}" for path in drawn)]


def _record(jobs: Sequence[Job], device: str, settings: dict[str, Any]) -> Record:
    return {
        "schema": SCHEMA,
        "status": "running",
        "environment": environment.environment(device),  # first, because later the load is caused by this run
        "settings": {"device": device, **settings},
        "peers": {name: peer.absent(device) or f"{peer.distribution} {peer.version}" for name, peer in PEERS.items()},
        "seconds": 0.0,
        "jobs": [dataclasses.asdict(job) for job in jobs],
        "cases": [],
    }


def resume(out: Path) -> Record:
    """Return the record of an unfinished run.

    Raises:
        BenchError: the record is missing, or is of another machine, commit or version.
    """
    if not (out / FILE).exists():
        raise BenchError(f"--resume: {out} holds no {FILE}")
    record = load(out)
    now = environment.environment(record["settings"]["device"])
    for what in ("machine", "commit", "torch", "triton", "threads"):
        if now[what] != record["environment"][what]:
            raise BenchError(
                f"--resume: {out} was measured with {what} {record['environment'][what]}, but here it is {now[what]}: the figures would "
                "not be comparable. Give another --out for a new run"
            )
    # The load at either start affects the times.
    record["environment"]["load_average"] = max(record["environment"]["load_average"], now["load_average"])
    record["cases"] = [whole for measured in record["cases"] if (whole := visits.without_unfinished(measured)) is not None]
    return record


def load(at: Path) -> Record:
    """Return the record in a file or a run's folder. It may be unfinished.

    Raises:
        BenchError: there is no valid record.
    """
    file = at if at.is_file() else at / FILE
    try:
        record: Record = json.loads(file.read_text(encoding="utf-8"))
        schema = record["schema"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BenchError(f"{file} is not a record of a benchmark: {type(error).__name__}") from None
    if schema != SCHEMA:
        raise BenchError(f"{file} has schema {schema}, but this version writes {SCHEMA}: give another --out")
    return record


def save(out: Path, record: Record) -> None:
    """Write the record atomically: a killed process leaves the previous state or this one. Creates the folder if necessary."""
    text = json.dumps(record, indent=1, ensure_ascii=False)
    # Put each list of numbers on one line.
    text = re.sub(r"\[\s+([-\d.,\seE+]+?)\s+\]", lambda m: "[" + ", ".join(m[1].replace(",", " ").split()) + "]", text)
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_whole(out / FILE, lambda temporary: temporary.write_text(text + "\n", encoding="utf-8"))
    except OSError as error:
        raise BenchError(f"--out {out}: cannot be written to ({error.strerror})") from None


def run(record: Record, out: Path, console: Console, budget_minutes: float | None = None) -> Record:
    """Run the remaining measurements of a record, print each finished case, and write the report, even after an interruption.

    Returns:
        The record; ``status`` shows whether it is complete.

    Raises:
        FileError: another process has locked the folder, or a file in it was not made by this command.
    """
    with output_of(out) as output:
        output.check([FILE, page.REPORT])
        output.claim(FILE)
        return _run(record, output, console, budget_minutes)


def _run(record: Record, output: Output, console: Console, budget_minutes: float | None) -> Record:
    out = output.path
    device, began, before = record["settings"]["device"], time.monotonic(), record["seconds"]
    deadline = math.inf if budget_minutes is None else began + 60 * budget_minutes
    jobs = [Job.load(saved) for saved in record["jobs"]]
    # Cases are in the order of the jobs. All first visits come before the second ones.
    remaining = [
        (visit, at) for visit in range(1, 1 + max((job.visits for job in jobs), default=0)) for at, job in enumerate(jobs)
        if job.visits >= visit and not (at < len(record["cases"]) and record["cases"][at]["visits_done"] >= visit)
    ]  # fmt: skip
    record["status"] = "running"

    def keep() -> None:
        record["seconds"] = round(before + time.monotonic() - began, 1)
        save(out, record)

    e = record["environment"]
    console.print(f"{e['machine']}: torch {e['torch']}, {e['threads']} threads, load average {e['load_average']}", highlight=False)
    if load := headline.busy(record):
        console.print(Text(f"The machine is busy ({load}): times will not be reliable.", style="bold yellow"))
    try:
        with _terminable(), _bars(console) as progress:
            steps = sum(job.steps_of(visit) for job in jobs for visit in range(1, 1 + job.visits))
            total = progress.add_task("", total=steps, completed=steps - sum(jobs[at].steps_of(visit) for visit, at in remaining))
            if "rates" not in record:
                progress.update(total, description="copy bandwidth and matrix rate")
                dtypes = sorted({job.case.dtype for job in jobs})
                record["rates"] = measure.rates(device, dtypes)
                keep()
            for visit, at in remaining:
                if time.monotonic() > deadline:
                    record["status"] = "out of time"
                    break
                _one(jobs[at], at, visit, record, keep, progress, total, deadline - time.monotonic())
                if record["cases"][at]["complete"]:
                    console.print(table.rich_table(record["cases"][at], record["rates"]))
            else:
                record["status"] = "complete"
    except KeyboardInterrupt:
        record["status"] = "interrupted"
    keep()
    for measured in record["cases"]:
        if not measured["complete"] and any("samples_ms" in row for row in measured["results"]):
            console.print(table.rich_table(measured, record["rates"]))
    page.write(output, record)
    print_headline(console, record)
    console.print(f"{out / page.REPORT} and {out / FILE}; plots in {out / 'plots'}", highlight=False, markup=False)
    if record["status"] != "complete":
        done = sum(measured["complete"] for measured in record["cases"])
        console.print(
            f"{page.STATUS[record['status']]} {done} of {len(jobs)} cases are complete; --resume --out {out} goes on.", highlight=False
        )
    return record


def print_headline(console: Console, record: Record) -> None:
    """Print the warnings and the sentence at the beginning of the report."""
    for warning in headline.warnings(record):
        console.print(Text(shown(warning), style="bold yellow"))
    if sentence := headline.sentence(record):
        console.print(Text(shown(sentence)))


def _one(job: Job, at: int, visit: int, record: Record, keep: Callable[[], None], progress: Progress, total: Any, seconds: float) -> None:
    """Visit a job, record its samples, and save the record after every round."""
    start = progress.tasks[0].completed
    measured = record["cases"][at] if at < len(record["cases"]) else visits.new(job)
    of_visits = f", process {visit} of {job.visits}" if job.visits > 1 else ""
    which = f"[{at + 1}/{len(record['jobs'])}{of_visits}] {table.title(measured)}"

    def advance(doing: str) -> None:
        progress.update(total, advance=1, description=f"{which}: {doing}")

    def save() -> None:
        record["cases"][at:] = [measured, *record["cases"][at + 1 :]]
        keep()

    visits.visit(measured, job, visit, record["settings"]["device"], advance, save, seconds)
    progress.update(total, completed=start + job.steps_of(visit))


@contextmanager
def _bars(console: Console) -> Iterator[Progress]:
    columns = (BarColumn(24), TaskProgressColumn(), TimeElapsedColumn(), TextColumn("{task.description}", markup=False))
    with Progress(*columns, console=console, transient=True, refresh_per_second=2) as progress:
        yield progress


@contextmanager
def _terminable() -> Iterator[None]:
    """Let SIGTERM end the run like Ctrl-C, and SIGINT too if it was ignored, as in a background job of a script."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread can set signal handlers
        return
    previous = {s: signal.signal(s, signal.default_int_handler) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for s, handler in previous.items():
            signal.signal(s, handler)
