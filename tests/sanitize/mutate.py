"""Breaks a copy of csrc in one place at a time; each time, a run of ``make asan``, ``tsan`` or ``guard`` has to fail.

python mutate.py [PATTERN]     after `make sanitize`: what a mutant does not change is not compiled again
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
BUILDS = HERE.parents[1] / "build"
BUILT = {"asan": [BUILDS / "sanitize/asan"], "tsan": [BUILDS / "sanitize/tsan"], "guard": list(BUILDS.glob("ninja-*"))}


@dataclass(frozen=True)
class Mutant:
    """One replacement in ``file``, which must occur there; ``expected`` (a pattern) must be in what the failing run prints."""

    name: str
    file: str
    old: str
    new: str
    expected: str
    run: str = "asan"


ROWS, HEADS, COLUMNS, PRODUCT, THREADS = "cpu/rows.cpp", "cpu/heads.cpp", "cpu/columns.h", "cpu/product.cpp", "cpu/threads.h"
READ_ROW, READ_MORE = (f"v {less} vocab; ++v) z[v] = Real(widen(source[v]));" for less in ("<", "<="))
WRITE_ROW, WRITE_MORE = (f"v {less} vocab; ++v) to[v] = narrow<T>(f(v));" for less in ("<", "<="))
BLOCKS = (
    "start < vocab; start += kBlock{}) {{\n        const int64_t stop = start + kBlock < vocab ? start + kBlock : vocab;\n        Real part"
)
PLAIN_COUNTER = "struct { int64_t n = 0; int64_t fetch_add(int64_t k, std::memory_order) { return (n += k) - k; } } next;"
MUTANTS = [
    Mutant("a column past the row is read", COLUMNS, READ_ROW, READ_MORE, "AddressSanitizer"),
    Mutant("the same, by the vector code that is released", COLUMNS, READ_ROW, READ_MORE, "Segmentation fault", "guard"),
    Mutant("the bias is read one further", COLUMNS, "+ bias[v])", "+ bias[v + 1])", "AddressSanitizer|AssertionError"),
    Mutant("a column past the gradient's row is written", COLUMNS, WRITE_ROW, WRITE_MORE, "AddressSanitizer"),
    Mutant("a statistic is written one row too far", ROWS, "stats[4 * a.stats_stride]", "stats[5 * a.stats_stride]", "AddressSanitizer"),
    Mutant("rows are taken to lie closer", COLUMNS, "+ row * side.stride", "+ row * vocab", "AddressSanitizer|AssertionError"),
    Mutant("the label is off by one", ROWS, ": s.z[label];", ": s.z[label + 1];", "AssertionError"),
    Mutant("sums leave out a column per block", COLUMNS, BLOCKS.format(""), BLOCKS.format(" + 1"), "AssertionError"),
    Mutant("scratch rows are too short", "cpu/rows.h", "(vocab + 15) / 16 * 16", "vocab / 16 * 16", "AddressSanitizer|AssertionError"),
    Mutant("log-probabilities go one too far", HEADS, "num_ids + k] = ids", "num_ids + k + 1] = ids", "AddressSanitizer"),
    Mutant("the largest are looked for one block short", HEADS, "/ kTopBlock, k = heap", "/ kTopBlock - 1, k = heap", "Assertion"),
    Mutant("among equals the last is the largest", HEADS, "} else if (v > value[0]) {", "} else if (v >= value[0]) {", "Assertion"),
    Mutant("draws go one too far", HEADS, "d < a.num_draws; ++d)", "d <= a.num_draws; ++d)", "AddressSanitizer"),
    Mutant("a gradient at an id is not added", HEADS, "g[ids[k]] += d_logprobs[k]", "g[ids[k]] = d_logprobs[k]", "AssertionError"),
    Mutant("a head's scratch is too short", "cpu/rows.h", "/ 32 + 1 + a.num_top", "/ 32 + a.num_top", "AddressSanitizer"),
    Mutant("softmax's gradient is of the logarithm", HEADS, "x[v] * (d[v] - mean)", "(d[v] - mean)", "AssertionError"),
    Mutant("a product is written too far", PRODUCT, "(columns - j * kLanes, 0", "(columns + 1 - j * kLanes, 0", "written between"),
    Mutant("a product reads one row too far", PRODUCT, "(j + i, columns - 1)", "(j + i, columns)", "AddressSanitizer"),
    Mutant("a deep product keeps its last part", PRODUCT, "kColumns, from > 0)", "kColumns, false)", "AssertionError"),
    Mutant("one row too many is handed out", THREADS, ") < items;)", ") <= items;)", "AddressSanitizer"),
    Mutant("signed numbers overflow", COLUMNS, "uint32_t(x.bits) << 16", "int32_t(x.bits) * 65536", "signed integer overflow"),
    Mutant("threads share their scratch", THREADS, "scratch[i].get()", "scratch[0].get()", "data race", "tsan"),
    Mutant("rows are counted without an atomic", THREADS, "std::atomic<int64_t> next{0};", PLAIN_COUNTER, "data race", "tsan"),
]


def fault(mutant: Mutant, folder: Path) -> str | None:
    """Return the failure of the checks, or None if they detected the mutant."""
    csrc, build = folder / "csrc", folder / "build" / mutant.run
    shutil.copytree(CSRC, csrc)
    source = csrc / mutant.file
    text = source.read_text()
    if mutant.old not in text:
        return f"{mutant.file} has no {mutant.old!r} any more: correct the mutant"
    source.write_text(text.replace(mutant.old, mutant.new))
    # Objects that are the same without it, newer than every source. Of the row kernels, one instruction set is changed.
    rows, heads = {"rows_baseline.o"}, {"heads_baseline.o"}
    threads = {"dispatch.o", "product.o"}
    of = {THREADS: threads, PRODUCT: {"product.o"}, ROWS: rows, HEADS: heads, COLUMNS: rows | heads}
    changed = of.get(mutant.file, threads | rows | heads)
    # The released bindings may want CUDA kernels.
    same = ("rows_*.o", "heads_*.o", "product.o", "dispatch.o") if mutant.run == "guard" else ("*.o",)
    build.mkdir(parents=True)
    for found in (path for pattern in same for where in BUILT[mutant.run] for path in where.glob(pattern)):
        if found.name not in changed:
            shutil.copy(found, build)
    command = ["make", "-s", mutant.run, f"CSRC={csrc}", f"BUILD={build.parent}", f"PYTHON={sys.executable}"]
    if mutant.run == "guard":
        command.append(f"EXTENSION={build / '_C.so'}")
    result = subprocess.run(command, cwd=HERE, capture_output=True, text=True, timeout=600)
    output = result.stdout + result.stderr
    if result.returncode == 0:
        return "nothing noticed it"
    if not re.search(mutant.expected, output):
        return f"it failed otherwise than by {mutant.expected!r}:\n{output[-3000:]}"
    return None


def main() -> None:
    wanted = re.compile(sys.argv[1] if len(sys.argv) > 1 else "")
    faults = 0
    for mutant in (m for m in MUTANTS if wanted.search(m.name)):
        with tempfile.TemporaryDirectory() as folder:
            wrong = fault(mutant, Path(folder))
        print(f"{mutant.run:5} {mutant.name}: {wrong or 'noticed'}", flush=True)
        faults += wrong is not None
    sys.exit(f"{faults} of the mutants were not noticed as they should be" if faults else 0)


if __name__ == "__main__":
    main()
