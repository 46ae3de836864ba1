"""``benchmarks.report`` draws measured results into README, pages and figures, and detects stale ones."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
import typer
from benching import measure_small

from benchmarks import report
from kdkernels.bench import figures, run


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bench") / "out"
    measure_small(out)
    return out


PAGE = "".join(f"# {name}\n\n<!-- bench: {name} -->\n<!-- /bench -->\n\n" for name in report.BLOCKS)


@pytest.fixture
def repository(measured: Path, tmp_path: Path) -> Path:
    """Make a repository with results, a README and a documentation page, all up to date."""
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


def test_pages_and_figures_are_drawn_and_up_to_date(repository: Path) -> None:
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


def test_new_results_make_documents_stale(repository: Path) -> None:
    file, record = record_of(repository)
    case = next(m for m in record["cases"] if m["curve"] == "tokens")
    case["results"][1]["peak_extra_bytes"] += 50 << 20
    file.write_text(json.dumps(record))
    stale = ["README.md: memory tables", "docs/page.md: memory tables", "docs/figures/a-machine-tokens-mib.svg: curve figure"]
    assert report.report(repository, check=True) == stale
    assert report.report(repository, check=True) == stale  # --check changes nothing
    assert report.report(repository, check=False) == stale
    assert report.report(repository, check=True) == []


def test_interrupted_results_raise(repository: Path) -> None:
    file, record = record_of(repository)
    file.write_text(json.dumps({**record, "status": "interrupted"}))
    with pytest.raises(report.ReportError, match="a-machine is from an interrupted run"):
        report.report(repository, check=True)


def test_manual_edits_are_stale(repository: Path) -> None:
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


def test_figure_is_current_only_for_its_data() -> None:
    line = {"name": "a", "ours": True, "x": [1, 2], "y": [1.0, 2.0]}
    data = {"title": "t", "x": "tokens", "y": "MiB", "log": True, "percent": False, "curves": [line]}
    svg = figures.draw("curve", data)
    assert figures.is_current(svg, "curve", data)
    assert not figures.is_current(svg, "curve", {**data, "title": "u"})
    assert not figures.is_current(svg, "loss", data)
    assert not figures.is_current("", "curve", data)
    assert figures.draw("curve", data) == svg
    assert figures.png("curve", data).startswith(b"\x89PNG")


def test_better_peers_are_listed(repository: Path) -> None:
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


def test_gpu_is_shown_before_cpu() -> None:
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
def test_invalid_markers_raise(repository: Path, text: str, message: str) -> None:
    (repository / "README.md").write_text(text)
    with pytest.raises(report.ReportError, match=message):
        report.report(repository, check=True)


def test_check_fails_for_stale_or_missing_results(
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
