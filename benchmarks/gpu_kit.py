"""Build a kit for a GPU machine without a network, and install it there.

    python -m benchmarks.gpu_kit build gpu-kit          # or make gpu-kit
    python -m benchmarks.gpu_kit install gpu-kit --packages DIR

A kit holds ``_C``, compiled for one Python and one GPU; the Triton kernels that ``benchmarks/run_gpu.sh`` launches, compiled; and wheels.
Triton names a compiled kernel by a hash of its own files, the kernel's source and the launch. ``install`` recomputes the names from the
parts of the hash, so another build of the same Triton version finds the kernels. Build the kit from exactly the commit that runs on the
GPU machine, since the kernels' sources are part of the names.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

ROOT = Path(__file__).parent.parent
LIMIT = 64 << 20
"""Largest size of a kit in bytes, so that it can be sent with a checkout."""

WHEELS = (
    "typer", "shellingham", "rich", "markdown-it-py", "mdurl", "pygments", "pytest", "pluggy", "iniconfig", "packaging", "hypothesis",
    "sortedcontainers", "pytest-xdist", "execnet", "liger-kernel", "trl", "datasets", "dill", "multiprocess", "xxhash",
)  # fmt: skip
"""Small packages that the tests need, and the libraries that the benchmarks compare with."""

TESTS = ("loss", "gradients", "numerics", "semantics", "primitives", "primitives_calls", "sparse", "draws", "ensemble", "chunking")
KERNELS, INDEX, GROUP = "triton.tar.xz", "triton.json", "__grp__"

VERSION = "import sys; print('%d.%d' % sys.version_info[:2])"

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


def _output_of(*command: str) -> str:
    """Return the output of a command."""
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True).stdout.strip()


def _run(*command: str | Path, **environment: str) -> None:
    subprocess.run([str(part) for part in command], check=True, cwd=ROOT, env={**os.environ, **environment})


def _version(python: str) -> str:
    """Return the version of a Python as "3.12".

    Raises:
        SystemExit: it does not run.
    """
    try:
        return _output_of(python, "-c", VERSION)
    except (OSError, subprocess.CalledProcessError):
        message = f"--python {python}: this command does not run. Give the path of a Python of the version that the GPU machine has"
        raise SystemExit(f"{message}, or make gpu-kit GPU_PYTHON=PATH") from None


@app.command()
def build(
    kit: Annotated[Path, typer.Argument(help="Folder for the kit. It must not exist.")],
    python: Annotated[str, typer.Option(help="A Python of the version that the GPU machine has, with its headers.")] = "python3.12",
    arch: Annotated[str, typer.Option(help="The GPU, as for KDKERNELS_CUDA_ARCHS.")] = "90a",
    triton: Annotated[str, typer.Option(help="The version of Triton that the GPU machine has.")] = "3.6.0",
    tests: Annotated[
        bool, typer.Option(help="Compile the kernels of the GPU tests too, minutes, not only those of the benchmarks.")
    ] = True,
) -> None:
    """Build a kit: the extension, the Triton kernels, and wheels."""
    if kit.exists():
        raise SystemExit(f"{kit} exists: remove it, or name another folder")
    about = {"commit": _output_of("git", "rev-parse", "HEAD"), "python": _version(python), "arch": arch, "triton": triton}
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work) / "kit"
        (folder / "wheels").mkdir(parents=True)
        _extension(folder, Path(work), python, arch)
        _wheels(folder / "wheels", about["python"])
        _kernels(folder, Path(work), triton, arch.rstrip("a"), tests)
        (folder / "kit.json").write_text(json.dumps(about, indent=1))
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        if size > LIMIT:
            raise SystemExit(f"the kit has {size >> 20} MiB, and {LIMIT >> 20} MiB is the limit: leave out wheels (WHEELS)")
        shutil.copytree(folder, kit)
    print(f"{kit}: {size / 2**20:.1f} MiB. On the GPU machine: benchmarks/run_gpu.sh --kit {kit}")


def _extension(folder: Path, work: Path, python: str, arch: str) -> None:
    """Build ``_C`` for this Python and GPU into ``folder``."""
    venv = work / "venv"
    _run(python, "-m", "venv", venv)
    pip = (venv / "bin" / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--constraint", "constraints.txt")
    _run(*pip, "setuptools", "pybind11", "ninja")
    _run(
        venv / "bin" / "python", "setup.py", "--quiet", "build_ext", "--build-lib", work / "lib", "--build-temp", work / "temp",
        KDKERNELS_CUDA="1", KDKERNELS_CUDA_ARCHS=arch,
    )  # fmt: skip
    (extension,) = (work / "lib").rglob("_C.*.so")
    shutil.copy(extension, folder)


def _wheels(folder: Path, version: str) -> None:
    platforms = [word for glibc in ("2_17", "2_28", "2_34") for word in ("--platform", f"manylinux_{glibc}_x86_64")]
    _run(
        sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps", "--only-binary=:all:",
        "--python-version", version, *platforms, "--platform", "manylinux2014_x86_64", "--dest", folder, *WHEELS,
    )  # fmt: skip


def _kernels(folder: Path, work: Path, version: str, arch: str, tests: bool) -> None:
    """Compile every launch of the benchmarks and tests with this version of Triton, and pack the machine code."""
    triton_folder = work / "triton"
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps")
    _run(*pip, "--target", triton_folder, f"triton=={version}")
    cache = work / "cache"
    environment = {
        "PYTHONPATH": os.pathsep.join(map(str, (triton_folder, ROOT, ROOT / "tests", ROOT / "tests" / "support"))),
        "TRITON_CACHE_DIR": str(cache),
        "TRITON_STORE_BINARY_ONLY": "1", "TRITON_INTERPRET": "0", "KDKERNELS_RECORD": str(work / "names"), "KDKERNELS_RECORD_ARCH": arch,
    }  # fmt: skip
    _run(sys.executable, "-m", "benchmarks.record_launches", **environment)
    if tests:
        files = [f"tests/fused/test_{name}.py" for name in TESTS]
        subprocess.run(  # failures do not matter: the torch backend computes the results
            [sys.executable, "-m", "pytest", "-q", "-n", "2", "-p", "benchmarks.record_launches", "-p", "no:cacheprovider",
             "-k", "triton-cpu", *files], cwd=ROOT, env={**os.environ, **environment}, stdout=subprocess.DEVNULL, check=False,
        )  # fmt: skip
    names: dict[str, str] = {}
    for path in (work / "names").iterdir():
        names.update(json.loads(path.read_text()))
    print(f"{pack(folder, cache, names)} Triton kernels compiled for sm_{arch} with Triton {version}")


def pack(kit: Path, cache: Path, names: dict[str, str]) -> int:
    """Write the kernels' machine code from ``cache`` into the kit, with the rest of each name's hash. Return their number."""
    index: list[dict[str, Any]] = []
    with tarfile.open(kit / KERNELS, "w:xz") as archive:
        for name, rest in sorted(names.items()):
            files = [path for path in (cache / name).iterdir() if path.suffix in (".cubin", ".json") and not path.name.startswith(GROUP)]
            folder = str(len(index))
            for path in files:
                archive.add(path, f"{folder}/{path.name}")
            index.append({"folder": folder, "rest": rest, "files": sorted(path.name for path in files)})
    (kit / INDEX).write_text(json.dumps(index))
    return len(index)


def unpack(kit: Path, cache: Path) -> int:
    """Write the kit's kernels into ``cache`` under the names that the installed Triton uses. Return their number."""
    index = json.loads((kit / INDEX).read_text())
    with tempfile.TemporaryDirectory() as work:
        with tarfile.open(kit / KERNELS) as archive:
            archive.extractall(work, filter="data")
        for entry in index:
            folder = cache / folder_name(entry["rest"])
            shutil.copytree(Path(work) / entry["folder"], folder, dirs_exist_ok=True)
            (metadata,) = (name for name in entry["files"] if name.endswith(".json"))
            children = {name: str((folder / name).absolute()) for name in entry["files"]}
            (folder / f"{GROUP}{metadata}").write_text(json.dumps({"child_paths": children}))
    return len(index)


def cache_module() -> Any:
    """Return Triton's cache module. Imported here, since building a kit needs no Triton."""
    from triton.runtime import cache

    return cache


def folder_name(rest: str) -> str:
    """Return the name of a compiled kernel's folder in the cache of the installed Triton."""
    digest = hashlib.sha256(f"{cache_module().triton_key()}-{rest}".encode()).digest()
    return base64.b32encode(digest).decode().rstrip("=")


@app.command()
def install(
    kit: Annotated[Path, typer.Argument(help="Folder of the kit.")],
    packages: Annotated[Path, typer.Option(help="Folder for the wheels, to be put on PYTHONPATH, and in `triton` below it the kernels.")],
) -> None:
    """Install a kit: the extension into this checkout, wheels and kernels into a folder."""
    import triton

    about = json.loads((kit / "kit.json").read_text())
    for extension in kit.glob("_C.*.so"):
        shutil.copy(extension, ROOT / "kdkernels")
    packages.mkdir(parents=True, exist_ok=True)
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--upgrade", "--target", str(packages))
    # One by one, so that an incompatible wheel does not stop the others.
    wheels = sorted((kit / "wheels").glob("*.whl"))
    refused = [wheel.name for wheel in wheels if subprocess.run([*pip, str(wheel)], check=False, capture_output=True).returncode]
    if triton.__version__ != about["triton"]:
        print(f"Triton is {triton.__version__} here and {about['triton']} in the kit: its kernels are compiled again")
        return
    kernels = unpack(kit, packages / "triton")
    print(f"installed {kernels} kernels and all but {len(refused)} wheels{': ' * bool(refused)}{', '.join(refused)}")


if __name__ == "__main__":
    app()
