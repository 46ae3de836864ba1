"""Every way to build and install the package, offline, with the test environment's packages and without build isolation.

Most tests build a copy of this project whose C++ and CUDA sources are one line each. A script replaces nvcc: it logs its arguments and
calls the C++ compiler.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.metadata import Metadata
from packaging.requirements import Requirement

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
BUILD_FILES = ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "constraints.txt", "CHANGELOG.md")

TINY_SOURCES = {
    "bindings.cpp": """
        #include <Python.h>
        #include "params.h"
        #ifndef KD_WITH_CUDA
        #define KD_CUDA_TARGETS ""
        #endif
        static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
        PyMODINIT_FUNC PyInit__C() {
            PyObject* m = PyModule_Create(&definition);
            PyModule_AddStringConstant(m, "cuda_targets", KD_CUDA_TARGETS);
            return m;
        }""",
    "params.h": "#pragma once",
    "cpu/rows.cpp": "namespace KD_ISA { int rows() { return 0; } }",
    "cpu/heads.cpp": "namespace KD_ISA { int heads() { return 0; } }",
    "cpu/product.cpp": "int product() { return 0; }",
    "cpu/dispatch.cpp": "int dispatch() { return 0; }",
    "cuda/one.cu": '#include "row.h"\nint one() { return row; }',
    "cuda/two.cu": "int two() { return 2; }",
    "cuda/row.h": "#pragma once\nconst int row = 1;",
}

NVCC = """#!{python}
import pathlib, subprocess, sys
arguments = sys.argv[1:]
if arguments == ["--list-gpu-code"]:
    print("sm_80", "sm_86", "sm_90", sep="\\n")
    sys.exit()
with open(pathlib.Path(__file__).with_suffix(".log"), "a") as log:
    print(*arguments, file=log)
passed, rest = [], iter(arguments)
for a in rest:
    if a in ("-o", "-MF"):
        passed += [a, next(rest)]
    elif a in ("-c", "-MMD", "-shared") or a.startswith(("-I", "-D", "-std")) or not a.startswith("-"):
        passed.append(a)
    elif a in ("-ccbin", "-gencode", "-Xcompiler", "-Xptxas", "-cudart", "--threads"):
        next(rest)
print("ptxas info: 0 bytes spill stores", file=sys.stderr)
sys.exit(subprocess.call(["c++", "-fPIC", "-x", "c++", *passed] if "-c" in passed else ["c++", *passed]))
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy of the project with one-line sources."""
    folder = tmp_path / "a project"  # a path with a space
    copy_project(folder)
    for name, text in TINY_SOURCES.items():
        path = folder / "csrc" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def copy_project(folder: Path) -> None:
    folder.mkdir()
    for name in BUILD_FILES:
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "kdkernels", folder / "kdkernels", ignore=shutil.ignore_patterns("*.so", "__pycache__"))


@pytest.fixture
def nvcc(tmp_path: Path) -> Path:
    """The folder of a CUDA toolkit whose nvcc is the script, for CUDA_HOME."""
    path = tmp_path / "cuda" / "bin" / "nvcc"
    path.parent.mkdir(parents=True)
    path.write_text(NVCC.format(python=sys.executable))
    path.chmod(0o755)
    return path.parents[1]


def run(*command: str | Path, cwd: Path, fails: bool = False, **variables: str | Path) -> str:
    """Run a command and return its output. This process's build variables are removed, and CUDA kernels are off by default."""
    removed = ("KDKERNELS_CUDA", "KDKERNELS_CUDA_ARCHS", "CUDA_HOME", "CUDA_PATH", "CXX", "CXXFLAGS", "PYTHONPATH")
    environment = {k: v for k, v in os.environ.items() if k not in removed and not k.startswith(("COV_", "COVERAGE_"))}
    environment |= {"KDKERNELS_CUDA": "0", "PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    environment |= {name: str(value) for name, value in variables.items()}
    result = subprocess.run(command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    assert (result.returncode != 0) == fails, result.stdout
    return result.stdout


def build(project: Path, **options: str | Path | bool) -> str:
    return run(sys.executable, "setup.py", "build_ext", "--inplace", cwd=project, **options)  # type: ignore[arg-type]


def pip_install(project: Path, target: Path, *arguments: str, **variables: str | Path) -> str:
    command = [sys.executable, "-m", "pip", "install", "--verbose", "--no-build-isolation", "--no-deps", "--target", target, *arguments]
    return run(*command, cwd=project, **variables)


def compiled(output: str) -> set[str]:
    """Return the names of the files that ninja built, from the commands that it printed."""
    return {name for line in output.splitlines() if re.match(r"\s*\[\d+/\d+\]", line) for name in re.findall(r" -o (\S+)", line)}


def in_python(code: str, path: Path) -> str:
    """Run code with ``path`` first on Python's path."""
    return run(sys.executable, "-c", code, cwd=path, PYTHONPATH=path).strip()


LOAD = """
import glob, importlib.util
spec = importlib.util.spec_from_file_location("_C", glob.glob("kdkernels/_C.*so")[0])
m = importlib.util.module_from_spec(spec)
spec.loader.exec_module(m)
"""
CPU_OBJECTS = {"product.o", "dispatch.o", "bindings.o", "_C.so"}


def cpu_objects(names: set[str]) -> set[str]:
    return {name for name in names if not name.startswith(("rows_", "heads_"))}


def test_pip_installs_the_package(project: Path, tmp_path: Path) -> None:
    target = tmp_path / "site"
    assert cpu_objects(compiled(pip_install(project, target, "."))) == CPU_OBJECTS
    assert in_python(LOAD + "print(m.cuda_targets or 'none')", target) == "none"
    assert (target / "kdkernels" / "py.typed").exists()
    assert (target / "kdkernels" / "_C.pyi").exists()


def test_second_build_compiles_nothing(project: Path, tmp_path: Path) -> None:
    assert compiled(build(project))
    for output in (
        build(project),
        pip_install(project, tmp_path / "site", "."),
        pip_install(project, tmp_path / "editable", "--editable", "."),
    ):
        assert compiled(output) == set()
        assert "no work to do" in output


def test_editable_install_imports_from_the_project(project: Path, tmp_path: Path) -> None:
    pip_install(project, tmp_path / "editable", "--editable", ".")
    assert list((project / "kdkernels").glob("_C.*.so"))
    assert not list((tmp_path / "editable").glob("kdkernels/*"))
    assert in_python(LOAD + "print('loaded')", project) == "loaded"


def test_changed_source_compiles_only_its_dependents(project: Path, nvcc: Path) -> None:
    cuda = {"CUDA_HOME": nvcc, "KDKERNELS_CUDA": "1"}

    def after(name: str) -> set[str]:
        path = project / "csrc" / name
        path.write_text(path.read_text() + "\n// changed\n")
        return compiled(build(project, **cuda))

    assert {"cuda_one.o", "cuda_two.o"} < compiled(build(project, **cuda))
    assert after("cuda/two.cu") == {"cuda_two.o", "_C.so"}
    assert after("cuda/row.h") == {"cuda_one.o", "_C.so"}
    assert after("cpu/dispatch.cpp") == {"dispatch.o", "_C.so"}
    assert after("params.h") == {"bindings.o", "_C.so"}
    assert compiled(build(project, **cuda)) == set()
    # Reports of removed sources are deleted.
    (project / "csrc" / "cuda" / "two.cu").rename(project / "csrc" / "cuda" / "three.cu")
    assert compiled(build(project, **cuda)) == {"cuda_three.o", "_C.so"}
    assert {report.name for report in project.glob("build/ninja-*/*.log")} == {"cuda_one.o.log", "cuda_three.o.log"}


def test_cuda_is_built_if_nvcc_is_found(project: Path, nvcc: Path) -> None:
    """The default is every known target and the newest one's PTX, with a static runtime, which loads without a driver."""
    output = build(project, KDKERNELS_CUDA="auto", CUDA_PATH=nvcc)
    assert re.search(r"building CUDA kernels with \S+nvcc for sm_80, sm_86, sm_90a: about \d+ minutes? on \d+ cores", output)
    assert "KDKERNELS_CUDA=0 skips them" in output
    assert in_python(LOAD + "print(m.cuda_targets)", project) == "80;86;90a"
    log = (nvcc / "bin" / "nvcc.log").read_text()
    command = next(line for line in log.splitlines() if "one.cu" in line)
    assert re.findall(r"-gencode (\S+)", command) == [
        "arch=compute_80,code=sm_80", "arch=compute_86,code=sm_86", "arch=compute_90a,code=sm_90a", "arch=compute_90,code=compute_90",
    ]  # fmt: skip
    assert "-DKD_WITH_CUDA=1" in command
    link = next(line for line in log.splitlines() if "-shared" in line)
    assert "-cudart static" in link
    assert "-lcuda" not in link
    (report,) = project.glob("build/ninja-*/cuda_one.o.log")
    assert "0 bytes spill stores" in report.read_text()


def test_cuda_targets_can_be_chosen(project: Path, nvcc: Path) -> None:
    cuda = {"CUDA_HOME": nvcc, "KDKERNELS_CUDA": "1"}
    build(project, KDKERNELS_CUDA_ARCHS="90a; 80", **cuda)
    assert in_python(LOAD + "print(m.cuda_targets)", project) == "90a;80"
    message = build(project, fails=True, KDKERNELS_CUDA_ARCHS="80;75;native", **cuda)
    assert "KDKERNELS_CUDA_ARCHS has '75', 'native'" in message
    assert "knows 80; 86; 90" in message


def test_failed_kernel_shows_the_compilers_error(project: Path, nvcc: Path) -> None:
    (project / "csrc" / "cuda" / "two.cu").write_text("int two() { return undeclared; }")
    message = build(project, fails=True, CUDA_HOME=nvcc, KDKERNELS_CUDA="auto")
    assert "undeclared" in message
    assert "KDKERNELS_CUDA=0 builds without the CUDA kernels" in message


def test_missing_nvcc_is_an_error_only_if_cuda_is_required(project: Path, tmp_path: Path) -> None:
    without_nvcc = {"PATH": path_of(tmp_path, "c++", "sh")}
    assert "there is no nvcc in CUDA_HOME/bin, CUDA_PATH/bin or on PATH" in build(project, fails=True, KDKERNELS_CUDA="1", **without_nvcc)
    assert cpu_objects(compiled(build(project, KDKERNELS_CUDA="auto", **without_nvcc))) == CPU_OBJECTS


@pytest.mark.parametrize("value", ["maybe", "", "2"])
def test_invalid_settings_of_the_build_raise(project: Path, value: str) -> None:
    assert f"KDKERNELS_CUDA is {value!r}; it can be auto, 0 or 1" in build(project, fails=True, KDKERNELS_CUDA=value)


def path_of(tmp_path: Path, *programs: str) -> str:
    """Return a PATH with only these programs and what they call."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for program in programs:
        (folder / program).symlink_to(shutil.which(program) or program)
    return str(folder) + (os.pathsep + os.path.dirname(shutil.which("as") or "") if "c++" in programs else "")


def test_install_without_a_compiler_is_pure_python(project: Path, tmp_path: Path) -> None:
    """An extension from an earlier build is not installed."""
    build(project)
    target = tmp_path / "site"
    empty_path = path_of(tmp_path)
    output = pip_install(project, target, ".", PATH=empty_path)
    assert "no C++ compiler that is supported here" in output
    assert not list(target.glob("kdkernels/*.so"))
    # The import hook of an editable install would find the extension in the project.
    code = "import sys; sys.meta_path = [f for f in sys.meta_path if 'Editable' not in str(f)]\n"
    reason = in_python(code + "from kdkernels.backends import _extension; print(_extension.missing())", target)
    assert "kdkernels._C cannot be imported" in reason
    assert "C++17 compiler" in reason
    assert "no C++ compiler" in pip_install(project, tmp_path / "editable", "--editable", ".", PATH=empty_path)


def test_wheel_from_the_sdist_loads(tmp_path: Path) -> None:
    """`python -m build` makes an sdist from the project and a wheel from the sdist, with the real sources (-O0, which is faster)."""
    pytest.importorskip("build")
    project, target = tmp_path / "project", tmp_path / "site"
    copy_project(project)
    shutil.copytree(ROOT / "csrc", project / "csrc")
    run(sys.executable, "-m", "build", "--no-isolation", cwd=project, CXXFLAGS="-O0")
    (sdist,), (wheel,) = (project / "dist").glob("*.tar.gz"), (project / "dist").glob("*.whl")
    shutil.unpack_archive(sdist, tmp_path / "unpacked")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    sources = {path.relative_to(ROOT) for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    assert sources <= {path.relative_to(unpacked) for path in unpacked.rglob("*")}
    pip_install(tmp_path, target, str(wheel))
    assert in_python(LOAD + "print('baseline' in m.cpu_isas(), len(m.divergences()))", target) == "True 10"

    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith("/METADATA"))
        requirements = [Requirement(str(r)) for r in Metadata.from_email(archive.read(name), validate=False).requires_dist or []]
    (torch,) = (r for r in requirements if r.name == "torch")
    # The requirement keeps any installed torch, also CPU builds and later versions.
    assert torch.specifier.contains("2.8.0")
    assert torch.specifier.contains("2.13.0+cpu")
    assert torch.specifier.contains("3.1")
    assert "torch" not in re.findall(r"^requires = (.*)$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[0]


LOGS = sorted(ROOT.glob("build/ninja-*/cuda_*.o.log"))


def spills(log: str) -> list[str]:
    """Return the lines of ``ptxas -v`` for kernels with a stack frame or spills, with kernel and target."""
    lines, kernel = [], "?"
    for line in log.splitlines():
        if match := re.search(r"Compiling entry function '(\S+)' for '(\S+)'", line):
            kernel = f"{match[1]} ({match[2]})"
        numbers = re.findall(r"(\d+) bytes (?:stack frame|spill stores|spill loads)", line)
        if any(int(n) for n in numbers):
            lines.append(f"{kernel}: {line.strip()}")
    return lines


def test_spills_are_found_in_a_report() -> None:
    quiet = "ptxas info : Compiling entry function 'k' for 'sm_80'\n    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n"
    assert spills(quiet) == []
    assert spills(quiet.replace("0 bytes spill loads", "16 bytes spill loads")) == [
        "k (sm_80): 0 bytes stack frame, 0 bytes spill stores, 16 bytes spill loads"
    ]


@pytest.mark.skipif(not LOGS, reason="this build has no CUDA kernels")
@pytest.mark.parametrize("log", LOGS, ids=lambda path: path.name)
def test_no_cuda_kernel_spills(log: Path) -> None:
    """Read the compiler's reports of this checkout's build."""
    assert spills(log.read_text()) == []
