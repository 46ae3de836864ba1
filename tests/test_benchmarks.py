"""The benchmarks measure what they say, and the documentation shows what was measured. Tiny shapes: no number here means anything."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

pytest.importorskip("benchmarks", reason="run from the root of the repository: python -m pytest")
pytest.importorskip("matplotlib", reason="the figures need the extra [bench]")

from benchmarks import figures, loss, measure, memory_scaling, report, variants
from benchmarks.cases import Case, build

HEADS, LOGITS = Case(32, 256, 8, 16), Case(32, 256)


def test_quantile_interpolates() -> None:
    assert [measure.quantile([4.0, 1.0, 2.0], q) for q in (0.0, 0.25, 0.5, 1.0)] == [1.0, 1.5, 2.0, 4.0]


def test_case_from_text() -> None:
    assert Case.parse("8,100,4,6:bfloat16:jsd", 3.0) == Case(8, 100, 4, 6, "bfloat16", "jsd", 3.0)
    logits = Case.parse("8,100:float32:forward_kl")
    assert not logits.has_heads
    assert (logits.flop, logits.floor_bytes) == (0, 3 * 8 * 100 * 4)
    for wrong in ("8,100", "8,100,4:float32:jsd", "8,0:float32:jsd", "8,100:int8:jsd", "8;100:float32:jsd", "8,100:float32"):
        with pytest.raises(ValueError, match="N,V,Ds,Dt:dtype:divergence"):
            Case.parse(wrong)
    for text in (text for texts in loss.CASES.values() for text in texts):
        Case.parse(text)
    with pytest.raises(ValueError, match="both"):
        Case(8, 100, 4, 0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("sizes", [(8, 16), (0, 0)], ids=["heads", "logits"])
def test_variants_compute_the_case(sizes: tuple[int, int], divergence: str, dtype: str) -> None:
    case = Case(32, 256, *sizes, dtype=dtype, divergence=divergence)
    for name in variants.default_variants(case, "cpu"):
        if name == "floor":
            assert variants.build(name, case, build(case))() is None
        elif name != "compile":  # the same formula, after seconds of compiling
            error = variants.check(name, case, "cpu")
            assert error is not None
            assert error < (0.05 if dtype == "bfloat16" else 1e-5)


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
    with pytest.raises(ValueError, match=r"floor, eager, compile, trl, liger, cuda, triton, native, torch"):
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


PAGE = "".join(f"# {name}\n\n<!-- bench: {name} -->\n<!-- /bench -->\n\n" for name in report.BLOCKS)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of real runs; only peak memory is made up, as every one would take a process."""
    out = tmp_path_factory.mktemp("results")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss, "peak_extra_bytes", lambda variant, *_, **__: (3 if variant == "eager" else 1) << 20)
        patch.setattr(memory_scaling, "peak_extra_bytes", lambda variant, case, *_, **__: (1 << 20) + 4 * case.n * case.v)
        names = ["floor", "eager", "torch", "torch/bfloat16", "liger"]
        cases = [f"32,256{rest}:{name}" for rest in (",8,16:bfloat16", ":float32") for name in ("forward_kl", "jsd")]
        loss.main(cases, 2.0, "cpu", names, samples=2, out=out)
        memory_scaling.main([64, 128], 512, 8, 16, "float32", "forward_kl", "cpu", ["torch"], [1], out=out)
    return out


@pytest.fixture
def repository(measured: Path, tmp_path: Path) -> Path:
    """A tree with results, a README and a page of documentation, brought up to date."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text(PAGE)
    (tmp_path / "docs" / "page.md").write_text(PAGE)
    for file in measured.glob("*/*.json"):
        copy = tmp_path / "benchmarks" / "results" / file.parent.name / file.name
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(file.read_text())
    report.report(tmp_path, check=False)
    return tmp_path


def record_of(repository: Path, name: str) -> tuple[Path, dict[str, Any]]:
    (file,) = repository.glob(f"benchmarks/results/*/{name}.json")
    return file, json.loads(file.read_text())


def test_results_hold_every_sample_and_the_reason_for_what_did_not_run(repository: Path) -> None:
    _, record = record_of(repository, "loss")
    assert [m["case"]["divergence"] for m in record["cases"]] == ["forward_kl", "jsd"] * 2
    heads, logits = record["cases"][0], record["cases"][2]
    for r in heads["results"][:4]:
        assert len(r["samples_ms"]) == 2
        assert (r["gradient_error"] is None) == (r["variant"] == "floor")
    assert heads["results"][2]["plan"]["num_chunks"] == 1
    assert "not logits" in logits["results"][4]["skipped"]
    assert record["environment"]["torch"] == torch.__version__


def test_pages_and_figures_are_drawn_and_then_current(repository: Path) -> None:
    assert report.report(repository, check=True) == []
    readme = (repository / "README.md").read_text()
    assert "PyTorch eager takes" in readme
    assert "| forward KL, bfloat16, `logits_dtype=bfloat16`; N=32 V=256 Ds=8 Dt=16 |" in readme
    (figure,) = (repository / "docs" / "figures").glob("*-loss.svg")
    assert f"](docs/figures/{figure.name})" in readme
    assert f"](figures/{figure.name})" in (repository / "docs" / "page.md").read_text()
    for svg in (repository / "docs" / "figures").iterdir():
        assert ET.fromstring(svg.read_text()).tag.endswith("svg")
    before = {file: file.read_bytes() for file in repository.rglob("*") if file.is_file()}
    assert report.report(repository, check=False) == []
    assert before == {file: file.read_bytes() for file in repository.rglob("*") if file.is_file()}


def test_new_results_make_what_shows_them_stale(repository: Path) -> None:
    file, record = record_of(repository, "memory_scaling")
    record["curves"][0]["points"][0]["peak_extra_bytes"] += 50 << 20
    file.write_text(json.dumps(record))
    name = f"{file.parent.name}-memory.svg"
    stale = ["README.md: memory tables", "docs/page.md: memory tables", f"docs/figures/{name}: memory figure"]
    assert report.report(repository, check=True) == stale
    assert report.report(repository, check=True) == stale  # --check changes nothing
    assert report.report(repository, check=False) == stale
    assert report.report(repository, check=True) == []


def test_what_is_edited_by_hand_is_stale(repository: Path) -> None:
    readme = repository / "README.md"
    readme.write_text(readme.read_text().replace("Medians of 2 samples", "Medians of 200 samples"))
    (figure,) = (repository / "docs" / "figures").glob("*-loss.svg")
    svg = figure.read_text()
    assert svg.count("<path") > 10
    figure.write_text(svg.replace("<path", "<path ", 1))
    (figure.parent / "other-machine-loss.svg").write_text(svg)
    assert report.report(repository, check=True) == [
        "README.md: summary",
        f"docs/figures/{figure.name}: loss figure",
        "docs/figures/other-machine-loss.svg: no results belong to it",
    ]
    report.report(repository, check=False)
    assert figure.read_text() == svg
    assert not (figure.parent / "other-machine-loss.svg").exists()


def test_a_figure_knows_its_data() -> None:
    data = {"title": "t", "curves": [{"name": "a", "ours": True, "tokens": [1, 2], "mib": [1.0, 2.0]}]}
    svg = figures.draw("memory", data)
    assert figures.is_current(svg, "memory", data)
    assert not figures.is_current(svg, "memory", {**data, "title": "u"})
    assert not figures.is_current(svg, "loss", data)
    assert not figures.is_current("", "memory", data)
    assert figures.draw("memory", data) == svg


def test_where_something_else_is_better_is_said(repository: Path) -> None:
    _, record = record_of(repository, "loss")
    for m in record["cases"]:
        for r in m["results"]:
            if "samples_ms" in r:
                r["samples_ms"] = [2.0 if r["variant"] == "eager" else 1.0] * 2
                r["peak_extra_bytes"] = (2 if r["variant"] == "eager" else 1) << 20
                r["gradient_error"] = None if r["variant"] == "floor" else 1e-3 if r["variant"] == "torch" else 2e-3
    records: report.Records = {"loss": {"m": record}}
    assert report.not_better(records, "").startswith("In none of the 4 cases")
    eager = record["cases"][1]["results"][1]
    eager.update(samples_ms=[0.5] * 2, peak_extra_bytes=1 << 19, gradient_error=5e-4)
    text = report.not_better(records, "")
    assert text.count("\n- m, N=32 V=256 Ds=8 Dt=16 bfloat16 jsd T=2: PyTorch eager") == 3
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
    file, _ = record_of(repository, "memory_scaling")
    file.unlink()
    with pytest.raises(typer.Exit):
        report.main(check=True)
    assert "memory_scaling.json, and there is none" in capsys.readouterr().err
    record_of(repository, "loss")[0].unlink()
    with pytest.raises(typer.Exit):
        report.main(check=True)
    assert "benchmarks/results is empty" in capsys.readouterr().err
