"""Measure in a separate process: ``ask`` starts one, which prints a line of JSON for each event.

``python -m kdkernels.bench.processes REQUEST`` is that process. After each line it waits for a byte on stdin, and it ends when the
process that started it ends.
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
from .measure import Event, Job, Tell

Request = dict[str, Any]
"""``task``, ``"visit"`` or ``"memory"``, and the arguments of ``measure.visit`` or of ``measure.peak_extra_bytes`` as plain data."""


class OutOfProcessError(RuntimeError):
    """The measuring process failed; the message is its last line."""


def answer(request: Request, tell: Tell) -> None:
    """Measures what is asked for, in this process."""
    arguments = {key: value for key, value in request.items() if key != "task"}
    if request["task"] == "visit":
        measure.visit(**{**arguments, "job": Job.load(request["job"])}, tell=tell)
    else:
        tell({"peak_extra_bytes": measure.peak_extra_bytes(**{**arguments, "case": Case(**request["case"])})})


def ask(request: Request, tell: Tell) -> None:
    """``answer`` in a fresh process, with as many threads as this one has.

    Raises:
        OutOfProcessError: it failed, or was killed, as happens when memory runs out.
    """
    command = [sys.executable, "-m", "kdkernels.bench.processes", json.dumps({**request, "threads": torch.get_num_threads()})]
    # A file, not a pipe: nobody would read it meanwhile.
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
                if line.endswith("\n"):  # else it was killed while it wrote
                    tell(json.loads(line))
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
    # These may reach every process of a terminal or a machine: the one that asked keeps what there is, and then ends this one.
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    heard = threading.Semaphore(0)

    def listen() -> None:
        while os.read(0, 1):
            heard.release()
        os._exit(1)  # the other end is closed: the parent has ended, possibly by SIGKILL

    threading.Thread(target=listen, daemon=True).start()
    # What libraries print must not come between the lines, nor may a process that they start keep the pipe open.
    lines = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def tell(event: Event) -> None:
        print(json.dumps(event), file=lines, flush=True)
        heard.acquire()  # while it draws or saves, nothing is timed

    torch.set_num_threads(request.pop("threads"))
    answer(request, tell)


if __name__ == "__main__":
    _main(json.loads(sys.argv[1]))
