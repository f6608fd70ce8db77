"""Counts signs that something is wrong with the tokens of a split: two BOS tokens in front, or no EOS at the end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from jax_simpo.data.store import GroupDataset

_MOST_GROUPS = 2000  # are looked at, evenly spaced: enough to tell a share, and quick on the largest data sets


@dataclass(frozen=True)
class TokenSigns:
    """Counts over the responses of the groups that were looked at.

    Attributes:
        responses: how many responses these are.
        double_bos: how many begin with two BOS tokens.
        without_eos: how many do not end with EOS.
    """

    responses: int = 0
    double_bos: int = 0
    without_eos: int = 0


def count_signs(groups: GroupDataset, bos: int | None, eos: int | None) -> TokenSigns:
    """Counts the signs in a split, of a large one in evenly spaced groups.

    Args:
        groups: the tokenised split.
        bos: the tokenizer's BOS token; None if it has none, and then nothing begins with two.
        eos: its EOS token; None if it has none, and then no count of missing ones is made.
    """
    chosen = np.unique(np.linspace(0, len(groups) - 1, min(len(groups), _MOST_GROUPS)).astype(int))
    responses = double_bos = without_eos = 0
    for group in groups.groups(chosen):
        for response in group.responses:
            responses += 1
            double_bos += bos is not None and response.ids[:2].tolist() == [bos, bos]
            without_eos += eos is not None and int(response.ids[-1]) != eos
    return TokenSigns(responses, double_bos, without_eos)
