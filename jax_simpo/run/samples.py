"""The samples of a run: a few prompts that the model answers before and after training, as text for people.

They are kept in `samples.jsonl` of the output directory, one object per prompt with `prompt`, `chosen`, `rejected`,
`before`, `after` and `during`. The file is written with the answers of the untrained model when training starts,
completed at evaluations where the run answers its prompts there too, and at the end; so a resumed run still has the
former answers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from jaxtyping import Int

from jax_simpo.data import template_limits
from jax_simpo.data.chat import reason_of
from jax_simpo.data.tokenize import GroupDataset
from jax_simpo.data.tree import common_prefix_length
from jax_simpo.errors import DataError
from jax_simpo.run import files
from jax_simpo.run.manifest import write_file

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MARK = "\0"  # stands for a special token; no text of a data file has it
_ROLES = "system|user|assistant|model"

When = Literal["before", "during", "after"]  # training


@dataclass(frozen=True)
class Sample:
    """A prompt with its two known answers and the model's own, as text; None where the model has not answered yet.

    `during` holds the answers at evaluations, by the number of the step in decimal digits.
    """

    prompt: str
    chosen: str
    rejected: str
    before: str | None = None
    after: str | None = None
    during: dict[str, str] = field(default_factory=dict)


def sample_prompts(
    pairs: GroupDataset, tokenizer: PreTrainedTokenizerBase, count: int
) -> tuple[list[Sample], list[Int[np.ndarray, " N"]]]:
    """Takes the first pairs of a split as samples, and returns them with the token ids that the model is to answer.

    Args:
        pairs: the split.
        tokenizer: its tokenizer.
        count: number of samples; a shorter split gives fewer.
    """
    header = _assistant_header(tokenizer)
    samples, prompts = [], []
    for index in range(min(count, len(pairs))):
        text, chosen = pairs.texts(index), pairs.group(index).best
        # In the original's rendering the assistant's header belongs to the response, not to the prompt, but an answer
        # comes after it. So the prompt goes on with as much of the template's generation prompt as the responses begin
        # with: all of it with Llama-3 and Zephyr, nothing with Mistral or where the prompt ends with it already, and
        # only a part where the template also opens a thought, say, which the responses do not have. The ids are the
        # pair's own: they are cut to the length that training has.
        shared = _header_length(text.prompt, header, chosen.targets[:-1], tokenizer)
        prompts.append(chosen.ids[: chosen.prompt_length + shared])
        prompt, best, worst = (
            readable(part, tokenizer) for part in (text.prompt, text.responses[0], text.responses[-1])
        )
        samples.append(Sample(prompt, best, worst))
    return samples, prompts


def read_answers(answers: Sequence[Sequence[int]], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Turns generated ids into text without special tokens; an answer of special tokens alone names and counts them."""
    texts = []
    for ids in answers:
        text = str(tokenizer.decode(ids, skip_special_tokens=True)).strip()
        # An untrained model may repeat one special token to the end, which is not the same as an empty answer.
        runs = [(str(tokenizer.decode([token])), len(list(same))) for token, same in groupby(ids)]
        texts.append(text or " ".join(name if count == 1 else f"{name} ({count} times)" for name, count in runs))
    return texts


def with_answers(samples: Sequence[Sample], when: When, texts: Sequence[str], step: int) -> list[Sample]:
    """Returns the samples completed by the answers of a model that has had `step` optimizer steps."""
    completed = []
    for sample, text in zip(samples, texts, strict=True):
        if when == "during":
            completed.append(replace(sample, during={**sample.during, str(step): text}))
        elif when == "before":
            completed.append(replace(sample, before=text))
        else:
            completed.append(replace(sample, after=text))
    return completed


def drop_later(output: Path, step: int) -> None:
    """Removes the answers at evaluations after a step from `samples.jsonl`, where there are any."""
    samples = read_samples(output)
    kept = [replace(s, during={n: text for n, text in s.during.items() if int(n) <= step}) for s in samples]
    if kept != samples:
        write_samples(output, kept)


def write_samples(output: Path, samples: Sequence[Sample]) -> None:
    """Writes `samples.jsonl` of an output directory."""
    lines = (json.dumps(asdict(sample), ensure_ascii=False) + "\n" for sample in samples)
    write_file(output, files.SAMPLES, "".join(lines))


def read_samples(output: Path) -> list[Sample]:
    """Reads the samples of an output directory; the list is empty when the run took none."""
    path = output / files.SAMPLES
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [Sample(**json.loads(line)) for line in lines if line]


def readable(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Makes a rendered prompt or answer readable: without special tokens, and with roles where there are several turns.

    >>> readable("<|begin|><|user|>Tea, please.<|end|>", tokenizer)
    'Tea, please.'
    """
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    special |= set(tokenizer.all_special_tokens)
    # A role is the marker itself (<|user|>), or stands after a marker up to another or the end of the line.
    text = re.sub(rf"<\|({_ROLES})\|>\s?", rf"{_MARK}\1{_MARK}", text)
    if special:
        text = re.sub("|".join(re.escape(token) for token in sorted(special, key=len, reverse=True)), _MARK, text)
    before, *parts = re.split(rf"{_MARK}\s*({_ROLES})\s*[{_MARK}\n]", text)
    turns = [("", before), *zip(parts[::2], parts[1::2], strict=True)]
    turns = [(role, _plain(content)) for role, content in turns if _plain(content)]
    if len(turns) == 1:
        return turns[0][1]
    return "\n".join(f"{role.capitalize()}: {content}" if role else content for role, content in turns)


def _plain(content: str) -> str:
    return content.replace(_MARK, "").strip()


def _assistant_header(tokenizer: PreTrainedTokenizerBase) -> str:
    """Returns the generation prompt of the chat template; an empty text where the template has none.

    Raises:
        DataError: the template cannot write it.
    """
    turn = [{"role": "user", "content": "x"}]
    extra = {"bos_token": ""} if tokenizer.bos_token is None else {}

    def write() -> list[str]:
        return [
            str(tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=add, **extra))
            for add in (False, True)
        ]

    try:
        without, with_header = template_limits.limited(write)
        template_limits.check_written([with_header], turn)
    except Exception as error:  # a template may raise anything
        raise DataError(
            f"chat template: cannot write what an answer begins with ({reason_of(error)}): correct it, or set "
            "`sample_prompts: 0`"
        ) from error
    return with_header.removeprefix(without) if with_header.startswith(without) else ""


def _header_length(prompt: str, header: str, targets: Int[np.ndarray, " T"], tokenizer: PreTrainedTokenizerBase) -> int:
    """Counts the tokens of the header with which a response begins."""
    if not header or prompt.endswith(header):
        return 0
    alone, with_header = (
        np.array(tokenizer(text, add_special_tokens=False)["input_ids"], np.int32) for text in (prompt, prompt + header)
    )
    # The prompt's last token may merge with the header, as it may with a response: then the boundary is one earlier.
    return max(common_prefix_length(with_header[boundary:], targets) for boundary in (len(alone), len(alone) - 1))
