"""Lays out groups of responses in rows: a sequence of tokens, and a mask of one integer per key.

Only this file knows how prefix sharing and packing are laid out; model, loss and trainer work on its arrays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from jax_simpo.data.groups import Group, GroupLengths
from jax_simpo.data.tree import lay_out


@dataclass(frozen=True)
class RowShape:
    """The static shape of a row: L tokens, T targets, R response slots."""

    length: int
    targets: int
    responses: int


@dataclass(frozen=True)
class RowBatch:
    """B rows, all arrays int32.

    Attributes:
        tokens: input token ids; padding 0.
        positions: RoPE position of each token in its own response's sequence; padding 0.
        key_end: key `k` is visible to query `q` iff `k <= q < key_end[k]`; padding 0.
        target_index: index in the row of the hidden state that predicts the target.
        target_token: the token predicted.
        target_response: response slot of the target; padding targets point at slot R, which is thrown away. Targets in
            the prompt of the response in slot s, if the rows have such targets, point at slot R + 1 + s.
        response_group: number of the response's group in the step, -1 for an empty slot.
        response_rank: rank of the response in its group, 0 for the best; tied responses have the same.
    """

    tokens: Int[np.ndarray, "B L"]
    positions: Int[np.ndarray, "B L"]
    key_end: Int[np.ndarray, "B L"]
    target_index: Int[np.ndarray, "B T"]
    target_token: Int[np.ndarray, "B T"]
    target_response: Int[np.ndarray, "B T"]
    response_group: Int[np.ndarray, "B R"]
    response_rank: Int[np.ndarray, "B R"]

    @classmethod
    def empty(cls, rows: int, shape: RowShape) -> RowBatch:
        """Makes rows without content: every token is padding, every slot empty."""
        widths = {"target": shape.targets, "response": shape.responses}
        batch = cls(
            **{f.name: np.zeros((rows, widths.get(f.name.split("_")[0], shape.length)), np.int32) for f in fields(cls)}
        )
        batch.target_response.fill(shape.responses)
        batch.response_group.fill(-1)
        return batch

    def arrays(self) -> dict[str, Int[np.ndarray, "B _"]]:
        """Returns the arrays by field name."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def rows(self, start: int, stop: int) -> RowBatch:
        """Returns the rows from `start` to `stop` as views."""
        return RowBatch(**{name: array[start:stop] for name, array in self.arrays().items()})

    @property
    def response_place(self) -> Int[np.ndarray, "B R"]:
        """The place of each slot's response among those of its group, best first."""
        slot = np.broadcast_to(np.arange(self.response_group.shape[1]), self.response_group.shape)
        is_first = np.diff(self.response_group, axis=1, prepend=-2) != 0
        return slot - np.maximum.accumulate(np.where(is_first, slot, 0), axis=1)

    @property
    def input_tokens(self) -> int:
        """Number of tokens that are not padding; only padding has a `key_end` of 0."""
        return int(np.count_nonzero(self.key_end))


def build_rows(
    rows: Sequence[Sequence[tuple[int, Group]]],
    shape: RowShape,
    *,
    prefix_sharing: bool,
    prompt_targets: bool = False,
) -> RowBatch:
    """Lays out each row's groups one after the other; a row may be empty.

    Args:
        rows: per row, the groups it holds, each with its number in the step.
        shape: the size of every row.
        prefix_sharing: lays out the common prefixes of a group's input sequences once; False shares nothing.
        prompt_targets: lists the tokens of the best response's prompt, but the first, as targets too.

    Raises:
        ValueError: a row's groups do not fit its shape (a bug in the step plan, which packs by the same lengths).
    """
    batch = RowBatch.empty(len(rows), shape)
    for b, groups in enumerate(rows):
        writer = _RowWriter(batch.rows(b, b + 1), shape)
        for number, group in groups:
            writer.add(number, group, prefix_sharing, prompt_targets)
    return batch


class Slots(NamedTuple):
    """The response in each slot of B rows, int32.

    Attributes:
        group: number of its group in the step, -1 for an empty slot.
        place: its place among the responses of its group, best first.
    """

    group: Int[np.ndarray, "B R"]
    place: Int[np.ndarray, "B R"]


def response_slots(rows: Sequence[Sequence[int]], lengths: GroupLengths, shape: RowShape) -> Slots:
    """Computes the slots of rows from the numbers of their groups, so that a process need not build all rows.

    The order is that of `build_rows`: group after group, and of each the responses from the best on.

    Args:
        rows: per row, the numbers of its groups in the step.
        lengths: the lengths of the groups of the step.
        shape: the size of every row.
    """
    slots = Slots(np.full((len(rows), shape.responses), -1, np.int32), np.zeros((len(rows), shape.responses), np.int32))
    for b, groups in enumerate(rows):
        sizes = lengths.sizes[list(groups)]
        first = np.repeat(np.cumsum(sizes) - sizes, sizes)
        slots.group[b, : len(first)] = np.repeat(np.array(groups, np.int32), sizes)
        slots.place[b, : len(first)] = np.arange(len(first)) - first
    return slots


class _RowWriter:
    """Fills one row from left to right."""

    def __init__(self, row: RowBatch, shape: RowShape) -> None:
        self.row = {name: array[0] for name, array in row.arrays().items()}
        self.shape = shape
        self.length = self.targets = self.responses = 0

    def add(self, number: int, group: Group, prefix_sharing: bool, prompt_targets: bool) -> None:
        tree = lay_out([r.inputs for r in group.responses], share=prefix_sharing)
        targets = sum(r.length for r in group.responses)
        targets += group.best.prompt_length - 1 if prompt_targets else 0
        self._check_room(self.length + tree.length, targets, len(group.responses))

        for node in tree.nodes:
            start = self.length + node.start
            stop = start + node.stop - node.first
            self.row["tokens"][start:stop] = group.responses[node.sequence].ids[node.first : node.stop]
            self.row["positions"][start:stop] = np.arange(node.first, node.stop)
            self.row["key_end"][start:stop] = self.length + node.end
        for place, response in enumerate(group.responses):
            # The token x[j] is predicted at input j - 1.
            predictors = self.length + tree.indices(place)
            if prompt_targets and place == 0:
                prompt = response.ids[1 : response.prompt_length]
                self._write_targets(predictors[: len(prompt)], prompt, self.shape.responses + 1 + self.responses)
            self._write_targets(predictors[response.scored - 1], response.targets, self.responses)
            self.row["response_group"][self.responses] = number
            self.row["response_rank"][self.responses] = group.ranks[place]
            self.responses += 1
        self.length += tree.length

    def _check_room(self, end: int, targets: int, responses: int) -> None:
        needed = RowShape(end, self.targets + targets, self.responses + responses)
        if (
            needed.length > self.shape.length
            or needed.targets > self.shape.targets
            or needed.responses > self.shape.responses
        ):
            raise ValueError(f"the groups of a row need {needed}, but the row has {self.shape}")

    def _write_targets(self, index: Int[np.ndarray, " N"], tokens: Int[np.ndarray, " N"], slot: int) -> None:
        stop = self.targets + len(tokens)
        self.row["target_index"][self.targets : stop] = index
        self.row["target_token"][self.targets : stop] = tokens
        self.row["target_response"][self.targets : stop] = slot
        self.targets = stop
