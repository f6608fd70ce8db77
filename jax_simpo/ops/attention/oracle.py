"""Attention in float64 on the host, with its gradients: what a backend's results on a chip are compared with.

No part of it runs on the chip, so a compiler or a kernel that is wrong there cannot hide in it. It comes with small
rows that have everything a mask can hold, and with rows as long as a run's, to time backends on.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from jax_simpo.ops.attention.backends import ScoreRule
from jax_simpo.ops.attention.mask import Room, visible_at


class Node(NamedTuple):
    """Tokens that the same sequences of a tree begin with, or go on with, and the branches after them."""

    tokens: int
    branches: tuple[Node, ...] = ()


class RowMask(NamedTuple):
    """Holds what the mask of some rows is made from.

    Attributes:
        key_end: int32, see `mask.visible_at`; 0 for padding.
        positions: int32, each token's place in its own sequence.
    """

    key_end: Int[np.ndarray, "B L"]
    positions: Int[np.ndarray, "B L"]

    @property
    def room(self) -> Room:
        """The bounds of what the rows hold. The last token of a sequence is seen by its own query alone."""
        index = np.arange(self.key_end.shape[1])
        sequences = (self.key_end == index + 1).sum(1).max()
        return Room(int(sequences), int(self.positions.max()) + 1, int((self.key_end - index).max()))

    def last_group(self) -> slice:
        """Returns where the last group of the first row stands, alone."""
        row = self.key_end[0]
        end = int(row.max())
        return slice(int(np.flatnonzero((row == end) & (self.positions[0] == 0))[0]), end)

    def part(self, tokens: slice) -> RowMask:
        """Returns these tokens of every row as rows of their own; no token before them sees, or is seen by, them."""
        return RowMask(self.key_end[:, tokens] - tokens.start, self.positions[:, tokens])

    def live_area(self, window: int | None) -> int:
        """Counts the pairs of a query and a key that it sees."""
        index = np.arange(self.key_end.shape[1])
        area = 0
        for key_end, position in zip(self.key_end, self.positions, strict=True):
            for query in np.array_split(index, -(-len(index) // 1024)):  # a slice at a time, for the memory
                positions = position[query][:, None], position[None, :]
                area += int(visible_at(query[:, None], index[None, :], key_end[None, :], *positions, window).sum())
        return area


class Results(NamedTuple):
    """The result of attention and its gradients, given the gradient of the result; arrays of JAX or of NumPy."""

    out: Float[Any, "B L H Dh"]
    dq: Float[Any, "B L H Dh"]
    dk: Float[Any, "B L K Dh"]
    dv: Float[Any, "B L K Dh"]


def small_rows() -> RowMask:
    """Returns two rows of 640 tokens: packed pairs, trees of up to four levels, a lone sequence, padding.

    With blocks of 128 there are hidden blocks, fully visible ones, and ones that are visible in part.
    """
    leaf = Node
    pair = Node(120, (leaf(270), leaf(170)))
    deep = Node(10, (leaf(20), Node(15, (leaf(25), leaf(5), leaf(15)))))
    tree = Node(150, (Node(60, (leaf(40), deep)), leaf(70), leaf(1)))
    return write_rows([[pair, leaf(60)], [tree, leaf(75), leaf(75)]], 640)


def packed_pairs(rows: int, length: int, room: Room | None = None) -> RowMask:
    """Returns rows filled with pairs of which half the tokens are the shared prompt, and padding after them.

    A pair has 1,024 tokens: fewer where the row or `room` has no place for such a pair, more where `room` has no place
    for enough of them to fill the row.

    Args:
        rows: the number of rows.
        length: tokens of a row.
        room: bounds that the rows keep; `sequences` is at least 2.
    """
    largest, most = length, length
    if room is not None:
        largest, most = min(length, room.span, room.longest * 4 // 3), room.sequences // 2
    tokens = min(largest, max(1024, length // most)) // 4 * 4
    pair = Node(tokens // 2, (Node(tokens // 4), Node(tokens // 4)))
    return write_rows([[pair] * min(most, length // tokens)] * rows, length)


def full_row(length: int) -> RowMask:
    """Returns one row of pairs of 1,024 tokens, the last of which takes the rest and ends with the row."""
    sizes = [1024] * max(1, length // 1024)
    sizes[-1] += length - sum(sizes)
    return write_rows([[Node(n // 2, (Node(n // 4), Node(n - n // 2 - n // 4))) for n in sizes]], length)


def write_rows(rows: list[list[Node]], length: int) -> RowMask:
    """Lays the trees of each row out one after the other, depth first; the rest of a row is padding."""
    key_end = np.zeros((len(rows), length), np.int32)
    positions = np.zeros((len(rows), length), np.int32)

    def write(row: int, node: Node, start: int, depth: int) -> int:
        stop = start + node.tokens
        positions[row, start:stop] = np.arange(depth, depth + node.tokens)
        end = stop
        for branch in node.branches:
            end = write(row, branch, end, depth + node.tokens)
        key_end[row, start:stop] = end
        return end

    for number, trees in enumerate(rows):
        start = 0
        for tree in trees:
            start = write(number, tree, start, 0)
    return RowMask(key_end, positions)


def exact_attention(
    q: Float[np.ndarray, "B L H Dh"],
    k: Float[np.ndarray, "B L K Dh"],
    v: Float[np.ndarray, "B L K Dh"],
    dout: Float[np.ndarray, "B L H Dh"],
    mask: RowMask,
    rule: ScoreRule,
) -> Results:
    """Computes grouped-query attention and its gradients in float64, as `dispatch.attention` defines them."""
    q, k, v, dout = (x.astype(np.float64) for x in (q, k, v, dout))
    results = Results(*(np.zeros_like(x) for x in (q, q, k, v)))
    group = q.shape[2] // k.shape[2]
    index = np.arange(q.shape[1])
    for row in range(len(q)):
        positions = mask.positions[row]
        visible = visible_at(
            index[:, None], index, mask.key_end[row], positions[:, None], positions[None, :], rule.window
        )
        for head in range(q.shape[2]):
            keys, values = k[row, :, head // group], v[row, :, head // group]
            scores = rule.scale * q[row, :, head] @ keys.T
            slope = np.ones_like(scores)
            if rule.softcap is not None:
                tanh = np.tanh(scores / rule.softcap)
                scores, slope = rule.softcap * tanh, 1 - tanh**2
            scores = np.where(visible, scores, -np.inf)
            weights = np.exp(scores - scores.max(-1, keepdims=True, initial=-1e30))
            weights /= np.maximum(weights.sum(-1, keepdims=True), 1e-300)  # padding sees no key, and gives zeros
            results.out[row, :, head] = weights @ values
            dweights = dout[row, :, head] @ values.T
            dscores = weights * (dweights - (weights * dweights).sum(-1, keepdims=True)) * slope * rule.scale
            results.dq[row, :, head] = dscores @ keys
            results.dk[row, :, head // group] += dscores.T @ q[row, :, head]
            results.dv[row, :, head // group] += weights.T @ dout[row, :, head]
    return results
