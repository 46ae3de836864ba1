"""Servers for test_walk.py: llama.cpp's and ``transformers serve``, each in a process that ends with the test."""

from __future__ import annotations

import importlib.util
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

XLLAMACPP = """
import sys, time, xllamacpp
p = xllamacpp.CommonParams()
p.model.path, p.port, p.hostnames = sys.argv[1], int(sys.argv[2]), ["127.0.0.1"]
p.n_ctx, p.n_parallel, p.warmup = 2048, 2, False
p.cpuparams.n_threads = p.cpuparams_batch.n_threads = 2
server = xllamacpp.Server(p)
time.sleep(3600)
"""
"""Start llama.cpp's server from the package ``xllamacpp``, used if ``llama-server`` is not installed."""


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextmanager
def started(command: list[str], port: int) -> Iterator[str]:
    """Start a server and yield its URL when it answers."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 300
        while not answers(f"http://127.0.0.1:{port}/health"):
            assert process.poll() is None, f"{command[0]} ended with status {process.returncode}"
            assert time.monotonic() < deadline, f"{command[0]} does not answer after 300 s"
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.kill()
        process.wait()


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as reply:
            return bool(reply.status == 200)
    except (urllib.error.URLError, OSError):
        return False  # not yet


@contextmanager
def llama_server(model: Path) -> Iterator[str]:
    gguf = next(model.glob("*.gguf"), None)
    if gguf is None:
        pytest.skip(f"llama.cpp's server needs a .gguf in {model}: see tests/real/model.py")
    port, installed = free_port(), shutil.which("llama-server")
    if installed:
        command = [installed, "--model", str(gguf), "--port", str(port), "--ctx-size", "2048", "--threads", "2"]
    elif importlib.util.find_spec("xllamacpp"):
        command = [sys.executable, "-c", XLLAMACPP, str(gguf), str(port)]
    else:
        pytest.skip("llama-server is not on PATH, and the package xllamacpp is not installed")
    with started(command, port) as url:
        yield url


@contextmanager
def transformers_serve(model: Path) -> Iterator[str]:
    script = Path(sys.executable).parent / "transformers"
    if not (script.exists() and importlib.util.find_spec("fastapi") and importlib.util.find_spec("uvicorn")):
        pytest.skip("transformers serve is not installed: pip install 'transformers[serving]'")
    port = free_port()
    with started([str(script), "serve", str(model), "--port", str(port), "--host", "127.0.0.1"], port) as url:
        yield url
