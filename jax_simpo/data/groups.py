"""The tokenised answers to one prompt, best first, and the lengths from which a step plan is made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
from jaxtyping import Int

from jax_simpo.data.tree import common_prefix_length, lay_out


@dataclass(frozen=True)
class Response:
    """One answer with the prompt it follows, as token ids, and which of the ids are scored.

    `ids[:-1]` are the model's inputs, and the scored ids are its targets. Usually these are all ids after the prompt.
    An answer of several turns may have tokens in between that are not the model's own, such as the user's; they are
    inputs alone.

    Attributes:
        ids: int32 [N].
        spans: the scored ids, as the start and stop of each run of them, in order.
    """

    ids: Int[np.ndarray, " N"]
    spans: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        bounds = [bound for span in self.spans for bound in span]
        edges = [0, *bounds, len(self.ids) + 1]
        if not bounds or any(a >= b for a, b in pairwise(edges)):
            raise ValueError(
                f"a response needs at least one prompt token before it and one token of its own; got {len(self.ids)} "
                f"ids of which {self.spans} are scored"
            )

    @classmethod
    def after(cls, prompt_length: int, ids: Int[np.ndarray, " N"]) -> Response:
        """Makes a response of which all ids after the first `prompt_length` are scored."""
        return cls(ids, ((prompt_length, len(ids)),))

    @property
    def prompt_length(self) -> int:
        """The number of ids before the first that is scored.

        It belongs to the response, not to the group: if the last prompt token merges with one of the answers, their
        numbers differ.
        """
        return self.spans[0][0]

    @property
    def inputs(self) -> Int[np.ndarray, " N-1"]:
        """All ids but the last, int32 [N-1]."""
        return self.ids[:-1]

    @property
    def length(self) -> int:
        """The number of scored ids."""
        return sum(stop - start for start, stop in self.spans)

    @property
    def scored(self) -> Int[np.ndarray, " T"]:
        """The indices of the scored ids, int64 [T]."""
        runs = [np.arange(start, stop) for start, stop in self.spans]
        return runs[0] if len(runs) == 1 else np.concatenate(runs)

    @property
    def targets(self) -> Int[np.ndarray, " T"]:
        """The scored ids, int32 [T]."""
        return self.ids[self.scored]


@dataclass(frozen=True)
class Group:
    """The responses to one prompt, best first. A pair is a group of two: the chosen and the rejected response.

    Attributes:
        responses: the responses.
        ranks: the rank of each response, from 0 for the best, ascending; responses of equal rank are tied. Without
            ranks every response has one of its own.
        scores: the score of each response, if the data has scores.
    """

    responses: tuple[Response, ...]
    ranks: tuple[int, ...] = ()
    scores: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if not self.ranks:
            object.__setattr__(self, "ranks", tuple(range(len(self.responses))))
        rises = [b - a for a, b in pairwise((0, *self.ranks))]
        if len(self.ranks) != len(self.responses) or not set(rises) <= {0, 1}:
            raise ValueError(f"{len(self.responses)} responses have the ranks {self.ranks}; expected 0, ... in order")
        if self.scores is not None and len(self.scores) != len(self.responses):
            raise ValueError(f"{len(self.responses)} responses have {len(self.scores)} scores")

    @property
    def best(self) -> Response:
        """The first of the best responses: of a pair, the chosen one."""
        return self.responses[0]


@dataclass(frozen=True)
class GroupLengths:
    """The token counts of G groups with R responses in all, from which rows are packed, int32
    where nothing else is said.

    Attributes:
        sizes: the number of responses of each group.
        tree_tokens: tokens of each group's inputs where every common prefix is laid out once.
        tree_visible: pairs of a query and a visible key in that layout, int64.
        tree_predictors: inputs in that layout that predict a target.
        ranks: the rank of each response in its group.
        inputs: input tokens of each response, which are its ids without the last.
        prompts: ids before the first scored id of each response.
        targets: scored ids of each response.
    """

    sizes: Int[np.ndarray, " G"]
    tree_tokens: Int[np.ndarray, " G"]
    tree_visible: Int[np.ndarray, " G"]
    tree_predictors: Int[np.ndarray, " G"]
    ranks: Int[np.ndarray, " R"]
    inputs: Int[np.ndarray, " R"]
    prompts: Int[np.ndarray, " R"]
    targets: Int[np.ndarray, " R"]

    def __len__(self) -> int:
        return len(self.sizes)

    @staticmethod
    def of(groups: Sequence[Group]) -> GroupLengths:
        """Measures groups that are already in memory."""
        responses = [(rank, r) for group in groups for rank, r in zip(group.ranks, group.responses, strict=True)]
        columns = [(rank, len(r.inputs), r.prompt_length, r.length) for rank, r in responses]
        tokens, visible, predictors = np.array([_measure_tree(g) for g in groups], np.int64).reshape(-1, 3).T
        return GroupLengths(
            np.array([len(group.responses) for group in groups], np.int32),
            tokens.astype(np.int32),
            visible,
            predictors.astype(np.int32),
            *np.array(columns, np.int32).reshape(-1, 4).T,
        )

    @property
    def noun(self) -> str:
        """Names these groups: "pairs" if each has two responses, "groups" otherwise."""
        return "pairs" if np.all(self.sizes == 2) else "groups"

    @cached_property
    def starts(self) -> Int[np.ndarray, " G"]:
        """The number of the first response of each group, which is its best; int64."""
        return np.cumsum(self.sizes, dtype=np.int64) - self.sizes

    def of_groups(self, indices: Int[np.ndarray, " H"]) -> GroupLengths:
        """Selects the lengths of the groups at `indices`."""
        responses = self.responses_of(indices)
        of_groups = (self.sizes, self.tree_tokens, self.tree_visible, self.tree_predictors)
        of_responses = (self.ranks, self.inputs, self.prompts, self.targets)
        return GroupLengths(*(column[indices] for column in of_groups), *(column[responses] for column in of_responses))

    def responses_of(self, indices: Int[np.ndarray, " H"]) -> Int[np.ndarray, " S"]:
        """Returns the numbers of all responses of the groups at `indices`, group after group, int64."""
        sizes = self.sizes[indices]
        first = np.repeat(self.starts[indices] - (np.cumsum(sizes) - sizes), sizes)
        return first + np.arange(len(first))

    def by_group(self, values: np.ndarray, empty: float) -> np.ndarray:
        """Arranges numbers of all responses [R] by group, [G, most responses of a group]; `empty` fills the rest."""
        arranged = np.full((len(self), self.sizes.max(initial=0)), empty, values.dtype)
        group = np.repeat(np.arange(len(self)), self.sizes)
        arranged[group, np.arange(len(group)) - self.starts[group]] = values
        return arranged

    def row_tokens(self, prefix_sharing: bool) -> Int[np.ndarray, " G"]:
        """Counts the tokens of each group in a row: all inputs, or those of the tree if prefixes are shared."""
        return self.tree_tokens if prefix_sharing else self._of_groups(self.inputs)

    def row_targets(self, prompt: bool = False) -> Int[np.ndarray, " G"]:
        """Counts the targets of each group in a row. Shared targets are listed once for each response.

        `prompt` adds the tokens of the best response's prompt but the first.
        """
        responses = self._of_groups(self.targets)
        return responses + self.prompts[self.starts] - 1 if prompt else responses

    def best_targets(self, prompt: bool = False) -> Int[np.ndarray, " G"]:
        """Counts the targets of each group's best response; `prompt` adds those of its prompt."""
        targets = self.targets[self.starts]
        return targets + self.prompts[self.starts] - 1 if prompt else targets

    def _of_groups(self, counts: Int[np.ndarray, " R"]) -> Int[np.ndarray, " G"]:
        return np.add.reduceat(counts, self.starts, dtype=np.int32) if len(self) else np.zeros(0, np.int32)


def _measure_pair(a: Response, b: Response) -> tuple[int, int, int]:
    """Returns what `_measure_tree` does, several times as fast, for two responses whose ids are all scored."""
    shared, lengths = common_prefix_length(a.inputs, b.inputs), [len(r.inputs) for r in (a, b)]
    tokens = sum(lengths) - shared
    visible = sum(n * (n + 1) for n in lengths) - shared * (shared + 1)
    # The predictors of a response begin with its last prompt token. Those within the shared prefix count once.
    twice = max(shared - (max(a.prompt_length, b.prompt_length) - 1), 0)
    return tokens, visible // 2, a.length + b.length - twice


def _measure_tree(group: Group) -> tuple[int, int, int]:
    """Returns the tokens, the visible pairs of query and key, and the predictors of targets in a group's tree."""
    if len(group.responses) == 2 and all(r.spans == ((r.prompt_length, len(r.ids)),) for r in group.responses):
        return _measure_pair(*group.responses)
    tree = lay_out([r.inputs for r in group.responses])
    visible = sum(node.stop * (node.stop + 1) - node.first * (node.first + 1) for node in tree.nodes) // 2
    predicts = np.zeros(tree.length, bool)
    for response, path in zip(group.responses, tree.paths, strict=True):
        for node in (tree.nodes[number] for number in path):
            for start, stop in response.spans:  # the token x[j] is predicted at input j - 1
                first, last = max(start - 1, node.first), min(stop - 1, node.stop)
                if first < last:
                    predicts[node.start + first - node.first : node.start + last - node.first] = True
    return tree.length, visible, int(np.count_nonzero(predicts))
