"""The tokenised preference pair, and the lengths from which a step plan is made."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int


@dataclass(frozen=True)
class Response:
    """One answer with the prompt it follows, as token ids.

    `ids[:-1]` are the model's inputs; `ids[prompt_length:]` are its targets. The prompt length belongs to the
    response, not to the pair: if the last prompt token merges with one of the answers, the two lengths differ.
    """

    ids: Int[np.ndarray, " N"]
    prompt_length: int

    def __post_init__(self) -> None:
        if not 1 <= self.prompt_length < len(self.ids):
            raise ValueError(
                f"a response needs at least one prompt token before it and one token of its own; got "
                f"{len(self.ids)} ids of which {self.prompt_length} are prompt"
            )

    @property
    def inputs(self) -> Int[np.ndarray, " N-1"]:
        """All ids but the last, int32 [N-1]."""
        return self.ids[:-1]

    @property
    def targets(self) -> Int[np.ndarray, " T"]:
        """The ids after the prompt, int32 [T]."""
        return self.ids[self.prompt_length :]


@dataclass(frozen=True)
class TokenizedPair:
    """The responses to one prompt, best first: rank 0 is chosen, rank 1 rejected, further ranks for longer lists."""

    responses: tuple[Response, ...]

    @property
    def chosen(self) -> Response:
        return self.responses[0]

    @property
    def rejected(self) -> Response:
        return self.responses[1]


def common_prefix_length(a: Int[np.ndarray, " A"], b: Int[np.ndarray, " B"]) -> int:
    """Counts the leading ids that two sequences have in common."""
    n = min(len(a), len(b))
    differs = np.flatnonzero(a[:n] != b[:n])
    return int(differs[0]) if differs.size else n


@dataclass(frozen=True)
class PairLengths:
    """The token counts of P pairs, from which rows are packed; all int32 [P].

    `chosen_inputs` and `rejected_inputs` count input tokens (ids without the last), `shared_inputs` the longest common
    prefix of the two input sequences, `chosen_targets` and `rejected_targets` the response tokens.
    """

    chosen_inputs: Int[np.ndarray, " P"]
    rejected_inputs: Int[np.ndarray, " P"]
    shared_inputs: Int[np.ndarray, " P"]
    chosen_targets: Int[np.ndarray, " P"]
    rejected_targets: Int[np.ndarray, " P"]

    def __len__(self) -> int:
        return len(self.chosen_inputs)

    @staticmethod
    def of(pairs: list[TokenizedPair]) -> PairLengths:
        """Measures pairs that are already in memory."""
        columns = np.array(
            [
                (
                    len(p.chosen.inputs),
                    len(p.rejected.inputs),
                    common_prefix_length(p.chosen.inputs, p.rejected.inputs),
                    len(p.chosen.targets),
                    len(p.rejected.targets),
                )
                for p in pairs
            ],
            dtype=np.int32,
        ).reshape(-1, 5)
        return PairLengths(*columns.T)

    def of_pairs(self, indices: Int[np.ndarray, " Q"]) -> PairLengths:
        """Selects the lengths of the pairs at `indices`."""
        return PairLengths(*(column[indices] for column in vars(self).values()))

    def row_tokens(self, prefix_sharing: bool) -> Int[np.ndarray, " P"]:
        """Counts the tokens of each pair in a row: `Nc + Nr - S`, with `S = 0` if nothing is shared."""
        separate = self.chosen_inputs + self.rejected_inputs
        return separate - self.shared_inputs if prefix_sharing else separate

    def targets(self, prompt: bool = False) -> Int[np.ndarray, " P"]:
        """Counts the targets of each pair in a row. Shared targets are listed once for each response.

        `prompt` adds the tokens of the chosen response's prompt but the first.
        """
        responses = self.chosen_targets + self.rejected_targets
        return responses + self.chosen_inputs - self.chosen_targets if prompt else responses
