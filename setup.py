"""Builds ``kdkernels._C``, the compiled row kernels; everything else is in pyproject.toml.

Needs a C++17 compiler (``CXX``, else c++, g++ or clang++), pybind11 and ninja; not torch. Without a compiler the package installs
all the same, in pure Python: ``kdkernels env`` then says what is missing.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()

# The CPU row kernel once per instruction set; the processor's best is picked when it runs.
X86_TARGETS = {
    "avx512": "-march=x86-64-v4 -mprefer-vector-width=512",
    "avx2": "-march=x86-64-v3",
    "baseline": "-march=x86-64",
}
TARGETS = X86_TARGETS if platform.machine().lower() in ("x86_64", "amd64") else {"baseline": ""}

# Infinities and NaN mean what they mean: no -ffast-math. Loops only become SIMD code if exceptions and errno don't count.
KERNEL_FLAGS = "-O3 -fno-math-errno -fno-trapping-math -ffp-contract=fast -fopenmp-simd"
COMMON_FLAGS = "-std=c++17 -fPIC -fvisibility=hidden -Wall -Wextra"


def find_compiler() -> str | None:
    """The C++ compiler's path, or None."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    return next((path for name in names if (path := shutil.which(name))), None)


class NinjaBuild(build_ext):
    """Writes a ninja file and runs it, so that a second build compiles only what changed."""

    def build_extension(self, ext: Extension) -> None:
        compiler = find_compiler()
        if compiler is None or sys.platform == "win32":
            print("kdkernels: no C++ compiler that is supported here; installing without the compiled kernels", file=sys.stderr)
            return
        import ninja
        import pybind11

        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        output.parent.mkdir(parents=True, exist_ok=True)
        includes = " ".join(f"-I{path}" for path in (pybind11.get_include(), sysconfig.get_path("include")))
        objects = {f"rows_{isa}.o": ("csrc/cpu/rows.cpp", f"{KERNEL_FLAGS} {flags} -DKD_ISA={isa}") for isa, flags in TARGETS.items()}
        objects["dispatch.o"] = ("csrc/cpu/dispatch.cpp", "-O2")
        objects["bindings.o"] = ("csrc/bindings.cpp", f"-O2 {includes}")
        extra = os.environ.get("CXXFLAGS", "")
        undefined = "-undefined dynamic_lookup" if sys.platform == "darwin" else ""
        lines = [
            "rule compile",
            f"  command = {compiler} {COMMON_FLAGS} $flags {extra} -MMD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule link",
            f"  command = {compiler} -shared {undefined} {extra} $in -pthread -o $out",
        ]
        for name, (source, flags) in objects.items():
            lines += [f"build {name}: compile {_escape(ROOT / source)}", f"  flags = {flags}"]
        lines += [f"build {_escape(output)}: link {' '.join(objects)}", ""]
        (build / "build.ninja").write_text("\n".join(lines))
        subprocess.run([Path(ninja.BIN_DIR) / "ninja", "-C", build], check=True)


def _escape(path: Path) -> str:
    """A path as ninja wants it."""
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


setup(ext_modules=[Extension("kdkernels._C", sources=[])], cmdclass={"build_ext": NinjaBuild})
