"""Tokenises rendered pairs, one by one or a split at a time, as the original SimPO does but for how it cuts answers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from jax_simpo.data.chat import PairText, render_pair
from jax_simpo.data.messages import BadRow, read_weight
from jax_simpo.data.pairs import Response, TokenizedPair
from jax_simpo.data.sources import RawSplit, decode_rows
from jax_simpo.data.store import PairDataset, Skipped, Store, cache_key
from jax_simpo.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["PairDataset", "TokenSettings", "tokenize_pair", "tokenize_split"]

TruncationMode = Literal["keep_end", "keep_start"]

CHUNK_ROWS = 512


@dataclass(frozen=True)
class TokenSettings:
    """The settings that determine a pair's token ids, together with its row and the tokenizer."""

    max_length: int
    max_prompt_length: int
    truncation_mode: TruncationMode = "keep_end"
    auto_insert_empty_system_msg: bool = True


# ---------------------------------------------------------------------------------------------------------------
# One pair
# ---------------------------------------------------------------------------------------------------------------


def tokenize_pair(
    text: PairText,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    max_prompt_length: int,
    truncation_mode: TruncationMode,
) -> TokenizedPair:
    """Tokenises one rendered pair.

    Args:
        text: prompt and answers after the chat template.
        tokenizer: as `load_tokenizer` returns it.
        max_length: most tokens of a prompt with its answer.
        max_prompt_length: tokens that a prompt is cut to if it does not fit `max_length` with the longer answer.
        truncation_mode: the end of a prompt that is kept.

    Raises:
        BadRow: truncation leaves no prompt or no answer, or makes the answers equal.
    """
    settings = TokenSettings(max_length, max_prompt_length, truncation_mode)
    return _make_pair(_encode(tokenizer, _texts_to_encode(text)), tokenizer, settings)


def _texts_to_encode(text: PairText) -> list[str]:
    return [text.prompt, text.prompt + text.chosen, text.prompt + text.rejected]


def _encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    ids: list[list[int]] = tokenizer(
        texts, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False
    )["input_ids"]
    return ids


def _make_pair(encoded: list[list[int]], tokenizer: PreTrainedTokenizerBase, settings: TokenSettings) -> TokenizedPair:
    """Makes a pair from the ids of the prompt alone and of the prompt with each answer."""
    prompt, *sequences = encoded
    max_length, max_prompt_length = settings.max_length, settings.max_prompt_length
    parts = [
        _add_bos_and_eos(ids[:start], ids[start:], tokenizer)
        for ids, start in zip(sequences, _answer_starts(prompt, sequences), strict=True)
    ]
    longer = max(len(answer_ids) for _, answer_ids in parts)
    responses = []
    for prompt_ids, answer_ids in parts:
        # As in the original: each response has its own prompt, but the longer answer decides for both.
        if len(prompt_ids) + longer > max_length:
            keep_start = settings.truncation_mode == "keep_start"
            prompt_ids = prompt_ids[:max_prompt_length] if keep_start else prompt_ids[-max_prompt_length:]
        # Unlike the original, which cuts both answers to max_length - max_prompt_length, even if the prompt is short.
        answer_ids = answer_ids[: max(max_length - len(prompt_ids), 0)]
        if not prompt_ids or not answer_ids or max_prompt_length < 1:
            raise BadRow(
                "nothing left after truncation",
                f"max_length {max_length} and max_prompt_length {max_prompt_length} leave {len(prompt_ids)} prompt and "
                f"{len(answer_ids)} answer tokens",
            )
        responses.append(Response(np.array(prompt_ids + answer_ids, np.int32), len(prompt_ids)))
    if np.array_equal(responses[0].ids, responses[1].ids):
        raise BadRow("nothing left after truncation", f"the answers differ only beyond max_length {max_length}")
    return TokenizedPair(tuple(responses))


def _answer_starts(prompt: list[int], sequences: list[list[int]]) -> list[int]:
    """Finds the first answer token of each sequence: one earlier if the prompt's last token merged with the answer."""
    starts = [len(prompt) - (ids[: len(prompt)] != prompt) for ids in sequences]
    chosen, rejected = (ids[:start] for ids, start in zip(sequences, starts, strict=True))
    differing = sum(a != b for a, b in zip(chosen, rejected, strict=False))
    if differing > 1 or any(len(ids) < len(prompt) for ids in sequences):
        # More than the last token merged. The original stops with an exception; here the answer starts at the first
        # token that is not the prompt's own.
        return [_common_prefix_length(prompt, ids) for ids in sequences]
    return starts


def _common_prefix_length(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _add_bos_and_eos(
    prompt: list[int], answer: list[int], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[int]]:
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if bos is not None and prompt[:1] != [bos]:
        prompt = [bos, *prompt]
    if eos is not None and answer[-1:] != [eos]:
        answer = [*answer, eos]
    return prompt, answer


# ---------------------------------------------------------------------------------------------------------------
# A whole split
# ---------------------------------------------------------------------------------------------------------------


def tokenize_split(
    raw: RawSplit,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    max_prompt_length: int,
    truncation_mode: TruncationMode = "keep_end",
    auto_insert_empty_system_msg: bool = True,
    on_bad_row: Literal["error", "skip"] = "error",
    num_proc: int | None = None,
    cache_dir: str | Path | None = None,
    progress: bool | None = None,
) -> PairDataset:
    """Tokenises a split, or opens the tokens that an earlier run with the same rows, tokenizer and settings cached.

    Args:
        raw: the pairs as the sources give them.
        tokenizer: as `load_tokenizer` returns it.
        max_length, max_prompt_length, truncation_mode: see `tokenize_pair`.
        auto_insert_empty_system_msg: see `render_pair`.
        on_bad_row: raises an error for rows that cannot be used, or skips them.
        num_proc: number of threads that encode. None uses one per core; 1 starts no thread.
        cache_dir: folder of the cache; None stands for the cache of Hugging Face datasets.
        progress: shows a bar on stderr, or none; None shows it on a terminal only.

    Raises:
        DataError: rows cannot be used and `on_bad_row` is "error", no row can be used, or the cache cannot be written.
    """
    settings = TokenSettings(max_length, max_prompt_length, truncation_mode, auto_insert_empty_system_msg)
    store = Store(cache_dir, cache_key(raw, tokenizer, asdict(settings)))
    with store.lock():  # one process of a host tokenises, and the others read its tokens
        cache_hit = store.exists()
        if not cache_hit:
            with _encoder_threads(num_proc), store.writer() as writer:
                for chunk in _tokenize_chunks(raw, tokenizer, settings, progress):
                    writer.write(*chunk)
    dataset = store.open(raw, cache_hit)
    if dataset.skipped and on_bad_row == "error":
        first = f"{len(dataset.skipped)} of {len(raw)} rows of {raw.name} cannot be used:"
        last = "Correct or remove them, or set `on_bad_row: skip` to go on without them (rows count from 0)."
        raise DataError("\n".join([first, *dataset.skipped_lines(), last]))
    if len(dataset) == 0:
        raise DataError(f"no row of {raw.name} can be used: {dataset.skipped_summary()}")
    if not dataset.weights.any():
        raise DataError(f"every pair of {raw.name} has the weight 0 (`{raw.weight_column}`): there is nothing to train")
    return dataset


class Chunk(NamedTuple):
    """Some rows of a split: of those that became pairs the number, text, tokens and weight, and those that did not."""

    indices: list[int]
    texts: list[PairText]
    pairs: list[TokenizedPair]
    weights: list[float]
    skipped: list[Skipped]


def _tokenize_chunks(
    raw: RawSplit, tokenizer: PreTrainedTokenizerBase, settings: TokenSettings, progress: bool | None
) -> Iterator[Chunk]:
    with _progress_bar(progress) as bar:
        task = bar.add_task(f"tokenise {raw.name}", total=len(raw))
        for start in range(0, len(raw), CHUNK_ROWS):
            rows = decode_rows(raw.table.slice(start, CHUNK_ROWS))
            yield _tokenize_chunk(start, rows, tokenizer, settings, raw.weight_column)
            bar.advance(task, len(rows))


def _tokenize_chunk(
    start: int,
    rows: list[dict[str, object]],
    tokenizer: PreTrainedTokenizerBase,
    settings: TokenSettings,
    weight_column: str | None,
) -> Chunk:
    chunk = Chunk([], [], [], [], [])
    rendered: list[tuple[int, PairText, float]] = []
    for index, row in enumerate(rows, start):
        try:
            weight = 1.0 if weight_column is None else read_weight(row["weight"], weight_column)
            rendered.append((index, render_pair(row, tokenizer, settings.auto_insert_empty_system_msg), weight))
        except BadRow as bad:
            chunk.skipped.append(Skipped(index, bad.kind, bad.detail))

    # One call encodes the chunk in the tokenizer's own Rust threads. Worker processes would be slower: 1300 pairs
    # (0.6 M tokens, Llama-3 vocabulary) take 0.33 s to encode on two cores and 0.25 s for the rest, and a spawned
    # worker takes 2 s to import transformers. Forked workers (as in `datasets`) may deadlock beside JAX's threads.
    encoded = _encode(tokenizer, [t for _, text, _ in rendered for t in _texts_to_encode(text)]) if rendered else []

    for number, (index, text, weight) in enumerate(rendered):
        try:
            pair = _make_pair(encoded[3 * number : 3 * number + 3], tokenizer, settings)
        except BadRow as bad:
            chunk.skipped.append(Skipped(index, bad.kind, bad.detail))
            continue
        chunk.indices.append(index)
        chunk.texts.append(text)
        chunk.pairs.append(pair)
        chunk.weights.append(weight)
    return chunk


@contextmanager
def _encoder_threads(num_proc: int | None) -> Iterator[None]:
    """Sets the number of Rust threads that encode. A process makes their pool once, so only its first call counts."""
    if num_proc is None:
        yield
        return
    before = {name: os.environ.get(name) for name in ("RAYON_NUM_THREADS", "TOKENIZERS_PARALLELISM")}
    if num_proc > 1:
        os.environ.setdefault("RAYON_NUM_THREADS", str(num_proc))
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if num_proc > 1 else "false"
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _progress_bar(show: bool | None) -> Progress:
    console = Console(stderr=True)
    # A split may be named `[x]`, which rich would read as markup.
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, disable=not (console.is_terminal if show is None else show))
