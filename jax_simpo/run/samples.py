"""The few prompts whose answers a run shows before and after training: which they are, and how a person reads them.

They live in `samples.jsonl` of the output directory, one object per prompt with `prompt`, `chosen`, `rejected`,
`before` and `after`. The file is written when training starts, with what the model answers then, and completed at the
end; so a resumed run still has what the untrained model said.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from jaxtyping import Int

from jax_simpo.data.pairs import common_prefix_length
from jax_simpo.data.tokenize import PairDataset

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SAMPLES_FILE = "samples.jsonl"

_MARK = "\0"  # stands for a special token; no text of a data file has it
_ROLES = "system|user|assistant|model"


@dataclass(frozen=True)
class Sample:
    """A prompt with its two known answers and the model's own, as text; None where it has not answered yet."""

    prompt: str
    chosen: str
    rejected: str
    before: str | None = None
    after: str | None = None


def sample_prompts(
    pairs: PairDataset, tokenizer: PreTrainedTokenizerBase, count: int
) -> tuple[list[Sample], list[Int[np.ndarray, " N"]]]:
    """The first pairs of a split as samples, and the token ids to answer for each."""
    header = _assistant_header(tokenizer)
    samples, prompts = [], []
    for index in range(min(count, len(pairs))):
        text, chosen = pairs.texts(index), pairs.pair(index).chosen
        # The assistant's header belongs to the response (nothing of it is in the prompt), but an answer comes after
        # it. So the prompt goes on with as much of the template's generation prompt as the responses begin with: all
        # of it with Llama-3 and Zephyr, nothing with Mistral, and no more where the template opens a thought, say,
        # which the responses do not have. The ids are the pair's own: cut to the length that training sees.
        shared = _header_length(text.prompt, header, chosen.targets[:-1], tokenizer)
        prompts.append(chosen.ids[: chosen.prompt_length + shared])
        samples.append(Sample(*(readable(part, tokenizer) for part in (text.prompt, text.chosen, text.rejected))))
    return samples, prompts


def read_answers(answers: Sequence[Sequence[int]], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Generated ids as text, without special tokens; where there is nothing else, they are named and counted."""
    texts = []
    for ids in answers:
        text = str(tokenizer.decode(ids, skip_special_tokens=True)).strip()
        # An untrained model may repeat one special token to the end, which is not the same as to say nothing.
        runs = [(str(tokenizer.decode([token])), len(list(same))) for token, same in groupby(ids)]
        texts.append(text or " ".join(name if count == 1 else f"{name} ({count} times)" for name, count in runs))
    return texts


def with_answers(samples: Sequence[Sample], when: Literal["before", "after"], texts: Sequence[str]) -> list[Sample]:
    """The samples with what the model answers before or after training."""
    return [replace(sample, **{when: text}) for sample, text in zip(samples, texts, strict=True)]


def write_samples(output: Path, samples: Sequence[Sample]) -> None:
    """Writes `samples.jsonl` of an output directory."""
    lines = (json.dumps(asdict(sample), ensure_ascii=False) + "\n" for sample in samples)
    (output / SAMPLES_FILE).write_text("".join(lines), encoding="utf-8")


def read_samples(output: Path) -> list[Sample]:
    """The samples of an output directory; none when the run took none."""
    path = output / SAMPLES_FILE
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [Sample(**json.loads(line)) for line in lines if line]


def readable(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """A rendered prompt or answer as a person reads it: no special tokens, and roles named where turns are several.

    >>> readable("<|begin|><|user|>Tea, please.<|end|>", tokenizer)
    'Tea, please.'
    """
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    special |= set(tokenizer.all_special_tokens)
    # A role is the marker itself (<|user|>), or stands after a marker up to another or the end of the line.
    text = re.sub(rf"<\|({_ROLES})\|>\s?", rf"{_MARK}\1{_MARK}", text)
    if special:
        text = re.sub("|".join(re.escape(token) for token in sorted(special, key=len, reverse=True)), _MARK, text)
    before, *turns = re.split(rf"{_MARK}\s*({_ROLES})\s*[{_MARK}\n]", text)
    said = [(role, _plain(content)) for role, content in zip(turns[::2], turns[1::2], strict=True)]
    said = [("", _plain(before)), *said]
    said = [(role, content) for role, content in said if content]
    if len(said) == 1:
        return said[0][1]
    return "\n".join(f"{role.capitalize()}: {content}" if role else content for role, content in said)


def _plain(content: str) -> str:
    return content.replace(_MARK, "").strip()


def _assistant_header(tokenizer: PreTrainedTokenizerBase) -> str:
    """What the chat template writes before an answer to be generated; nothing if it knows no generation prompt."""
    turn = [{"role": "user", "content": "x"}]
    extra = {"bos_token": ""} if tokenizer.bos_token is None else {}
    without, whole = (
        str(tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=add, **extra))
        for add in (False, True)
    )
    return whole.removeprefix(without) if whole.startswith(without) else ""


def _header_length(prompt: str, header: str, targets: Int[np.ndarray, " T"], tokenizer: PreTrainedTokenizerBase) -> int:
    """With how many tokens of the header a response begins."""
    if not header:
        return 0
    alone, whole = (
        np.array(tokenizer(text, add_special_tokens=False)["input_ids"], np.int32) for text in (prompt, prompt + header)
    )
    # The prompt's last token may merge with the header, as it may with a response: then the boundary is one earlier.
    return max(common_prefix_length(whole[boundary:], targets) for boundary in (len(alone), len(alone) - 1))
