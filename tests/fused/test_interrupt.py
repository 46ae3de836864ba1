"""Ctrl-C during a long call of the compiled CPU kernels, sent as a signal to another process."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from kdkernels.backends import _extension

CALL = """
import torch, kdkernels as kd
from kdkernels.backends import cpu

rows, chunks = cpu.rows, []
def counted(*arguments):
    chunks.append(None)
    rows(*arguments)
    if interruptible and len(chunks) == {begins_with}:
        print("in the middle", flush=True)
cpu.rows, interruptible = counted, True

student, teacher = (torch.zeros(4096, 16384, requires_grad=r) for r in (True, False))
def call(n):
    kd.distillation_loss(student[:n], teacher[:n], divergence="jsd", chunk_rows=1, backend="native").backward()
try:
    call(4096)
except KeyboardInterrupt:
    stopped, interruptible = len(chunks), False
    chunks.clear()
    call(4)  # a later call works
    print(stopped, len(chunks), student.grad is not None)
"""


@pytest.mark.skipif(_extension.missing() is not None, reason="the compiled kernels are missing")
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT for a process")
@pytest.mark.parametrize("begins_with", [1, 4097], ids=["forward", "backward"])
def test_interrupt_ends_the_call_at_the_next_chunk(begins_with: int) -> None:
    """The call has 8192 chunks of one row: 4096 in forward, 4096 in backward."""
    code = CALL.format(begins_with=begins_with)
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "in the middle\n", process.stderr.read()
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    stopped, chunks_of_second_call, has_gradient = output.split()
    assert begins_with <= int(stopped) < begins_with + 4000, "the call ran to its end"
    assert (chunks_of_second_call, has_gradient) == ("8", "True")
