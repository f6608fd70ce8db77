"""The backends of the loss head: what one consists of, and the registry of those there are.

A backend makes tiles of logits: some states by a block of the vocabulary. It returns what the rest of the head needs of
them, which is never the logits themselves. To add one, write a file that ends with `BACKEND = Backend(...)` and add its
line to `BACKENDS`. All compute the same numbers; `xla` is the one that runs anywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jax_simpo.ops.attention.backends import Place
from jax_simpo.ops.loss_head.blocks import Block, Blocks
from jax_simpo.ops.loss_head.states import StateList

# A backend's name in a config, and its module, which is imported when the backend is first asked for.
BACKENDS = {
    "xla": "jax_simpo.ops.loss_head.xla",
    "triton": "jax_simpo.ops.loss_head.triton",
    "mosaic": "jax_simpo.ops.loss_head.mosaic",
}


class Rule(NamedTuple):
    """Holds the static settings of a tile.

    Attributes:
        softcap: caps the logits, `softcap * tanh(logits / softcap)`; None for no cap.
        keeps: return the logits of the forward pass too. Only `xla` is asked to.
        interpret: run kernels on the CPU, for tests.
    """

    softcap: float | None
    keeps: bool = False
    interpret: bool = False


class Sums(NamedTuple):
    """Holds of every listed state what its log-sum-exp is made of; the rest of the list has no meaning.

    Attributes:
        top: a number that is at least nearly as large as the state's largest logit.
        total: the sum of `exp(logit - top)`.
        kept: the logits of every block, or `nothing_kept()`.
    """

    top: Float[Array, " N"]
    total: Float[Array, " N"]
    kept: Float[Array, "K N S"]


def nothing_kept() -> Float[Array, "1 1 1"]:
    """Stands for logits that are not kept, with their number of axes."""
    return jax.lax.empty((1, 1, 1), jnp.float32)


class Wanted(NamedTuple):
    """Holds what the gradient of a tile's logits is made of, for each state. K is `states.SHARED`.

    Attributes:
        token: its targets, counted from the start of this device's part of the vocabulary; -1 for none.
        dlogp: the gradient of their log-probs.
        lse: its log-sum-exp; infinite for padding.
    """

    token: Int[Array, "C K"]
    dlogp: Float[Array, "C K"]
    lse: Float[Array, " C"]


@dataclass(frozen=True)
class Backend:
    """One way to make the tiles, as four functions. Under a mesh they run inside `shard_map`, on one device's part.

    With z a capped logit and p its probability, `exp(z - lse)`, the gradient of z is dlogp where the entry is a target,
    less p times the sum of the state's dlogps; that of the product of state and head is this times the cap's slope.

    Attributes:
        tile: `tile()` returns how many states and how many logits a tile of the backward pass has where nothing else is
            asked for.
        sums: `sums(states, head, listing, blocks, rule)` goes through the whole vocabulary.
        dlogits: `dlogits(states, weights, wanted, block, blocks, rule, kept)` returns the gradient of the products of a
            tile, [C, S], in the states' dtype; 0 at entries that are not the block's own. `kept` are the tile's logits,
            or None.
        obstacle: `obstacle(place, width)` says why the backend cannot run there with states of this width, and returns
            None where it can. The text goes on after the backend's name.
    """

    tile: Callable[[], tuple[int, int]]
    sums: Callable[[Array, Array, StateList, Blocks, Rule], Sums]
    dlogits: Callable[[Array, Array, Wanted, Block, Blocks, Rule, Array | None], Array]
    obstacle: Callable[[Place, int], str | None]


def load_backend(name: str) -> Backend:
    """Imports a backend.

    Args:
        name: one of `BACKENDS`.

    Raises:
        ValueError: no backend has that name.
    """
    if name not in BACKENDS:
        raise ValueError(f"loss head backend {name!r} is not one of {', '.join(BACKENDS)}")
    backend: Backend = import_module(BACKENDS[name]).BACKEND
    return backend
