"""Says if contenders made the same step: their first losses, of the same pairs and weights, must agree.

Imports neither jax nor torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

# How far the first losses of right contenders may be apart. In float32 they have been seen 1e-5 apart. bfloat16 rounds
# a token's log-prob by some 4e-3; in the mean over a response, times beta, and over the pairs of a step, less than 1e-3
# of it is left.
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-3}


def disagreement(losses: Mapping[str, float], dtype: str) -> str | None:
    """Returns a sentence about first losses that are not the same, or None if they are.

    Args:
        losses: of the contenders.
        dtype: the compute dtype, the least precise of theirs.
    """
    values = list(losses.values())
    if all(map(math.isfinite, values)) and max(values, default=0.0) - min(values, default=0.0) <= TOLERANCE[dtype]:
        return None
    told = ", ".join(f"{name} {loss:.6g}" for name, loss in losses.items())
    return f"first losses are more than {TOLERANCE[dtype]:g} apart, which {dtype} does not explain: {told}"
