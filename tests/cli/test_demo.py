"""``kdkernels demo``: text, batches, training, comparison of losses, and output files."""

from __future__ import annotations

import io
import json
import random
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from rich.progress import Progress
from typer.testing import CliRunner

from kdkernels import cli
from kdkernels.cli.demo import compare, corpus, figures, report, run, train
from kdkernels.cli.demo.settings import DemoError, LossShape, ModelSize, Settings
from kdkernels.cli.environment import environment
from kdkernels.support import memory

TINY = Settings.quick().changed(
    steps=3,
    vocab_size=300,
    max_bytes=150_000,
    batch=2,
    window=16,
    held_out_windows=4,
    evaluations=2,
    teacher=ModelSize(hidden=32, layers=1, head_dim=16),
    student=ModelSize(hidden=16, layers=1, head_dim=8),
    loss_shape=LossShape(rows=16, vocab=64, student_hidden=8, teacher_hidden=8, samples=1),
)


def words(count: int, seed: int) -> str:
    """Return a text of ``count`` words of about six bytes, drawn from 200 words, so that a BPE learns merges."""
    generator = random.Random(seed)
    vocabulary = ["".join(generator.choices("abcdefgh", k=generator.randint(2, 8))) for _ in range(200)]
    return "".join(generator.choice(vocabulary) + generator.choice("  \n") for _ in range(count))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty-four text files of about 6 kB, some in a subfolder."""
    root = tmp_path_factory.mktemp("text")
    (root / "below").mkdir()
    for i in range(24):
        (root / ("below" if i % 5 == 0 else ".") / f"{i}.txt").write_text(words(1000, i))
    return root


# Text


def test_each_file_is_either_training_or_held_out(folder: Path) -> None:
    text = corpus.collect(folder, 10**9, seed=0)
    train_names, held_out_names = {d.name for d in text.train}, {d.name for d in text.held_out}
    assert text.split == "by file"
    assert len(train_names | held_out_names) == 24
    assert not train_names & held_out_names
    share = sum(len(d.text) for d in text.held_out) / sum(len(d.text) for d in (*text.train, *text.held_out))
    assert 0.05 <= share <= 0.1
    assert any(name.startswith("below/") for name in train_names | held_out_names)


def test_choice_of_files_depends_only_on_the_seed(folder: Path) -> None:
    hashes = [corpus.collect(folder, 120_000, seed).sha256 for seed in (0, 0, 1)]
    assert hashes[0] == hashes[1] != hashes[2]


def test_single_file_is_split_near_its_end(tmp_path: Path) -> None:
    file = tmp_path / "book.txt"
    file.write_text(words(20_000, 0))
    text = corpus.collect(file, 10**9, seed=0)
    assert [d.name for d in (*text.train, *text.held_out)] == ["book.txt (start)", "book.txt (end)"]
    assert text.train[0].text + text.held_out[0].text == file.read_text()
    assert text.train[0].text.endswith("\n")
    assert len(text.held_out[0].text) == pytest.approx(0.1 * len(file.read_text()), rel=0.05)


def test_single_line_is_split(tmp_path: Path) -> None:
    file = tmp_path / "line.txt"
    file.write_text(words(20_000, 0).replace("\n", " "))
    text = corpus.collect(file, 10**9, seed=0)
    assert text.train[0].text + text.held_out[0].text == file.read_text()


def test_binary_hidden_empty_and_repeated_files_are_left_out(tmp_path: Path, folder: Path) -> None:
    for i, path in enumerate(sorted(folder.rglob("*.txt"))):
        (tmp_path / f"{i}.txt").write_text(path.read_text())
    expected = {p.name for p in tmp_path.iterdir()}
    (tmp_path / "copy.txt").write_text((tmp_path / "0.txt").read_text())
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "nul.bin").write_text("a\0b" * 100)
    (tmp_path / "latin1.txt").write_bytes(b"caf\xe9 " * 100)
    (tmp_path / ".hidden").write_text("hidden " * 100)
    (tmp_path / "__pycache__").mkdir()
    (tmp_path / "__pycache__" / "module.txt").write_text("cached " * 100)
    text = corpus.collect(tmp_path, 10**9, seed=0)
    names = {d.name for d in (*text.train, *text.held_out)}
    assert names - {"copy.txt"} in (expected, expected - {"0.txt"})  # either of two equal files
    assert len(names) == len(expected)


def test_file_is_cut_to_the_number_of_bytes(tmp_path: Path) -> None:
    file = tmp_path / "snow.txt"
    file.write_text("\N{SNOWMAN}" * 100_000, encoding="utf-8")  # three bytes each, no line ends
    text = corpus.collect(file, 200_000, seed=0)
    assert text.train[0].text + text.held_out[0].text == "\N{SNOWMAN}" * 66_666


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has file names that are not Unicode")
def test_file_names_that_are_not_utf8_are_read(tmp_path: Path, folder: Path) -> None:
    for path in folder.rglob("*.txt"):
        Path(f"{tmp_path}/\udcff{path.name}").write_text(path.read_text())
    assert len(corpus.collect(tmp_path, 10**9, seed=0).sha256) == 64


def test_standard_library_is_the_default_text() -> None:
    text = corpus.collect(None, 300_000, seed=0)
    names = [d.name for d in (*text.train, *text.held_out)]
    assert all(name.endswith(".py") for name in names)
    assert not any({"test", "tests", "site-packages"} & set(name.split("/")) for name in names)
    assert sum(len(d.text.encode()) for d in (*text.train, *text.held_out)) == pytest.approx(300_000, abs=10)


def test_missing_standard_library_sources_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(DemoError, match="came without its sources: give a text file"):
        corpus.collect(None, 10**6, seed=0)


def test_tokens_end_every_file_and_fit_the_vocabulary(folder: Path) -> None:
    text = corpus.collect(folder, 10**9, seed=0)
    tokens = corpus.tokenize(text, corpus.train_tokenizer(text, 400))
    assert tokens.vocab == 400
    for ids, documents in ((tokens.train, text.train), (tokens.held_out, text.held_out)):
        assert ids.dtype == torch.int64
        assert 0 <= ids.min() <= ids.max() < tokens.vocab
        assert (ids == 0).sum() == len(documents)  # 0 is the end-of-text token
        assert ids[-1] == 0


# Batches and training


def test_batches_depend_on_seed_and_epoch() -> None:
    stream = torch.arange(1000)
    first, repeated, reseeded = (train.Batches(stream, stream, replace(TINY, seed=seed)) for seed in (0, 0, 1))
    for a, b, c, d in zip(first.training(4, 0), repeated.training(4, 0), reseeded.training(4, 0), first.training(4, 1), strict=True):
        assert a.shape == (TINY.batch, TINY.window + 1)
        assert torch.equal(a, b)
        assert not torch.equal(a, c)  # another seed
        assert not torch.equal(a, d)  # another epoch of the same seed
        assert (a.diff(dim=1) == 1).all()  # consecutive tokens
    assert torch.equal(first.held_out, reseeded.held_out)


@pytest.mark.parametrize(("training", "held_out"), [(16, 1000), (1000, 33)])
def test_too_few_tokens_raise(training: int, held_out: int) -> None:
    with pytest.raises(DemoError, match=f"{training:,} training and {held_out:,} held-out tokens are too few for windows of 17"):
        train.Batches(torch.zeros(training, dtype=torch.int64), torch.zeros(held_out, dtype=torch.int64), TINY)


def test_building_a_model_keeps_the_random_state() -> None:
    before = torch.get_rng_state()
    models = [
        train.build(TINY.student, 300, TINY),
        train.build(TINY.student, 300, TINY),
        train.build(TINY.student, 300, replace(TINY, seed=1)),
    ]
    assert torch.equal(before, torch.get_rng_state())
    prints = [train.fingerprint(model) for model in models]
    assert prints[0] == prints[1] != prints[2]


def test_training_stops_at_a_loss_that_is_not_finite() -> None:
    model = train.build(TINY.student, 300, TINY)
    stream = torch.arange(300)
    batches = train.Batches(stream, stream, TINY)

    def loss(model: Any, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return train.ce_loss(model, ids, labels) * float("nan")

    with pytest.raises(DemoError, match="the training loss is nan at step 1 of 2: try another --temperature"):
        train.train(model, loss, batches.training(2, 0), batches.held_out, 1e-3, 2, lambda held_out: None)


def test_fused_kd_loss_is_the_sum_of_its_terms() -> None:
    settings = replace(TINY, temperature=2.0, kd_weight=0.7, ce_weight=0.3)
    teacher, student = train.build(settings.teacher, 300, settings), train.build(settings.student, 300, settings)
    teacher.requires_grad_(False)
    windows = torch.randint(300, (2, 17), generator=torch.Generator().manual_seed(0))
    ids, labels = windows[:, :-1], windows[:, 1:]
    q, p = ((model(ids).logits.double() / 2).log_softmax(-1) for model in (student, teacher))
    kl = (p.exp() * (p - q)).sum(-1).mean()
    expected = 0.7 * 4 * kl + 0.3 * train.ce_loss(student, ids, labels)
    loss = train.kd_loss(teacher, settings)(student, ids, labels)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    evaluation = train.compare_to_teacher(student, student, windows, settings.backend)
    assert evaluation.kl_to_teacher.abs().max() < 1e-6
    assert evaluation.top1_agreement.min() == 1
    assert evaluation.cross_entropy.mean().item() == pytest.approx(train.held_out_loss(student, windows), rel=1e-5)


def test_fused_and_dense_kd_train_the_same_student() -> None:
    settings = replace(TINY, temperature=2.0)
    teacher = train.build(settings.teacher, 300, settings).requires_grad_(False)
    stream = torch.randint(300, (500,), generator=torch.Generator().manual_seed(0))
    batches = train.Batches(stream, stream, settings)

    def dense(student: Any, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        q, p = ((model(ids).logits / 2).log_softmax(-1).flatten(0, 1) for model in (student, teacher))
        kl = torch.nn.functional.kl_div(q, p, log_target=True, reduction="batchmean")
        return settings.kd_weight * 4 * kl + settings.ce_weight * train.ce_loss(student, ids, labels)

    curves = [
        train.train(
            train.build(settings.student, 300, settings), loss, batches.training(20, 0), batches.held_out, 1e-2, 4, lambda held_out: None
        )
        for loss in (train.kd_loss(teacher, settings), dense)
    ]
    assert curves[0].train == pytest.approx(curves[1].train, rel=1e-4)
    assert curves[0].held_out == pytest.approx(curves[1].held_out, rel=1e-4)
    assert abs(curves[0].train[-1] - curves[0].train[0]) > 0.01, "the loss changes"


def trained(folder: Path, settings: Settings) -> dict[str, Any]:
    """Return the output of ``train_models`` without times."""
    result = run.train_models(settings, folder, Progress(disable=True))
    for model in result["models"].values():
        del model["median_step_seconds"], model["curve"]["step_seconds"]
    return result


def test_the_same_seed_trains_the_same_models(folder: Path) -> None:
    first, repeated, reseeded = (trained(folder, replace(TINY, seed=seed)) for seed in (0, 0, 1))
    assert first == repeated
    for name in first["models"]:
        assert first["models"][name]["final_weights_sha256"] != reseeded["models"][name]["final_weights_sha256"]


# Fused against dense


def job(loss: str, **changes: Any) -> compare.Job:
    fields = {"seed": 0, "device": "cpu", "backend": "auto", "temperature": 2.0, "kd_weight": 0.5, "ce_weight": 0.5}
    return compare.Job(**{"loss": loss, "shape": TINY.loss_shape, **fields, "threads": torch.get_num_threads(), **changes})


def test_fused_and_dense_losses_have_equal_values() -> None:
    fused, dense = compare.run(job("fused", backend="torch")), compare.run(job("dense"))
    assert fused.value == pytest.approx(dense.value, rel=1e-5)
    assert (fused.backend, dense.backend) == ("torch", None)
    assert min(fused.seconds, dense.seconds) > 0


def test_job_survives_json() -> None:
    assert compare._job(json.loads(json.dumps(asdict(job("fused"))))) == job("fused")


def test_failed_process_returns_its_error() -> None:
    assert "backend 'no such backend' is unknown" in str(compare._in_fresh_process(job("fused", backend="no such backend")))


@pytest.mark.parametrize(
    ("code", "stderr", "error"),
    [
        (-9, "", "killed by signal 9, as happens when memory runs out"),
        (3, "", "exit code 3, no message"),
        (1, "Trace\nMemoryError\n", "MemoryError"),
    ],
)
def test_process_failure_is_one_line(monkeypatch: pytest.MonkeyPatch, code: int, stderr: str, error: str) -> None:
    done = SimpleNamespace(returncode=code, stdout="", stderr=stderr)
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: done)
    assert compare._in_fresh_process(job("dense")) == error


def test_samples_are_summarised_by_their_median() -> None:
    samples = [compare.Sample("native", 1.0, s, p) for s, p in ((3.0, 30), (1.0, 10), (2.0, 20))]
    assert compare._summary(samples) == compare.Measurement("native", 1.0, (3.0, 1.0, 2.0), 2.0, 20)
    assert compare._summary([compare.Sample(None, 1.0, 1.0, None)]).peak_bytes is None
    assert compare._summary([*samples, "no memory"]) == compare.Measurement(error="no memory")


def test_peak_memory_includes_freed_tensors() -> None:
    script = (
        "import torch; from kdkernels.support.memory import peak_bytes; d = torch.device('cpu')\n"
        "before = peak_bytes(d); x = torch.ones(64 * 2**20, dtype=torch.uint8); del x; print(peak_bytes(d) - before)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(done.stdout) == pytest.approx(64 * 2**20, rel=0.1)


@pytest.mark.parametrize(("platform", "unit"), [("freebsd", 1024), ("darwin", 1), ("win32", None)])
def test_peak_memory_of_other_systems(monkeypatch: pytest.MonkeyPatch, platform: str, unit: int | None) -> None:
    resource = pytest.importorskip("resource")
    monkeypatch.setattr(memory, "Path", lambda name: SimpleNamespace(exists=lambda: False))
    monkeypatch.setattr(memory.sys, "platform", platform)
    monkeypatch.setattr(resource, "getrusage", lambda who: SimpleNamespace(ru_maxrss=7))
    assert memory.peak_bytes(torch.device("cpu")) == (None if unit is None else 7 * unit)


# The whole demo


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """The output of one ``kdkernels demo --quick``."""
    out = tmp_path_factory.mktemp("demo") / "new" / "folder"
    result = CliRunner(env={"COLUMNS": "100"}).invoke(cli.app, ["demo", "--quick", "--device", "cpu", "--out", str(out)])
    assert result.exit_code == 0, result.output
    return SimpleNamespace(out=out, output=result.output, record=json.loads((out / "demo.json").read_text()))


def test_quick_writes_only_a_figure_and_a_json(quick: SimpleNamespace) -> None:
    assert sorted(p.name for p in quick.out.iterdir()) == [".kdkernels", "demo.json", "demo.png"]
    assert (quick.out / "demo.png").read_bytes().startswith(b"\x89PNG\r\n")
    assert str(quick.out / "demo.png") in quick.output


def test_quick_trains_two_students_from_the_same_start(quick: SimpleNamespace) -> None:
    teacher, ce, kd = (quick.record["models"][name] for name in ("teacher", "student_ce", "student_kd"))
    assert ce["initial_weights_sha256"] == kd["initial_weights_sha256"]
    assert len({m["final_weights_sha256"] for m in (teacher, ce, kd)} | {ce["initial_weights_sha256"]}) == 4
    assert (ce["steps"], ce["parameters"]) == (kd["steps"], kd["parameters"])
    for model in (teacher, ce, kd):
        curve = model["curve"]
        assert len(curve["train"]) == len(curve["step_seconds"]) == model["steps"] == curve["step"][-1]
        assert len(curve["step"]) == len(curve["held_out"])
        assert model["held_out_loss"] == curve["held_out"][-1] < curve["held_out"][0] - 0.3, "the model learns"
    difference = quick.record["student_difference"]
    assert difference["kd_minus_ce"] == pytest.approx(kd["held_out_loss"] - ce["held_out_loss"], abs=1e-4)


def test_quick_compares_the_losses_at_a_large_vocabulary(quick: SimpleNamespace) -> None:
    shape, (fused, dense) = quick.record["settings"]["loss_shape"], (quick.record["loss_comparison"][name] for name in compare.LOSSES)
    assert shape["vocab"] >= 32_000
    assert fused["error"] is dense["error"] is None
    assert fused["value"] == pytest.approx(dense["value"], rel=1e-5)
    assert len(fused["seconds"]) == len(dense["seconds"]) == shape["samples"]
    assert 0 < fused["peak_bytes"] < dense["peak_bytes"]


def test_quick_prints_its_measurements(quick: SimpleNamespace) -> None:
    for model in quick.record["models"].values():
        assert f"{model['held_out_loss']:.4f}" in quick.output
    for m in quick.record["loss_comparison"].values():
        assert f"{m['median_seconds']:.3f} s" in quick.output
        assert f"{m['peak_bytes'] / 2**20:,.0f} MiB" in quick.output
    assert "Fused takes" in quick.output
    assert "…" not in quick.output, "a column was cut"


def test_json_holds_settings_environment_and_text_hash(quick: SimpleNamespace) -> None:
    assert quick.record["settings"] == json.loads(json.dumps(asdict(Settings.quick())))
    assert quick.record["environment"] == json.loads(json.dumps(environment()))
    assert len(quick.record["corpus"]["sha256"]) == 64


def test_failed_measurements_are_drawn_and_printed(quick: SimpleNamespace) -> None:
    failed, unknown = compare.Measurement(error="out of memory"), compare.Measurement("native", 1.0, (2.0,), 2.0, None)
    record = {**quick.record, "loss_comparison": {"fused": asdict(unknown), "dense": asdict(failed)}}
    assert figures.draw(record).startswith(b"\x89PNG")
    console = Console(file=io.StringIO(), width=120)
    report.print_tables(record, console)
    output = console.file.getvalue()
    assert "out of memory" in output
    assert "not measured" in output
    assert "Fused takes" not in output


# Files


def test_files_are_replaced_together(tmp_path: Path) -> None:
    report.save(tmp_path / "a" / "b", {"x": b"1", "y": b"2"})
    report.save(tmp_path / "a" / "b", {"x": b"3", "y": b"4"})
    assert {p.name: p.read_bytes() for p in (tmp_path / "a" / "b").iterdir()} == {"x": b"3", "y": b"4"}


def test_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report.save(tmp_path, {"x": b"old", "y": b"old"})
    write = Path.write_bytes

    def full(self: Path, content: bytes) -> int:
        if self.name == "y":
            raise OSError(28, "No space left on device", str(self))
        return write(self, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(DemoError, match=r"--out .*: No space left on device \(y\)\. Give another folder"):
        report.save(tmp_path, {"x": b"new", "y": b"new"})
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"x": b"old", "y": b"old"}


def test_interrupted_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report.save(tmp_path, {"x": b"old"})

    def interrupted(self: Path, content: bytes) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_bytes", interrupted)
    with pytest.raises(KeyboardInterrupt):
        report.save(tmp_path, {"x": b"new"})
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"x": b"old"}
