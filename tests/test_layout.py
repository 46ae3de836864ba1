"""Imports point one way: each room of the package knows those before it, and the loss knows none of them."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import torch
from conftest import require
from layout import CALLS, CSRC, PACKAGE, ROOT, body, calls, crossed, functions, lines_of, package_files, tree
from more_sides import Sharpened
from sanitize.mutate import MUTANTS

import kdkernels as kd
from kdkernels import divergences

ROOMS = ("tap", "data", "teachers", "trainer", "recipes", "bench", "cli")
"""A room may import from those to its left, and from what every room stands on."""
LOSS = ("support", "sides", "fused", "backends")
"""The loss, besides the modules at the top."""


def imported(file: Path) -> set[str]:
    """The modules of this package that a file imports, as ``tap.head``; inside functions, too."""
    found: set[str] = set()
    here = ("kdkernels", *file.relative_to(PACKAGE).parts[:-1])
    for node in ast.walk(tree(file)):
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
"""Modules for users of other libraries: they import the loss and the tap, and nothing imports them."""


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


def test_training_loop_is_not_overridden() -> None:
    methods: set[str] = set()
    for name in ("trainer", "hooks"):
        module = tree(PACKAGE / "trainer" / f"{name}.py")
        classes = [node for node in module.body if isinstance(node, ast.ClassDef)]
        methods |= {node.name for trainer in classes for node in trainer.body if isinstance(node, ast.FunctionDef)}
    assert {"compute_loss", "prediction_step", "_save_checkpoint"} <= methods
    assert not methods & LOOP


# ---- what a new divergence touches


DIVERGENCE_FILES = {"kdkernels/divergences.py", "kdkernels/backends/triton/divergences.py", "csrc/divergence.h"}
"""Files that define a divergence. tests/backends/test_stages.py adds two through these alone."""


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


def test_every_mutant_has_its_place_in_the_sources() -> None:
    """``make sanitize`` takes minutes to find out."""
    assert not [mutant.name for mutant in MUTANTS if mutant.old not in (CSRC / mutant.file).read_text(encoding="utf-8")]


# ---- what a new backend or side touches


def test_backends_are_named_in_one_place() -> None:
    """A backend of this package is a module and its entry in the registry: no list of them elsewhere in the code that runs a call."""
    names = {"native", "triton", "reference"}  # "torch" is also a package, "cuda" a type of device
    files = [*CORE, *sorted((PACKAGE / "backends").rglob("*.py"))]
    named: dict[str, set[str]] = {}
    for file in files:
        for node in ast.walk(tree(file)):
            if isinstance(node, ast.Constant) and node.value in names:
                named.setdefault(file.relative_to(PACKAGE).as_posix(), set()).add(node.value)
    assert named == {"backends/selection.py": names}


def test_kinds_of_sides_are_known_in_their_folder_only() -> None:
    """A kind is a file there and its export. The primitives return two of them."""
    kinds = {"LMHead", "Logits", "TopK", "Sampled", "Ensemble"}
    named = {
        f"{file.relative_to(PACKAGE).as_posix()}: {alias.name}"
        for file in CORE
        if file.parent.name != "sides" and file.name != "primitives.py"
        for node in ast.walk(tree(file))
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.name in kinds
    }
    assert not named


@pytest.mark.parametrize("backend", ["reference", "torch", "native", "triton"])
def test_a_kind_of_teacher_runs_from_its_own_file(backend: str) -> None:
    """tests/support/more_sides.py is such a file: nothing else knows it."""
    require(backend, "cpu")
    results = []
    logits, labels = torch.randn(3, 12), torch.tensor([4, -100, 0])
    student = torch.randn(3, 12, requires_grad=True)
    for teacher in (Sharpened(logits, 1.5), logits * 1.5):
        loss = kd.distillation_loss(student, teacher, temperature=2.0, labels=labels, backend=backend)  # type: ignore[arg-type]
        results.append((loss, *torch.autograd.grad(loss, student)))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


def test_files_named_by_the_architecture_page_exist() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    named = set(re.findall(r"[\w/]+(?:\.(?:py|h|cpp|cu)|/)(?![\w.#])", page)) - {"kdkernels/"}
    assert len(named) > 25
    here = {file.name for file in package_files()}  # a row of a folder names its files without it
    assert not {name for name in named - here if not any((root / name).exists() for root in (ROOT, PACKAGE, CSRC))}


# ---- sizes


CORE = [PACKAGE / f"{name}.py" for name in ("losses", "primitives", "reference", "divergences")] + [
    *sorted((PACKAGE / "fused").glob("*.py")),
    *sorted((PACKAGE / "sides").glob("*.py")),
]


def test_no_file_is_too_long_to_read() -> None:
    files = [*package_files(), *CSRC.rglob("*.h"), *CSRC.rglob("*.c*")]
    assert len(files) > 100
    assert not {file.name: lines for file in files if (lines := lines_of(file)) > 500}


def test_functions_are_short() -> None:
    found = [function for file in package_files() for function in functions(file)]
    longest = max(found, key=lambda f: f.lines)
    print(f"longest function: {longest}")
    assert longest.lines <= 60


def test_functions_have_few_parameters() -> None:
    """Functions that users call are not counted. In Triton each array and number is a parameter, so kernels have ceilings of their own."""
    jit = [function for file in package_files() for function in functions(file) if function.jit]
    assert max(f.parameters for f in jit if f.name.endswith("_kernel")) <= 44
    assert max(f.parameters for f in jit if not f.name.endswith("_kernel")) <= 19
    found = [function for file in package_files() for function in functions(file) if not function.jit]
    core = [f for file in CORE for f in functions(file) if f.name.partition(": ")[2] not in ("distillation_loss", "cross_entropy")]
    widest = max((*core, *(f for f in found if f.private)), key=lambda f: f.parameters)
    print(f"most parameters of a private function: {widest}")
    assert widest.parameters <= 8


def test_the_code_between_the_loss_and_its_ops_is_small() -> None:
    lines = sum(lines_of(PACKAGE / "fused" / f"{name}.py") for name in ("ops", "checks", "call"))
    print(f"lines of ops, checks and call: {lines}")
    assert lines <= 750


def test_few_modules_stand_at_the_top() -> None:
    public = {"__init__.py", "_version.py", "losses.py", "primitives.py", "divergences.py", "reference.py"}
    documented = {"errors.py", "files.py"}  # import paths of kdkernels.support that docs name
    assert {file.name for file in PACKAGE.glob("*.py")} == public | documented
    assert len([*PACKAGE.glob("*/__init__.py")]) <= 13


def test_the_arguments_of_the_ops_are_spelled_once() -> None:
    assert sum(file.read_text(encoding="utf-8").count("SymInt[]") for file in CORE) == 1


def test_only_its_own_file_asks_what_kind_a_side_is() -> None:
    kinds = {"LMHead", "TopK", "Sampled", "Ensemble", "TeacherKind"}
    asked = {
        f"{file.name}:{node.lineno}"
        for file in CORE
        if file.parent.name != "sides"
        for node in ast.walk(tree(file))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "isinstance"
        for name in ast.walk(node)
        if isinstance(name, ast.Name) and name.id in kinds
    }
    assert not asked


WAY = {"torch": 8, "native": 12, "triton": 11, "cuda": 15}
"""Most files on the way from the loss to the gradient of the head, forward and backward."""
ALL_FILES = {"torch": 16, "native": 24, "triton": 18, "cuda": 29}
"""Most files with a function that runs there, and included C++ headers: may fall, must not rise."""


@pytest.mark.parametrize("backend", WAY)
def test_a_loss_crosses_few_files(backend: str) -> None:
    """tests/support/layout.py defines both counts."""
    require("native" if backend == "cuda" else backend, "cpu")
    files = crossed(backend)
    print(f"{backend}: {len(files.way)} files on the way: {', '.join(files.way)}; {len(files.all)} in all: {', '.join(files.all)}")
    assert {"losses.py", "fused/engine.py", "sides/head.py", "fused/gemm.py"} <= files.python_way.keys()
    assert {Path(file).stem for file in files.way} & {"divergence", "divergences"}
    assert set(files.way) <= set(files.all)
    assert len(files.way) <= WAY[backend]
    assert len(files.all) <= ALL_FILES[backend]


@pytest.mark.parametrize("backend", CALLS)
def test_the_calls_from_a_compiled_backend_to_the_divergence_are_in_the_sources(backend: str) -> None:
    chain = CALLS[backend]
    reached = {chain[0].file}
    for step in chain:
        assert step.file in reached
        text = body(step.file, step.function)
        assert text is not None, step
        for file, function in step.callees:
            assert calls(text, function), (step, function)
            assert file == "csrc/bindings.cpp" or body(file, function) is not None, (file, function)
            reached.add(file)
    assert chain[-1].callees[-1] == ("csrc/divergence.h", "terms")


def test_a_missing_call_is_noticed() -> None:
    text = body("csrc/cpu/dispatch.cpp", "cpu_rows")
    assert text is not None
    assert calls(text, "for_rows")
    assert not calls(text, "head_row")
    assert not calls(text.replace("chosen.rows(", "chosen."), "rows")
    assert body("csrc/cpu/rows.h", "rows") is None  # declared only
