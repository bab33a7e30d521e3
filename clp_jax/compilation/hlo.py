"""Optimised HLO as text, read into computations and instructions: what the cost model needs of it and no more."""

import dataclasses
import functools
import json
import math
import re
from collections.abc import Mapping
from typing import Any

_BYTES = {
    "pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "s32": 4, "u32": 4, "s64": 8, "u64": 8,
    "f8e4m3fn": 1, "f8e5m2": 1, "f16": 2, "bf16": 2, "f32": 4, "f64": 8, "c64": 8, "c128": 16, "token": 0,
}  # fmt: skip
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_COMPUTATION = re.compile(r"^(ENTRY\s+)?%?([\w.\-]+)\s*(?:\([^\n]*)?\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT\s+)?%?([\w.\-]+) = (.*)$")
_COMMENT = re.compile(r"/\*[^*]*\*/")
_CALLED = re.compile(
    r"(calls|to_apply|body|condition|true_computation|false_computation|called_computations)=\{?%?([\w.\-]+)"
)
_OPERATION = re.compile(r'op_name="([^"]*)"')
_FRAME = re.compile(r"stack_frame_id=(\d+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of HLO.

    Attributes:
        name: unique in its module.
        opcode: such as ``fusion``.
        shape: of what it gives, as text.
        operands: names of what it reads.
        attributes: the text behind the operands.
        inner: the text between the brackets: operands, or a parameter's number.
    """

    name: str
    opcode: str
    shape: str
    operands: tuple[str, ...]
    attributes: str
    inner: str

    @functools.cached_property
    def bytes(self) -> float:
        """Of what it gives, layouts and padding aside."""
        return shape_bytes(self.shape)

    @functools.cached_property
    def config(self) -> Mapping[str, Any]:
        """What the backend says of it."""
        found = balanced(self.attributes, "backend_config=")
        if found is None:
            return {}
        try:
            return json.loads(found)
        except json.JSONDecodeError:
            return {}

    @property
    def cycles(self) -> float | None:
        """The compiler's estimate of its duration; None where there is none."""
        found = self.config.get("window_config", {}).get("estimated_cycles")
        return None if found is None else float(found)

    def called(self, kind: str) -> str | None:
        """The computation that an attribute names."""
        return next((name for key, name in _CALLED.findall(self.attributes) if key == kind), None)

    @property
    def branches(self) -> tuple[str, ...]:
        """The computations that a conditional chooses among."""
        found = _BRANCHES.search(self.attributes)
        if found is None:
            pair = (self.called("true_computation"), self.called("false_computation"))
            return tuple(name for name in pair if name is not None)
        return tuple(name.strip().lstrip("%") for name in found[1].split(","))


@dataclasses.dataclass(frozen=True)
class Module:
    """A program.

    Attributes:
        computations: instructions of each, in the order they run.
        entry: name of the first.
        frames: where in Python each stack frame is, by its number: the innermost place in this package.
    """

    computations: Mapping[str, tuple[Instruction, ...]]
    entry: str
    frames: Mapping[int, str] = dataclasses.field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> "Module":
        """Reads what ``compiled.as_text()`` gives.

        Raises:
            ValueError: when there is no entry computation.
        """
        computations: dict[str, list[Instruction]] = {}
        entry, current = None, None
        for line in text.splitlines():
            if line and not line[0].isspace():
                match = _COMPUTATION.match(line) if not line.startswith("HloModule") else None
                current = computations.setdefault(match[2], []) if match else None
                entry = match[2] if match and match[1] else entry
            elif current is not None and (match := _INSTRUCTION.match(line)):
                current.append(_instruction(match[2], match[3]))
        if entry is None:
            raise ValueError("this HLO has no ENTRY computation.")
        return cls({name: tuple(lines) for name, lines in computations.items()}, entry, _frames(text))

    @functools.cached_property
    def instructions(self) -> Mapping[str, Instruction]:
        """All instructions by name."""
        return {line.name: line for lines in self.computations.values() for line in lines}

    def operand_bytes(self, instruction: Instruction) -> float:
        """Of what an instruction reads."""
        return sum(self.instructions[name].bytes for name in instruction.operands if name in self.instructions)

    def source(self, instruction: Instruction) -> str:
        """The operation and the line of Python that an instruction comes from, as far as known."""
        operation = _OPERATION.search(instruction.attributes)
        frame = _FRAME.search(instruction.attributes)
        place = self.frames.get(int(frame[1]), "") if frame else ""
        return " ".join(part for part in (operation[1] if operation else "", place) if part)

    def trips(self, loop: Instruction) -> int | None:
        """Iterations of a loop that counts from 0 to a constant; None where something else may end it.

        Loops of `jax.lax.scan` are such.
        """
        known = loop.config.get("known_trip_count", {}).get("n")
        if known is not None:
            return int(known)
        condition = self.computations.get(loop.called("condition") or "", ())
        root = next((line for line in reversed(condition) if line.opcode not in ("bitcast", "copy")), None)
        if root is not None and root.opcode == "fusion" and len(self.inside(root)) > 0:
            lines = self.inside(root)
            limits = [self.instructions[name] for name in root.operands if name in self.instructions]
            root, condition = lines[-1], (*lines, *limits)
        if root is None or root.opcode != "compare" or "direction=LT" not in root.attributes:
            return None
        limits = [line for line in condition if line.opcode == "constant" and line.inner.isdigit()]
        return int(limits[0].inner) if len(limits) == 1 else None

    def inside(self, instruction: Instruction) -> tuple[Instruction, ...]:
        """The instructions of what a fusion or an asynchronous start calls."""
        name = (
            instruction.called("calls") or instruction.called("to_apply") or instruction.called("called_computations")
        )
        return self.computations.get(name or "", ())


def shape_bytes(shape: str) -> float:
    """Bytes of all arrays in the text of a shape."""
    return sum(math.prod(dims) * _BYTES.get(kind, 0) for kind, dims in array_shapes(shape))


def array_shapes(shape: str) -> list[tuple[str, tuple[int, ...]]]:
    """Type and dimensions of all arrays in the text of a shape."""
    return [(kind, tuple(int(d) for d in dims.split(",") if d)) for kind, dims in _ARRAY.findall(shape)]


def balanced(text: str, label: str) -> str | None:
    """The braces behind a label and what is in them; None without the label."""
    start = text.find(label)
    if start < 0 or start + len(label) >= len(text) or text[start + len(label)] not in "{[(":
        return None
    start += len(label)
    return text[start : _closing(text, start) + 1]


def _closing(text: str, start: int) -> int:
    """Where the bracket that opens at `start` closes; brackets in quotes do not count."""
    depth, quoted, position = 0, False, start
    while position < len(text):
        letter = text[position]
        if quoted:
            position += letter == "\\"
            quoted = letter != '"'
        elif letter == '"':
            quoted = True
        elif letter in "([{":
            depth += 1
        elif letter in ")]}":
            depth -= 1
            if depth == 0:
                return position
        position += 1
    return len(text) - 1


def _instruction(name: str, text: str) -> Instruction:
    text = _COMMENT.sub("", text)
    cut = _closing(text, 0) + 1 if text.startswith("(") else text.index(" ")
    shape, rest = text[:cut], text[cut:].lstrip()
    opening = rest.index("(")
    closing = _closing(rest, opening)
    inner = rest[opening + 1 : closing]
    return Instruction(
        name=name,
        opcode=rest[:opening],
        shape=shape,
        operands=tuple(re.findall(r"%([\w.\-]+)", inner)),
        attributes=rest[closing + 1 :].lstrip(", "),
        inner=inner,
    )


def _frames(text: str) -> dict[int, str]:
    """The tables of places at the head of a module: stack frames by number."""
    files = {int(number): name for number, name in re.findall(r'^(\d+) "([^"]*)"$', _table(text, "FileNames"), re.M)}
    places, found = {}, {}
    for number, file, line in re.findall(
        r"^(\d+) \{file_name_id=(\d+) function_name_id=\d+ line=(\d+)", _table(text, "FileLocations"), re.M
    ):
        places[int(number)] = (files.get(int(file), ""), line)
    frames = {
        int(number): (int(place), int(parent or 0))
        for number, place, parent in re.findall(
            r"^(\d+) \{file_location_id=(\d+)(?: parent_frame_id=(\d+))?", _table(text, "StackFrames"), re.M
        )
    }
    for number in frames:
        chain: list[tuple[str, str]] = []
        seen = number
        while seen in frames and len(chain) < 64:
            chain.append(places.get(frames[seen][0], ("", "0")))
            seen = frames[seen][1] if frames[seen][1] != seen else 0
        own = next((place for place in chain if "clp_jax/" in place[0]), chain[0])
        found[number] = f"{re.split('clp_jax/|site-packages/', own[0])[-1]}:{own[1]}"
    return found


def _table(text: str, name: str) -> str:
    match = re.search(rf"^{name}\n(.*?)\n\n", text, re.M | re.S)
    return match[1] if match else ""
