"""Makes the pairs that benchmarks run on: from six length profiles of the prefix-sharing paper, or a file of pairs.

A profile has two medians of its dataset: `length` of prompt plus response, and `ratio` of prompt to response (Wang and
Hegde, "Accelerating Direct Preference Optimization with Prefix Sharing", arXiv 2410.20305).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path

import numpy as np
from jaxtyping import Int

from jax_simpo.data.groups import Group, GroupLengths, Response

SIGMA = 0.5  # standard deviation of the logarithm of a length
CUT = 4  # the longest prompts and responses, in medians


@dataclass(frozen=True)
class Profile:
    """Median lengths of a dataset's pairs, and the speed-up of sharing that the paper reports for it.

    `paper` is samples/s of FlexAttention with sharing over FlashAttention 3, both packed, on 8 H100; `paper_unpacked`
    is the same without packing.
    """

    name: str
    length: int
    ratio: float
    paper: float
    paper_unpacked: float

    @property
    def prompt(self) -> float:
        """Median length of a prompt, in tokens."""
        return self.length * self.ratio / (1 + self.ratio)

    @property
    def response(self) -> float:
        """Median length of a response, in tokens."""
        return self.length / (1 + self.ratio)


PROFILES = {
    profile.name: profile
    for profile in (
        Profile("capybara", 1160, 1.59, 1.34, 11.90 / 8.38),
        Profile("hh-rlhf", 186, 2.15, 1.41, 36.11 / 33.71),
        Profile("metamath-dpo", 872, 3.91, 1.57, 19.13 / 13.86),
        Profile("tldr", 416, 11.14, 1.35, 35.36 / 31.43),
        Profile("tulu-helpsteer", 775, 6.34, 1.48, 21.75 / 14.83),
        Profile("ultrafeedback", 409, 0.42, 1.17, 20.46 / 18.40),
    )
}


@dataclass(frozen=True)
class Pairs:
    """Pairs in memory, with the interface of a dataset."""

    all: Sequence[Group]

    def __len__(self) -> int:
        return len(self.all)

    def groups(self, indices: Int[np.ndarray, " P"]) -> list[Group]:
        return [self.all[i] for i in indices]

    @cached_property
    def lengths(self) -> GroupLengths:
        return GroupLengths.of(list(self.all))


def draw_lengths(profile: Profile, count: int, seed: int = 0) -> Int[np.ndarray, "P 3"]:
    """Draws lengths of prompts, chosen and rejected responses: log-normal with these medians, cut at four times."""
    medians = np.array([profile.prompt, profile.response, profile.response])
    draws = np.random.default_rng(seed).lognormal(np.log(medians), SIGMA, (count, 3))
    return np.maximum(1, np.minimum(draws, CUT * medians).round()).astype(np.int64)


def profile_pairs(profile: Profile, count: int, vocabulary: int, seed: int = 0) -> Pairs:
    """Makes pairs of random tokens in a profile's lengths.

    The first tokens of a pair's responses differ, so the pair shares exactly its prompt.
    """
    rng = np.random.default_rng((seed, 1))
    pairs = []
    for lengths in draw_lengths(profile, count, seed):
        prompt, chosen, rejected = (rng.integers(1, vocabulary, n, np.int32) for n in lengths)
        rejected[0] = chosen[0] % (vocabulary - 1) + 1
        responses = (Response.after(len(prompt), np.concatenate([prompt, answer])) for answer in (chosen, rejected))
        pairs.append(Group(tuple(responses)))
    return Pairs(pairs)


def read_pairs(file: Path, tokenizer: str, count: int, vocabulary: int | None = None) -> Pairs:
    """Reads the first pairs of a JSONL file and tokenises them as for training.

    Args:
        file: a file with one pair a line, `chosen` and `rejected` conversations.
        tokenizer: a folder or hub id.
        count: the most pairs to read.
        vocabulary: size of the model's vocabulary. If it is smaller than the tokenizer's, token ids are folded into
            it: the cost of a step depends on lengths alone.
    """
    from jax_simpo.data import chat
    from jax_simpo.data.conversations import read_conversation
    from jax_simpo.data.rendering import choose_rendering
    from jax_simpo.data.tokenize import tokenize_group

    loaded = chat.load_tokenizer(tokenizer)
    rendering = choose_rendering(loaded, "auto", False)
    with file.open(encoding="utf-8") as lines:
        rows = [read_conversation(json.loads(line)) for line in islice(lines, count)]
    texts = [chat.render_group(row, loaded, False, rendering=rendering) for row in rows]
    limits = {"max_length": 8192, "max_prompt_length": 6144, "truncation_mode": "keep_end"}
    pairs = [tokenize_group(text, loaded, **limits) for text in texts]  # type: ignore[arg-type]
    if vocabulary is None or vocabulary >= len(loaded):
        return Pairs(pairs)
    folded = [tuple(Response(r.ids % vocabulary, r.spans) for r in pair.responses) for pair in pairs]
    return Pairs([Group(responses) for responses in folded])
