"""Cuts prompts and answers to `max_length`, answers only as far as needed, unlike the original, and counts the cuts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from jax_simpo.data.groups import Response
from jax_simpo.data.messages import BadRow
from jax_simpo.data.notes import Cuts

TruncationMode = Literal["keep_end", "keep_start"]


@dataclass(frozen=True)
class Limits:
    """Limits the lengths of prompts and answers; see `tokenize_group`."""

    max_length: int
    max_prompt_length: int
    truncation_mode: TruncationMode = "keep_end"


class Parts(NamedTuple):
    """The ids of a prompt and of an answer to it, and the runs of scored ids in the answer."""

    prompt: list[int]
    answer: list[int]
    scored: list[tuple[int, int]]


def cut_group(parts: Sequence[Parts], limits: Limits) -> tuple[list[Response], Cuts]:
    """Makes the responses of a group, none longer than `max_length`, and counts what that has cut.

    Raises:
        BadRow: nothing is left of a prompt or an answer, or all answers are equal.
    """
    longest = max(len(part.answer) for part in parts)
    cut = [_cut(part, longest, limits) for part in parts]
    responses = [response for response, _, _ in cut]
    if all(np.array_equal(responses[0].ids, other.ids) for other in responses[1:]):
        raise BadRow(
            "same tokens",
            f"the answers differ only beyond max_length {limits.max_length}, or in words the tokenizer does not know",
        )
    lost = [len(part.answer) > answer for part, (_, _, answer) in zip(parts, cut, strict=True)]
    shorter = any(len(part.prompt) > prompt for part, (_, prompt, _) in zip(parts, cut, strict=True))
    whole = max(len(part.prompt) for part in parts) + longest
    return responses, Cuts(
        groups=int(any(lost) or shorter),
        prompts=int(shorter),
        responses=sum(lost),
        all_responses=len(parts),
        longest=whole,
        max_length=limits.max_length,
    )


def _cut(parts: Parts, longest: int, limits: Limits) -> tuple[Response, int, int]:
    """Makes a response that is no longer than `max_length`, and counts what is left of its prompt and its answer.

    `longest` is the length of the group's longest answer.
    """
    prompt, answer, scored = parts
    max_length, max_prompt_length = limits.max_length, limits.max_prompt_length
    # As in the original: each response has its own prompt, but the longest answer decides for all.
    if len(prompt) + longest > max_length:
        keep_start = limits.truncation_mode == "keep_start"
        prompt = prompt[:max_prompt_length] if keep_start else prompt[-max_prompt_length:]
    # Unlike the original, which cuts all answers to max_length - max_prompt_length, even if the prompt is short.
    answer = answer[: max(max_length - len(prompt), 0)]
    ends = ((start, min(stop, len(answer))) for start, stop in scored)
    spans = tuple((len(prompt) + start, len(prompt) + stop) for start, stop in ends if start < stop)
    if not prompt or not spans or max_prompt_length < 1:
        raise BadRow(
            "nothing left after truncation",
            f"max_length {max_length} and max_prompt_length {max_prompt_length} leave {len(prompt)} prompt and "
            f"{sum(stop - start for start, stop in spans)} answer tokens",
        )
    ids = (prompt + answer)[: spans[-1][1]]  # what follows the last scored token would be computed for nothing
    return Response(np.array(ids, np.int32), spans), len(prompt), len(answer)
