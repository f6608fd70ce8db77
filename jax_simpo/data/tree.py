"""Lays token sequences out as the radix tree of their common prefixes, depth first, every distinct token once.

A token is visible to the tokens of its subtree, which follow it without a gap. So where a subtree ends is all that a
mask needs to know.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Int


class Node(NamedTuple):
    """Neighbouring tokens that the same sequences have in common.

    Attributes:
        sequence: a sequence that holds the tokens: the first of those that do.
        first: the place of the first token in that sequence, which is its depth in the tree.
        stop: the place after the last token.
        start: the index of the first token in the layout.
        end: the index after the last token of the subtree.
    """

    sequence: int
    first: int
    stop: int
    start: int
    end: int


@dataclass(frozen=True)
class Tree:
    """The layout of some sequences.

    Attributes:
        nodes: the nodes in the order of their tokens.
        paths: for each sequence, the numbers of its nodes, from the root.
    """

    nodes: Sequence[Node]
    paths: Sequence[Sequence[int]]

    @property
    def length(self) -> int:
        """The number of tokens, each distinct one counted once."""
        return sum(node.stop - node.first for node in self.nodes)

    def savings(self) -> list[int]:
        """Counts the tokens that are not laid out again, by level: the root's, its children's, and so on."""
        levels = [level for path in self.paths for level, _ in enumerate(path)]
        saved = [0] * (max(levels, default=-1) + 1)
        first: set[int] = set()
        for path in self.paths:
            for level, number in enumerate(path):
                if number in first:
                    saved[level] += self.nodes[number].stop - self.nodes[number].first
                first.add(number)
        return saved

    def indices(self, sequence: int) -> Int[np.ndarray, " N"]:
        """Returns the index in the layout of every token of a sequence, int64."""
        nodes = [self.nodes[number] for number in self.paths[sequence]]
        return np.concatenate([np.zeros(0, np.int64), *(np.arange(n.start, n.start + n.stop - n.first) for n in nodes)])


def common_prefix_length(a: Int[np.ndarray, " A"], b: Int[np.ndarray, " B"]) -> int:
    """Counts the leading ids that two sequences have in common."""
    n = min(len(a), len(b))
    differs = np.flatnonzero(a[:n] != b[:n])
    return int(differs[0]) if differs.size else n


def lay_out(sequences: Sequence[Int[np.ndarray, " _"]], *, share: bool = True) -> Tree:
    """Lays sequences out as a tree. Of the branches of a node, that of the earliest sequence comes first.

    Args:
        sequences: token ids; some may be equal, or begin with others, or have nothing in common.
        share: False lays out every sequence by itself, one after the other.
    """
    layout = _Layout(sequences)
    if share:
        layout.place(list(range(len(sequences))), 0)
    else:
        for number in range(len(sequences)):
            layout.place([number], 0)
    nodes = [Node(*node, end) for node, end in zip(layout.nodes, layout.ends, strict=True)]
    return Tree(nodes, layout.paths)


class _Layout:
    """A tree that is being laid out."""

    def __init__(self, sequences: Sequence[Int[np.ndarray, " _"]]) -> None:
        self.sequences = sequences
        self.nodes: list[tuple[int, int, int, int]] = []
        self.ends: list[int] = []
        self.paths: list[list[int]] = [[] for _ in sequences]
        self.length = 0

    def place(self, members: list[int], depth: int) -> None:
        """Lays out the sequences `members` from `depth` on; what is before it they have in common.

        The first of them is a path through their tree, which every other one leaves somewhere. So each is compared with
        the first alone, and those that leave it together make a tree of their own.
        """
        first, *others = members
        own = self.sequences[first]
        leaves = {n: depth + common_prefix_length(own[depth:], self.sequences[n][depth:]) for n in others}
        places = sorted({*leaves.values(), len(own)})
        on_path = {}  # the node of the path that ends where some sequences leave it
        start = depth
        for place in places:
            if place > start:
                on_path[place] = self._add_node(
                    first, start, place, [first, *(n for n in others if leaves[n] >= place)]
                )
            start = place
        for place in reversed(places):
            branches: dict[int, list[int]] = {}
            for n in others:
                if leaves[n] == place < len(self.sequences[n]):
                    branches.setdefault(int(self.sequences[n][place]), []).append(n)
            for branch in branches.values():
                self.place(branch, place)
            if place in on_path:
                self.ends[on_path[place]] = self.length

    def _add_node(self, sequence: int, first: int, stop: int, members: list[int]) -> int:
        number = len(self.nodes)
        self.nodes.append((sequence, first, stop, self.length))
        self.ends.append(0)
        for member in members:
            self.paths[member].append(number)
        self.length += stop - first
        return number
