"""How much memory a compiled program is given, from the compiler's own list of allocations.

`memory_analysis()` has sums, but a TPU's `temp_size_in_bytes` adds up arrays that lie in the same place at different
times: for Llama-3 8B on 256 v5e chips it says 11.0 GiB where the program is given 7.0. The list is a protocol buffer
(`BufferAssignmentProto` of xla/service/hlo.proto), of which three numbers of each allocation are read here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

_ALLOCATIONS = 3  # field of BufferAssignmentProto
_SIZE, _THREAD_LOCAL, _COLOR = 2, 3, 8  # fields of BufferAllocationProto


def program_bytes(memory: Any) -> int:
    """Bytes of device memory of a program: arguments, results, temporaries and the program itself.

    Args:
        memory: `jax.stages.Compiled.memory_analysis()`.
    """
    code = memory.generated_code_size_in_bytes
    listed = bytes(getattr(memory, "serialized_buffer_assignment_proto", b""))
    if not listed:  # not every compiler gives it
        size = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
        return size + memory.temp_size_in_bytes + code
    allocations = (dict(_fields(value)) for field, value in _fields(listed) if field == _ALLOCATIONS)
    # Thread-local ones are on a stack; other colors are other memories (on a TPU: vector memory, scalar memory, host).
    on_device = (a for a in allocations if not a.get(_THREAD_LOCAL) and not a.get(_COLOR))
    return sum(a.get(_SIZE, 0) for a in on_device) + code


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """The fields of a protocol buffer message: numbers as int, everything else as bytes.

    https://protobuf.dev/programming-guides/encoding
    """
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        field, kind = key >> 3, key & 7
        if kind == 0:
            value, at = _varint(message, at)
            yield field, value
            continue
        if kind == 2:
            size, at = _varint(message, at)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise ValueError(f"not a protocol buffer message: wire type {kind} at byte {at}")
        yield field, message[at : at + size]
        at += size


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
