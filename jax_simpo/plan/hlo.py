"""Reads the collectives of a compiled program and how often each one runs, loop bodies included.

XLA writes the same collective in many forms: as one instruction, as a pair of start and done, wrapped in an
asynchronous call, or inside a fusion. On TPUs a reduce-scatter is a fusion of an all-reduce and a slice, and a
collective that runs beside other work is written three times: in the fusions where it starts, continues and ends. CPU
and GPU programs state the trip count of a loop; for TPU programs it is worked out from the loop's counter.
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
# What starts nothing on a GPU.
_FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "async-done", "copy-done")
_PASS_THROUGH = ("copy", "bitcast", "convert", "copy-start", "copy-done", "reshape")


@dataclass(frozen=True)
class Collective:
    """One collective instruction of one device.

    Attributes:
        kind: one of `KINDS`.
        shapes: the shapes of its output arrays.
        bytes: the bytes of the complete arrays: the output of an all-gather, the input of a reduce-scatter and of the
            others. (This is the "size" of nccl-tests. Each of n devices sends (n - 1) / n of it, and twice that for an
            all-reduce.)
        times: how often one run of the program executes it.
        op_name: the operation of the source program that it comes from.
    """

    kind: str
    shapes: tuple[tuple[int, ...], ...]
    bytes: int
    times: int
    op_name: str


def collectives(hlo: str) -> list[Collective]:
    """Returns all collectives in the text of a compiled module.

    Raises:
        ValueError: a collective is in a loop whose trip count is unknown.
    """
    return list(_Module(hlo).collectives())


@dataclass(frozen=True)
class Work:
    """The work of one run of a GPU's program.

    Attributes:
        launches: kernels and library calls that are started.
        bytes: bytes that these read and write: every operand and result once a call, of what is sliced the slice.
        waits: times that the host waits for the device, to learn whether a loop goes on or which branch is taken.
    """

    launches: float
    bytes: float
    waits: float


def gpu_work(hlo: str, passes: float) -> Work:
    """Adds up the work in the text of a module that is compiled for a GPU.

    A kernel of Pallas or of a library counts its operands and results once, however often it reads them.

    Args:
        hlo: the text.
        passes: how often a loop is taken to run whose trip count is unknown. Of the branches of a condition, the one
            that moves the most bytes counts.
    """
    module = _Module(hlo)
    return module.work(module.entry, passes)


def loop_states(hlo: str) -> list[tuple[int, tuple[tuple[str, tuple[int, ...]], ...]]]:
    """Returns the trip count (0: unknown) and the arrays of each loop that is not inside another loop.

    The arrays are those that the loop carries or reads, each as dtype and shape.
    """
    module = _Module(hlo)
    whiles = [instruction for instruction in module.bodies[module.entry].values() if instruction.opcode == "while"]
    return [(module.trip_count(module.entry, loop) or 0, tuple(_arrays(loop.type))) for loop in whiles]


def loop_traffic(hlo: str, shape: tuple[int, ...]) -> list[int]:
    """Returns, of each loop that is not inside another, the bytes of arrays of one shape that it reads and writes.

    Every body in it counts once, and every operand and result of an instruction. Arrays that a TPU's compiler keeps in
    its fast memory do not count.

    Args:
        hlo: the text of a module.
        shape: of the arrays.
    """
    module = _Module(hlo)
    whiles = [instruction for instruction in module.bodies[module.entry].values() if instruction.opcode == "while"]
    return [module.traffic(_attribute(loop, "body"), shape) for loop in whiles]


@dataclass(frozen=True)
class _Instruction:
    """One line of a computation; `text` holds the operands as they are written."""

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    text: str
    attributes: str
    root: bool


class _Module:
    """A parsed module: its computations by name, each a dict of its instructions by name."""

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
        """Yields the collectives of the program, in the order of its text."""
        yield from self._walk(self.entry, 1)

    def _walk(self, name: str, times: int) -> Iterator[Collective]:
        """Yields the collectives of a computation that runs `times` times."""
        body = self.bodies[name]
        for instruction in body.values():
            opcode, attributes = instruction.opcode, instruction.attributes
            if (kind := _KIND.fullmatch(opcode)) is not None:
                yield self._collective(body, instruction, kind[1], times)
            elif opcode == "while":
                yield from self._walk_loop(name, instruction, times)
            elif opcode == "fusion" and _FUSED_SCATTER.match(called := _CALLED.findall(attributes)[0]):
                size = sum(_bytes(body[operand].type) for operand in instruction.operands)
                reductions = (i for i in self.bodies[called].values() if i.opcode == "all-reduce")
                yield Collective(
                    "reduce-scatter", _shapes(instruction.type), size, times, _op_name(next(reductions, instruction))
                )
            elif opcode == "fusion" and self._continues(_CALLED.findall(attributes)[0]):
                continue
            else:
                for computation in self._called(instruction):
                    yield from self._walk(computation, times)

    def _continues(self, name: str) -> bool:
        """Returns True if a TPU's fusion continues or ends a collective that an earlier fusion has started."""
        ends = any('"AsyncCollectiveDone"' in i.attributes for i in self.bodies[name].values())
        return ends or name.startswith("async_collective_fusion")

    def _walk_loop(self, name: str, loop: _Instruction, times: int) -> Iterator[Collective]:
        count = self.trip_count(name, loop)
        for collective in self._walk(_attribute(loop, "body"), times * (count or 1)):
            # Loops whose count depends on data (attention over live blocks) are allowed, but without collectives.
            if count is None:
                raise ValueError(f"{collective.kind} in a loop of unknown length: {loop.name} ({_op_name(loop)})")
            yield collective

    def _called(self, instruction: _Instruction) -> Iterator[str]:
        """Yields the computations that an instruction runs, except a reduction's or sort's function of elements."""
        if instruction.opcode in ("call", "call-start", "async-start"):
            yield from re.findall(r"to_apply=%?([\w.-]+)", instruction.attributes)
        names = _CALLED.findall(instruction.attributes)
        for group in _CALLED_GROUP.findall(instruction.attributes):
            names += [name.strip().lstrip("%") for name in group.split(",")]
        yield from (name for name in names if name in self.bodies)

    def _collective(
        self, body: dict[str, _Instruction], instruction: _Instruction, kind: str, times: int
    ) -> Collective:
        outputs = _output_arrays(instruction)
        input_bytes = sum(_bytes(body[operand].type) for operand in instruction.operands if operand in body)
        size = max(input_bytes, sum(array_bytes(*array) for array in outputs))
        return Collective(kind, tuple(shape for _, shape in outputs), size, times, _op_name(instruction))

    # --- what a GPU does

    def work(self, name: str, passes: float) -> Work:
        """Adds up the work of a computation; see `gpu_work`."""
        launches, size, waits = 0.0, 0.0, 0.0
        body = self.bodies[name]
        for instruction in body.values():
            times, inner = 1.0, []
            if instruction.opcode == "while":
                count = self.trip_count(name, instruction)
                times = passes if count is None else count
                inner = [self.work(_attribute(instruction, "body"), passes)]
                waits += times if count is None else 0
            elif instruction.opcode == "conditional":
                branches = [self.work(branch, passes) for branch in self._called(instruction)]
                inner = [max(branches, key=lambda work: work.bytes)]
                waits += 1
            elif instruction.opcode in ("call", "async-start"):
                inner = [self.work(called, passes) for called in self._called(instruction)]
            elif not _is_free(instruction):
                launches += 1
                size += self._moved(body, instruction)
            launches += times * sum(work.launches for work in inner)
            size += times * sum(work.bytes for work in inner)
            waits += times * sum(work.waits for work in inner)
        return Work(launches, size, waits)

    def traffic(self, name: str, shape: tuple[int, ...]) -> int:
        """Adds up the bytes of arrays of a shape in a computation and the loops in it; see `loop_traffic`."""
        body, size = self.bodies[name], 0
        for instruction in body.values():
            if instruction.opcode == "while":
                size += self.traffic(_attribute(instruction, "body"), shape)
            elif not instruction.opcode.endswith("-start") and not _is_free(instruction):
                types = [instruction.type, *(body[name].type for name in instruction.operands if name in body)]
                for dtype, dims, layout in re.findall(rf"{_ARRAY.pattern}(\{{[^}}]*\}})?", " ".join(types)):
                    found = tuple(int(n) for n in dims.split(",") if n)
                    size += array_bytes(dtype, found) if found == shape and "S(1)" not in layout else 0
        return size

    def _moved(self, body: dict[str, _Instruction], instruction: _Instruction) -> int:
        """Returns the bytes that a kernel reads and writes."""
        operands = [body[operand] for operand in instruction.operands if operand in body]
        if instruction.opcode != "fusion":
            return _bytes(instruction.type) + sum(_bytes(operand.type) for operand in operands)
        fused = self.bodies[_CALLED.findall(instruction.attributes)[0]]
        parameters = {int(i.text): i.name for i in fused.values() if i.opcode == "parameter"}
        read = sum(_read(fused, parameters[n], _bytes(operand.type)) for n, operand in enumerate(operands))
        return read + sum(_written(fused, result) for result in _results(fused))

    # --- how often a loop runs

    def trip_count(self, name: str, loop: _Instruction) -> int | None:
        """Returns the trip count that XLA states, or works it out; None if it depends on data.

        A loop that counts up has three constants: the start of its counter, the step and the bound.
        """
        if stated := re.search(r'"known_trip_count":\{"n":"?(\d+)', loop.attributes):
            return int(stated[1])
        condition, body = self.bodies[_attribute(loop, "condition")], self.bodies[_attribute(loop, "body")]
        test = _root(condition)
        if test.opcode != "compare" or "direction=LT" not in test.attributes:
            return None
        counter, bound = (_source(condition, operand) for operand in test.operands)
        if counter.opcode != "get-tuple-element":
            return None
        counter_index = _index(counter)
        start = self._initial(name, loop, counter_index)
        end = _constant(bound)
        if end is None and bound.opcode == "get-tuple-element":
            end = self._initial(name, loop, _index(bound))  # the loop carries it unchanged
        step = self._increment(body, counter_index)
        if start is None or end is None or not step:
            return None
        return max(0, -(-(end - start) // step))

    def _initial(self, name: str, loop: _Instruction, index: int) -> int | None:
        """Returns the constant that an element of a loop's state starts from; None if it is not constant."""
        body = self.bodies[name]
        state = _source(body, loop.operands[0])
        return _constant(_source(body, state.operands[index])) if state.opcode == "tuple" else None

    def _increment(self, body: dict[str, _Instruction], index: int) -> int | None:
        """Returns the constant that each pass adds to an element of a loop's state; None if there is no such one."""
        root = _root(body)
        if root.opcode != "tuple":
            return None
        update = _source(body, root.operands[index])
        if update.opcode == "fusion":
            fused = self.bodies[_CALLED.findall(update.attributes)[0]]
            arguments = {f"parameter({i})": body[operand] for i, operand in enumerate(update.operands)}
            update = _root(fused)
            sources = [_source(fused, operand) for operand in update.operands]
            sources = [arguments.get(f"parameter({s.text})", s) if s.opcode == "parameter" else s for s in sources]
        else:
            sources = [_source(body, operand) for operand in update.operands]
        if update.opcode != "add":
            return None
        elements = [s for s in sources if s.opcode == "get-tuple-element" and _index(s) == index]
        steps = [step for s in sources if (step := _constant(s)) is not None]
        return steps[0] if len(elements) == len(steps) == 1 else None


def _is_free(instruction: _Instruction) -> bool:
    """Returns True if an instruction starts nothing on a device."""
    return instruction.opcode in _FREE or 'custom_call_target="AllocateBuffer"' in instruction.attributes


def _results(fused: dict[str, _Instruction]) -> list[_Instruction]:
    root = _root(fused)
    return [fused[operand] for operand in root.operands] if root.opcode == "tuple" else [root]


def _read(fused: dict[str, _Instruction], name: str, size: int) -> int:
    """Returns the bytes that a fusion reads of a parameter of that size."""
    read = 0
    for user in (i for i in fused.values() if name in i.operands):
        if user.opcode in ("dynamic-slice", "slice", "gather") and user.operands[0] == name:
            read += _bytes(user.type)
        elif user.opcode == "dynamic-update-slice" and user.operands[0] == name:
            continue  # what it keeps lies where it is
        elif user.opcode in _PASS_THROUGH or user.opcode == "bitcast":
            read += _read(fused, user.name, size)
        else:
            read += size
    return min(read, size)


def _written(fused: dict[str, _Instruction], result: _Instruction) -> int:
    while result.opcode in ("bitcast", "copy") and result.operands[0] in fused:
        result = fused[result.operands[0]]
    if result.opcode == "dynamic-update-slice":
        return _bytes(fused[result.operands[1]].type)
    return _bytes(result.type)


def _parse(line: str) -> _Instruction | None:
    """Reads one line of a module; returns None if it holds no instruction."""
    match = re.match(r"\s+(ROOT )?%?([\w.-]+) = ", line)
    if match is None:
        return None
    definition = line[match.end() :]  # type, opcode, operands in brackets, attributes
    end = _closing(definition, 0) + 1 if definition.startswith("(") else definition.index(" ")
    opcode = re.match(r"\s*([\w-]+)\(", definition[end:])
    if opcode is None:
        return None
    opening = end + opcode.end() - 1
    closing = _closing(definition, opening)
    text = definition[opening + 1 : closing]
    operands = tuple(re.findall(r"%([\w.-]+)", text))
    return _Instruction(
        match[2], definition[:end], opcode[1], operands, text, definition[closing + 1 :], bool(match[1])
    )


def _closing(text: str, opening: int) -> int:
    """Returns the index of the bracket that closes the one at `opening`."""
    depth = 0
    for bracket in re.compile(r"[()]").finditer(text, opening):
        depth += 1 if bracket[0] == "(" else -1
        if not depth:
            return bracket.start()
    raise ValueError(f"a bracket is not closed: {text[:200]}")


def _source(body: dict[str, _Instruction], name: str) -> _Instruction:
    """Returns the instruction that makes a value, skipping those that only copy, convert or reshape it."""
    instruction = body[name]
    while instruction.opcode in _PASS_THROUGH:
        instruction = body[instruction.operands[0]]
    return instruction


def _root(body: dict[str, _Instruction]) -> _Instruction:
    return next(instruction for instruction in body.values() if instruction.root)


def _constant(instruction: _Instruction) -> int | None:
    is_integer = instruction.opcode == "constant" and re.fullmatch(r"-?\d+", instruction.text)
    return int(instruction.text) if is_integer else None


def _attribute(instruction: _Instruction, name: str) -> str:
    match = re.search(rf"\b{name}=%?([\w.-]+)", instruction.attributes)
    assert match is not None, f"{instruction.name} has no {name}"
    return match[1]


def _index(instruction: _Instruction) -> int:
    return int(_attribute(instruction, "index"))


def _op_name(instruction: _Instruction) -> str:
    match = re.search(r'op_name="([^"]*)"', instruction.attributes)
    return match[1] if match else ""


def _output_arrays(instruction: _Instruction) -> list[tuple[str, tuple[int, ...]]]:
    """Returns the output arrays of a collective. The type of most kinds' `-start` lists the inputs before them."""
    arrays, count = _arrays(instruction.type), len(instruction.operands)
    started = instruction.opcode.endswith("-start") and len(arrays) >= 2 * count
    return arrays[count : 2 * count] if started else arrays


def _arrays(type_: str) -> list[tuple[str, tuple[int, ...]]]:
    """Returns dtype and shape of each array of a type, tuples flattened."""
    return [(dtype, tuple(int(n) for n in dims.split(",") if n)) for dtype, dims in _ARRAY.findall(type_)]


def _shapes(type_: str) -> tuple[tuple[int, ...], ...]:
    return tuple(shape for _, shape in _arrays(type_))


def _bytes(type_: str) -> int:
    return sum(array_bytes(*array) for array in _arrays(type_))


def array_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Returns the bytes of an array; `dtype` is XLA's name of its type (`bf16`, `s32`, `pred`)."""
    bits = re.search(r"\d+", dtype)
    width = {"pred": 8, "token": 0}.get(dtype, int(bits[0]) if bits else 0)
    return -(-math.prod(shape) * width // 8)
