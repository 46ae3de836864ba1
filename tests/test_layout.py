"""Imports point one way: each room of the package knows those before it, and the loss knows none of them."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import pytest
import torch

import kdkernels as kd
from kdkernels import divergences

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "kdkernels"
ROOMS = ("tap", "data", "teachers", "trainer", "recipes", "bench", "cli")
"""A room may import from those to its left, and from what every room stands on."""
LOSS = ("support", "sides", "fused", "backends")
"""The loss, besides the modules at the top."""


def imported(file: Path) -> set[str]:
    """The modules of this package that a file imports, as ``tap.head``; inside functions, too."""
    found: set[str] = set()
    here = ("kdkernels", *file.relative_to(PACKAGE).parts[:-1])
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level + 1] if node.level else ()
            module = ".".join((*base, *([node.module] if node.module else [])))
            found |= {f"{module}.{alias.name}" for alias in node.names}
    return {name.removeprefix("kdkernels.") for name in found if name.startswith("kdkernels.")}


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_from_rooms_before_it(room: str) -> None:
    files = sorted((PACKAGE / room).rglob("*.py"))
    assert len(files) > 1
    after = ROOMS[ROOMS.index(room) + 1 :]
    backwards = {f"{file.name}: {name}" for file in files for name in imported(file) if name.partition(".")[0] in after}
    assert not backwards


GUESTS = ("integrations", "compat")
"""What other libraries' users import: it knows the loss and the tap, and nothing here knows it."""


@pytest.mark.parametrize("guest", GUESTS)
def test_guests_import_the_loss_and_the_tap_alone(guest: str) -> None:
    files = sorted((PACKAGE / guest).rglob("*.py"))
    assert len(files) > 1
    beyond = {*ROOMS, *GUESTS} - {"tap", guest}
    assert not {f"{file.name}: {name}" for file in files for name in imported(file) if name.partition(".")[0] in beyond}


def test_nothing_imports_a_guest() -> None:
    files = [file for file in PACKAGE.rglob("*.py") if file.relative_to(PACKAGE).parts[0] not in GUESTS]
    assert not {f"{file.name}: {name}" for file in files for name in imported(file) if name.partition(".")[0] in GUESTS}


def test_the_loss_imports_from_no_room() -> None:
    files = [file for file in PACKAGE.glob("*.py") if file.name != "__init__.py"]
    files += [file for room in LOSS for file in (PACKAGE / room).rglob("*.py")]
    assert "losses" in {file.stem for file in files}
    assert not {f"{file.name}: {name}" for file in files for name in imported(file) if name.partition(".")[0] in ROOMS}


LOOP = {
    "_inner_training_loop", "_run_epoch", "training_step", "_prepare_for_training", "set_initial_training_values", "create_optimizer",
    "create_optimizer_and_scheduler", "get_train_dataloader", "get_eval_dataloader", "_get_dataloader", "_get_train_sampler", "_wrap_model",
}  # fmt: skip
"""Methods of transformers.Trainer that are its loop: steps, accumulation, optimizer, order of the data, devices."""


def test_the_training_loop_is_that_of_transformers() -> None:
    methods: set[str] = set()
    for name in ("trainer", "hooks"):
        tree = ast.parse((PACKAGE / "trainer" / f"{name}.py").read_text(encoding="utf-8"))
        classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
        methods |= {node.name for trainer in classes for node in trainer.body if isinstance(node, ast.FunctionDef)}
    assert {"compute_loss", "prediction_step", "_save_checkpoint"} <= methods
    assert not methods & LOOP


def test_no_file_is_too_long_to_read() -> None:
    files = [*PACKAGE.rglob("*.py"), *(PACKAGE.parent / "csrc").rglob("*.h"), *(PACKAGE.parent / "csrc").rglob("*.c*")]
    assert len(files) > 100
    assert not {file.name: lines for file in files if (lines := len(file.read_text(encoding="utf-8").splitlines())) > 500}


# ---- what a new divergence touches


DIVERGENCE_FILES = {"kdkernels/divergences.py", "kdkernels/backends/triton/divergences.py", "csrc/divergence.h"}
"""Where a divergence is written; tests/backends/test_stages.py adds two through these places alone."""


def test_no_other_file_knows_the_divergences() -> None:
    """One or two may be named, as an example or a default. Three are a list, which the next divergence would be missing from."""
    classes = [cls.__name__ for cls in divergences.REGISTRY.values()]
    files = [*PACKAGE.rglob("*.py"), *ROOT.glob("csrc/**/*.h"), *ROOT.glob("csrc/**/*.c*")]
    lists = {}
    for file in files:
        text, name = file.read_text(encoding="utf-8"), file.relative_to(ROOT).as_posix()
        named = [cls for cls in classes if re.search(rf"\b{cls}\b", text)]
        if len(named) > 2 and name not in DIVERGENCE_FILES:
            lists[name] = named
    assert lists.keys() == {"kdkernels/__init__.py"}, lists  # exports all of them


def test_the_switch_of_the_compiled_kernels_covers_every_divergence() -> None:
    header = (ROOT / "csrc" / "divergence.h").read_text(encoding="utf-8")
    ids = dict(re.findall(r"struct (\w+) : [^{]*{\s*static constexpr int id = (\d+);", header))
    assert {name: int(number) for name, number in ids.items()} == {cls.__name__: cls.id for cls in divergences.REGISTRY.values()}
    count = re.search(r"kDivergences = (\d+);", header)
    assert count is not None
    assert sorted(map(int, ids.values())) == list(range(int(count[1])))
    assert re.findall(r"case (\w+)::id:", header[count.start() :]) == list(ids)


# ---- sizes


CORE = [PACKAGE / f"{name}.py" for name in ("losses", "primitives", "reference", "divergences")] + [
    *sorted((PACKAGE / "fused").glob("*.py")),
    *sorted((PACKAGE / "sides").glob("*.py")),
]


def functions(file: Path) -> Iterator[tuple[str, int, int]]:
    """Yield (name, lines without the docstring, parameters without self) of every function of a file."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.FunctionDef):
            continue
        lines = (node.end_lineno or 0) - node.lineno + 1
        if ast.get_docstring(node) is not None:
            lines -= (node.body[0].end_lineno or 0) - node.body[0].lineno + 1
        parameters = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
        yield f"{file.name}: {node.name}", lines, len(parameters) - (parameters[:1] in (["self"], ["ctx"], ["cls"]))


def test_the_core_stays_small() -> None:
    """Sizes of the code between the user and the kernels."""
    found = [function for file in CORE for function in functions(file)]
    longest = max(found, key=lambda f: f[1])
    public = {"distillation_loss", "cross_entropy"}
    widest = max((f for f in found if f[0].split(": ")[1] not in public), key=lambda f: f[2])
    call = sum(len((PACKAGE / "fused" / f"{name}.py").read_text(encoding="utf-8").splitlines()) for name in ("ops", "checks", "call"))
    print(f"lines of ops, checks and call: {call}; longest function: {longest}; most parameters of a private function: {widest}")
    assert call <= 750
    assert longest[1] <= 60
    assert widest[2] <= 8


def test_the_arguments_of_the_ops_are_spelled_once() -> None:
    assert sum(file.read_text(encoding="utf-8").count("SymInt[]") for file in CORE) == 1


def test_only_its_own_file_asks_what_kind_a_side_is() -> None:
    kinds = {"LMHead", "TopK", "Sampled", "Ensemble", "TeacherKind"}
    asked = {
        f"{file.name}:{node.lineno}"
        for file in CORE
        if file.parent.name != "sides"
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "isinstance"
        for name in ast.walk(node)
        if isinstance(name, ast.Name) and name.id in kinds
    }
    assert not asked


def test_a_loss_crosses_few_files() -> None:
    """Every file of the package with a function that runs between the loss and the gradient of the head, forward and backward."""
    hidden, weight = torch.randn(4, 8, requires_grad=True), torch.randn(16, 8, requires_grad=True)
    teacher = kd.LMHead(torch.randn(4, 6), torch.randn(16, 6))
    crossed: dict[str, None] = {}

    def profile(frame: FrameType, event: str, argument: object) -> None:
        file = Path(frame.f_code.co_filename)
        if event == "call" and PACKAGE in file.parents:
            crossed[file.relative_to(PACKAGE).as_posix()] = None

    def step() -> None:
        kd.distillation_loss(kd.LMHead(hidden, weight), teacher, backend="torch").backward()

    step()  # imports
    sys.setprofile(profile)
    try:
        step()
    finally:
        sys.setprofile(None)
    print(f"{len(crossed)} files: {', '.join(crossed)}")
    assert {"losses.py", "fused/engine.py", "sides/head.py", "backends/torch.py"} <= crossed.keys()
    assert len(crossed) <= 16
