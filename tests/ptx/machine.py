"""Runs a grid of thread blocks (CTAs), a warp of each at a time, on numpy arrays of their lanes.

A *wave* is one warp of every CTA, 32 lanes each. Waves run one after the other, each to its next barrier or end: which of its warps a
CTA contributes to which wave is the order in which its warps run. Lanes that diverge run one branch after the other and meet again.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from .memory import Memory
from .opcodes import RAW, Lanes, Operation, UnknownOpcodeError, dtype, operation
from .program import BITS, Instruction, Program

WARP = 32
Mask: TypeAlias = "npt.NDArray[np.bool_] | None"
Step: TypeAlias = "Callable[[Wave, Mask], None]"
Order: TypeAlias = "Callable[[int, int], Sequence[int]]"
"""The order in which CTA number i runs its n warps."""


class MachineError(AssertionError):
    """Code that a GPU would hang on, or for which the manual promises nothing."""


def mixed_orders(cta: int, warps: int) -> Sequence[int]:
    """Forwards in the first CTA, backwards in the second, shuffled in the third, and so on."""
    if cta % 3 == 0:
        return range(warps)
    if cta % 3 == 1:
        return range(warps - 1, -1, -1)
    return random.Random(cta).sample(range(warps), warps)


class Registers(dict[str, Lanes]):
    """Raw bits by name; all ones until they are written."""

    def __init__(self, program: Program, lanes: int) -> None:
        super().__init__()
        self._program, self._lanes = program, lanes

    def __missing__(self, name: str) -> Lanes:
        return np.invert(np.zeros(self._lanes, RAW[self._program.bits(name)]))


class Wave:
    """One warp of every CTA: registers of all their lanes, and where each lane is."""

    def __init__(self, grid: Grid, warps: Sequence[int]) -> None:
        self.grid = grid
        ctas = len(warps)
        lanes = ctas * WARP
        self.registers = Registers(grid.program, lanes)
        cta = np.repeat(np.arange(ctas), WARP)
        warp = np.repeat(np.asarray(warps), WARP)
        self.warps = cta * 64 + warp  # as memory.py numbers them
        self.shared_base = cta * grid.shared_bytes
        self.special = {
            "%tid.x": (warp * WARP + np.arange(lanes) % WARP).astype(np.uint32),
            "%ctaid.x": cta.astype(np.uint32),
            "%laneid": (np.arange(lanes) % WARP).astype(np.uint32),
            "%ntid.x": np.full(lanes, grid.program.threads, np.uint32),
            "%nctaid.x": np.full(lanes, ctas, np.uint32),
        }
        for name in ("%tid.y", "%tid.z", "%ctaid.y", "%ctaid.z"):
            self.special[name] = np.zeros(lanes, np.uint32)
        self.position = np.zeros(lanes, np.int64)
        self.waiting = np.zeros(lanes, bool)
        self.ended = np.zeros(lanes, bool)
        self.epochs = np.zeros(lanes, np.int64)

    def put(self, name: str, value: Lanes, mask: Mask) -> None:
        """Write a register; lanes beyond the mask keep theirs."""
        lanes = len(self.position)
        if value.dtype != bool:
            value = np.ascontiguousarray(value).view(RAW[8 * value.itemsize])
        if len(value) != lanes:
            value = np.broadcast_to(value, (lanes,))
        if mask is not None:
            value = np.where(mask, value, self.registers[name])
        self.registers[name] = value

    def run(self) -> None:
        """Run until every lane waits at a barrier or has ended."""
        code, joins = self.grid.code, self.grid.joins
        while True:
            running = ~(self.waiting | self.ended)
            places = self.position[running]
            if not places.size:
                return
            free = places[~joins[places]]  # lanes at an instruction of a whole warp wait for the warp's others
            pc = int((free if free.size else places).min())
            active = running & (self.position == pc)
            beyond = places[places > pc]
            stop = int(beyond.min()) if beyond.size else len(code)
            mask = None if active.all() else active
            jump, step = code[pc]
            while jump is None:
                assert step is not None
                step(self, mask)
                pc += 1
                if pc >= stop or (mask is not None and joins[pc]):
                    break
                jump, step = code[pc]
            if jump is None:
                self.position[active] = pc
            else:
                self._control(jump, pc, active)

    def _control(self, instruction: Instruction, pc: int, active: npt.NDArray[np.bool_]) -> None:
        self.position[active] = pc + 1
        taken = active
        if instruction.predicate is not None:
            taken = active & (self.registers[instruction.predicate] ^ instruction.negated)
        name = instruction.opcode.split(".")[0]
        if name == "bra":
            self.position[taken] = self.grid.program.labels[instruction.operands[0]]
        elif name == "bar" or name == "barrier":
            self.whole_warps(taken, instruction.opcode)
            self.waiting |= taken
        else:
            self.ended |= taken

    def whole_warps(self, mask: Mask, opcode: str) -> None:
        """Insist on warps of which every lane takes part or none."""
        if mask is not None:
            counts = mask.reshape(-1, WARP).sum(1)
            if ((counts != 0) & (counts != WARP)).any():
                raise MachineError(f"{opcode}: only some lanes of a warp arrive")


class Grid:
    """A launch: ``arguments`` are the bytes of each parameter.

    Args:
        memory: global memory, already filled.
        shared_bytes: of each CTA.
        order: in which each CTA runs its warps.
    """

    def __init__(
        self, program: Program, ctas: int, arguments: Sequence[bytes], memory: Memory, shared_bytes: int, order: Order = mixed_orders
    ) -> None:
        if len(arguments) != len(program.parameters):
            raise ValueError(f"{program.name} takes {len(program.parameters)} parameters, not {len(arguments)}")
        self.program, self.memory = program, memory
        self.arguments = {name: value for (_, name), value in zip(program.parameters, arguments, strict=True)}
        self.shared_bytes = -(-shared_bytes // 64) * 64 + 64  # never-allowed bytes between two CTAs
        self.shared = Memory(ctas * self.shared_bytes, "shared")
        self.shared.allowed.reshape(ctas, -1)[:, :shared_bytes] = True
        self.code, self.joins = _decoded(program)
        warps = program.threads // WARP
        orders = [order(cta, warps) for cta in range(ctas)]
        self.waves = [Wave(self, [chosen[place] for chosen in orders]) for place in range(warps)]

    def run(self) -> None:
        """Run every CTA to its end."""
        with np.errstate(all="ignore"):
            while True:
                for wave in self.waves:
                    wave.run()
                waiting = np.array([wave.waiting[::WARP] for wave in self.waves])  # [warps, ctas]
                if not waiting.any():
                    return
                released = waiting.all(0)
                if not released.any():
                    raise MachineError("some warps wait at a barrier that others of their CTA never reach")
                lanes = np.repeat(released, WARP)
                for wave in self.waves:
                    wave.waiting &= ~lanes
                    wave.epochs = wave.epochs + lanes


# ---- instructions as functions of a wave

_CONTROL = re.compile(r"bra(?:\.uni)?|ret|exit|(?:bar|barrier)\.sync(?:\.aligned)?")
_WHOLE_WARP = re.compile(r"shfl\.sync\..*|redux\.sync\..*|(?:ld|st)matrix\..*|bar\.warp\.sync|(?:bar|barrier)\.sync(?:\.aligned)?")
_ACCESS = re.compile(r"(ld|st)(?:\.(?:volatile|relaxed|weak))?\.(global|shared)(?:::cta)?(?:\.L\w+::\w+)*(?:\.v([24]))?\.([busf]\d+)")
_MATRIX = re.compile(r"(ld|st)matrix\.sync\.aligned\.m8n8\.x([124])(\.trans)?\.shared\.b16")
_PARAM = re.compile(r"ld\.param\.([busf]\d+)")
_ADDRESS = re.compile(r"\[\s*([%$\w]+)\s*(?:\+\s*(-?\w+)\s*)?\]")


@lru_cache(maxsize=64)
def _decoded(program: Program) -> tuple[list[tuple[Instruction | None, Step | None]], npt.NDArray[np.bool_]]:
    """For each instruction itself if it moves lanes, else its step; and which ones a whole warp must reach together."""
    code: list[tuple[Instruction | None, Step | None]] = []
    for instruction in program.code:
        if _CONTROL.fullmatch(instruction.opcode):
            code.append((instruction, None))
        else:
            code.append((None, _predicated(instruction, _step(program, instruction))))
    joins = [_WHOLE_WARP.fullmatch(i.opcode) is not None for i in program.code]
    return code, np.array([*joins, False])


def _predicated(instruction: Instruction, step: Step) -> Step:
    predicate, negated = instruction.predicate, instruction.negated
    if predicate is None:
        return step

    def run(wave: Wave, mask: Mask) -> None:
        taken = wave.registers[predicate]
        if negated:
            taken = ~taken
        if mask is not None:
            taken = taken & mask
        if taken.all():
            step(wave, None)
        elif taken.any():
            step(wave, taken)

    return run


def _step(program: Program, instruction: Instruction) -> Step:
    opcode, operands = instruction.opcode, instruction.operands
    if access := _ACCESS.fullmatch(opcode):
        name, space, count, kind = access.groups()
        return _memory_step(program, opcode, name == "ld", space, int(count or 1), kind, operands)
    if matrix := _MATRIX.fullmatch(opcode):
        name, count, transposed = matrix.groups()
        return _matrix_step(program, opcode, name == "ld", int(count), bool(transposed), operands)
    if parameter := _PARAM.fullmatch(opcode):
        return _parameter_step(program, parameter.group(1), operands)
    if re.fullmatch(r"mov\.b\d+", opcode) and "{" in "".join(operands):
        return _vector_move(program, BITS[opcode.split(".")[1]], operands)
    if opcode == "shfl.sync.bfly.b32":
        return _butterfly(program, opcode, operands)
    if match := re.fullmatch(r"redux\.sync\.(min|max|add|and|or|xor)\.([bsu]32)", opcode):
        return _warp_reduction(program, opcode, match.group(1), match.group(2), operands)
    if opcode in ("bar.warp.sync", "fence.acq_rel.cta", "membar.cta"):
        return lambda wave, mask: wave.whole_warps(mask, opcode) if "warp" in opcode else None
    return _arithmetic(program, operation(opcode), operands)


def _arithmetic(program: Program, what: Operation, operands: Sequence[str]) -> Step:
    target, *sources = operands
    if len(sources) != len(what.sources):
        raise UnknownOpcodeError(f"expected {len(what.sources)} operands, not {sources}")
    read = [_source(program, text, kind) for text, kind in zip(sources, what.sources, strict=True)]
    apply, widen = what.apply, _widened(program, target, what.result)
    if len(read) == 1:
        (only,) = read
        return lambda wave, mask: wave.put(target, widen(apply(only(wave))), mask)
    if len(read) == 2:
        first, second = read
        return lambda wave, mask: wave.put(target, widen(apply(first(wave), second(wave))), mask)
    return lambda wave, mask: wave.put(target, widen(apply(*(source(wave) for source in read))), mask)


def _widened(program: Program, register: str, kind: str) -> Callable[[Lanes], Lanes]:
    """Sign- or zero-extends a value to a register that is wider than its type."""
    if program.bits(register) == BITS[kind]:
        return lambda value: value
    wide = dtype(("s" if kind[0] == "s" else "u") + str(program.bits(register)))
    narrow = dtype(kind if kind[0] == "s" else "u" + str(BITS[kind]))
    return lambda value: value.view(narrow).astype(wide)


def _constant(text: str, kind: str) -> Lanes | None:
    """An immediate as an array of one."""
    bits = BITS[kind]
    if number := re.fullmatch(r"0[fFdD]([0-9a-fA-F]+)", text):
        return np.array([int(number.group(1), 16)], RAW[bits]).view(dtype(kind))
    if re.fullmatch(r"-?(?:0x[0-9a-fA-F]+|\d+)U?", text):
        value = int(text.rstrip("U"), 0)
        return np.array([value != 0]) if kind == "pred" else np.array([value & (2**bits - 1)], RAW[bits]).view(dtype(kind))
    return None


def _source(program: Program, text: str, kind: str) -> Callable[[Wave], Lanes]:
    """Reads an operand as lanes of a type."""
    if (value := _constant(text, kind)) is not None:
        return lambda wave: value
    view = dtype(kind)
    if re.fullmatch(r"%(?:n?tid|n?ctaid)\.[xyz]|%laneid", text):
        return lambda wave: wave.special[text].astype(RAW[BITS[kind]]).view(view)
    if not text.lstrip("!").startswith("%"):  # a variable in shared memory, of which Triton has one
        start = np.zeros(1, view)
        return lambda wave: start
    if text.startswith("!"):
        inverted = text[1:]
        return lambda wave: ~wave.registers[inverted]
    if kind == "pred":
        return lambda wave: wave.registers[text]
    if program.bits(text) == BITS[kind]:
        return lambda wave: wave.registers[text].view(view)
    narrow = RAW[BITS[kind]]
    return lambda wave: wave.registers[text].astype(narrow).view(view)


def _names(vector: str) -> list[str]:
    return [name.strip() for name in vector.strip("{} ").split(",")]


def _memory_step(program: Program, opcode: str, load: bool, space: str, count: int, kind: str, operands: Sequence[str]) -> Step:
    data, address = operands if load else reversed(operands)
    place, shared = _address(program, address), space == "shared"
    names, width = _names(data), BITS[kind] // 8
    if len(names) != count:
        raise UnknownOpcodeError(f"{opcode}: {len(names)} registers")
    values = [] if load else [_source(program, name, f"b{8 * width}") for name in names]
    widen = [_widened(program, name, kind) for name in names] if load else []

    def run(wave: Wave, mask: Mask) -> None:
        at, memory = place(wave), wave.grid.memory
        if shared:
            at, memory = at + wave.shared_base, wave.grid.shared
        warps, epochs = wave.warps, wave.epochs
        if mask is not None:
            at, warps, epochs = at[mask], warps[mask], epochs[mask]
        if load:
            for name, extend, value in zip(names, widen, memory.load(at, width, count, warps, epochs, opcode), strict=True):
                wave.put(name, extend(_spread(value, mask)), mask)
        else:
            written = [np.broadcast_to(value(wave), wave.position.shape) for value in values]
            memory.store(at, written if mask is None else [value[mask] for value in written], warps, epochs, opcode)

    return run


def _address(program: Program, text: str) -> Callable[[Wave], Lanes]:
    """Lanes of ``[register + offset]``."""
    place = _ADDRESS.fullmatch(text)
    if place is None:
        raise UnknownOpcodeError(f"expected an address, not {text!r}")
    name, offset = place.group(1), np.int64(int(place.group(2) or "0", 0))
    base = _source(program, name, "s64" if name.startswith("%") and program.bits(name) == 64 else "u32")
    return lambda wave: np.broadcast_to(base(wave), wave.position.shape).astype(np.int64) + offset


def _matrix_step(program: Program, opcode: str, load: bool, count: int, transposed: bool, operands: Sequence[str]) -> Step:
    """Matrices of 8 x 8 16-bit elements in shared memory; lane 8 i + r has the address of row r of matrix i.

    Register i of lane 4 r + c holds elements 2 c and 2 c + 1 of row r of matrix i; of column r if ``transposed``.
    """
    data, address = operands if load else reversed(operands)
    place, names = _address(program, address), _names(data)
    row, column = np.arange(WARP) // 4, np.arange(WARP) % 4
    sources = [] if load else [_source(program, name, "b32") for name in names]

    def run(wave: Wave, mask: Mask) -> None:
        wave.whole_warps(mask, opcode)
        chosen = np.ones(len(wave.position), bool) if mask is None else mask
        rows = (place(wave) + wave.shared_base).reshape(-1, WARP)
        warps, epochs = wave.warps[chosen], wave.epochs[chosen]
        for i, name in enumerate(names):
            wave.grid.shared.check(rows[chosen[::WARP], 8 * i : 8 * i + 8].ravel(), 16, opcode)
            halves = []
            for half in (0, 1):
                at = rows[:, 8 * i + 2 * column + half] + 2 * row if transposed else rows[:, 8 * i + row] + 4 * column + 2 * half
                at = at.ravel()[chosen]
                if load:
                    halves.append(_spread(wave.grid.shared.load(at, 2, 1, warps, epochs, opcode)[0], chosen))
                else:
                    value = (sources[i](wave) >> np.uint32(16 * half)).astype(np.uint16)
                    wave.grid.shared.store(at, [value[chosen]], warps, epochs, opcode)
            if load:
                wave.put(name, np.stack(halves, 1).view(np.uint32)[:, 0], mask)

    return run


def _spread(values: Lanes, mask: Mask) -> Lanes:
    """Values of the lanes of a mask in their places."""
    if mask is None:
        return values
    spread = np.zeros(len(mask), values.dtype)
    spread[mask] = values
    return spread


def _parameter_step(program: Program, kind: str, operands: Sequence[str]) -> Step:
    target, address = operands
    name, widen = address.strip("[] "), _widened(program, target, kind)

    def run(wave: Wave, mask: Mask) -> None:
        wave.put(target, widen(np.frombuffer(wave.grid.arguments[name], dtype(kind), 1)), mask)

    return run


def _vector_move(program: Program, bits: int, operands: Sequence[str]) -> Step:
    """``mov`` between a register and the two or four that its bits make."""
    target, source = operands
    names = _names(target if target.startswith("{") else source)
    part = RAW[bits // len(names)]
    if target.startswith("{"):
        whole = _source(program, source, f"b{bits}")

        def unpack(wave: Wave, mask: Mask) -> None:
            parts = np.ascontiguousarray(whole(wave)).view(part).reshape(-1, len(names))
            for k, name in enumerate(names):
                if name != "_":
                    wave.put(name, parts[:, k], mask)

        return unpack
    reads = [_source(program, name, f"b{bits // len(names)}") for name in names]

    def pack(wave: Wave, mask: Mask) -> None:
        parts = [np.broadcast_to(read(wave), wave.position.shape) for read in reads]
        wave.put(target, np.stack(parts, 1).view(RAW[bits])[:, 0], mask)

    return pack


def _butterfly(program: Program, opcode: str, operands: Sequence[str]) -> Step:
    """Each lane takes the value of the lane whose number differs by a mask of bits; only whole warps exchange."""
    target = operands[0].split("|")[0]
    value, distance = _source(program, operands[1], "b32"), int(operands[2], 0)
    if operands[3:] != ("31", "-1"):
        raise UnknownOpcodeError(f"{opcode}: only among all 32 lanes, not {operands[3:]}")

    def run(wave: Wave, mask: Mask) -> None:
        wave.whole_warps(mask, opcode)
        lanes = np.arange(len(wave.position))
        wave.put(target, np.broadcast_to(value(wave), lanes.shape)[lanes ^ distance], mask)

    return run


_REDUCTIONS: dict[str, Any] = {
    "min": np.minimum, "max": np.maximum, "add": np.add, "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
}  # fmt: skip


def _warp_reduction(program: Program, opcode: str, name: str, kind: str, operands: Sequence[str]) -> Step:
    target, value = operands[0], _source(program, operands[1], kind)

    def run(wave: Wave, mask: Mask) -> None:
        wave.whole_warps(mask, opcode)
        lanes = np.broadcast_to(value(wave), wave.position.shape).reshape(-1, WARP)
        reduced = _REDUCTIONS[name].reduce(lanes, axis=1, dtype=lanes.dtype)
        wave.put(target, np.repeat(reduced, WARP), mask)

    return run
