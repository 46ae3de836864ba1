"""No command overwrites, renames or deletes a file that it did not create."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
from typer.testing import CliRunner

from kdkernels.cli.root import app
from kdkernels.support.files import MARKER, FileError, Lines, Lock, Output, write_jsonl, write_whole

HASH = "0" * 64
TEXT = "a file of the user's, without a last line end"
FILES = (
    "config.json", "model.safetensors", "tokenizer.json", "rows.jsonl", "replies.jsonl", "results.json", "report.html", "demo.json",
    "demo.png", "run.json", "summary.json", "training.png", "manifest.json", "head.safetensors", "000000.parquet", "settings.json",
    "fill.jsonl", "judge.jsonl", "factual.jsonl", "questioner.jsonl", "teacher.jsonl", "out.jsonl", "out.jsonl.log", "out.jsonl.tmp",
    "out.jsonl.log.lock", "notes.txt", "a.tmp", ".lock", ".rows.jsonl.0123456789abcdef.unfinished", "checkpoint-5/weights.bin",
    "checkpoint-merged-2026/weights.bin", "plots/loss-1.svg", "round-0/imitate.jsonl", "round-0/settings.json",
)  # fmt: skip


def tree(folder: Path) -> dict[str, object]:
    """Return every path in a folder with its type, and its content or link target."""
    entries: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        mode = os.lstat(path).st_mode
        content = os.readlink(path) if stat.S_ISLNK(mode) else path.read_bytes() if stat.S_ISREG(mode) else None
        entries[path.relative_to(folder).as_posix()] = (stat.S_IFMT(mode), content)
    return entries


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and rows that every command accepts."""
    folder = tmp_path_factory.mktemp("home")
    tiny.save(folder / "model")
    tiny.write(folder / "data.jsonl", [{"prompt": f"the quick {i}", "response": "brown fox"} for i in range(3)])
    return folder


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """A user's folder whose files have the names of all outputs, logs, locks and temporary files."""
    folder = tmp_path / "mine"
    for name in FILES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(TEXT)
    (tmp_path / "victim").write_text(TEXT)
    (folder / "link").symlink_to(tmp_path / "victim")
    os.mkfifo(folder / "pipe")
    return folder


ROWS = ("--data", "DATA", "--out", "OUT")
URL = ("--base-url", "http://127.0.0.1:9/v1")
SERVER = (*URL, "--model", "m", "--retries", "0")
PLACES = ("out.jsonl", "link", "pipe", "plots")
RECIPES = ("sequence", "in-context", "chain-of-thought", "socratic", "lion")
COMMANDS: dict[str, tuple[str, ...]] = {
    "train": ("train", "--teacher", "MODEL", "--student", "MODEL", "--data", "DATA", "--output-dir", "OUT", "--max-steps", "1"),
    **{f"cache {kind}": ("cache", "--teacher", "MODEL", "--kind", kind, *ROWS) for kind in ("topk", "sampled", "hidden", "text")},
    "cache of replies": ("cache", "--from-replies", "--tokenizer", "MODEL", *ROWS),
    "cache of a server": ("cache", *URL, "--teacher", "m", "--tokenizer", "MODEL", *ROWS),
    **{f"generate {name}": ("generate", *SERVER, "--data", "DATA", "--out", f"OUT/{name}") for name in PLACES},
    **{f"recipe {name}": ("recipe", name, *SERVER, *ROWS) for name in RECIPES},
    "recipe disco": ("recipe", "disco", *SERVER, "--labels", "good,bad", *ROWS),
    "recipe scott": ("recipe", "scott", "--teacher", "MODEL", *ROWS),
    "recipe over its data": ("recipe", "sequence", *SERVER, "--data", "OUT/rows.jsonl", "--out", "OUT"),
    "bench": ("bench", "--suite", "smoke", "--device", "cpu", "--out", "OUT"),
    "demo": ("demo", "--quick", "--device", "cpu", "--out", "OUT"),
}  # fmt: skip


def run(home: Path, out: Path, words: tuple[str, ...]) -> str:
    """Run a command that must fail. Return its error."""
    names = {"MODEL": str(home / "model"), "DATA": str(home / "data.jsonl"), "OUT": str(out)}
    for name, value in names.items():
        words = tuple(word.replace(name, value) for word in words)
    result = CliRunner().invoke(app, list(words), catch_exceptions=False)
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("Error: "), result.stderr
    assert result.stderr.count("\n") == 1, result.stderr
    return result.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_leaves_a_users_folder_unchanged(home: Path, hostile: Path, command: str) -> None:
    before = tree(hostile.parent)
    run(home, hostile, COMMANDS[command])
    assert tree(hostile.parent) == before


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "checkpoint-5/weights.bin", "run.json", "training.png"])
def test_training_is_refused_if_its_folder_has_a_users_file(home: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "out" / name).parent.mkdir(parents=True)
    (tmp_path / "out" / name).write_text(TEXT)
    before = tree(tmp_path)
    run(home, tmp_path / "out", COMMANDS["train"])
    assert tree(tmp_path) == before


@pytest.mark.parametrize("name", ["replies.jsonl", "rows.jsonl"])
def test_recipe_is_refused_before_any_request_if_its_folder_has_a_users_file(home: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text('{"key": "a", "text": "rows of the user\'s"}')
    before = tree(tmp_path)
    assert "is not of this command" in run(home, tmp_path / "out", COMMANDS["recipe sequence"])
    assert tree(tmp_path) == before


def test_generate_does_not_overwrite_the_users_log_file(home: Path, tmp_path: Path) -> None:
    (tmp_path / "out.jsonl.log").write_text(TEXT)
    before = tree(tmp_path)
    assert "out.jsonl.log is not of this command" in run(home, tmp_path, COMMANDS["generate out.jsonl"])
    assert tree(tmp_path) == before


def test_refused_command_removes_the_folders_that_it_created(tmp_path: Path) -> None:
    with pytest.raises(FileError), Output(tmp_path / "a" / "b", "test") as output:
        raise FileError(output.kind)
    assert not list(tmp_path.iterdir())


def test_output_folder_has_one_command_and_one_process(tmp_path: Path) -> None:
    with Output(tmp_path / "out", "recipe sequence") as output:
        output.write_rows("rows.jsonl", [{"a": 1}])
        with pytest.raises(FileError, match="in use by another process"), Output(tmp_path / "out", "recipe sequence"):
            pass
    with pytest.raises(FileError, match="holds the output of `kdkernels recipe sequence`"), Output(tmp_path / "out", "train"):
        pass
    with Output(tmp_path / "out", "recipe sequence") as output:
        output.write_rows("rows.jsonl", [{"a": 2}])
    assert json.loads((tmp_path / "out" / "rows.jsonl").read_text()) == {"a": 2}


def test_edited_rows_are_not_overwritten(tmp_path: Path) -> None:
    with Output(tmp_path, "test") as output:
        rows = output.write_rows("rows.jsonl", [{"a": 1}])
        rows.write_text("edited")
        with pytest.raises(FileError, match="or was changed since"):
            output.write_rows("rows.jsonl", [{"a": 2}])
    assert rows.read_text() == "edited"


def test_foreign_marker_file_is_kept(tmp_path: Path) -> None:
    for content in (TEXT, "[1]\n", '{"kdkernels": 2}\n', "nul\0\n"):
        (tmp_path / MARKER).write_text(content)
        with pytest.raises(FileError, match="not a marker of kdkernels"), Output(tmp_path, "test"):
            pass
        assert (tmp_path / MARKER).read_text() == content


def test_truncated_marker_is_repaired(tmp_path: Path) -> None:
    with Output(tmp_path, "test") as output:
        output.write_rows("rows.jsonl", [{"a": 1}])
    marker = (tmp_path / MARKER).read_bytes()
    for cut in (5, len(marker) - 3):
        (tmp_path / MARKER).write_bytes(marker[:cut])
        with Output(tmp_path, "test", adopt=lambda: ["rows.jsonl"]) as output:
            output.write_rows("rows.jsonl", [{"a": 1}])


def symbolic_link(path: Path, target: Path) -> None:
    path.symlink_to(target)


def dangling_link(path: Path, target: Path) -> None:
    path.symlink_to(target.parent / "nowhere")


def hard_link(path: Path, target: Path) -> None:
    os.link(target, path)


def pipe(path: Path, target: Path) -> None:
    os.mkfifo(path)


def directory(path: Path, target: Path) -> None:
    path.mkdir()


def use(folder: Path, name: str) -> None:
    """Write to the lock, log or output that has a file ``name``."""
    if name == "lock":
        with Lock(folder / name, "it"):
            pass
    elif "log" in name:
        with Lines(folder / "log") as lines:
            lines.append({"a": 1})
    else:
        with Output(folder / "out", "test") as output:
            output.write_rows("rows.jsonl", [{"a": 1}])


OBSTACLES = (symbolic_link, dangling_link, hard_link, pipe, directory)


@pytest.mark.parametrize("make", OBSTACLES)
def test_locks_logs_markers_and_outputs_are_not_written_through_links(tmp_path: Path, make: Callable[[Path, Path], None]) -> None:
    (tmp_path / "victim").write_text(TEXT)
    for number, name in enumerate(("lock", "log", f".log{MARKER}", f"out/{MARKER}", "out/rows.jsonl")):
        folder = tmp_path / str(number)
        (folder / "out").mkdir(parents=True)
        make(folder / name, tmp_path / "victim")
        before = tree(tmp_path)
        with pytest.raises(FileError):
            use(folder, name)
        assert tree(tmp_path) == before


@pytest.mark.parametrize("make", OBSTACLES[:4])
def test_log_replaced_by_a_link_is_not_followed(tmp_path: Path, make: Callable[[Path, Path], None]) -> None:
    with Lines(tmp_path / "log") as lines:
        lines.append({"a": 1})
    (tmp_path / "log").unlink()
    (tmp_path / "victim").write_text(TEXT)
    make(tmp_path / "log", tmp_path / "victim")
    before = tree(tmp_path)
    with pytest.raises(FileError):
        Lines(tmp_path / "log").__enter__()
    assert tree(tmp_path) == before


def test_output_outside_its_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "plots").symlink_to(tmp_path / "elsewhere")
    for name in ("plots/a.svg", "../a.svg", str(tmp_path / "a.svg")):
        with pytest.raises(FileError), Output(tmp_path / "out", "test") as output:
            output.write(name, lambda temporary: temporary.write_text("a"))
    assert tree(tmp_path / "elsewhere") == {}


def test_output_folder_may_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    for _ in range(2):
        with Output(tmp_path / "out", "test") as output:
            output.write_rows("rows.jsonl", [{"a": 1}])
    assert sorted(tree(tmp_path / "disk")) == [MARKER, "rows.jsonl"]


def test_only_the_commands_own_temporary_files_are_removed(tmp_path: Path) -> None:
    with Output(tmp_path, "test") as output:
        output.write_rows("rows.jsonl", [{"a": 1}])
    (tmp_path / ".rows.jsonl.0123456789abcdef.unfinished").write_text("left by a killed process")
    for name in (".other.jsonl.0123456789abcdef.unfinished", "rows.jsonl.tmp", ".rows.jsonl.mine.unfinished", "rows.jsonl.unfinished"):
        (tmp_path / name).write_text(TEXT)
    with Output(tmp_path, "test"):
        pass
    assert not (tmp_path / ".rows.jsonl.0123456789abcdef.unfinished").exists()
    assert sum(content == TEXT.encode() for _, content in tree(tmp_path).values()) == 4  # type: ignore[misc]


def test_input_is_never_overwritten(tmp_path: Path) -> None:
    with Output(tmp_path, "test") as output:
        path = output.write_rows("rows.jsonl", [{"a": 1}])
        (tmp_path / "other-name").symlink_to(path)
        for source in (path, tmp_path / "other-name", str(path)):
            with pytest.raises(FileError, match=r"--data .* is what this command writes"):
                output.check(["rows.jsonl"], {"--data": source})
        output.check(["rows.jsonl"], {"--data": tmp_path / "data.jsonl", "--pool": None})


def test_output_is_not_written_into_the_folder_of_its_input(tmp_path: Path) -> None:
    data, link = tmp_path / "data", tmp_path / "link"
    data.mkdir()
    link.symlink_to(data)
    tiny.write(data / "data.jsonl", [{"prompt": "a", "response": "b"}])
    before = tree(tmp_path)
    for source, out in ((data, data), (link, data), (data, link)):
        with (
            pytest.raises(FileError, match=r"is in the folder of --data: the next run would read it"),
            Output(out / "rows.jsonl", "test", beside=True) as output,
        ):
            output.check(["rows.jsonl"], {"--data": source})
        assert tree(tmp_path) == before
    with Output(data / "out", "test") as output:
        output.check(["rows.jsonl"], {"--data": data})


def test_full_disk_keeps_the_old_file(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "rows.jsonl", [{"a": 1}])

    def full(temporary: Path) -> None:
        temporary.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        write_whole(tmp_path / "rows.jsonl", full)
    assert tree(tmp_path) == {"rows.jsonl": (stat.S_IFREG, b'{"a": 1}\n')}


def test_log_without_a_marker_is_recognised_by_its_lines(tmp_path: Path) -> None:
    from kdkernels.teachers.replies import ReplyLog

    (tmp_path / "log").write_text(json.dumps({"key": "a", "request": HASH, "text": "paid for"}) + "\n")
    with ReplyLog(tmp_path / "log") as log:
        entry = log.find("a", HASH)
    assert entry is not None
    assert entry["text"] == "paid for"
    (tmp_path / "rows").write_text(json.dumps({"key": "a", "request": "a row of the user's"}) + "\n")
    with pytest.raises(FileError, match="is not of this command"):
        ReplyLog(tmp_path / "rows").__enter__()


def test_training_keeps_checkpoints_of_other_programs(home: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def trained(steps: int) -> tuple[int, str]:
        words = ("train", "--teacher", "MODEL", "--student", "MODEL", "--data", "DATA", "--output-dir", "OUT", "--save-steps", "1")
        names = {"MODEL": str(home / "model"), "DATA": str(home / "data.jsonl"), "OUT": str(out)}
        more = ("--save-total-limit", "1", "--max-steps", str(steps), "--report-to", "none")
        result = CliRunner().invoke(app, [names.get(word, word) for word in words + more], catch_exceptions=False)
        return result.exit_code, result.output

    status, output = trained(1)
    assert status == 0, output
    foreign = [out / "checkpoint-1-mine" / "weights.bin", out / "checkpoint-old-7" / "trainer_state.json", out / "notes.txt", out / "a.tmp"]
    for path in foreign:
        path.parent.mkdir(exist_ok=True)
        path.write_text(TEXT)
    status, output = trained(3)
    assert status == 0, output
    assert [path.read_text() for path in foreign] == [TEXT] * 4
    assert sorted(path.name for path in out.glob("checkpoint-[0-9]")) == ["checkpoint-3"]
    (out / "checkpoint-5").mkdir()
    before = tree(out)
    status, output = trained(5)
    assert (status, "checkpoint-5 is not of this command" in output) == (2, True), output
    assert tree(out) == before
