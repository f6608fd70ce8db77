"""Reads the collectives of a compiled program, those inside loop bodies included, and how often each one runs.

XLA writes the same collective in many ways: as one instruction, as a pair of start and done, wrapped into an
asynchronous call, inside a fusion; on TPUs a reduce-scatter as a fusion of an all-reduce and a slice, and one that runs
beside other work three times over, in the fusions where it starts, goes on and ends. CPU and GPU programs say how often
a loop runs; TPU programs do not, there it is worked out from the loop's counter.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

# All collectives of XLA. https://openxla.org/xla/operation_semantics
KINDS = (
    *("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all"),
    *("collective-permute", "collective-broadcast"),
)
_KIND = re.compile(rf"({'|'.join(KINDS)})(-start)?")
_FUSED_SCATTER = re.compile(r"%?all-reduce-scatter")  # the name of the computation that a TPU's fusion calls
_ARRAY = re.compile(r"\b(pred|token|bf16|[suf]\d+\w*|c\d+)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:calls|true_computation|false_computation)=%?([\w.-]+)")
_CALLED_GROUP = re.compile(r"(?:branch_computations|called_computations)=\{([^}]*)\}")
_PASSES_ON = ("copy", "bitcast", "convert", "copy-start", "copy-done", "reshape")


@dataclass(frozen=True)
class Collective:
    """One collective instruction of one device.

    Attributes:
        kind: one of `KINDS`.
        shapes: of the arrays that it makes.
        bytes: of the whole arrays that it is about: what an all-gather ends with, what a reduce-scatter starts with,
            what goes into the others. (The "size" of nccl-tests; of n devices, each sends (n - 1) / n of it, and twice
            that for an all-reduce.)
        times: how often a run of the program executes it.
        op_name: where in the source program it comes from.
    """

    kind: str
    shapes: tuple[tuple[int, ...], ...]
    bytes: int
    times: int
    op_name: str


def collectives(hlo: str) -> list[Collective]:
    """All collectives of a compiled module's text.

    Raises:
        ValueError: one is in a loop of which it cannot be said how often it runs.
    """
    return list(_Module(hlo).collectives())


def loop_states(hlo: str) -> list[tuple[int, tuple[tuple[str, tuple[int, ...]], ...]]]:
    """Of each loop outside of other loops: how often it runs (0: unknown), and the arrays it carries and reads.

    Arrays are given as dtype and shape.
    """
    module = _Module(hlo)
    whiles = [instruction for instruction in module.bodies[module.entry].values() if instruction.opcode == "while"]
    return [(module.trip_count(module.entry, loop) or 0, tuple(_arrays(loop.type))) for loop in whiles]


@dataclass(frozen=True)
class _Instruction:
    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    text: str  # the operands as they are written
    attributes: str
    root: bool


class _Module:
    """A module's computations by name, each with its instructions by name."""

    def __init__(self, hlo: str) -> None:
        self.bodies: dict[str, dict[str, _Instruction]] = {}
        self.entry = ""
        body: dict[str, _Instruction] = {}
        for line in hlo.splitlines():
            if opening := re.match(r"(ENTRY )?%?([\w.-]+) \(.*\{$", line):
                body = self.bodies[opening[2]] = {}
                self.entry = opening[2] if opening[1] else self.entry
            elif (instruction := _parse(line)) is not None:
                body[instruction.name] = instruction

    def collectives(self) -> Iterator[Collective]:
        yield from self._walk(self.entry, 1)

    def _walk(self, name: str, times: int) -> Iterator[Collective]:
        body = self.bodies[name]
        for instruction in body.values():
            opcode, attributes = instruction.opcode, instruction.attributes
            if (kind := _KIND.fullmatch(opcode)) is not None:
                yield self._collective(body, instruction, kind[1], times)
            elif opcode == "while":
                yield from self._walk_loop(name, instruction, times)
            elif opcode == "fusion" and _FUSED_SCATTER.match(called := _CALLED.findall(attributes)[0]):
                whole = sum(_bytes(body[operand].type) for operand in instruction.operands)
                inner = (i for i in self.bodies[called].values() if i.opcode == "all-reduce")
                yield Collective(
                    "reduce-scatter", _shapes(instruction.type), whole, times, _op_name(next(inner, instruction))
                )
            elif opcode == "fusion" and self._continues(_CALLED.findall(attributes)[0]):
                continue
            else:
                for computation in self._called(instruction):
                    yield from self._walk(computation, times)

    def _continues(self, name: str) -> bool:
        """Whether a TPU's fusion goes on with, or ends, a collective that an earlier fusion has started."""
        done = any('"AsyncCollectiveDone"' in i.attributes for i in self.bodies[name].values())
        return done or name.startswith("async_collective_fusion")

    def _walk_loop(self, name: str, loop: _Instruction, times: int) -> Iterator[Collective]:
        count = self.trip_count(name, loop)
        inside = self._walk(_attribute(loop, "body"), times * (count or 1))
        for collective in inside:
            # A loop whose count depends on data (attention over live blocks) may not hold a collective at all.
            if count is None:
                raise ValueError(f"{collective.kind} in a loop of unknown length: {loop.name} ({_op_name(loop)})")
            yield collective

    def _called(self, instruction: _Instruction) -> Iterator[str]:
        """Computations that an instruction runs. What a reduction or a sort calls for each element is none of them."""
        if instruction.opcode in ("call", "call-start", "async-start"):
            yield from re.findall(r"to_apply=%?([\w.-]+)", instruction.attributes)
        names = _CALLED.findall(instruction.attributes)
        for group in _CALLED_GROUP.findall(instruction.attributes):
            names += [name.strip().lstrip("%") for name in group.split(",")]
        yield from (name for name in names if name in self.bodies)

    def _collective(
        self, body: dict[str, _Instruction], instruction: _Instruction, kind: str, times: int
    ) -> Collective:
        made = _made(instruction)
        given = sum(_bytes(body[operand].type) for operand in instruction.operands if operand in body)
        size = max(given, sum(_size(*array) for array in made))
        return Collective(kind, tuple(shape for _, shape in made), size, times, _op_name(instruction))

    # --- how often a loop runs

    def trip_count(self, name: str, loop: _Instruction) -> int | None:
        """As XLA says, or from the constants that the loop's counter starts from, is raised by and compared with."""
        if known := re.search(r'"known_trip_count":\{"n":"?(\d+)', loop.attributes):
            return int(known[1])
        condition, body = self.bodies[_attribute(loop, "condition")], self.bodies[_attribute(loop, "body")]
        test = _root(condition)
        if test.opcode != "compare" or "direction=LT" not in test.attributes:
            return None
        counter, bound = (_source(condition, operand) for operand in test.operands)
        if counter.opcode != "get-tuple-element":
            return None
        at = _index(counter)
        start = self._initial(name, loop, at)
        end = _constant(bound)
        if end is None and bound.opcode == "get-tuple-element":
            end = self._initial(name, loop, _index(bound))  # carried along, and not changed on the way
        step = self._raised(body, at)
        if start is None or end is None or not step:
            return None
        return max(0, -(-(end - start) // step))

    def _initial(self, name: str, loop: _Instruction, at: int) -> int | None:
        body = self.bodies[name]
        state = _source(body, loop.operands[0])
        return _constant(_source(body, state.operands[at])) if state.opcode == "tuple" else None

    def _raised(self, body: dict[str, _Instruction], at: int) -> int | None:
        """By how much an element of a loop's state is raised each time."""
        root = _root(body)
        if root.opcode != "tuple":
            return None
        new = _source(body, root.operands[at])
        if new.opcode == "fusion":
            inner = self.bodies[_CALLED.findall(new.attributes)[0]]
            given = {f"parameter({i})": body[operand] for i, operand in enumerate(new.operands)}
            new = _root(inner)
            sources = [_source(inner, operand) for operand in new.operands]
            sources = [given.get(f"parameter({s.text})", s) if s.opcode == "parameter" else s for s in sources]
        else:
            sources = [_source(body, operand) for operand in new.operands]
        if new.opcode != "add":
            return None
        same = [s for s in sources if s.opcode == "get-tuple-element" and _index(s) == at]
        steps = [step for s in sources if (step := _constant(s)) is not None]
        return steps[0] if len(same) == len(steps) == 1 else None


def _parse(line: str) -> _Instruction | None:
    match = re.match(r"\s+(ROOT )?%?([\w.-]+) = ", line)
    if match is None:
        return None
    rest = line[match.end() :]
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    called = re.match(r"\s*([\w-]+)\(", rest[end:])
    if called is None:
        return None
    opening = end + called.end() - 1
    closing = _closing(rest, opening)
    text = rest[opening + 1 : closing]
    operands = tuple(re.findall(r"%([\w.-]+)", text))
    return _Instruction(match[2], rest[:end], called[1], operands, text, rest[closing + 1 :], bool(match[1]))


def _closing(text: str, opening: int) -> int:
    """Where the bracket is closed that is opened there."""
    depth = 0
    for bracket in re.compile(r"[()]").finditer(text, opening):
        depth += 1 if bracket[0] == "(" else -1
        if not depth:
            return bracket.start()
    raise ValueError(f"brackets that are not closed: {text[:200]}")


def _source(body: dict[str, _Instruction], name: str) -> _Instruction:
    """The instruction that a value comes from, through those that only pass it on."""
    instruction = body[name]
    while instruction.opcode in _PASSES_ON:
        instruction = body[instruction.operands[0]]
    return instruction


def _root(body: dict[str, _Instruction]) -> _Instruction:
    return next(instruction for instruction in body.values() if instruction.root)


def _constant(instruction: _Instruction) -> int | None:
    whole = instruction.opcode == "constant" and re.fullmatch(r"-?\d+", instruction.text)
    return int(instruction.text) if whole else None


def _attribute(instruction: _Instruction, name: str) -> str:
    found = re.search(rf"\b{name}=%?([\w.-]+)", instruction.attributes)
    assert found is not None, f"{instruction.name} has no {name}"
    return found[1]


def _index(instruction: _Instruction) -> int:
    return int(_attribute(instruction, "index"))


def _op_name(instruction: _Instruction) -> str:
    found = re.search(r'op_name="([^"]*)"', instruction.attributes)
    return found[1] if found else ""


def _made(instruction: _Instruction) -> list[tuple[str, tuple[int, ...]]]:
    """The arrays that a collective makes. Where it is only started, most kinds' types list first what it is given."""
    arrays, count = _arrays(instruction.type), len(instruction.operands)
    started = instruction.opcode.endswith("-start") and len(arrays) >= 2 * count
    return arrays[count : 2 * count] if started else arrays


def _arrays(type_: str) -> list[tuple[str, tuple[int, ...]]]:
    return [(dtype, tuple(int(n) for n in dims.split(",") if n)) for dtype, dims in _ARRAY.findall(type_)]


def _shapes(type_: str) -> tuple[tuple[int, ...], ...]:
    return tuple(shape for _, shape in _arrays(type_))


def _bytes(type_: str) -> int:
    return sum(_size(*array) for array in _arrays(type_))


def _size(dtype: str, shape: tuple[int, ...]) -> int:
    return array_bytes(dtype, shape)


def array_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of an array of XLA's dtype of that name (`bf16`, `s32`, `pred`)."""
    bits = re.search(r"\d+", dtype)
    width = {"pred": 8, "token": 0}.get(dtype, int(bits[0]) if bits else 0)
    return -(-math.prod(shape) * width // 8)
