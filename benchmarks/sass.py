"""Count the instructions of loops in NVIDIA machine code, by the pipe that executes them.

The pipes are Hopper's, from the throughput table of the CUDA programming guide. Of the 128 lanes that a multiprocessor issues a cycle, FMA
can take all, ALU (integers, comparisons, conversions) a half, LSU (loads, stores, shuffles) a quarter, XU (exponentials, logarithms) an
eighth.
"""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_PIPES = {
    "FMA": "FFMA FMUL FADD HFMA2 HADD2 HMUL2 FFMA2 FADD2 FMUL2 IMAD",
    "XU": "MUFU POPC FLO BREV F2I I2F",
    "LSU": "LDG STG LDS STS SHFL LD ST LDL STL LDSM STSM LDC ATOM ATOMS ATOMG RED REDUX",
    "control": "BRA BAR EXIT BSSY BSYNC WARPSYNC NOP CALL RET BREAK SYNCS DEPBAR MEMBAR FENCE ERRBAR",
}
_PIPE_OF = {name: pipe for pipe, names in _PIPES.items() for name in names.split()}

_FUNCTION = re.compile(r"^\s*Function : (\S+)")
_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][A-Z0-9_.]*)\s*([^;]*);")
_RESOURCES = re.compile(r"Function (\S+):\s*\n\s*(REG:.*)")


@dataclass(frozen=True)
class Instruction:
    address: int
    opcode: str
    arguments: str
    predicate: str | None

    @property
    def name(self) -> str:
        return self.opcode.split(".")[0]

    @property
    def pipe(self) -> str:
        return "uniform" if self.name.startswith("U") else _PIPE_OF.get(self.name, "ALU")

    @property
    def target(self) -> int | None:
        """Return the target address of a branch."""
        address = re.search(r"0x([0-9a-f]+)\s*$", self.arguments) if self.name == "BRA" else None
        return int(address.group(1), 16) if address else None

    @property
    def conditional(self) -> bool:
        return self.predicate is not None or "," in self.arguments

    @property
    def loaded_bytes(self) -> int:
        """Return the bytes that a lane loads from global or shared memory."""
        if self.name not in ("LDG", "LDS", "LD"):
            return 0
        sizes = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
        return next((sizes[part] for part in self.opcode.split(".") if part in sizes), 4)


@dataclass(frozen=True)
class Turn:
    """Requirements for the path of one turn through a loop. The shortest path that meets them is counted.

    This excludes branches for disabled features, rare cases and incomplete vectors.
    """

    load: str
    """Opcode of the 16-byte loads: LDG or LDS."""
    loaded: int
    """Exact number of bytes that a lane loads with them."""
    transcendental: int = 0
    """Smallest number of exponentials and logarithms."""
    stores: bool = False
    """True if the path must store a vector of 8 or 16 bytes to global memory."""


def pipes(code: Sequence[Instruction]) -> Counter[str]:
    return Counter(instruction.pipe for instruction in code)


def disassemble(binary: Path, cuobjdump: Path, functions: Sequence[str] = (), arch: str | None = None) -> dict[str, list[Instruction]]:
    """Return the code of kernels (all, or ``functions``) in a cubin or library, by name."""
    command = [str(cuobjdump), "-sass", *(["-arch", arch] if arch else []), *(["-fun", ",".join(functions)] if functions else [])]
    out = subprocess.run([*command, str(binary)], capture_output=True, text=True, check=True).stdout
    return parse(out)


def resources(binary: Path, cuobjdump: Path, arch: str | None = None) -> dict[str, dict[str, int]]:
    """Return the registers (REG), spills (STACK), local (LOCAL) and shared memory (SHARED) of each kernel, by name."""
    command = [str(cuobjdump), "--dump-resource-usage", *(["-arch", arch] if arch else []), str(binary)]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    numbers = {name: re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", line) for name, line in _RESOURCES.findall(out)}
    return {name: {key: int(value) for key, value in pairs} for name, pairs in numbers.items()}


def parse(text: str) -> dict[str, list[Instruction]]:
    """Parse the output of ``cuobjdump -sass``."""
    functions: dict[str, list[Instruction]] = {}
    code: list[Instruction] = []
    for line in text.splitlines():
        if "/*" in line:
            if match := _INSTRUCTION.match(line):
                address, predicate, opcode, arguments = match.groups()
                code.append(Instruction(int(address, 16), opcode, arguments.strip(), predicate))
        elif match := _FUNCTION.match(line):
            code = functions.setdefault(match.group(1), [])
    return functions


def loops(code: Sequence[Instruction]) -> list[list[Instruction]]:
    """Return the innermost loops, in the order of the code."""
    index_at = {instruction.address: index for index, instruction in enumerate(code)}
    spans: dict[int, int] = {}
    for index, instruction in enumerate(code):
        start = index_at.get(instruction.target) if instruction.target is not None else None
        if start is not None and start <= index:
            spans[start] = max(index, spans.get(start, 0))
    innermost = [
        (start, stop)
        for start, stop in sorted(spans.items())
        if not any(start <= a and b <= stop for a, b in spans.items() if (a, b) != (start, stop))
    ]
    return [list(code[start : stop + 1]) for start, stop in innermost]


_Done = tuple[int, int, bool]  # bytes loaded, transcendentals (up to the wanted number), stored


def shortest(loop: Sequence[Instruction], turn: Turn) -> list[Instruction] | None:
    """Return the shortest path from a loop's first to its last instruction that meets the requirements, or None.

    Jumps inside a loop go forward, so one pass in the order of the code finds the shortest path to each instruction.
    """
    index_at = {instruction.address: index for index, instruction in enumerate(loop)}
    best: list[dict[_Done, tuple[int, int, _Done | None]]] = [{} for _ in loop]  # done -> (instructions, from, done there)
    best[0][0, 0, False] = (0, -1, None)
    for index, instruction in enumerate(loop[:-1]):
        load = 16 if instruction.name == turn.load and "128" in instruction.opcode else 0
        stored = instruction.name == "STG" and ("128" in instruction.opcode or ".64" in instruction.opcode)
        target = index_at.get(instruction.target) if instruction.target is not None else None
        ends = instruction.name in ("EXIT", "RET", "BRA") and not instruction.conditional
        reachable = ([] if ends else [index + 1]) + ([target] if target is not None and target > index else [])
        for (loaded, computed, has_stored), (count, _, _) in best[index].items():
            if loaded + load > turn.loaded:
                continue
            after = (loaded + load, min(turn.transcendental, computed + (instruction.name == "MUFU")), has_stored or stored)
            for place in reachable:
                if after not in best[place] or count + 1 < best[place][after][0]:
                    best[place][after] = (count + 1, index, (loaded, computed, has_stored))
    complete = [done for done in best[-1] if done[0] == turn.loaded and done[1] == turn.transcendental and done[2] >= turn.stores]
    if not complete:
        return None
    place, done = len(loop) - 1, min(complete, key=lambda done: best[-1][done][0])
    path = [loop[-1]]
    while place > 0:
        _, place, earlier = best[place][done]
        assert earlier is not None
        done = earlier
        path.append(loop[place])
    return path[::-1]
