"""Documentation: Python blocks run, tables equal the code, links work, and the site builds."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kdkernels as kd
from kdkernels.backends import selection
from kdkernels.divergences import REGISTRY

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
README = PAGES[0].read_text(encoding="utf-8")

BLOCK = re.compile(r"(?:<!-- needs: (?P<needs>[^>]+) -->\n)?```python\n(?P<code>.*?)```", re.DOTALL)


def missing(needs: str | None) -> bool:
    """Return whether a requirement of a block is missing: a package, or a GPU."""
    names = [] if needs is None else [name.strip() for name in needs.split(",")]
    return any(not torch.cuda.is_available() if name == "a GPU" else importlib.util.find_spec(name) is None for name in names)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_run(page: Path) -> None:
    """Run a page's blocks in order in one namespace, as a reader would paste them."""
    namespace: dict[str, object] = {"__name__": page.stem}
    text = page.read_text(encoding="utf-8")
    blocks = list(BLOCK.finditer(text))
    assert len(blocks) == text.count("```python\n")
    for block in blocks:
        line = text.count("\n", 0, block.start("code"))
        code = compile("\n" * line + block["code"], str(page), "exec")  # blank lines, so that a traceback has the page's line numbers
        if not missing(block["needs"]):
            exec(code, namespace)


def test_readme_example_has_ten_lines_and_runs_alone() -> None:
    code = BLOCK.search(README)["code"]  # type: ignore[index]
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    namespace: dict[str, object] = {}
    exec(code, namespace)
    head = namespace["student_head"]
    assert isinstance(head, torch.nn.Parameter)
    assert head.grad is not None
    assert bool(head.grad.isfinite().all())


def rows_of(table_header: str) -> list[list[str]]:
    """Return the cells of a README table."""
    _, _, tail = README.partition(table_header + "\n")
    assert tail, table_header
    lines = tail.splitlines()[1:]
    return [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in lines[: lines.index("")]]


def test_readme_lists_every_divergence_with_its_defaults() -> None:
    rows = rows_of("| name | class, with its defaults | formula | paper |")
    assert {name: eval(call, {"kd": kd}) for name, call, *_ in rows} == {name: cls() for name, cls in REGISTRY.items()}
    for name, call, *_ in rows:
        divergence = eval(call, {"kd": kd})
        assert call == f"kd.{divergence!r}", name  # the defaults are written out


def test_readme_lists_every_backend_and_its_dtypes() -> None:
    rows = rows_of("| backend | what | where | logits |")
    assert [name for name, *_ in rows] == list(selection.NAMES)
    for name, _, _, dtypes in rows:
        device = "cpu" if selection.unavailable(name, "cpu", (torch.float32, torch.float32)) is None else "cuda"
        if selection.unavailable(name, device, (torch.float32, torch.float32)) is not None:
            continue  # not available on this machine
        for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            runs = selection.unavailable(name, device, (dtype, dtype)) is None
            assert runs == (str(dtype).removeprefix("torch.") in dtypes.split(", ")), (name, dtype)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_have_targets(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings], target


def test_changelog_begins_with_the_version_or_unreleased() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    first = re.search(r"^## \[(.+?)\]", changelog, re.MULTILINE)
    assert first is not None
    assert first[1] in ("Unreleased", kd.__version__)


@pytest.mark.parametrize("front", ["README.md", "docs/index.md"])
def test_front_pages_link_to_every_page(front: str) -> None:
    page = ROOT / front
    targets = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    linked = {(page.parent / target.partition("#")[0]).resolve() for target in targets}
    pages = {path.resolve() for path in (ROOT / "docs").glob("*.md")} - {page, ROOT / "docs" / "changelog.md"}
    assert sorted(path.name for path in pages - linked) == []


def test_site_builds_without_warnings(tmp_path: Path) -> None:
    """Warnings are broken links, pages missing from the navigation and malformed docstrings."""
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(tmp_path / "site")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "site" / "api" / "losses" / "index.html").read_text(encoding="utf-8").count("distillation_loss") > 3
