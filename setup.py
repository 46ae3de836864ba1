"""Builds ``kdkernels._C``, the compiled row kernels; everything else is in pyproject.toml.

Needs a C++17 compiler (``CXX``, else c++, g++ or clang++), pybind11 and ninja; not torch. Without a compiler the package installs
all the same, in pure Python: ``kdkernels env`` then says what is missing.

CUDA kernels are built where there is an nvcc (``CUDA_HOME``, ``CUDA_PATH`` or ``PATH``; CUDA 12 or newer). No GPU and no driver is
needed to build or to import them, and none is asked.

- ``KDKERNELS_CUDA``: ``auto`` (the default: with nvcc, CUDA and CPU kernels; without, CPU kernels), ``0`` (never), ``1`` (or fail).
- ``KDKERNELS_CUDA_ARCHS``: the GPUs to build for, such as ``"80;90a"``; by default those of ``CUDA_TARGETS`` that nvcc knows.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()

# The CPU row kernels once per instruction set; the processor's best is picked when it runs.
X86_TARGETS = {
    "avx512": "-march=x86-64-v4 -mprefer-vector-width=512",
    "avx2": "-march=x86-64-v3",
    "baseline": "-march=x86-64",
}
TARGETS = X86_TARGETS if platform.machine().lower() in ("x86_64", "amd64") else {"baseline": ""}

# Every .cu file holds machine code for each of these, and the PTX of the newest for GPUs still to come.
CUDA_TARGETS = ("80", "86", "89", "90a", "100", "120")
SECONDS_PER_TARGET = 100  # of one core, measured on a 2.5 GHz server

# Infinities and NaN mean what they mean: no -ffast-math. Loops only become SIMD code if exceptions and errno don't count.
KERNEL_FLAGS = "-O3 -fno-math-errno -fno-trapping-math -ffp-contract=fast -fopenmp-simd"
COMMON_FLAGS = "-std=c++17 -fPIC -fvisibility=hidden -Wall -Wextra"
CUDA_FLAGS = "-std=c++20 -O3 --expt-relaxed-constexpr -ftz=true -prec-div=false -Xcompiler -fPIC,-fvisibility=hidden,-Wall -Xptxas -v"


def find_compiler() -> str | None:
    """The C++ compiler's path, or None."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    return next((path for name in names if (path := shutil.which(name))), None)


@dataclass(frozen=True)
class Cuda:
    """A CUDA compiler and what it builds for: ``("80", "90a")`` is sm_80 and sm_90a."""

    nvcc: str
    targets: tuple[str, ...]

    @property
    def code_flags(self) -> str:
        # PTX of an architecture-specific target ("90a") runs on that target alone: the newest PTX is that of the plain one.
        newest = max(self.targets, key=_generation)
        machine = [f"-gencode arch=compute_{t},code=sm_{t}" for t in self.targets]
        return " ".join([*machine, f"-gencode arch=compute_{_generation(newest)},code=compute_{_generation(newest)}"])

    def announcement(self, cores: int) -> str:
        """Return how long the build takes and how to shorten it."""
        minutes = max(1, round(SECONDS_PER_TARGET * len(self.targets) / cores / 60))
        return (
            f"kdkernels: building CUDA kernels with {self.nvcc} for {', '.join(f'sm_{target}' for target in self.targets)}: "
            f"about {minutes} minute{'s' * (minutes > 1)} on {cores} cores the first time. "
            "KDKERNELS_CUDA=0 skips them; KDKERNELS_CUDA_ARCHS=90a builds for one GPU only"
        )


def find_cuda() -> Cuda | None:
    """Return the CUDA compiler that KDKERNELS_CUDA asks for, or None for CPU kernels only.

    Raises:
        SystemExit: the setting is unknown, cannot be had, or names GPUs that this nvcc does not know.
    """
    wanted = os.environ.get("KDKERNELS_CUDA", "auto")
    if wanted not in ("auto", "0", "1"):
        raise SystemExit(f"kdkernels: KDKERNELS_CUDA is {wanted!r}; it can be auto, 0 or 1")
    homes = [Path(os.environ[name], "bin") for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    nvcc = next((found for path in (*homes, None) if (found := shutil.which("nvcc", path=path))), None) if wanted != "0" else None
    if nvcc is None:
        if wanted == "1":
            raise SystemExit(
                "kdkernels: KDKERNELS_CUDA=1, but there is no nvcc in CUDA_HOME/bin, CUDA_PATH/bin or on PATH: "
                "install the CUDA toolkit (12 or newer), or build without the CUDA kernels (KDKERNELS_CUDA=auto or 0)"
            )
        return None
    known = subprocess.run([nvcc, "--list-gpu-code"], check=True, capture_output=True, text=True).stdout
    generations = {int(number) for number in re.findall(r"sm_(\d+)", known)}
    asked = re.split(r"[;,\s]+", os.environ.get("KDKERNELS_CUDA_ARCHS", "").strip("; ,"))
    if asked == [""]:
        return Cuda(nvcc, tuple(t for t in CUDA_TARGETS if _generation(t) in generations))
    wrong = [t for t in asked if not re.fullmatch(r"\d+[af]?", t) or _generation(t) not in generations]
    if wrong:
        raise SystemExit(
            f"kdkernels: KDKERNELS_CUDA_ARCHS has {', '.join(map(repr, wrong))}; {nvcc} knows {'; '.join(map(str, sorted(generations)))} "
            "(with an a for the features of that generation only, as in 90a)"
        )
    return Cuda(nvcc, tuple(dict.fromkeys(asked)))


def _generation(target: str) -> int:
    return int(target.rstrip("af"))


class NinjaBuild(build_ext):
    """Writes a ninja file and runs it, so that a second build compiles only what changed.

    The objects stay in ``build/``, wherever the frontend would have its temporary files: pip makes a new place for those each time.
    """

    def build_extension(self, ext: Extension) -> None:
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        cuda = find_cuda()
        compiler = find_compiler()
        if compiler is None or sys.platform == "win32":
            missing = "no C++ compiler that is supported here (CXX, c++, g++ or clang++)"
            if os.environ.get("KDKERNELS_CUDA") == "1":
                raise SystemExit(f"kdkernels: KDKERNELS_CUDA=1, but there is {missing}")
            print(f"kdkernels: {missing}; installing without the compiled kernels", file=sys.stderr)
            output.unlink(missing_ok=True)  # left by an earlier build, of other sources perhaps
            return
        if cuda is not None:
            print(cuda.announcement(os.cpu_count() or 1), file=sys.stderr)  # pip shows it with --verbose
        import ninja
        import pybind11

        build = ROOT / "build" / f"ninja-{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        build.mkdir(parents=True, exist_ok=True)
        # One name for headers that an isolated build has somewhere else each time, and no reason to compile again.
        headers = build / "pybind11"
        headers.unlink(missing_ok=True)
        headers.symlink_to(pybind11.get_include())
        for report in build.glob("cuda_*.o.log"):
            source = report.name.removeprefix("cuda_").removesuffix(".o.log")
            if not (ROOT / "csrc" / "cuda" / f"{source}.cu").exists():
                report.unlink()
        (build / "build.ninja").write_text(ninja_file(compiler, cuda))
        try:
            subprocess.run([Path(ninja.BIN_DIR) / "ninja", "-C", build], check=True)
        except subprocess.CalledProcessError:
            hint = "; KDKERNELS_CUDA=0 builds without the CUDA kernels" if cuda else ""
            raise SystemExit(f"kdkernels: the compiled kernels do not build: the errors are above{hint}") from None
        output.parent.mkdir(parents=True, exist_ok=True)
        # Put in place whole: a process may have the old one mapped.
        new = output.with_suffix(".new")
        shutil.copy(build / "_C.so", new)
        new.replace(output)


def ninja_file(compiler: str, cuda: Cuda | None) -> str:
    """The ninja file: an object per source (per source and instruction set for the CPU's row kernels), then ``_C.so``."""
    python = shlex.quote(sysconfig.get_path("include"))
    targets = f" '-DKD_CUDA_TARGETS=\"{';'.join(cuda.targets)}\"'" if cuda else ""
    objects = {
        f"{name}_{isa}.o": ("compile", f"csrc/cpu/{name}.cpp", f"{KERNEL_FLAGS} {flags} -DKD_ISA={isa}")
        for name in ("rows", "heads")
        for isa, flags in TARGETS.items()
    }
    objects["product.o"] = ("compile", "csrc/cpu/product.cpp", "-O3")
    objects["dispatch.o"] = ("compile", "csrc/cpu/dispatch.cpp", "-O2")
    objects["bindings.o"] = ("compile", "csrc/bindings.cpp", f"-O2 -isystem pybind11 -isystem {python}{targets}")
    compiler = shlex.quote(compiler)
    undefined = "-undefined dynamic_lookup" if sys.platform == "darwin" else ""
    extra = os.environ.get("CXXFLAGS", "")
    common = f"-I{shlex.quote(str(ROOT / 'csrc'))}"
    link = f"{compiler} -shared {undefined} {extra} $in -pthread -o $out"
    if cuda:
        common += " -DKD_WITH_CUDA=1"
        nvcc = f"{shlex.quote(cuda.nvcc)} -ccbin {compiler}"
        sources = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
        # Sources are compiled side by side; cores that this leaves idle compile a source for several targets at once.
        threads = max(1, min(len(cuda.targets), (os.cpu_count() or 1) // max(len(sources), 1)))
        for source in sources:
            objects[f"cuda_{source.stem}.o"] = ("cuda", f"csrc/cuda/{source.name}", f"--threads {threads} {cuda.code_flags}")
        # The static runtime looks for the driver when it is first used, so the extension loads where there is none.
        link = f"{nvcc} -shared -cudart static -Xcompiler -pthread $in -o $out"
    lines = [
        "rule compile",
        f"  command = {compiler} {COMMON_FLAGS} {common} $flags {extra} -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {link}",
    ]
    if cuda:
        # What ptxas says of each kernel (registers, spills, shared memory) is kept beside the object, in NAME.o.log.
        lines += [
            "rule cuda",
            f"  command = {nvcc} {CUDA_FLAGS} {common} $flags -MMD -MF $out.d -c $in -o $out > $out.log 2>&1 || {{ cat $out.log; false; }}",
            "  depfile = $out.d",
            "  deps = gcc",
        ]
    for name, (rule, source, flags) in objects.items():
        lines += [f"build {name}: {rule} {_escape(ROOT / source)}", f"  flags = {flags}"]
    lines += [f"build _C.so: link {' '.join(objects)}", ""]
    return "\n".join(lines)


def _escape(path: Path) -> str:
    """A path as ninja wants it."""
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


# Optional: the editable install does not miss the extension where there is no compiler.
setup(ext_modules=[Extension("kdkernels._C", sources=[], optional=True)], cmdclass={"build_ext": NinjaBuild})
