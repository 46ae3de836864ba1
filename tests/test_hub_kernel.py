"""The losses as a kernel for Hugging Face's package ``kernels``, loaded as that package loads it."""

from __future__ import annotations

import ast
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import kdkernels

ROOT = Path(__file__).parents[1]


def load(name: str, file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def variant(tmp_path_factory: pytest.TempPathFactory) -> Path:
    script = load("hub_kernel", ROOT / "release" / "hub_kernel.py")
    folder: Path = script.build(tmp_path_factory.mktemp("kernel") / "out")
    return folder


def test_hub_kernel_gives_the_results_of_the_installed_package(variant: Path) -> None:
    name = json.loads((variant / "metadata.json").read_text())["id"]
    kernel = load(name, variant / "kdkernels" / "__init__.py")
    assert kernel is not kdkernels
    generator = torch.Generator().manual_seed(0)
    hidden, weight, teacher = (torch.randn(*shape, generator=generator) for shape in ((6, 8), (32, 8), (6, 32)))
    results = []
    for package in (kernel, kdkernels):
        leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        loss = package.distillation_loss(package.LMHead(*leaves), teacher, divergence=package.JSD(), temperature=2.0)
        loss.backward()
        results.append((loss.detach(), *[tensor.grad for tensor in leaves]))
    torch.testing.assert_close(results[0], results[1])
    modules = [module for key, module in sys.modules.items() if key.startswith(f"{name}.")]
    assert all(Path(str(module.__file__)).is_relative_to(variant) for module in modules), "no module of the installed package"


def test_hub_kernel_imports_only_torch_and_triton(variant: Path) -> None:
    allowed = {*sys.stdlib_module_names, "torch", "triton", "typing_extensions", "kdkernels"}  # torch itself needs typing_extensions
    nodes = [node for path in variant.rglob("*.py") for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))]
    absolute = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    absolute += [str(node.module) for node in nodes if isinstance(node, ast.ImportFrom) and not node.level]
    imported = {name.partition(".")[0] for name in absolute}
    assert {"torch", "triton"} <= imported <= {*allowed, "psutil"}, "psutil is optional: without it, free memory is not known"


def test_hub_kernel_does_not_replace_an_existing_folder(tmp_path: Path) -> None:
    script = load("hub_kernel", ROOT / "release" / "hub_kernel.py")
    with pytest.raises(SystemExit, match="exists: remove it"):
        script.build(tmp_path)
