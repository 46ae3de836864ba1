"""Goes through the jobs of a suite and keeps ``results.json`` as good as the last sample, so that whatever ends a run costs one round."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from . import environment, measure, page, table
from .cases import Case
from .measure import Job
from .peers import PEERS

SCHEMA = 1
FILE = "results.json"

Record = dict[str, Any]
"""What ``results.json`` holds: ``environment``, ``settings``, ``rates``, ``jobs`` as planned, ``cases`` as measured, in their order."""


class BenchError(RuntimeError):
    """The run cannot begin; the message says why, and what to do."""


def begin(jobs: Sequence[Job], device: str, settings: dict[str, Any], out: Path) -> Record:
    """A new record.

    Raises:
        BenchError: ``out`` holds an unfinished run, or cannot be written to.
    """
    if (out / FILE).exists() and load(out)["status"] != "complete":
        raise BenchError(f"{out} holds a run that was cut short: --resume finishes it, or give another --out")
    record: Record = {
        "schema": SCHEMA,
        "status": "running",
        "environment": environment.environment(device),  # first: later the load is our own
        "settings": {"device": device, **settings},
        "peers": {name: peer.absent(device) or f"{peer.distribution} {peer.version}" for name, peer in PEERS.items()},
        "seconds": 0.0,
        "jobs": [dataclasses.asdict(job) for job in jobs],
        "cases": [],
    }
    save(out, record)
    return record


def resume(out: Path) -> Record:
    """The record of a run that was cut short.

    Raises:
        BenchError: there is none, or it is of another machine, another commit or other versions.
    """
    if not (out / FILE).exists():
        raise BenchError(f"--resume: {out} holds no {FILE}")
    record = load(out)
    now = environment.environment(record["settings"]["device"])
    for what in ("machine", "commit", "torch", "triton", "threads"):
        if now[what] != record["environment"][what]:
            raise BenchError(
                f"--resume: {out} was measured with {what} {record['environment'][what]}, and here it is {now[what]}: figures would not "
                "compare. Give another --out for a new run"
            )
    record["cases"] = [measured for measured in record["cases"] if measured["complete"]]
    return record


def load(out: Path) -> Record:
    """A record, whole or cut short.

    Raises:
        BenchError: what is there is none.
    """
    try:
        record: Record = json.loads((out / FILE).read_text(encoding="utf-8"))
        schema = record["schema"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BenchError(f"{out / FILE} is no record of a benchmark: {type(error).__name__}") from None
    if schema != SCHEMA:
        raise BenchError(f"{out / FILE} is of schema {schema}, and this version writes {SCHEMA}: give another --out")
    return record


def save(out: Path, record: Record) -> None:
    """In one piece: a process that is killed leaves the last state or this one."""
    text = json.dumps(record, indent=1, ensure_ascii=False)
    # A list of numbers reads better on one line.
    text = re.sub(r"\[\s+([-\d.,\seE+]+?)\s+\]", lambda m: "[" + ", ".join(m[1].replace(",", " ").split()) + "]", text)
    try:
        out.mkdir(parents=True, exist_ok=True)
        unfinished = out / f".{FILE}.unfinished"
        unfinished.write_text(text + "\n", encoding="utf-8")
        os.replace(unfinished, out / FILE)
    except OSError as error:
        raise BenchError(f"--out {out}: cannot be written to ({error.strerror})") from None


def job_of(saved: dict[str, Any]) -> Job:
    return Job(**{**saved, "case": Case(**saved["case"]), "variants": tuple(saved["variants"])})


def run(record: Record, out: Path, console: Console, budget_minutes: float | None = None) -> Record:
    """Measures what the record still lacks; shows each case as it is done; writes the report in the end, however it comes.

    Returns:
        The record, whose ``status`` says whether it is complete.
    """
    device, began, before = record["settings"]["device"], time.monotonic(), record["seconds"]
    deadline = math.inf if budget_minutes is None else began + 60 * budget_minutes
    jobs = [job_of(saved) for saved in record["jobs"]]
    record["status"] = "running"

    def keep() -> None:
        record["seconds"] = round(before + time.monotonic() - began, 1)
        save(out, record)

    e = record["environment"]
    console.print(f"{e['machine']}: torch {e['torch']}, {e['threads']} threads, load average {e['load_average']}", highlight=False)
    try:
        with _terminable(), _bars(console) as progress:
            total = progress.add_task(
                "", total=sum(job.steps for job in jobs), completed=sum(j.steps for j in jobs[: len(record["cases"])])
            )
            if "rates" not in record:
                progress.update(total, description="copy bandwidth and matrix rate")
                dtypes = sorted({job.case.dtype for job in jobs})
                record["rates"] = measure.rates(device, dtypes)
                keep()
            for job in jobs[len(record["cases"]) :]:
                if time.monotonic() > deadline:
                    record["status"] = "out of time"
                    break
                _one(job, device, record, keep, progress, total, deadline)
                console.print(table.rich_table(record["cases"][-1], record["rates"]))
            else:
                record["status"] = "complete"
    except KeyboardInterrupt:
        record["status"] = "interrupted"
    keep()
    page.write(out, record)
    console.print(f"[bold]{out / 'report.html'}[/bold] and {out / FILE}; plots in {out / 'plots'}", highlight=False)
    if record["status"] != "complete":
        done = sum(measured["complete"] for measured in record["cases"])
        console.print(
            f"{page.STATUS[record['status']]} {done} of {len(jobs)} cases are complete; --resume --out {out} goes on.", highlight=False
        )
    return record


def _one(job: Job, device: str, record: Record, keep: Any, progress: Progress, total: Any, deadline: float) -> None:
    """Measures a job into the record, and keeps what there is of it after every round."""
    start = progress.tasks[0].completed
    at = len(record["cases"])

    def advance(doing: str, steps: int) -> None:
        progress.update(
            total, advance=steps, description=f"[{at + 1}/{len(record['jobs'])}] {table.title({'case': vars(job.case)})}: {doing}"
        )

    def partly(measured: dict[str, Any]) -> None:
        record["cases"][at:] = [measured]
        keep()

    partly(measure.measure(job, device, advance, partly, deadline))
    progress.update(total, completed=start + job.steps)


@contextmanager
def _bars(console: Console) -> Iterator[Progress]:
    columns = (BarColumn(24), TaskProgressColumn(), TimeElapsedColumn(), TextColumn("{task.description}", markup=False))
    with Progress(*columns, console=console, transient=True) as progress:
        yield progress


@contextmanager
def _terminable() -> Iterator[None]:
    """A SIGTERM, as of a machine that is taken back, ends the run like Ctrl-C; so does a SIGINT that a script's ``&`` had ignored."""
    if threading.current_thread() is not threading.main_thread():
        yield  # whoever called has the say
        return
    previous = {s: signal.signal(s, signal.default_int_handler) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for s, handler in previous.items():
            signal.signal(s, handler)
