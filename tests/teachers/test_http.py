"""HTTP teachers against real server processes: the fault-injecting server, and ``transformers serve`` with a model."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny
from serving import KEY, Server, requests, wait_until
from typer.testing import CliRunner

from kdkernels import cli
from kdkernels.support.files import FileError
from kdkernels.teachers.generate import asked_of, messages_of, requests_of
from kdkernels.teachers.http import HTTPModel, HTTPModelError, Refused, retry_after
from kdkernels.teachers.local import LocalModel
from kdkernels.teachers.text import Request

runner = CliRunner(env={"COLUMNS": "200", "TERM": "dumb", "NO_COLOR": "1"})
FAULTS = (
    "",
    "full",
    "fullms",
    "busy",
    "error",
    "html",
    "malformed",
    "empty",
    "null",
    "drip",
    "silent",
    "cut",
    "hangup",
    "cut*2",
    "error*3",
)


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with Server.started(tmp_path) as started:
        yield started


def faulty(count: int, delay: float = 0.2, faults: Sequence[str] = FAULTS) -> list[str]:
    return [f"{i} delay={delay} " + (f"fault={fault}" if (fault := faults[i % len(faults)]) else "") for i in range(count)]


# Faults


def test_every_fault_with_64_requests_in_flight_gives_each_reply_once(
    server: Server, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    prompts, log = faulty(240), tmp_path / "log.jsonl"
    model = server.model(concurrency=96, prices=(1.0, 2.0))
    replies = model.complete(requests(prompts, logprobs=2), log)
    assert [reply.key for reply in replies] == [f"row {i}" for i in range(240)]
    assert [reply.text for reply in replies] == [f"echo {prompt}" for prompt in prompts]
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert Counter(line["key"] for line in lines) == Counter(reply.key for reply in replies)
    stats = server.stats()
    assert stats["answered"] == dict.fromkeys(prompts, 1), "each request is answered, and paid for, once"
    assert stats["most"] >= 64
    assert stats["early"] == {}, "no retry comes earlier than the server asked"
    expected = {"": 0, "cut*2": 2, "error*3": 3}
    assert model.usage.retries == sum(expected.get(FAULTS[i % len(FAULTS)], 1) for i in range(240))
    tokens = sum(map(len, prompts))
    assert (model.usage.replies, model.usage.prompt_tokens, model.usage.completion_tokens) == (240, tokens, 720)
    assert model.usage.cost == pytest.approx((tokens + 2 * 720) / 1e6)
    # The server repeats the Authorization header in its errors. The key must not be logged or printed.
    out, err = capfd.readouterr()
    assert KEY not in log.read_text() + out + err
    again = server.model()
    assert again.complete(requests(prompts, logprobs=2), log) == replies
    assert (again.usage.from_log, again.usage.retries) == (240, 0)
    assert server.stats() == stats, "replies in the log are not requested again"


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("error*99", r"gave up on request 'row 0' after 3 tries: 500: .*no, Bearer \[key\]"),
        ("html*99", "after 3 tries: 502"),
        ("malformed*99", r"after 3 tries: an answer that is not whole"),
        ("hangup*99", "after 3 tries: no connection, or one that was cut"),
        ("silent*99", "after 3 tries: no whole answer within 0.3 s"),
        ("drip*99", "after 3 tries: no whole answer within 0.3 s"),
        ("key", r"401: .*no, Bearer \[key\].*the key is read from OPENAI_API_KEY, which is set"),
    ],
)
def test_permanent_errors_end_the_run_with_the_reason(server: Server, tmp_path: Path, fault: str, message: str) -> None:
    model = server.model(retries=2, timeout=0.3, concurrency=1)
    with pytest.raises(HTTPModelError, match=message) as error:
        model.complete(requests([f"fault={fault}", "never asked"]), tmp_path / "log")
    assert KEY not in str(error.value)
    assert error.value.__cause__ is None
    assert "never asked" not in server.stats()["answered"]


def test_fatal_error_keeps_replies_in_flight(server: Server, tmp_path: Path) -> None:
    prompts = ["slow delay=0.5", "fault=key"]
    with pytest.raises(HTTPModelError, match="401"):
        server.model().complete(requests(prompts), tmp_path / "log")
    assert [json.loads(line)["key"] for line in (tmp_path / "log").read_text().splitlines()] == ["row 0"]


@pytest.mark.skipif(sys.version_info < (3, 11), reason="asyncio.run of Python 3.10 cancels everything at once")
def test_interrupt_waits_for_requests_in_flight(server: Server, tmp_path: Path) -> None:
    log = tmp_path / "log"
    code = (
        "import sys; from pathlib import Path; from kdkernels.teachers.http import HTTPModel; from kdkernels.teachers.text import Request\n"
    )
    code += "asked = [Request(str(i), [{'role': 'user', 'content': f'{i} delay=1.5'}]) for i in range(20)]\n"
    code += "HTTPModel(sys.argv[1], 'm', concurrency=5).complete(asked, Path(sys.argv[2]))"
    process = subprocess.Popen([sys.executable, "-c", code, server.url, str(log)], stderr=subprocess.PIPE, text=True)
    wait_until(lambda: server.stats()["most"] >= 5, process)
    process.send_signal(signal.SIGINT)
    assert "KeyboardInterrupt" in process.communicate()[1]
    assert sorted(json.loads(line)["key"] for line in log.read_text().splitlines()) == ["0", "1", "2", "3", "4"]
    assert len(server.stats()["answered"]) == 5


def test_refused_requests_are_named_and_do_not_stop_the_others(server: Server, tmp_path: Path) -> None:
    prompts = ["good", "fault=refused*99", "good too"]
    with pytest.raises(Refused, match=r"refuses 1 of 3 requests; 'row 1': 400: .*Bearer \[key\]") as error:
        server.model().complete(requests(prompts), tmp_path / "log")
    assert set(error.value.reasons) == {"row 1"}
    assert len((tmp_path / "log").read_text().splitlines()) == 2
    data = tiny.write(tmp_path / "data.jsonl", [{"prompt": prompt} for prompt in prompts])
    command = ["generate", "--base-url", server.url, "--model", "m", "--data", data, "--out", tmp_path / "out.jsonl"]
    result = runner.invoke(cli.app, [str(a) for a in command])
    assert (result.exit_code, "--skip-refused" in result.output, (tmp_path / "out.jsonl").exists()) == (2, True, False)
    result = runner.invoke(cli.app, [str(a) for a in [*command, "--skip-refused"]])
    assert result.exit_code == 0, result.output
    assert "2 rows, 1 refused" in result.output
    tokens = len("good") + len("good too")
    assert f"2 replies (2 from the log), 0 retries, 1 refused, {tokens} prompt tokens, 6 completion tokens" in result.output
    assert KEY not in result.output + (tmp_path / "out.jsonl").read_text()


def test_samples_of_one_prompt_differ_and_repeat_with_the_seed(server: Server, tmp_path: Path) -> None:
    """If every sample had the same seed, a server that honours it would return equal samples."""
    batch = requests(["x"] * 8, temperature=1.0)
    texts = [[reply.text for reply in server.model(seed=seed).complete(batch, tmp_path / f"{n}")] for n, seed in enumerate((3, 3, 4))]
    assert len(set(texts[0])) == 8
    assert texts[0] == texts[1]
    assert not set(texts[0]) & set(texts[2])


def test_recipe_skips_refused_requests(server: Server, tmp_path: Path) -> None:
    data = tiny.write(tmp_path / "data.jsonl", [{"prompt": prompt} for prompt in ("good", "fault=refused*99", "good too")])
    command = ["recipe", "sequence", "--base-url", server.url, "--model", "m", "--data", data, "--out", tmp_path / "out", "--price", "1,2"]
    result = runner.invoke(cli.app, [str(a) for a in command])
    assert (result.exit_code, "the server refuses 1 of 3 requests" in result.output) == (2, True)
    result = runner.invoke(cli.app, [str(a) for a in [*command, "--skip-refused"]])
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in (tmp_path / "out" / "rows.jsonl").read_text().splitlines()]
    assert [row["response"] for row in rows] == ["echo good", "echo good too"]
    assert "2/3 replies in replies.jsonl" in result.output
    assert "teacher: 2 replies (2 from the log), 0 retries, 1 refused, 12 prompt tokens, 6 completion tokens, cost 0.0000" in result.output
    assert KEY not in result.output + (tmp_path / "out" / "replies.jsonl").read_text()


def test_api_key_is_sent_only_to_its_server(server: Server, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REFEREES", "sk-of-the-referee")
    data = tiny.write(tmp_path / "seeds.jsonl", [{"prompt": "sing of a lazy dog"}, {"prompt": "name two birds"}])

    def lion(out: str, *options: object) -> None:
        command = [
            "recipe",
            "lion",
            "--data",
            data,
            "--out",
            tmp_path / out,
            "--base-url",
            server.url,
            "--model",
            "m",
            "--count",
            2,
            *options,
        ]
        result = runner.invoke(cli.app, [str(a) for a in [*command, "--max-tokens", 8]])
        assert result.exit_code == 0, result.output

    lion("begun")
    (tmp_path / "other").mkdir()
    with Server.started(tmp_path / "other") as other:
        judged = ["--student", folder, "--referee-url", other.url, "--referee-model", "r", "--generator-model", "g"]
        for out, options, keys in (
            ("a", ["--generator-url", f"{server.url}/", "--referee-key-variable", "REFEREES"], ["Bearer sk-of-the-referee"]),
            ("b", ["--generator-url", other.url], ["Bearer none", "Bearer sk-of-the-referee"]),
        ):
            shutil.copytree(tmp_path / "begun", tmp_path / out)
            lion(out, *judged, *options)
            assert sorted(other.stats()["keys"]) == keys
        assert list(server.stats()["keys"]) == [f"Bearer {KEY}"]


def test_missing_server_raises_without_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(HTTPModelError, match="after 2 tries: no connection"):
        HTTPModel(f"http://127.0.0.1:{port}/v1", "m", retries=1, backoff=0.01).complete(requests(["a"]), tmp_path / "log")


def test_retry_after_is_read_in_all_its_forms() -> None:
    assert retry_after({"retry-after": "1.5"}) == 1.5
    assert retry_after({"retry-after-ms": "250", "retry-after": "9"}) == 0.25
    assert retry_after({"retry-after": "Thu, 01 Jan 2015 00:00:00 GMT"}) == 0.0
    assert 3500 < retry_after({"retry-after": time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 3600))}) <= 3600
    assert retry_after({"retry-after": "soon"}) == retry_after({}) == 0.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base_url": "localhost:8000"}, "base_url must be a URL"),
        ({"base_url": f"http://me:{KEY}@host/v1"}, "environment variable OPENAI_API_KEY"),
        ({"base_url": f"http://host/v1?key={KEY}"}, "environment variable OPENAI_API_KEY"),
        ({"concurrency": 0}, "concurrency=0"),
        ({"timeout": 0}, "timeout=0"),
        ({"api": "other"}, "'other'"),
    ],
)
def test_invalid_settings_raise(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        HTTPModel(**{"base_url": "http://localhost/v1", "model": "m", **options})
    assert KEY not in str(error.value)


def test_invalid_requests_raise(server: Server, tmp_path: Path) -> None:
    same = [Request("a", [{"role": "user", "content": "x"}])] * 2
    with pytest.raises(ValueError, match="two requests have the key 'a'"):
        server.model().complete(same, tmp_path / "log")
    two = Request("a", [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}])
    with pytest.raises(ValueError, match="the completions API takes one prompt"):
        server.model(api="completions").complete([two], tmp_path / "log")
    assert not (tmp_path / "log").exists()


def test_complete_works_inside_a_running_event_loop(server: Server, tmp_path: Path) -> None:
    async def notebook() -> list[Any]:
        return server.model().complete(requests(["a", "b"]), tmp_path / "log")

    assert [reply.text for reply in asyncio.run(notebook())] == ["echo a", "echo b"]


# The log


def test_torn_last_line_repeats_only_its_request(server: Server, tmp_path: Path) -> None:
    log = tmp_path / "log"
    replies = server.model(concurrency=1).complete(requests(["a", "b", "c"]), log)
    whole = log.read_bytes()
    log.write_bytes(whole[:-9])
    assert server.model(concurrency=1).complete(requests(["a", "b", "c", "d"]), log)[:3] == replies
    assert server.stats()["answered"] == {"a": 1, "b": 1, "c": 2, "d": 1}
    assert log.read_bytes().startswith(whole)


def test_damaged_foreign_or_locked_log_raises(server: Server, tmp_path: Path) -> None:
    log = tmp_path / "log"
    server.model().complete(requests(["a", "b"]), log)
    whole = log.read_bytes()
    for model, prompts in ((server.model(), ["b", "a"]), (server.model(seed=1), ["a", "b"])):
        with pytest.raises(FileError, match="reply for 'row 0' to another request"):
            model.complete(requests(prompts), log)
    with pytest.raises(FileError, match="reply for 'row 0'"):
        server.model().complete(requests(["a"], max_tokens=5), log)
    log.write_bytes(b"{]\n" + whole)
    with pytest.raises(FileError, match="line 1, is not a JSON object"):
        server.model().complete(requests(["a", "b"]), log)
    log.write_bytes(b'{"prompt": "x"}\n' + whole)
    with pytest.raises(FileError, match="not a log of replies"):
        server.model().complete(requests(["a", "b"]), log)
    log.write_bytes(whole)
    holder = "import sys, time; from kdkernels.support.files import Lines\nfrom pathlib import Path\n"
    holder += "with Lines(Path(sys.argv[1])):\n    print('held', flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", holder, str(log)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    try:
        with pytest.raises(FileError, match="in use by another process"):
            server.model().complete(requests(["a", "b"]), log)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    assert server.model().complete(requests(["a", "b"]), log), "a killed process leaves no lock"
    assert log.read_bytes() == whole


def test_generate_repeated_after_sigkill_does_not_repeat_requests(server: Server, tmp_path: Path) -> None:
    prompts = faulty(150, 0.05, ("", "fullms", "error", "", "malformed", "cut", "hangup"))
    data = tiny.write(tmp_path / "data.jsonl", [{"prompt": p, "id": i} for i, p in enumerate(prompts)])
    out = tmp_path / "answers.jsonl"
    log = tmp_path / "answers.jsonl.log"
    command = ["generate", "--base-url", server.url, "--model", "m", "--data", data, "--out", out, "--concurrency", 16, "--timeout", 4]
    process = subprocess.Popen(
        [sys.executable, "-m", "kdkernels.cli", *map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    wait_until(lambda: log.exists() and log.read_bytes().count(b"\n") >= 30, process)
    process.send_signal(signal.SIGKILL)
    output = process.communicate()[0]
    assert not out.exists(), "the output is written only when it is complete"
    logged = {json.loads(line)["key"] for line in log.read_text().splitlines() if line.endswith("}")}
    paid = server.stats()["answered"]
    with log.open("ab") as file:
        file.write(b'{"key":"torn by the ki')
    result = runner.invoke(cli.app, [str(a) for a in command])
    assert result.exit_code == 0, result.output
    assert f"{out}: 150 rows" in " ".join(result.output.split()) or "150 rows" in result.output
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert rows == [{"prompt": p, "id": i, "response": f"echo {p}", "finish_reason": "stop"} for i, p in enumerate(prompts)]
    keys = {
        request.key: request.messages[0]["content"]
        for request in requests_of([{"prompt": p} for p in prompts], max_tokens=256, temperature=0)
    }
    final = server.stats()["answered"]
    assert all(final[keys[key]] == paid[keys[key]] == 1 for key in logged), "logged replies are not paid for again"
    twice = [prompt for prompt in prompts if final[prompt] != 1]
    assert len(twice) <= 16, "only requests in flight at the kill may repeat"
    assert all(paid.get(prompt) == 1 and final[prompt] == 2 for prompt in twice)
    assert KEY not in output + result.output
    assert not any(KEY.encode() in path.read_bytes() for path in tmp_path.iterdir())
    before = data.read_bytes()
    result = runner.invoke(cli.app, [str(a) for a in [*command[:7], "--out", data]])
    assert (result.exit_code, "would be overwritten" in " ".join(result.output.split()), data.read_bytes()) == (2, True, before)


# transformers serve


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def local(folder: Path) -> LocalModel:
    return LocalModel(folder)


def test_transformers_serve_gives_the_text_of_the_model(tmp_path: Path, folder: Path, local: LocalModel) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [Path(sys.executable).with_name("transformers"), "serve", folder, "--device", "cpu", "--host", "127.0.0.1", "--port", port]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with (tmp_path / "serve.log").open("w") as file:
        process = subprocess.Popen([str(a) for a in command], env=environment, stdout=file, stderr=file)

    def listening() -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    try:
        wait_until(listening, process, 120)
        rows = tiny.rows(6)
        data, out = tiny.write(tmp_path / "data.jsonl", rows), tmp_path / "out.jsonl"
        url = f"http://127.0.0.1:{port}/v1"
        generate = ["generate", "--base-url", url, "--model", folder, "--data", data, "--out", out, "--max-tokens", 6, "--timeout", 60]
        result = runner.invoke(cli.app, [str(a) for a in generate])
        assert result.exit_code == 0, result.output
        assert "6 replies (0 from the log), 0 retries" in result.output
        rows_out = [json.loads(line) for line in out.read_text().splitlines()]
        # The text equals that of the model in this process, so the messages, the template and the limits arrive.
        replies = local.complete(requests_of(rows, max_tokens=6, temperature=0.0), tmp_path / "local.log")
        assert [row["response"] for row in rows_out] == [reply.text for reply in replies]
        plain = HTTPModel(url, str(folder), api="completions", timeout=60).complete(
            requests(["the quick"], max_tokens=5), tmp_path / "plain.log"
        )
        assert plain[0].completion_tokens > 0
        with pytest.raises(HTTPModelError, match="gives no log-probabilities"):
            HTTPModel(url, str(folder), timeout=60).complete(requests(["the"], logprobs=2, max_tokens=2), tmp_path / "logprobs.log")
    finally:
        process.kill()
        process.wait()


def test_messages_and_keys_of_rows() -> None:
    user, assistant = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    assert messages_of({"messages": [user, assistant]}) == [user]
    assert messages_of({"prompt": "a", "response": "b"}) == [user]
    for row in ({"messages": [assistant]}, {"text": "a"}, {}):
        with pytest.raises(ValueError, match="a row needs prompt or messages"):
            messages_of(row)
    teacher = {"prompt": "a", "teacher_prompt": "b"}
    assert (messages_of(teacher), asked_of(teacher)) == ([user], [{"role": "user", "content": "b"}])
    assert asked_of({"messages": [user], "teacher_messages": [assistant, user]}) == [assistant, user]
    for name in ("demonstrations", "tools"):
        with pytest.raises(ValueError, match=name):
            asked_of({"prompt": "a", name: ["b"]})
    with pytest.raises(ValueError, match="row 2"):
        requests_of([{"prompt": "a"}, {}], max_tokens=1, temperature=0)
    keys = [
        r.key
        for r in requests_of([{"prompt": "a"}, {"prompt": "b"}, {"prompt": "a"}, {"prompt": "a", "key": 7}], max_tokens=1, temperature=0)
    ]
    assert len(set(keys)) == 4
    assert keys[3] == "7"
    moved = [r.key for r in requests_of([{"prompt": "new"}, {"prompt": "b"}], max_tokens=1, temperature=0)]
    assert moved[1] == keys[1], "a row keeps its key at another position"
