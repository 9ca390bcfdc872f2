"""PTX text as instructions."""

from __future__ import annotations

import re
from collections import ChainMap
from typing import NamedTuple


class Instruction(NamedTuple):
    """An instruction.

    Attributes:
        guard: the predicate that lanes need, and whether they need it to be false; None if all take part.
        op: the operation with its modifiers and types: ("ld", "global", "v4", "b32").
        operands: as they are written; a vector is a tuple.
        text: all of it.
    """

    guard: tuple[str, bool] | None
    op: tuple[str, ...]
    operands: tuple[str | tuple[str, ...], ...]
    text: str


class Program(NamedTuple):
    """The body of a kernel: its instructions, and for each branch among them, by its index, that of the instruction to which it goes."""

    instructions: list[Instruction]
    targets: dict[int, int]


def parse(ptx: str) -> Program:
    """Return the first kernel of a PTX module."""
    body = ptx[ptx.index(".entry") :]
    body = body[body.index("{", body.index(")")) + 1 :].split("// -- End function")[0]
    body = re.sub(r"//[^\n]*", "", body)
    instructions: list[Instruction] = []
    scope: ChainMap[str, int] = ChainMap()  # labels; those of inline assembly may repeat outside their braces
    branches: dict[int, ChainMap[str, int]] = {}
    for statement in re.split(r"[;\n]", body):
        text = statement.strip()
        if text.startswith("{") and not text.startswith("{ %"):  # a scope
            scope, text = scope.new_child(), text[1:].strip()
        if label := re.match(r"^(\$?[\w$]+):(.*)$", text):
            scope[label[1]] = len(instructions)
            text = label[2].strip()
        if is_last := text.count("}") > text.count("{"):
            text = text.rstrip("} ")
        if text and not text.startswith("."):  # directives declare registers and say where the source stands
            instructions.append(_instruction(text))
            if instructions[-1].op[0] == "bra":
                branches[len(instructions) - 1] = scope
        if is_last:
            scope = scope.parents
    return Program(instructions, {at: labels[str(instructions[at].operands[0])] for at, labels in branches.items()})


def _instruction(text: str) -> Instruction:
    guard = re.match(r"^@(!?)(\S+)\s+(.*)$", text)
    op, *rest = (guard[3] if guard else text).split(maxsplit=1)
    split = re.findall(r"\{[^}]*\}|\[[^]]*\]|[^,\s][^,]*", rest[0] if rest else "")
    parsed = tuple(tuple(part.strip() for part in one[1:-1].split(",")) if one.startswith("{") else one.strip() for one in split)
    return Instruction((guard[2], bool(guard[1])) if guard else None, tuple(op.split(".")), parsed, text)
