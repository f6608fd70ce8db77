"""Stands in for jaxtyping where that is missing: annotations name shapes that nothing reads at run time.

`benchmarks/gpu.sh` puts this folder on the path of Python only where the real package cannot be imported.
"""

from __future__ import annotations

from typing import Any

Array = Any


class _Shaped:
    """Takes an annotation such as `Float[Array, "B L"]` for the type of its array."""

    def __class_getitem__(cls, of: tuple[Any, str]) -> Any:
        return of[0]


Bool = Float = Int = Shaped = _Shaped
