"""A machine that runs a program of PTX: all its warps in step, an instruction at a time, lanes as numpy arrays.

Warps in step need no barrier, and what would race between them does not: that is not found here. Where lanes part, :class:`NotImplementedError` is
raised, as for instructions that no kernel here has needed so far.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from tests.ptx import arithmetic, matrices
from tests.ptx.memory import Memory, Scratch
from tests.ptx.program import Instruction, Program
from tests.ptx.registers import Bits, Lanes, as_bits, as_values, field, is_float, size

SILENT = {"bar", "barrier", "fence", "membar", "griddepcontrol", "nanosleep", "createpolicy"}  # no result, and warps are in step
UNWRITTEN = 0x7FC01234  # NaN, in a register that was never written
SHARED_BYTES = 232448
LOCAL, LOCAL_BYTES = 1 << 60, 4096  # where local memory begins, and how much each lane has
WIDE = {"u16": "u32", "s16": "s32", "u32": "u64", "s32": "s64"}
Operand = Any  # a name or a tuple of names, which the operation knows


class DeviceAssert(RuntimeError):
    """A device-side assert was tripped."""


class Machine:
    """Runs one program of a grid.

    Args:
        program: what to run.
        warps: of 32 lanes each.
        parameters: raw bits by name.
        memory: what loads and stores may touch.
        place: the program's place in the grid, and the grid's size, by name: "%ctaid.x", "%nctaid.x" and so on.
    """

    def __init__(self, program: Program, warps: int, parameters: dict[str, int], memory: Memory, place: dict[str, int]) -> None:
        self._program, self._memory, self._shared = program, memory, Scratch(SHARED_BYTES)
        self._parameters = np.array(list(parameters.values()), np.uint64)
        self._lanes = 32 * warps
        lane = np.arange(self._lanes, dtype=np.uint64)
        self._registers: dict[str, Bits] = {"%tid.x": lane, "%laneid": lane % np.uint64(32), "%tid.y": self._all(0), "%tid.z": self._all(0)}
        self._registers |= {name: self._all(value) for name, value in place.items()}
        self._registers |= {name: self._all(8 * i) for i, name in enumerate(parameters)}  # their addresses
        self._registers["__local_depot0"] = lane * np.uint64(LOCAL_BYTES) + np.uint64(LOCAL)
        self._local = Scratch(LOCAL_BYTES * self._lanes, first=LOCAL)

    @np.errstate(all="ignore")
    def run(self) -> int:
        """Run to the end and return how many instructions that took. Raises DeviceAssert, and IndexError for memory that is nobody's."""
        at = count = 0
        while at < len(self._program.instructions):
            instruction = self._program.instructions[at]
            at, count = at + 1, count + 1
            active, name = self._active(instruction), instruction.op[0]
            if name in ("bra", "ret"):
                if active.any() and not active.all():
                    raise NotImplementedError(f"lanes part at {instruction.text}")
                if active.all():
                    if name == "ret":
                        break
                    at = self._program.targets[at - 1]
            else:
                self._execute(instruction, active)
        return count

    def _execute(self, instruction: Instruction, active: Lanes) -> None:
        _, op, operands, text = instruction
        own: Callable[..., None] | None = getattr(self, f"_{op[0]}", None)
        if own is not None:
            own(op, operands, active, text)
        elif op[0] in ("trap", "call"):
            if active.any():
                raise DeviceAssert(text)
        elif op[0] in SILENT:
            pass
        elif op[-1].endswith("16x2"):
            values = [self._packed(operand, op[-1]) for operand in operands[1:]]
            compute = (arithmetic.FLOATS if is_float(op[-1]) else arithmetic.WHOLE)[op[0]]
            halves = [as_bits(compute(*(value[half] for value in values)), op[-1][:-2]) for half in range(2)]
            self._assign(operands[0], halves[0] | halves[1] << np.uint64(16), active)
        elif is_float(op[-1]):
            if op[0] not in arithmetic.FLOATS:
                raise NotImplementedError(text)
            wide = [self._value(operand, op[-1]).astype(np.float64) for operand in operands[1:]]
            self._assign(operands[0], as_bits(arithmetic.FLOATS[op[0]](*wide), op[-1]), active)
        elif op[0] in arithmetic.LOGIC:
            kind = "pred" if op[-1] == "pred" else f"u{8 * size(op[-1])}"
            self._assign(operands[0], as_bits(arithmetic.LOGIC[op[0]](*(self._value(x, kind) for x in operands[1:])), kind), active)
        else:
            self._assign(operands[0], self._whole(op, operands, text), active)

    def _whole(self, op: tuple[str, ...], operands: tuple[Operand, ...], text: str) -> Bits:
        """Return what an instruction that computes with whole numbers gives."""
        if op[0] not in arithmetic.WHOLE and op[0] not in ("shl", "shr"):
            raise NotImplementedError(text)
        kind = WIDE[op[-1]] if "wide" in op else op[-1].replace("b", "u")
        values = [self._value(x, kind if i == 2 else op[-1]).astype(as_values(self._all(0), kind).dtype) for i, x in enumerate(operands[1:])]
        if op[0] in ("shl", "shr"):
            return as_bits(arithmetic.shift(op[0], values[0], self._value(operands[2], "u32")), kind)
        if op[:2] == ("mul", "hi"):
            product = values[0].astype(object) * values[1].astype(object)
            return as_bits((product >> 8 * size(kind)).astype(values[0].dtype), kind)
        if "hi" in op:
            raise NotImplementedError(text)
        return as_bits(arithmetic.WHOLE[op[0]](*values), kind)

    def _all(self, value: int) -> Bits:
        return np.full(self._lanes, value & 0xFFFFFFFFFFFFFFFF, np.uint64)

    def _active(self, instruction: Instruction) -> Lanes:
        if instruction.guard is None:
            return np.ones(self._lanes, bool)
        name, is_negated = instruction.guard
        return (self._bits(name) != 0) != is_negated

    def _bits(self, operand: Operand) -> Bits:
        if operand in self._registers:
            return self._registers[operand]
        if operand.startswith("%"):
            return self._all(UNWRITTEN)
        if operand.lower().startswith(("0f", "0d")):
            return self._all(int(operand[2:], 16))
        if operand in ("true", "false"):
            return self._all(operand == "true")
        return self._all(int(operand.rstrip("U"), 0)) if re.match(r"-?\d", operand) else self._all(0)  # the address of shared memory or of a text

    def _addresses(self, operand: Operand) -> Lanes:
        base, _, offset = operand.strip("[] ").partition("+")
        return self._bits(base.strip()).astype(np.int64) + int(offset or 0)

    def _warps(self) -> list[slice]:
        return [slice(first, first + 32) for first in range(0, self._lanes, 32)]

    def _value(self, operand: Operand, kind: str) -> Lanes:
        return as_values(self._bits(operand), kind)

    def _packed(self, operand: Operand, kind: str) -> list[Lanes]:
        halves = (as_values(field(self._bits(operand), 16 * half, 16), kind[:-2]) for half in range(2))
        return [half.astype(np.float64) if is_float(kind) else half for half in halves]

    def _assign(self, name: Operand, bits: Bits, active: Lanes) -> None:
        if name != "_":
            self._registers[name] = bits if active.all() else np.where(active, bits, self._bits(name))

    def _mov(self, op: tuple[str, ...], operands: tuple[Operand, ...], active: Lanes, text: str) -> None:
        target, source = operands
        bits = 64 if op[-1] == "pred" else 8 * size(op[-1])
        if isinstance(target, tuple):
            for i, name in enumerate(target):
                self._assign(name, field(self._bits(source), i * bits // len(target), bits // len(target)), active)
        elif isinstance(source, tuple):
            parts = (field(self._bits(name), 0, bits // len(source)) << np.uint64(i * bits // len(source)) for i, name in enumerate(source))
            self._assign(target, np.bitwise_or.reduce(list(parts)), active)
        else:
            self._assign(target, field(self._bits(source), 0, bits), active)

    _cvta = _mov

    def _ld(self, op: tuple[str, ...], operands: tuple[Operand, ...], active: Lanes, text: str) -> None:
        names = operands[0] if isinstance(operands[0], tuple) else (operands[0],)
        if op[1] == "param":
            self._assign(names[0], self._parameters[np.where(active, self._addresses(operands[1]), 0) // 8], active)
            return
        count, loaded = size(op[-1]), np.zeros((len(names), self._lanes), np.uint64)
        for lane, cells in self._cells(op, operands[1], len(names), active, text):
            loaded[:, lane] = cells.view(f"u{count}")
        for name, bits in zip(names, loaded, strict=True):
            self._assign(name, as_bits(as_values(bits, op[-1]).astype(np.int64), "s64") if op[-1] in ("s8", "s16") else bits, active)

    def _st(self, op: tuple[str, ...], operands: tuple[Operand, ...], active: Lanes, text: str) -> None:
        names = operands[1] if isinstance(operands[1], tuple) else (operands[1],)
        if op[1] == "param":  # of a call, which is an assert's
            return
        stored = np.stack([self._bits(name) for name in names]).astype(f"u{size(op[-1])}")
        for lane, cells in self._cells(op, operands[0], len(names), active, text):
            cells[:] = np.ascontiguousarray(stored[:, lane]).view(np.uint8)

    def _cells(self, op: tuple[str, ...], address: Operand, count: int, active: Lanes, text: str):
        """Yield each active lane with the bytes of ``count`` elements at its address."""
        addresses = self._addresses(address)
        for lane in np.flatnonzero(active):
            yield lane, self._at(op, int(addresses[lane]), count * size(op[-1]), text)

    def _at(self, op: tuple[str, ...], address: int, count: int, text: str) -> Lanes:
        space = self._shared if op[1].startswith("shared") else self._local if address >= LOCAL else self._memory
        return space.at(address, count, text)

    def _setp(self, op: tuple[str, ...], operands: tuple[Operand, ...], active: Lanes, text: str) -> None:
        if op[-1] in ("f16x2", "bf16x2"):
            a, b = (self._packed(operand, op[-1]) for operand in operands[1:3])
            for half, name in enumerate(operands[0].split("|")):
                self._assign(name, as_bits(arithmetic.compare(op[1], a[half], b[half]), "pred"), active)
            return
        kind = op[-1] if op[-1][0] != "b" or is_float(op[-1]) else op[-1].replace("b", "u")
        result = arithmetic.compare(op[1], self._value(operands[1], kind), self._value(operands[2], kind))
        if op[2] in arithmetic.LOGIC:
            result = arithmetic.LOGIC[op[2]](result, self._value(operands[3], "pred"))
        self._assign(operands[0], as_bits(result, "pred"), active)

    def _selp(self, op: tuple[str, ...], operands: tuple[Operand, ...], active: Lanes, text: str) -> None:
        self._assign(operands[0], np.where(self._value(operands[3], "pred"), self._bits(operands[1]), self._bits(operands[2])), active)

    def _cvt(self, op: tuple[str, ...], operands: tuple[Operand, ...], active: Lanes, text: str) -> None:
        target, source = op[-2:]
        if target in ("f16x2", "bf16x2"):
            high, low = (as_bits(self._value(operand, source), target[:-2]) for operand in operands[1:3])
            self._assign(operands[0], low | high << np.uint64(16), active)
            return
        values = self._value(operands[1], source)
        if is_float(source) and not is_float(target):
            values = np.trunc(values) if op[1] == "rzi" else np.rint(values)
        self._assign(operands[0], as_bits(values, target), active)

    def _shfl(self, op: tuple[str, ...], operands: tuple[Operand, ...], active: Lanes, text: str) -> None:
        lane, step = np.arange(self._lanes) % 32, np.where(active, self._bits(operands[2]), 0).astype(np.int64)
        source = {"bfly": lane ^ step, "idx": step % 32, "down": np.minimum(lane + step, 31), "up": np.maximum(lane - step, 0)}[op[2]]
        self._assign(operands[0].split("|")[0], self._bits(operands[1])[np.arange(self._lanes) // 32 * 32 + source], active)

    def _elect(self, op: tuple[str, ...], operands: tuple[Operand, ...], active: Lanes, text: str) -> None:
        leader, is_leader = operands[0].split("|")
        self._assign(leader, self._all(0), active)
        self._assign(is_leader, as_bits(self._registers["%laneid"] == 0, "pred"), active)

    def _redux(self, op: tuple[str, ...], operands: tuple[Operand, ...], active: Lanes, text: str) -> None:
        values = self._value(operands[1], op[-1].replace("b", "u")).reshape(-1, 32)
        reduced = arithmetic.REDUCTIONS[op[2]](values, axis=1).astype(values.dtype)
        self._assign(operands[0], as_bits(np.repeat(reduced, 32), op[-1].replace("b", "u")), active)

    def _bfe(self, op: tuple[str, ...], operands: tuple[Operand, ...], active: Lanes, text: str) -> None:
        values, first, count = (
            self._value(operand, kind).astype(np.int64) for operand, kind in zip(operands[1:], (op[-1], "u32", "u32"), strict=True)
        )
        bits = values >> first & (1 << count) - 1
        if op[-1][0] == "s":  # the highest of the bits is their sign
            bits -= (bits >> np.maximum(count - 1, 0) & 1) << count
        self._assign(operands[0], as_bits(bits, op[-1]), active)

    def _prmt(self, op: tuple[str, ...], operands: tuple[Operand, ...], active: Lanes, text: str) -> None:
        self._assign(operands[0], arithmetic.permute_bytes(*(self._bits(operand) for operand in operands[1:])), active)

    def _lop3(self, op: tuple[str, ...], operands: tuple[Operand, ...], active: Lanes, text: str) -> None:
        words = (field(self._bits(operand), 0, 32) for operand in operands[1:4])
        self._assign(operands[0], arithmetic.look_up(int(operands[4], 0), *words), active)

    def _ldmatrix(self, op: tuple[str, ...], operands: tuple[Operand, ...], active: Lanes, text: str) -> None:
        is_load = op[0] == "ldmatrix"
        names, address = operands if is_load else operands[::-1]
        names = names if isinstance(names, tuple) else (names,)
        addresses = self._addresses(address)
        found = [
            matrices.transfer(
                self._shared, addresses[warp], None if is_load else [self._bits(name)[warp] for name in names], len(names), "trans" in op, text
            )
            for warp in self._warps()
        ]
        for i, name in enumerate(names if is_load else ()):
            self._assign(name, np.concatenate([each[i] for each in found]), active)

    _stmatrix = _ldmatrix

    def _mma(self, op: tuple[str, ...], operands: tuple[Operand, ...], active: Lanes, text: str) -> None:
        if "m16n8k16" not in op or op[-4] != "f32":
            raise NotImplementedError(text)
        factors = [[[self._bits(name)[warp] for name in factor] for factor in operands[1:]] for warp in self._warps()]
        results = [matrices.multiply(a, b, c, op[-2]) for a, b, c in factors]
        for i, name in enumerate(operands[0]):
            self._assign(name, np.concatenate([each[i] for each in results]), active)
