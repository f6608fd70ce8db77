"""Reads the collectives of a compiled program, those inside loop bodies included, and how often each one runs."""

from __future__ import annotations

import re
from dataclasses import dataclass

_BYTES = {"f32": 4, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "pred": 1, "s8": 1, "u8": 1, "s64": 8, "f64": 8}
_KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


@dataclass(frozen=True)
class Collective:
    """One collective instruction: what it makes on each device, and how often a run executes it."""

    kind: str
    shapes: tuple[tuple[int, ...], ...]
    bytes: int
    times: int
    op_name: str


def collectives(hlo: str) -> list[Collective]:
    """All collectives of a compiled module's text. Loops must have a trip count that XLA knows."""
    bodies = _computations(hlo)
    entry = next(name for name, text in bodies.items() if text.startswith("ENTRY"))
    found: list[Collective] = []

    def walk(name: str, times: int) -> None:
        for line in bodies[name].splitlines()[1:]:
            if (collective := _collective(line, times)) is not None:
                found.append(collective)
            if " while(" in line:
                body = re.search(r"body=%?([\w.-]+)", line)
                count = re.search(r'"known_trip_count":\{"n":"?(\d+)', line)
                assert body is not None
                # A loop whose count depends on data (attention over live blocks) may not hold a collective at all.
                inside = len(found)
                walk(body[1], times * (int(count[1]) if count else 1))
                assert count or len(found) == inside, f"a collective in a loop of unknown length: {line[:200]}"
            else:
                for called in re.findall(r"(?:calls|to_apply|true_computation|false_computation)=%?([\w.-]+)", line):
                    if called in bodies and "reduce" not in line.split("=")[1][:60]:
                        walk(called, times)
                for group in re.findall(r"(?:branch_computations|called_computations)=\{([^}]*)\}", line):
                    for called in group.split(","):
                        walk(called.strip().lstrip("%"), times)

    walk(entry, 1)
    return found


def _computations(hlo: str) -> dict[str, str]:
    bodies = {}
    for block in re.split(r"\n(?=(?:ENTRY )?%?[\w.-]+ \([^\n]*\{\n)", hlo):
        if match := re.match(r"(?:ENTRY )?%?([\w.-]+) \(", block):
            bodies[match[1]] = block
    return bodies


def _collective(line: str, times: int) -> Collective | None:
    match = re.match(rf"\s*(?:ROOT )?%?[\w.-]+ = (.*?) ({'|'.join(_KINDS)})(?:-start)?\(", line)
    if match is None:
        return None
    arrays = re.findall(r"(\w+)\[([\d,]*)\]", match[1])
    shapes = tuple(tuple(int(n) for n in dims.split(",") if n) for _, dims in arrays)
    size = 0
    for (dtype, _), shape in zip(arrays, shapes, strict=True):
        count = _BYTES[dtype]
        for n in shape:
            count *= n
        size += count
    name = re.search(r'op_name="([^"]*)"', line)
    return Collective(match[2], shapes, size, times, name[1] if name else "")
