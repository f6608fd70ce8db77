"""The mask of a batch: the one rule that says which keys a query sees, and the value that takes it to the layers.

Key `k` of a row is visible to query `q` iff `k <= q < key_end[k]`; a sliding window adds
`positions[q] - positions[k] < window`. This rule makes attention causal, hides the chosen response from the rejected
one, keeps packed pairs apart, and hides padding, whose `key_end` is 0. A query that sees no key (padding) gets zeros,
in values and gradients.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


def visible_at(
    query: Int[Any, "..."],
    key: Int[Any, "..."],
    key_end: Int[Any, "..."],
    query_position: Int[Any, "..."] | None = None,
    key_position: Int[Any, "..."] | None = None,
    window: int | None = None,
) -> Bool[Any, "..."]:
    """Returns True where the query sees the key: the rule of this module. The arrays, JAX's or NumPy's, are broadcast.

    Args:
        query: int32, index of the query in its row.
        key: int32, index of the key in its row.
        key_end: int32, end (exclusive) of the queries that see the key.
        query_position: int32 RoPE position of the query; needed for a window only.
        key_position: int32 RoPE position of the key; needed for a window only.
        window: sliding window in positions, `None` for none.
    """
    visible = (key <= query) & (query < key_end)
    if window is not None:
        assert query_position is not None and key_position is not None, "a window is measured in positions"
        visible &= query_position - key_position < window
    return visible


class Room(NamedTuple):
    """Holds what is known of rows before they are made, from which backends take their static sizes.

    Attributes:
        sequences: most responses of a row.
        longest: most tokens of the input sequence of one response.
        span: most tokens of a row from a key to a query that sees it, both counted: those of the largest group.
    """

    sequences: int
    longest: int
    span: int


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("key_end", "positions", "tables"),
    meta_fields=("windows", "backend", "room", "interpret"),
)
@dataclass(frozen=True)
class Mask:
    """The mask of a batch in the form its backend reads, made once per batch by `prepare_mask`.

    Every array has the rows first, so that a mask is split over the mesh as the batch is.

    Attributes:
        key_end: int32, end (exclusive) of the queries that see each key; 0 for padding.
        positions: int32 RoPE positions, counted in each response's own sequence.
        tables: for each of `windows`, what the backend made of the mask, such as lists of live blocks.
        windows: the distinct sliding windows of the model's layers; `None` is full attention.
        backend: one of `backends.BACKENDS`.
        room: bounds of the row's contents, `None` if unknown.
        interpret: run kernels without their hardware, slowly, for tests.
    """

    key_end: Int[Array, "B L"]
    positions: Int[Array, "B L"]
    tables: tuple[Any, ...]
    windows: tuple[int | None, ...]
    backend: str
    room: Room | None
    interpret: bool

    @property
    def real(self) -> Bool[Array, "B L"]:
        """True for tokens, False for padding."""
        return self.key_end > 0

    def table(self, window: int | None) -> Any:
        """Returns the backend's table for layers with this window.

        Raises:
            ValueError: the mask was prepared for other windows.
        """
        if window not in self.windows:
            raise ValueError(f"the mask was prepared for the windows {self.windows}, and {window} is not among them")
        return self.tables[self.windows.index(window)]

    def visible(self, window: int | None = None) -> Bool[Array, "B L L"]:
        """Writes the rule out for every query and key of a row, `[row, query, key]`: L x L booleans a row."""
        index = jnp.arange(self.key_end.shape[-1])
        return visible_at(
            index[:, None],
            index[None, :],
            self.key_end[:, None, :],
            self.positions[:, :, None],
            self.positions[:, None, :],
            window,
        )
