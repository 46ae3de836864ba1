"""The benchmarks measure what they say, and the documentation shows what was measured. Tiny shapes: no number here means anything."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

pytest.importorskip("benchmarks", reason="run from the root of the repository: python -m pytest")
pytest.importorskip("matplotlib", reason="the figures need the extra [bench]")

from rich.console import Console

from benchmarks import report
from kdkernels.bench import figures, measure, page, plots, run, suites, table, variants
from kdkernels.bench.cases import Case, Inputs, build
from kdkernels.bench.measure import Job
from kdkernels.bench.peers import PEERS, Peer
from kdkernels.divergences import REGISTRY

HEADS, LOGITS = Case(32, 256, 8, 16), Case(32, 256)
QUIET = Console(quiet=True)


def test_quantile_interpolates() -> None:
    assert [measure.quantile([4.0, 1.0, 2.0], q) for q in (0.0, 0.25, 0.5, 1.0)] == [1.0, 1.5, 2.0, 4.0]


def test_shape_from_text() -> None:
    assert Case.parse_shape("8,100,4,6") == (8, 100, 4, 6)
    assert Case.parse_shape("8,100") == (8, 100, 0, 0)
    for wrong in ("8", "8,0", "8;100", "8,100,4", "8,100,4,6,7", "a,b"):
        with pytest.raises(ValueError, match="N,V,Ds,Dt"):
            Case.parse_shape(wrong)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [({"ds": 4}, "both"), ({"operation": "sort"}, "operation"), ({"masked": 1.0}, "masked"), ({"ds": 4, "dt": 8, "gap": 0.1}, "gap")],
)
def test_cases_that_make_no_sense(arguments: dict[str, Any], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        Case(8, 100, **arguments)


def test_floor_of_a_case() -> None:
    assert Case(8, 100, 4, 6).flop == 2 * 8 * 100 * (3 * 4 + 6)
    assert Case(8, 100, 4, 6, masked=0.5, frozen_head=True).flop == 2 * 4 * 100 * (2 * 4 + 6)
    assert Case(8, 100, 4, 6, operation="cross_entropy").flop == 2 * 8 * 100 * 3 * 4
    assert (LOGITS.flop, LOGITS.floor_bytes) == (0, 3 * 32 * 256 * 4)


def test_a_gap_sets_how_far_the_teacher_is() -> None:
    def distance(gap: float) -> float:
        inputs = build(Case(64, 256, 16, 16, gap=gap))
        s, t = inputs.student, inputs.teacher
        assert not isinstance(s, torch.Tensor)
        assert not isinstance(t, torch.Tensor)
        assert t.weight.equal(s.weight)
        return float(((t.hidden - s.hidden).norm() / s.hidden.norm()).detach())

    assert distance(0.0) == 0
    assert abs(distance(0.1) - 0.1) < 0.02


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("sizes", [(8, 16), (0, 0)], ids=["heads", "logits"])
@pytest.mark.parametrize(("masked", "frozen"), [(0.0, False), (0.5, True)])
def test_variants_compute_the_case(sizes: tuple[int, int], divergence: str, dtype: str, masked: float, frozen: bool) -> None:
    case = Case(32, 256, *sizes, dtype=dtype, divergence=divergence, masked=masked, frozen_head=frozen)
    rows = [] if case.has_heads or masked else [f"rows:{name}" for name in variants.backends_for("cpu", case.torch_dtype)]
    for name in (*variants.default_variants(case, "cpu"), *rows):
        if name == "floor":
            assert variants.build(name, case, build(case))() is None
        elif name != "compile":  # the same formula, after seconds of compiling
            error = variants.check(name, case, "cpu")
            assert error is not None
            assert error < (0.05 if dtype == "bfloat16" else 1e-5), name


@pytest.mark.parametrize("divergence", list(REGISTRY))
def test_the_dense_formula_of_every_divergence(divergence: str) -> None:
    error = variants.check("eager", Case(32, 256, dtype="float32", divergence=divergence), "cpu")
    assert error is not None
    assert error < 1e-5


def test_cross_entropy_is_an_operation_of_its_own() -> None:
    case = Case(32, 256, 8, 16, operation="cross_entropy", masked=0.25)
    names = variants.default_variants(case, "cpu")
    assert names[:3] == ["floor", "eager", "compile"]
    assert {"native", "torch"} <= set(names)
    for name in [n for n in names if n not in ("floor", "compile")]:
        error = variants.check(name, case, "cpu")
        assert error is not None
        assert error < 1e-5


def test_options_in_a_variant_s_name() -> None:
    v = variants.Variant.parse("native/bfloat16@rows=512")
    assert v.options == {"backend": "native", "logits_dtype": torch.bfloat16, "chunk_rows": 512}
    assert variants.Variant.parse("torch@budget=3").options == {"backend": "torch", "memory_budget": 3 << 20}
    assert variants.Variant.parse("rows:cuda").rows_only
    assert table.name_of("native/bfloat16@rows=512") == "kdkernels native, bfloat16 logits, 512 rows"
    for wrong in ("native@rows", "native@rows=0", "native@speed=9", "native@budget=x"):
        with pytest.raises(ValueError, match="after @"):
            variants.Variant.parse(wrong)


def test_what_is_held_by_design() -> None:
    case = Case(1024, 256, 8, 16)
    held = variants.held("torch@rows=128", case, build(case))
    assert (held["rows_per_chunk"], held["num_chunks"]) == (128, 8)
    gradients = 4 * 8 * (1024 + 256)
    assert held["buffer_bytes"] == 2 * 4 * 128 * 256
    assert held["accounted_bytes"] == gradients + held["buffer_bytes"]


def test_row_kernels_allocate_nothing_and_refuse_what_they_cannot() -> None:
    inputs = build(LOGITS)
    step = variants.build("rows:torch", LOGITS, inputs)
    step()
    first = inputs.trained[0].grad
    step()
    assert inputs.trained[0].grad is first
    with pytest.raises(ValueError, match="row kernels take logits"):
        variants.build("rows:torch", HEADS, build(HEADS))


@pytest.mark.parametrize("case", [HEADS, LOGITS], ids=["heads", "logits"])
def test_a_variant_that_computes_something_else_is_found(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    eager = variants._eager
    monkeypatch.setitem(variants._BUILDERS, "eager", lambda case, inputs: eager(Case(**{**vars(case), "temperature": 2.1}), inputs))
    with pytest.raises(RuntimeError, match="differs from the float64 reference"):
        variants.check("eager", case, "cpu")


def test_nothing_is_timed_in_an_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    from kdkernels import dispatch

    monkeypatch.setattr(dispatch, "unavailable", lambda *_: None)  # as with TRITON_INTERPRET=1
    names = variants.default_variants(HEADS, "cpu")
    assert names[:3] == ["floor", "eager", "compile"]
    assert not {"triton", "cuda"} & set(names)


def test_unknown_variant_lists_the_valid_ones() -> None:
    with pytest.raises(ValueError, match=r"floor, eager, compile, cuda, triton, native, torch, trl, liger_jsd"):
        variants.build("fast", HEADS, build(HEADS))


def test_every_round_runs_every_variant_with_clear_gradients() -> None:
    inputs = build(LOGITS)
    ran: list[str] = []

    def step(name: str) -> Callable[[], None]:
        def run() -> None:
            assert inputs.trained[0].grad is None
            inputs.trained[0].grad = torch.ones(LOGITS.n, LOGITS.v)
            ran.append(name)

        return run

    def too_large() -> None:
        raise torch.OutOfMemoryError("no memory\nmore of it")

    taken, failed = measure.time_interleaved({"big": too_large, **{name: step(name) for name in "abc"}}, inputs, samples=6, warmup=2)
    assert failed == {"big": "OutOfMemoryError: no memory"}
    rounds = ["".join(ran[i : i + 3]) for i in range(0, len(ran), 3)]
    assert {name: len(samples) for name, samples in taken.items()} == {"a": 6, "b": 6, "c": 6}
    assert len(rounds) == 8
    assert all(sorted(r) == ["a", "b", "c"] for r in rounds)
    assert len(set(rounds)) > 1


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is measured on Linux")
def test_peak_memory_of_a_known_allocation() -> None:
    """The floor of given logits writes one [N, V] buffer, here of 64 MiB."""
    peak = measure.peak_extra_bytes("floor", Case(1024, 16384))
    assert abs(peak - (64 << 20)) < 2 << 20  # the kernel counts pages in batches


def test_a_process_that_fails_says_why() -> None:
    with pytest.raises(measure.OutOfProcessError, match="variant 'fast' is unknown"):
        measure.peak_extra_bytes("fast", HEADS)


def test_a_deadline_ends_the_rounds_but_leaves_a_sample() -> None:
    rounds: list[int] = []
    taken, _ = measure.time_interleaved(
        {"a": lambda: None}, build(LOGITS), samples=9, after_round=lambda t: rounds.append(len(t["a"])), deadline=0.0
    )
    assert len(taken["a"]) == 1
    assert rounds == [0, 1]


def test_rates_of_this_machine() -> None:
    rates = measure.rates("cpu", ["float32"], samples=2)
    assert 0.1 < rates["copy_gb_s"] < 10_000
    assert rates["matrix"]["float32"]["tflop_s"] > 0


# --- other libraries


def fake(monkeypatch: pytest.MonkeyPatch, build_loss: Callable[[Case, Inputs], Callable[[], torch.Tensor]], **options: Any) -> None:
    """A library called "other" that is installed."""
    monkeypatch.setitem(PEERS, "other", Peer("Other", "json", "torch", build_loss, **options))


def dense(case: Case, inputs: Inputs) -> Callable[[], torch.Tensor]:
    return lambda: variants._true_distillation(case, inputs)


def test_every_peer_says_why_it_cannot() -> None:
    for name, peer in PEERS.items():
        assert peer.cannot(LOGITS, "cpu") is not None, name
        if "cpu" not in peer.devices:
            assert peer.absent("cpu") is not None, name
    assert PEERS["fla"].module == "fla"
    no_such = Peer("X", "no_such_module_anywhere", "no-such", dense)
    assert no_such.absent("cpu") == "no-such is not installed"


def test_a_peer_that_computes_something_else_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    fake(monkeypatch, lambda case, inputs: lambda: 2 * variants._true_distillation(case, inputs))
    measured = measure.measure(Job(HEADS, ("eager", "other"), samples=1, memory=False), "cpu")
    eager, other = measured["results"]
    assert len(eager["samples_ms"]) == 1
    assert "samples_ms" not in other
    assert "the loss differs from the float64 reference by 1.0e+00" in other["skipped"]


def test_a_peer_that_fails_gets_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(case: Case, inputs: Inputs) -> Callable[[], torch.Tensor]:
        raise ImportError("libother.so.1 is missing\nand more")

    fake(monkeypatch, broken, note="it rounds")
    measured = measure.measure(Job(HEADS, ("floor", "other"), samples=1, memory=False), "cpu")
    assert measured["results"][1]["skipped"] == "ImportError: libother.so.1 is missing"
    cells = list(table.rows(measured, None))[1]
    assert cells[1] == "did not run: ImportError: libother.so.1 is missing"
    assert table.notes(measured) == []


def test_a_bound_is_checked_against_what_it_computes_and_is_no_rival(monkeypatch: pytest.MonkeyPatch) -> None:
    fake(monkeypatch, lambda case, inputs: lambda: variants._true_cross_entropy(case, inputs), operation="cross_entropy", note="a bound")
    measured = measure.measure(Job(HEADS, ("floor", "other"), samples=1, memory=False), "cpu")
    assert measured["results"][1]["gradient_error"] < 1e-5
    assert table.best_peer(measured) is None
    assert table.notes(measured) == ["other: a bound."]


def test_a_process_that_is_killed_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: Any, **__: Any) -> int:
        raise measure.OutOfProcessError("its process was killed by signal 9, memory being short")

    monkeypatch.setattr(measure, "peak_extra_bytes", killed)
    measured = measure.measure(Job(HEADS, ("floor", "eager"), samples=1), "cpu")
    assert "killed by signal 9" in measured["results"][1]["skipped"]
    assert len(measured["results"][0]["samples_ms"]) == 1


def test_what_would_not_fit_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "_available_bytes", lambda: 1000)
    measured = measure.measure(Job(HEADS, ("floor", "eager", "torch"), samples=1, memory=False), "cpu")
    assert ["skipped" in r for r in measured["results"]] == [True, True, False]
    assert "are free" in measured["results"][0]["skipped"]


# --- suites


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_suites_grow_and_every_case_has_its_floor(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(variants, "backends_for", lambda *_: ["native", "torch"])
    sizes = [len(suites.jobs(suite, device)) for suite in suites.SUITES]
    assert sizes == sorted(sizes)
    assert len(set(sizes)) == 3
    jobs = suites.jobs("full", device)
    assert len(set(jobs)) == len(jobs)
    for job in jobs:
        assert ("floor" in job.variants) == bool(job.samples)
        assert str(job.case)
        if job.curve and job.curve != "rows per chunk":
            assert job.curve in plots.CURVES
    rows = {(j.case.divergence, j.case.v) for j in jobs if j.curve == "row kernels"}
    assert rows == {(d, v) for d in REGISTRY for v in suites.ROW_VOCABULARIES}


def test_what_is_asked_for_replaces_the_suite() -> None:
    jobs = suites.jobs("smoke", "cpu", shapes=[(8, 100, 4, 6), (8, 100, 0, 0)], divergences=["jsd"], temperature=3.0, peers=[])
    assert [str(j.case) for j in jobs] == ["jsd, float32, N=8 V=100 Ds=4 Dt=6, T=3", "jsd, float32, N=8 V=100 (logits given), T=3"]
    assert not set(jobs[0].variants) & set(PEERS)
    only = suites.jobs("smoke", "cpu", dtypes=["bfloat16"], backends=["torch"], peers=[])
    assert {j.case.dtype for j in only} == {"bfloat16"}
    assert only[0].variants == ("floor", "eager", "compile", "torch", "torch/bfloat16")


# --- a run


def small_jobs() -> list[Job]:
    names = ("floor", "eager", "torch", "torch/bfloat16", "trl")
    cases = [Case(32, 256, *sizes, "bfloat16", d) for sizes in ((8, 16), (0, 0)) for d in ("forward_kl", "jsd")]
    jobs = [Job(case, names[: 5 if case.has_heads else 3], samples=2) for case in cases]
    jobs += [Job(Case(n, 512, 8, 16), ("floor", "eager", "torch", "torch@budget=1"), 2, True, "tokens") for n in (64, 128)]
    jobs += [Job(Case(64, v, dtype="bfloat16"), ("floor", "rows:torch"), 2, False, "row kernels") for v in (256, 512)]
    jobs += [Job(Case(16, 256, 8, 8, "bfloat16", gap=g), ("eager", "torch"), 0, False, "gap") for g in (1.0, 0.1)]
    return [*jobs, Job(Case(256, 256, 8, 16), ("floor", "torch@rows=64", "torch@rows=128"), 2, False, "rows per chunk")]


def made_up_peak(variant: str, case: Case, *_: Any) -> int:
    if variant == "trl":
        raise measure.OutOfProcessError("ModuleNotFoundError: No module named 'trl'")
    return ((3 if variant == "eager" else 1) << 20) + 4 * case.n * case.v


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of a real run; only peak memory is made up, as every one would take a process."""
    out = tmp_path_factory.mktemp("bench") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "peak_extra_bytes", made_up_peak)
        patch.setattr(
            measure, "rates", lambda device, dtypes: {"copy_gb_s": 10.0, "matrix": {d: {"size": 8, "tflop_s": 1.0} for d in dtypes}}
        )
        record = run.begin(small_jobs(), "cpu", {"suite": "smoke", "temperature": 2.0}, out)
        run.run(record, out, QUIET)
    return out


def test_a_run_leaves_results_plots_and_one_page(measured: Path) -> None:
    record = run.load(measured)
    assert record["status"] == "complete"
    assert [run.job_of(saved) for saved in record["jobs"]] == small_jobs()
    assert all(m["complete"] for m in record["cases"])
    heads = record["cases"][0]
    for r in heads["results"][:4]:
        assert len(r["samples_ms"]) == 2
        assert (r["gradient_error"] is None) == (r["variant"] == "floor")
    assert heads["results"][4]["skipped"] == "ModuleNotFoundError: No module named 'trl'"
    assert record["environment"]["torch"] == torch.__version__
    names = {file.name for file in (measured / "plots").iterdir()}
    wanted = {"loss-1", "loss-4", "tokens-ms", "tokens-mib", "gap-error", "row-kernels-bandwidth", "rows-per-chunk-ms"}
    assert {f"{name}.{ext}" for name in wanted for ext in ("svg", "png")} <= names
    text = (measured / "report.html").read_text()
    assert "Cut short" not in text
    assert "No module named &#x27;trl&#x27;" in text
    assert text.count("<svg") == len(names) // 2


def test_the_page_needs_nothing_else(measured: Path) -> None:
    text = (measured / "report.html").read_text()
    names = re.sub(r'xmlns(:\w+)?="[^"]*"|<metadata>.*?</metadata>', "", text, flags=re.DOTALL)  # names, not addresses
    assert not re.search(r"https?://|<script|@import|<img", names)
    assert not re.search(r'(?:src|href)="(?!#|data:)', names)
    assert "#2563eb" not in text.partition("</style>")[2], "figures take the page's colours"


def interrupted_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """The clock of the CPU raises Ctrl-C at its nth use."""
    timer, count = measure._time_cpu, iter(range(10**6))

    def time_cpu(s: variants.Step) -> float:
        if next(count) == step:
            raise KeyboardInterrupt
        return timer(s)

    monkeypatch.setattr(measure, "_time_cpu", time_cpu)


def test_an_interrupted_run_keeps_its_samples_and_is_finished(measured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "rates", lambda *_: {"copy_gb_s": 10.0, "matrix": {}})
    jobs = [Job(HEADS, ("floor", "eager"), 3, memory=False), Job(LOGITS, ("floor", "eager", "torch"), 3, memory=False)]
    with monkeypatch.context() as patch:
        interrupted_at(patch, 2 * 4 + 3 * 2 + 1)  # in the second case, after its first sample
        record = run.run(run.begin(jobs, "cpu", {"suite": "smoke"}, tmp_path), tmp_path, QUIET)
    assert record["status"] == "interrupted"
    kept = run.load(tmp_path)
    assert [m["complete"] for m in kept["cases"]] == [True, False]
    assert sorted(len(r["samples_ms"]) for r in kept["cases"][1]["results"]) == [1, 1, 2]
    text = (tmp_path / "report.html").read_text()
    assert "Cut short" in text
    assert "1 of 2 cases" in text
    with pytest.raises(run.BenchError, match="--resume finishes it"):
        run.begin(jobs, "cpu", {}, tmp_path)
    finished = run.run(run.resume(tmp_path), tmp_path, QUIET)
    assert finished["status"] == "complete"
    assert finished["cases"][0] == kept["cases"][0]
    assert [len(r["samples_ms"]) for r in finished["cases"][1]["results"]] == [3, 3, 3]
    assert "Cut short" not in (tmp_path / "report.html").read_text()


def test_a_budget_of_time_ends_a_run_between_cases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "rates", lambda *_: {"copy_gb_s": 10.0, "matrix": {}})
    jobs = [Job(HEADS, ("floor",), 1, memory=False)] * 2
    record = run.run(run.begin(jobs, "cpu", {"suite": "smoke"}, tmp_path), tmp_path, QUIET, budget_minutes=1e-9)
    assert (record["status"], record["cases"]) == ("out of time", [])
    assert run.run(run.resume(tmp_path), tmp_path, QUIET)["status"] == "complete"


@pytest.mark.parametrize(
    ("signal_", "status"), [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "interrupted"), (signal.SIGKILL, "running")]
)
def test_a_process_that_is_ended_leaves_a_record(tmp_path: Path, signal_: signal.Signals, status: str) -> None:
    command = [sys.executable, "-m", "kdkernels.cli", "bench", "--suite", "smoke", "--shape", "64,512,8,16", "--backends", "torch"]
    process = subprocess.Popen(
        [*command, "--peers", "none", "--device", "cpu", "--out", str(tmp_path / "out")],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    file = tmp_path / "out" / run.FILE
    until = time.monotonic() + 120
    while not (file.exists() and "rates" in json.loads(file.read_text())):
        assert process.poll() is None
        assert time.monotonic() < until
        time.sleep(0.05)
    process.send_signal(signal_)
    output, _ = process.communicate(timeout=120)
    record = run.load(tmp_path / "out")
    assert record["status"] == status
    if signal_ == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
    else:
        assert process.returncode == 130, output
        assert "--resume" in output
        assert "Cut short" in (tmp_path / "out" / "report.html").read_text()


def test_resume_refuses_what_would_not_compare(tmp_path: Path) -> None:
    with pytest.raises(run.BenchError, match=r"holds no results\.json"):
        run.resume(tmp_path)
    record = run.begin([Job(HEADS, ("floor",), 1)], "cpu", {}, tmp_path)
    record["environment"]["commit"] = "0123456789"
    run.save(tmp_path, record)
    with pytest.raises(run.BenchError, match="measured with commit 0123456789"):
        run.resume(tmp_path)
    for text, word in (("{", "no record"), ("[]", "no record"), ('{"schema": 99}', "schema 99")):
        (tmp_path / run.FILE).write_text(text)
        with pytest.raises(run.BenchError, match=word):
            run.load(tmp_path)


def test_without_matplotlib_the_page_says_so(measured: Path) -> None:
    text = page.page(run.load(measured), [])
    assert "Plots need matplotlib" in text
    assert "<svg" not in text


def test_what_looks_like_markup_is_shown_as_it_is() -> None:
    results = [{"variant": "floor", "samples_ms": [1.0, 2.0]}, {"variant": "eager", "skipped": "OSError: [Errno 12] no [bold]memory"}]
    console = Console(record=True, width=160, file=io.StringIO())
    console.print(table.rich_table({"case": vars(LOGITS), "flop": 0, "floor_bytes": 1, "results": results}, None))
    text = console.export_text()
    assert "ms p50 [p20, p80]" in text
    assert "[Errno 12] no [bold]memory" in text


SCRIPT = Path(__file__).parent.parent / "benchmarks" / "run_gpu.sh"


def run_gpu(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", str(SCRIPT), *arguments], capture_output=True, text=True, check=False)


def test_the_gpu_script_says_what_it_would_run(tmp_path: Path) -> None:
    (tmp_path / "wheels").mkdir()
    (tmp_path / "wheels" / "trl-1.0-py3-none-any.whl").touch()
    done = run_gpu("--dry-run", "--wheels", str(tmp_path / "wheels"), "--out", str(tmp_path / "out"), "--minutes", "20")
    assert (done.returncode, done.stderr) == (0, "")
    steps = [line.partition(" (")[0] for line in done.stdout.splitlines()]
    assert steps == ["install-trl", "build", "environment", "tests", "bench"]
    assert "--suite standard --device cuda" in done.stdout
    assert done.stdout.rstrip().endswith("--budget-minutes 19")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--speed"], "unknown option --speed"),
        (["--out"], "--out needs a value"),
        (["--wheels", "no/such"], "no such folder"),
        (["--minutes", "x"], "whole"),
    ],
)
def test_the_gpu_script_refuses_what_it_does_not_know(arguments: list[str], word: str) -> None:
    done = run_gpu("--dry-run", *arguments)
    assert done.returncode == 2
    assert word in done.stderr


def test_the_gpu_script_needs_a_gpu(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one here")
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexit 0\n")  # a Python that has everything
    python.chmod(0o755)
    done = subprocess.run(
        ["bash", str(SCRIPT), "--out", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": os.defpath, "PYTHON": str(python)},
    )
    assert done.returncode == 1
    assert "--cpu tries the same steps without one" in done.stdout
    assert "no GPU" in (tmp_path / "out" / "summary.txt").read_text()


PAGE = "".join(f"# {name}\n\n<!-- bench: {name} -->\n<!-- /bench -->\n\n" for name in report.BLOCKS)


@pytest.fixture
def repository(measured: Path, tmp_path: Path) -> Path:
    """A tree with results, a README and a page of documentation, brought up to date."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text(PAGE)
    (tmp_path / "docs" / "page.md").write_text(PAGE)
    copy = tmp_path / "benchmarks" / "results" / "a-machine" / run.FILE
    copy.parent.mkdir(parents=True)
    copy.write_text((measured / run.FILE).read_text())
    report.report(tmp_path, check=False)
    return tmp_path


def record_of(repository: Path) -> tuple[Path, dict[str, Any]]:
    (file,) = repository.glob(f"benchmarks/results/*/{run.FILE}")
    return file, json.loads(file.read_text())


def test_pages_and_figures_are_drawn_and_then_current(repository: Path) -> None:
    assert report.report(repository, check=True) == []
    readme = (repository / "README.md").read_text()
    assert "PyTorch eager takes" in readme
    assert "| forward KL, bfloat16, `logits_dtype=bfloat16`; N=32 V=256 Ds=8 Dt=16 |" in readme
    (figure,) = (repository / "docs" / "figures").glob("*-loss-1.svg")
    assert f"](docs/figures/{figure.name})" in readme
    assert f"](figures/{figure.name})" in (repository / "docs" / "page.md").read_text()
    for svg in (repository / "docs" / "figures").iterdir():
        assert ET.fromstring(svg.read_text()).tag.endswith("svg")
    before = {file: file.read_bytes() for file in repository.rglob("*") if file.is_file()}
    assert report.report(repository, check=False) == []
    assert before == {file: file.read_bytes() for file in repository.rglob("*") if file.is_file()}


def test_new_results_make_what_shows_them_stale(repository: Path) -> None:
    file, record = record_of(repository)
    at = next(m for m in record["cases"] if m["curve"] == "tokens")
    at["results"][1]["peak_extra_bytes"] += 50 << 20
    file.write_text(json.dumps(record))
    stale = ["README.md: memory tables", "docs/page.md: memory tables", "docs/figures/a-machine-tokens-mib.svg: curve figure"]
    assert report.report(repository, check=True) == stale
    assert report.report(repository, check=True) == stale  # --check changes nothing
    assert report.report(repository, check=False) == stale
    assert report.report(repository, check=True) == []


def test_results_of_a_run_that_was_cut_short_are_not_shown(repository: Path) -> None:
    file, record = record_of(repository)
    file.write_text(json.dumps({**record, "status": "interrupted"}))
    with pytest.raises(report.ReportError, match="a-machine is of a run that was cut short"):
        report.report(repository, check=True)


def test_what_is_edited_by_hand_is_stale(repository: Path) -> None:
    readme = repository / "README.md"
    readme.write_text(readme.read_text().replace("Medians of 2 samples", "Medians of 200 samples"))
    (figure,) = (repository / "docs" / "figures").glob("*-loss-1.svg")
    svg = figure.read_text()
    assert svg.count("<path") > 10
    figure.write_text(svg.replace("<path", "<path ", 1))
    (figure.parent / "other-machine-loss-1.svg").write_text(svg)
    assert report.report(repository, check=True) == [
        "README.md: summary",
        f"docs/figures/{figure.name}: loss figure",
        "docs/figures/other-machine-loss-1.svg: no results belong to it",
    ]
    report.report(repository, check=False)
    assert figure.read_text() == svg
    assert not (figure.parent / "other-machine-loss-1.svg").exists()


def test_a_figure_knows_its_data() -> None:
    line = {"name": "a", "ours": True, "x": [1, 2], "y": [1.0, 2.0]}
    data = {"title": "t", "x": "tokens", "y": "MiB", "log": True, "percent": False, "curves": [line]}
    svg = figures.draw("curve", data)
    assert figures.is_current(svg, "curve", data)
    assert not figures.is_current(svg, "curve", {**data, "title": "u"})
    assert not figures.is_current(svg, "loss", data)
    assert not figures.is_current("", "curve", data)
    assert figures.draw("curve", data) == svg
    assert figures.png("curve", data).startswith(b"\x89PNG")


def test_where_something_else_is_better_is_said(repository: Path) -> None:
    _, record = record_of(repository)
    record["cases"] = [m for m in record["cases"] if not m["curve"]]
    for m in record["cases"]:
        for r in m["results"]:
            if "samples_ms" in r:
                r["samples_ms"] = [2.0 if r["variant"] == "eager" else 1.0] * 2
                r["peak_extra_bytes"] = (2 if r["variant"] == "eager" else 1) << 20
                r["gradient_error"] = None if r["variant"] == "floor" else 1e-3 if r["variant"] == "torch" else 2e-3
    records: report.Records = {"m": record}
    assert report.not_better(records, "").startswith("In none of the 4 cases")
    eager = record["cases"][1]["results"][1]
    eager.update(samples_ms=[0.5] * 2, peak_extra_bytes=1 << 19, gradient_error=5e-4)
    text = report.not_better(records, "")
    assert text.count("\n- m, JSD, bfloat16, N=32 V=256 Ds=8 Dt=16, T=2: PyTorch eager") == 3
    assert "0.50 ms, kdkernels 1.00 ms" in text
    assert "gradient error 5.0e-04, kdkernels 1.0e-03" in text


def test_a_gpu_is_shown_before_a_cpu() -> None:
    cpu, gpu = ({"environment": {"gpu": name}} for name in (None, "NVIDIA H200"))
    assert report.featured({"cpu-2core": cpu, "nvidia-h200": gpu})[0] == "nvidia-h200"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- bench: nonsense -->\n<!-- /bench -->", "README.md: there is no block 'nonsense'; there are headline"),
        ("<!-- bench: summary -->\nno end", "README.md: a block has no end"),
        ("<!-- bench: summary -->\n<!-- bench: machines -->\n<!-- /bench -->", "README.md: the block 'summary' has no end"),
    ],
)
def test_markers_that_make_no_sense(repository: Path, text: str, message: str) -> None:
    (repository / "README.md").write_text(text)
    with pytest.raises(report.ReportError, match=message):
        report.report(repository, check=True)


def test_the_command_fails_where_something_is_stale_or_nothing_is_there(
    repository: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(report, "ROOT", repository)
    report.main(check=True)
    assert "up to date" in capsys.readouterr().out
    (repository / "README.md").write_text(PAGE)
    with pytest.raises(typer.Exit) as stale:
        report.main(check=True)
    assert stale.value.exit_code == 1
    assert "stale: README.md: headline" in capsys.readouterr().err
    record_of(repository)[0].unlink()
    with pytest.raises(typer.Exit):
        report.main(check=True)
    assert "benchmarks/results is empty" in capsys.readouterr().err
