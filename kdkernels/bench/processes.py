"""Measure in a separate process. ``ask`` starts it, and it prints a line of JSON for each event.

The process runs ``python -m kdkernels.bench.processes REQUEST``. After each line it waits for a byte on stdin. It ends when the process
that started it ends.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from contextlib import suppress
from typing import Any

import torch

from . import measure
from .cases import Case
from .measure import Emit, Event, Job

Request = dict[str, Any]
"""``task`` (``"visit"`` or ``"memory"``), and the arguments of ``measure.visit`` or ``measure.peak_extra_bytes``, as plain data."""


class OutOfProcessError(RuntimeError):
    """The measuring process failed; the message is its last line."""


def answer(request: Request, emit: Emit) -> None:
    """Run a request in this process."""
    arguments = {key: value for key, value in request.items() if key != "task"}
    if request["task"] == "visit":
        measure.visit(**{**arguments, "job": Job.load(request["job"])}, emit=emit)
    else:
        emit({"peak_extra_bytes": measure.peak_extra_bytes(**{**arguments, "case": Case(**request["case"])})})


def ask(request: Request, emit: Emit) -> None:
    """Run a request in a fresh process, with the same number of threads as this one.

    Raises:
        OutOfProcessError: the process failed or was killed, for example because memory ran out.
    """
    command = [sys.executable, "-m", "kdkernels.bench.processes", json.dumps({**request, "threads": torch.get_num_threads()})]
    # A file instead of a pipe, which would fill up because it is only read at the end.
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors,
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, encoding="utf-8"
        ) as process,
    ):  # fmt: skip
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            for line in process.stdout:
                if line.endswith("\n"):  # otherwise the process was killed while writing
                    emit(json.loads(line))
                    with suppress(BrokenPipeError):
                        os.write(process.stdin.fileno(), b"\n")
            code = process.wait()
        finally:
            process.kill()
        if code < 0:
            raise OutOfProcessError(f"its process was killed by signal {-code}" + (", memory being short" if code == -9 else ""))
        if code:
            errors.seek(0)
            raise OutOfProcessError((errors.read().strip().splitlines() or ["no message"])[-1][:300])


def _main(request: Request) -> None:
    # These signals may reach all processes of a terminal. The parent handles them: it saves the results and then ends this process.
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    heard = threading.Semaphore(0)

    def listen() -> None:
        while os.read(0, 1):
            heard.release()
        os._exit(1)  # the other end is closed: the parent has ended, possibly by SIGKILL

    threading.Thread(target=listen, daemon=True).start()
    # Output of libraries must not mix with the lines, and processes that they start must not keep the pipe open.
    lines = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def emit(event: Event) -> None:
        print(json.dumps(event), file=lines, flush=True)
        heard.acquire()  # do not time anything while the parent draws or saves

    torch.set_num_threads(request.pop("threads"))
    answer(request, emit)


if __name__ == "__main__":
    _main(json.loads(sys.argv[1]))
