"""Commands killed by SIGKILL at random moments and repeated. They end with the same files and repeat no reply in the log."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
from serving import KEY, Server

KILLS, AT_ONCE = 4, 4


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with Server.started(tmp_path) as started:
        yield started


def killed(seed: str, seconds: float, *command: Any) -> int:
    """Kill and repeat a command until it succeeds. Return the number of kills."""
    script = str(Path(__file__).parents[1] / "support" / "killed.py")
    process = subprocess.run([sys.executable, script, seed, str(seconds), *map(str, command)], capture_output=True, text=True)
    assert process.returncode == 0, process.stdout + process.stderr
    kills, status = map(int, process.stdout.splitlines()[-1].split())
    assert status == 0, process.stdout + process.stderr
    assert KEY not in process.stdout + process.stderr
    return kills


def keys(log: Path) -> list[str]:
    log_keys = [json.loads(line)["key"] for line in log.read_text().splitlines()]
    assert len(log_keys) == len(set(log_keys)), f"{log.name} holds a key twice"
    return log_keys


def test_generate_killed_at_random_moments(server: Server, tmp_path: Path) -> None:
    data = tiny.write(tmp_path / "data.jsonl", [{"prompt": f"{i} delay=0.1"} for i in range(120)])
    kills = trial = 0
    while kills < KILLS:
        out = tmp_path / f"{trial}.jsonl"
        new_kills = killed(
            f"generate {trial}", 1.0, "generate", "--base-url", server.url, "--model", "m", "--data", data, "--out", out,
            "--temperature", 1, "--seed", trial, "--concurrency", AT_ONCE,
        )  # fmt: skip
        rows = [json.loads(line) for line in out.read_text().splitlines()]
        assert [row["prompt"] for row in rows] == [f"{i} delay=0.1" for i in range(120)]
        assert len({row["response"] for row in rows}) == 120
        assert len(keys(out.with_name(out.name + ".log"))) == 120
        kills, trial = kills + new_kills, trial + 1
    assert sum(server.stats()["answered"].values()) <= 120 * trial + kills * AT_ONCE, "only requests in flight are repeated"


@pytest.mark.slow
def test_lion_killed_at_random_moments(server: Server, tmp_path: Path) -> None:
    seeds = tiny.write(tmp_path / "seeds.jsonl", [{"prompt": f"Describe thing number {i} delay=0.1"} for i in range(8)])
    student = tiny.save(tmp_path / "student")
    stages = ("round-0/imitate.jsonl", "round-0/judged.jsonl", "round-0/generated.jsonl", "round-1/imitate.jsonl")

    def loop(out: Path, seed: str, seconds: float) -> int:
        common = (
            "recipe", "lion", "--data", seeds, "--out", out, "--base-url", server.url, "--model", "m", "--count", 6, "--max-tokens", 8,
            "--concurrency", AT_ONCE, "--batch-size", 1,
        )  # fmt: skip
        return killed(seed, seconds, *common) + killed(seed, seconds, *common, "--student", student)

    assert loop(tmp_path / "whole", "", 600) == 0
    expected = {name: (tmp_path / "whole" / name).read_bytes() for name in stages}
    requests_of_one_run = sum(server.stats()["answered"].values())
    kills = trial = 0
    while kills < KILLS:
        out = tmp_path / f"{trial}"
        kills += loop(out, f"lion {trial}", 2.0)
        assert {name: (out / name).read_bytes() for name in stages} == expected
        for log in ("teacher.jsonl", "round-0/student.jsonl", "round-0/referee.jsonl", "round-0/generator.jsonl"):
            assert keys(out / log) != []
        trial += 1
    assert sum(server.stats()["answered"].values()) <= requests_of_one_run * (trial + 1) + kills * AT_ONCE
