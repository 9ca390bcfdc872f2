"""PTX text as instructions."""

from __future__ import annotations

import re
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
    """The body of a kernel: its instructions, and where each label stands among them."""

    instructions: list[Instruction]
    labels: dict[str, int]


def parse(ptx: str) -> Program:
    """Return the first kernel of a PTX module."""
    body = ptx[ptx.index(".entry") :]
    body = body[body.index("{", body.index(")")) + 1 :].split("// -- End function")[0]
    body = re.sub(r"//[^\n]*", "", body)
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for statement in re.split(r"[;\n]", body):
        text = statement.strip()
        if text.startswith("{") and not text.startswith("{ %"):  # a scope
            text = text[1:].strip()
        if label := re.match(r"^(\$?[\w$]+):(.*)$", text):
            labels[label[1]] = len(instructions)
            text = label[2].strip()
        if text.count("}") > text.count("{"):
            text = text.rstrip("} ")
        if text and not text.startswith("."):  # directives declare registers and say where the source stands
            instructions.append(_instruction(text))
    return Program(instructions, labels)


def _instruction(text: str) -> Instruction:
    guard = re.match(r"^@(!?)(\S+)\s+(.*)$", text)
    op, *rest = (guard[3] if guard else text).split(maxsplit=1)
    split = re.findall(r"\{[^}]*\}|\[[^]]*\]|[^,\s][^,]*", rest[0] if rest else "")
    parsed = tuple(tuple(part.strip() for part in one[1:-1].split(",")) if one.startswith("{") else one.strip() for one in split)
    return Instruction((guard[2], bool(guard[1])) if guard else None, tuple(op.split(".")), parsed, text)
