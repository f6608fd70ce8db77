"""Lays out preference pairs in rows: a sequence of tokens, and a mask of one integer per key.

Only this file knows how prefix sharing and packing are laid out; model, loss and trainer work on its arrays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from jax_simpo.data.pairs import TokenizedPair, common_prefix_length


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
        response_pair: pair number in the step, -1 for an empty slot.
        response_rank: 0 chosen, 1 rejected, further ranks for longer lists.
    """

    tokens: Int[np.ndarray, "B L"]
    positions: Int[np.ndarray, "B L"]
    key_end: Int[np.ndarray, "B L"]
    target_index: Int[np.ndarray, "B T"]
    target_token: Int[np.ndarray, "B T"]
    target_response: Int[np.ndarray, "B T"]
    response_pair: Int[np.ndarray, "B R"]
    response_rank: Int[np.ndarray, "B R"]

    @classmethod
    def empty(cls, rows: int, shape: RowShape) -> RowBatch:
        """Makes rows without content: every token is padding, every slot empty."""
        widths = {"target": shape.targets, "response": shape.responses}
        batch = cls(
            **{f.name: np.zeros((rows, widths.get(f.name.split("_")[0], shape.length)), np.int32) for f in fields(cls)}
        )
        batch.target_response.fill(shape.responses)
        batch.response_pair.fill(-1)
        return batch

    def arrays(self) -> dict[str, Int[np.ndarray, "B _"]]:
        """Returns the arrays by field name."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def rows(self, start: int, stop: int) -> RowBatch:
        """Returns the rows from `start` to `stop` as views."""
        return RowBatch(**{name: array[start:stop] for name, array in self.arrays().items()})

    @property
    def input_tokens(self) -> int:
        """Number of tokens that are not padding; only padding has a `key_end` of 0."""
        return int(np.count_nonzero(self.key_end))


def build_rows(
    rows: Sequence[Sequence[tuple[int, TokenizedPair]]],
    shape: RowShape,
    *,
    prefix_sharing: bool,
    prompt_targets: bool = False,
) -> RowBatch:
    """Lays out each row's pairs one after the other; a row may be empty.

    Args:
        rows: per row, the pairs it holds, each with its number in the step.
        shape: the size of every row.
        prefix_sharing: lays out the common prefix of a pair's input sequences once; False shares nothing.
        prompt_targets: lists the tokens of the chosen response's prompt, but the first, as targets too.

    Raises:
        ValueError: a row's pairs do not fit its shape (a bug in the step plan, which packs by the same lengths).
    """
    batch = RowBatch.empty(len(rows), shape)
    for b, pairs in enumerate(rows):
        writer = _RowWriter(batch.rows(b, b + 1), shape)
        for number, pair in pairs:
            writer.add(number, pair, prefix_sharing, prompt_targets)
    return batch


class Slots(NamedTuple):
    """The response in each slot of B rows: `response_pair` and `response_rank` of a `RowBatch`, int32."""

    pair: Int[np.ndarray, "B R"]
    rank: Int[np.ndarray, "B R"]


def response_slots(rows: Sequence[Sequence[int]], shape: RowShape) -> Slots:
    """Computes the slots of rows from the numbers of their pairs, so that a process need not build all rows.

    The order is that of `build_rows`: pair after pair, and of each the chosen response before the rejected one.
    """
    slots = Slots(np.full((len(rows), shape.responses), -1, np.int32), np.zeros((len(rows), shape.responses), np.int32))
    for b, pairs in enumerate(rows):
        slots.pair[b, : 2 * len(pairs)] = np.repeat(np.array(pairs, np.int32), 2)
        slots.rank[b, 1 : 2 * len(pairs) : 2] = 1
    return slots


class _RowWriter:
    """Fills one row from left to right."""

    def __init__(self, row: RowBatch, shape: RowShape) -> None:
        self.row = {name: array[0] for name, array in row.arrays().items()}
        self.shape = shape
        self.length = self.targets = self.responses = 0

    def add(self, number: int, pair: TokenizedPair, prefix_sharing: bool, prompt_targets: bool) -> None:
        inputs = [r.inputs for r in pair.responses]
        shared = min(common_prefix_length(inputs[0], other) for other in inputs[1:]) if prefix_sharing else 0
        start, branch = self.length, self.length + shared
        end = branch + sum(len(x) - shared for x in inputs)
        targets = sum(len(r.targets) for r in pair.responses)
        targets += pair.chosen.prompt_length - 1 if prompt_targets else 0
        self._check_room(end, targets, len(inputs))

        self._write_tokens(start, inputs[0][:shared], first_position=0, key_end=end)
        for rank, response in enumerate(pair.responses):
            branch_tokens = response.inputs[shared:]
            branch_end = branch + len(branch_tokens)
            self._write_tokens(branch, branch_tokens, first_position=shared, key_end=branch_end)
            # Input i of this response stands at start + i while shared, at branch + i - shared in its own branch; the
            # target x[j] is predicted at input j - 1.
            predictors = np.arange(len(response.inputs))
            target_index = predictors + np.where(predictors < shared, start, branch - shared)
            first = response.prompt_length - 1
            if prompt_targets and rank == 0:
                slot_of_prompt = self.shape.responses + 1 + self.responses
                self._write_targets(target_index[:first], response.ids[1 : first + 1], slot_of_prompt)
            self._write_response(number, rank, target_index[first:], response.targets)
            branch = branch_end
        self.length = end

    def _check_room(self, end: int, targets: int, responses: int) -> None:
        needed = RowShape(end, self.targets + targets, self.responses + responses)
        if (
            needed.length > self.shape.length
            or needed.targets > self.shape.targets
            or needed.responses > self.shape.responses
        ):
            raise ValueError(f"the pairs of a row need {needed}, but the row has {self.shape}")

    def _write_tokens(self, start: int, tokens: Int[np.ndarray, " N"], *, first_position: int, key_end: int) -> None:
        stop = start + len(tokens)
        self.row["tokens"][start:stop] = tokens
        self.row["positions"][start:stop] = np.arange(first_position, first_position + len(tokens))
        self.row["key_end"][start:stop] = key_end

    def _write_response(
        self, number: int, rank: int, index: Int[np.ndarray, " N"], tokens: Int[np.ndarray, " N"]
    ) -> None:
        self._write_targets(index, tokens, self.responses)
        self.row["response_pair"][self.responses] = number
        self.row["response_rank"][self.responses] = rank
        self.responses += 1

    def _write_targets(self, index: Int[np.ndarray, " N"], tokens: Int[np.ndarray, " N"], slot: int) -> None:
        stop = self.targets + len(tokens)
        self.row["target_index"][self.targets : stop] = index
        self.row["target_token"][self.targets : stop] = tokens
        self.row["target_response"][self.targets : stop] = slot
        self.targets = stop
