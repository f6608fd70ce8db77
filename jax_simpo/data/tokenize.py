"""Tokenises rendered groups, one or a whole split, as the original SimPO does but for how it cuts answers."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from jax_simpo.data import template_limits
from jax_simpo.data.chat import TOO_MUCH, GroupText, render_group
from jax_simpo.data.conversations import Conversation, Row, make_conversation, read_row, read_weight
from jax_simpo.data.cutting import Limits, Parts, TruncationMode, cut_group
from jax_simpo.data.groups import Group, Response
from jax_simpo.data.in_context import ChatRendering
from jax_simpo.data.messages import BadRow
from jax_simpo.data.notes import Cuts, Notes, Skipped, SpecialText, SpecialTokensInMessages
from jax_simpo.data.ranking import GroupSettings
from jax_simpo.data.rendering import Rendering, choose_rendering
from jax_simpo.data.sources import RawSplit, decode_rows
from jax_simpo.data.special_text import SpecialTokens, StandIns
from jax_simpo.data.store import GroupDataset, Store, cache_key
from jax_simpo.errors import DataError
from jax_simpo.terminal import open_console, visible

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["GroupDataset", "TokenSettings", "tokenize_group", "tokenize_split"]

CHUNK_ROWS = 512
_MOST_TOO_MUCH = 10


@dataclass(frozen=True)
class TokenSettings(Limits):
    """The settings that determine a group's token ids, together with its rows and the tokenizer."""

    auto_insert_empty_system_msg: bool = True
    chat_rendering: ChatRendering = "auto"
    special_tokens_in_messages: SpecialTokensInMessages = "text"
    train_on: Literal["last_turn", "assistant_turns"] = "last_turn"
    group_by: Literal["prompt"] | None = None
    groups: GroupSettings = field(default_factory=GroupSettings)


# ---------------------------------------------------------------------------------------------------------------
# One group
# ---------------------------------------------------------------------------------------------------------------


def tokenize_group(
    text: GroupText,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    max_prompt_length: int,
    truncation_mode: TruncationMode,
) -> Group:
    """Tokenises one rendered group, whose responses come best first and are not tied.

    Args:
        text: prompt and responses after the chat template.
        tokenizer: as `load_tokenizer` returns it.
        max_length: most tokens of a prompt with its answer.
        max_prompt_length: tokens that a prompt is cut to if it does not fit `max_length` with the longest answer.
        truncation_mode: the end of a prompt that is kept.

    Raises:
        BadRow: truncation leaves no prompt or no answer, or makes all answers equal.
    """
    settings = TokenSettings(max_length, max_prompt_length, truncation_mode)
    responses = _make_responses(_encode(tokenizer, _texts_to_encode(text)), text, tokenizer, settings)
    return Group(tuple(responses))


def _texts_to_encode(text: GroupText) -> list[str]:
    """Lists the prompt, and for each response the whole text and the text before every place inside it."""
    texts = [text.prompt]
    for place, response in enumerate(text.responses):
        texts += [text.prompt + response, *(text.prompt + response[:end] for end in _places_inside(text, place))]
    return texts


def _places_inside(text: GroupText, place: int) -> list[int]:
    """Lists the places inside a response at which scored characters begin or end."""
    ends = {end for span in text.scored_of(place) for end in span}
    return sorted(ends - {0, len(text.responses[place])})


def _encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    ids: list[list[int]] = tokenizer(
        texts, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False
    )["input_ids"]
    return ids


def _make_responses(
    encoded: Iterable[list[int]], text: GroupText, tokenizer: PreTrainedTokenizerBase, settings: TokenSettings
) -> list[Response]:
    """Makes the responses of a group from the ids of its texts, in the order of `_texts_to_encode`."""
    return cut_group(_take_apart(encoded, text, tokenizer), settings)[0]


def _take_apart(encoded: Iterable[list[int]], text: GroupText, tokenizer: PreTrainedTokenizerBase) -> list[Parts]:
    """Finds prompt, answer and scored ids of each response, with BOS and EOS, and cuts nothing."""
    texts = iter(encoded)
    prompt, sequences, inside = next(texts), [], []
    for place in range(len(text.responses)):
        sequences.append(next(texts))
        inside.append({end: next(texts) for end in _places_inside(text, place)})
    starts = _answer_starts(prompt, sequences)
    parts = []
    for place, (ids, start) in enumerate(zip(sequences, starts, strict=True)):
        index = {0: start, len(text.responses[place]): len(ids)}
        index |= {end: _boundary(before, ids) for end, before in inside[place].items()}
        scored = _joined([(index[a] - start, index[b] - start) for a, b in text.scored_of(place)])
        parts.append(_add_bos_and_eos(ids[:start], ids[start:], scored, tokenizer))
    return parts


def _joined(runs: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Joins runs that touch, as those of two turns of the assistant in a row, or that meet in a merged token."""
    joined = runs[:1]
    for start, stop in runs[1:]:
        if start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(stop, joined[-1][1]))
        else:
            joined.append((start, stop))
    return joined


def _boundary(before: list[int], ids: list[int]) -> int:
    """Finds where the text of `before` ends in `ids`: one token earlier if its last token merged with the next."""
    end = len(before)
    if ids[:end] == before:
        return end
    return end - 1 if ids[: end - 1] == before[:-1] else _common_prefix_length(before, ids)


def _answer_starts(prompt: list[int], sequences: list[list[int]]) -> list[int]:
    """Finds the first answer token of each sequence: one earlier if the prompt's last token merged with the answer.

    If its last two tokens and the first letters of the answers became one token, these letters are not scored. So it is
    in the original, and golden rows of bpe4k-inst are such (they lose a blank after `[/INST]`).
    """
    starts = [len(prompt) - (ids[: len(prompt)] != prompt) for ids in sequences]
    first, *others = (ids[:start] for ids, start in zip(sequences, starts, strict=True))
    differing = max((sum(a != b for a, b in zip(first, other, strict=False)) for other in others), default=0)
    if differing > 1 or any(len(ids) < len(prompt) for ids in sequences):
        # More than the last token merged. The original stops with an exception; here the answer starts at the first
        # token that is not the prompt's own.
        return [_common_prefix_length(prompt, ids) for ids in sequences]
    return starts


def _common_prefix_length(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _add_bos_and_eos(
    prompt: list[int], answer: list[int], scored: list[tuple[int, int]], tokenizer: PreTrainedTokenizerBase
) -> Parts:
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if bos is not None and prompt[:1] != [bos]:
        prompt = [bos, *prompt]
    if eos is not None and answer[-1:] != [eos]:
        answer = [*answer, eos]
        *before, (start, _) = scored
        scored = [*before, (start, len(answer))]  # the last turn is the assistant's, and EOS ends it
    return Parts(prompt, answer, scored)


# ---------------------------------------------------------------------------------------------------------------
# A whole split
# ---------------------------------------------------------------------------------------------------------------


def settings_of(config: Any) -> dict[str, Any]:
    """Returns the keyword arguments of `tokenize_split` that a config gives, by the names of its keys."""
    same = (
        "max_length",
        "max_prompt_length",
        "truncation_mode",
        "auto_insert_empty_system_msg",
        "chat_rendering",
        "special_tokens_in_messages",
        "train_on",
        "group_by",
    )
    return {
        **{key: getattr(config, key) for key in (*same, "on_bad_row")},
        "groups": GroupSettings(config.max_responses, config.min_score_gap, config.ties),
        "num_proc": config.preprocessing_num_workers,
        "cache_dir": config.data_cache_dir,
    }


def tokenize_split(
    raw: RawSplit,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    max_prompt_length: int,
    truncation_mode: TruncationMode = "keep_end",
    auto_insert_empty_system_msg: bool = True,
    chat_rendering: ChatRendering = "auto",
    special_tokens_in_messages: SpecialTokensInMessages = "text",
    train_on: Literal["last_turn", "assistant_turns"] = "last_turn",
    group_by: Literal["prompt"] | None = None,
    groups: GroupSettings | None = None,
    on_bad_row: Literal["error", "skip"] = "error",
    num_proc: int | None = None,
    cache_dir: str | Path | None = None,
    progress: bool | None = None,
) -> GroupDataset:
    """Tokenises a split, or opens the tokens that an earlier run with the same rows, tokenizer and settings cached.

    Args:
        raw: the pairs as the sources give them.
        tokenizer: as `load_tokenizer` returns it.
        max_length, max_prompt_length, truncation_mode: see `tokenize_group`.
        auto_insert_empty_system_msg, train_on: see `render_group`.
        chat_rendering: see `choose_rendering`.
        special_tokens_in_messages: "text" reads a message that spells a special token as it stands; "tokens" lets it
            become that token, as in the original.
        group_by: "prompt" makes one group of all rows of a prompt; None makes one of every row.
        groups: which answers of a group are left out.
        on_bad_row: raises an error for rows that cannot be used, or skips them.
        num_proc: number of threads that encode. None uses one per core; 1 starts no thread.
        cache_dir: folder of the cache; None stands for the cache of Hugging Face datasets.
        progress: shows a bar on stderr, or none; None shows it on a terminal only.

    Raises:
        DataError: rows cannot be used and `on_bad_row` is "error", no row can be used, or the cache cannot be written.
    """
    settings = TokenSettings(
        max_length,
        max_prompt_length,
        truncation_mode,
        auto_insert_empty_system_msg,
        chat_rendering,
        special_tokens_in_messages,
        train_on,
        group_by,
        groups or GroupSettings(),
    )
    store = Store(cache_dir, cache_key(raw, tokenizer, asdict(settings)))
    with store.lock():  # one process of a host tokenises, and the others read its tokens
        damage = store.remove_if_damaged() if store.exists() else ""
        cache_hit = store.exists()
        if not cache_hit:
            with _encoder_threads(num_proc), store.writer() as writer:
                writing = _Writing.of(tokenizer, settings)
                writer.notes.rendering += writing.rendering.reasons
                for chunk in _tokenize_chunks(raw, writing, progress):
                    writer.write(chunk.indices, chunk.texts, chunk.groups, chunk.weights, chunk.notes)
    dataset = store.open(raw, cache_hit, damage)
    if dataset.skipped and on_bad_row == "error":
        first = f"{len(dataset.skipped)} of {len(raw)} rows of {raw.name} cannot be used:"
        last = "Correct or remove them, or set `on_bad_row: skip` to go on without them (rows count from 0)."
        raise DataError("\n".join([first, *dataset.skipped_lines(), last]))
    if len(dataset) == 0:
        raise DataError(f"no row of {raw.name} can be used: {dataset.skipped_summary()}")
    if not dataset.weights.any():
        raise DataError(f"every pair of {raw.name} has the weight 0 (`{raw.weight_column}`): there is nothing to train")
    return dataset


@dataclass(frozen=True)
class _Writing:
    """Describes how the rows of a split become tokens."""

    tokenizer: PreTrainedTokenizerBase
    settings: TokenSettings
    rendering: Rendering
    special: SpecialTokens

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, settings: TokenSettings) -> _Writing:
        insert = settings.auto_insert_empty_system_msg
        rendering = choose_rendering(tokenizer, settings.chat_rendering, insert)
        return cls(tokenizer, settings, rendering, SpecialTokens(tokenizer))

    def render(self, turns: Conversation, stand_ins: StandIns) -> GroupText:
        """Renders a group whose messages hold these stand-ins."""
        settings = self.settings
        insert, train_on = settings.auto_insert_empty_system_msg, settings.train_on
        text = render_group(turns, self.tokenizer, insert, train_on, self.rendering)
        return replace(text, stand_ins=stand_ins) if stand_ins else text


def _tokenize_chunks(raw: RawSplit, writing: _Writing, progress: bool | None) -> Iterator[Chunk]:
    settings = writing.settings
    with _progress_bar(progress) as bar:
        task = bar.add_task(f"tokenise {visible(raw.name)}", total=len(raw))
        for rows in _gathered(raw, settings):
            chunk, conversations = Chunk(), []
            for read in rows:
                try:
                    conversations.append((read, _conversation(read, raw, settings)))
                except BadRow as bad:
                    chunk.skip(read, bad)
            _tokenize_chunk(chunk, conversations, writing)
            yield chunk
            bar.advance(task, sum(len(read.indices) for read in rows))


class _Read(NamedTuple):
    """The rows of a group: their numbers in the split, their values, and what is wrong with one of them."""

    indices: list[int]
    rows: list[Row]
    weights: list[float]
    bad: BadRow | None = None


def _gathered(raw: RawSplit, settings: TokenSettings) -> Iterator[list[_Read]]:
    """Yields the rows of some hundred groups at a time: each row by itself, or all rows of a prompt together."""
    reads = (
        [_read_row(raw, index, row) for index, row in enumerate(decode_rows(raw.table.slice(start, CHUNK_ROWS)), start)]
        for start in range(0, len(raw), CHUNK_ROWS)
    )
    if settings.group_by is None:
        yield from reads
        return
    # Rows of two splits are never gathered: each split is evaluated by itself.
    split_of_row = [name for name, rows in raw.parts or ((raw.name, len(raw)),) for _ in range(rows)]
    gathered: dict[tuple[str, str], _Read] = {}
    for read in chain.from_iterable(reads):
        key = split_of_row[read.indices[0]], f"bad {read.indices}" if read.bad else read.rows[0].key
        same = gathered.setdefault(key, read)
        if same is not read:
            same.indices.extend(read.indices)
            same.rows.extend(read.rows)
            same.weights.extend(read.weights)
    everything = list(gathered.values())
    for start in range(0, len(everything), CHUNK_ROWS):
        yield everything[start : start + CHUNK_ROWS]


def _read_row(raw: RawSplit, index: int, row: dict[str, Any]) -> _Read:
    try:
        weight = 1.0 if raw.weight_column is None else read_weight(row["weight"], raw.weight_column)
        return _Read([index], [read_row(row)], [weight])
    except BadRow as bad:
        return _Read([index], [], [], bad)


def _conversation(read: _Read, raw: RawSplit, settings: TokenSettings) -> Conversation:
    if read.bad is not None:
        raise read.bad
    if len(set(read.weights)) > 1:
        raise BadRow("wrong weight", f"the rows of the prompt have different weights (`{raw.weight_column}`)")
    return make_conversation(read.rows, settings.groups)


def _tokenize_chunk(chunk: Chunk, conversations: list[tuple[_Read, Conversation]], writing: _Writing) -> None:
    tokenizer, settings, special = writing.tokenizer, writing.settings, writing.special
    rendered: list[tuple[_Read, Conversation, GroupText]] = []
    with template_limits.prepared():
        for read, turns in conversations:
            try:
                written, stand_ins = turns, StandIns()
                if found := special.found_in(turns):
                    read_as = settings.special_tokens_in_messages
                    chunk.notes.add(Notes(special_text=SpecialText(len(found), read.indices[0], found[0], read_as)))
                    if read_as == "text":
                        written, stand_ins = special.hide(turns)
                rendered.append((read, turns, writing.render(written, stand_ins)))
            except BadRow as bad:
                chunk.skip(read, bad)
                too_much = [row for row in chunk.notes.skipped if row.kind == TOO_MUCH]
                if len(too_much) >= _MOST_TOO_MUCH:  # each may have taken seconds
                    raise DataError(
                        f"{too_much[0].reason}, in row {too_much[0].index} and in {len(too_much) - 1} of the "
                        f"{len(conversations)} read with it (rows count from 0): set another `chat_template`"
                    ) from bad

    # One call encodes the chunk in the tokenizer's own Rust threads. Worker processes would be slower: 1300 pairs
    # (0.6 M tokens, Llama-3 vocabulary) take 0.33 s to encode on two cores and 0.25 s for the rest, and a spawned
    # worker takes 2 s to import transformers. Forked workers (as in `datasets`) may deadlock beside JAX's threads.
    texts = [_texts_to_encode(text) for _, _, text in rendered]
    usual = [own for own, (_, _, text) in zip(texts, rendered, strict=True) if not text.stand_ins]
    encoded = iter(_encode(tokenizer, [*chain.from_iterable(usual)]) if usual else [])

    for (read, turns, text), own in zip(rendered, texts, strict=True):
        try:
            ids = special.encode(own, text.stand_ins) if text.stand_ins else list(islice(encoded, len(own)))
            responses, cuts = cut_group(_take_apart(ids, text, tokenizer), settings)
        except BadRow as bad:
            chunk.skip(read, bad)
            continue
        chunk.add(read, turns, text, responses, cuts)


@dataclass
class Chunk:
    """Some rows of a split: the groups that they became, and the rows that became none.

    Attributes:
        indices: the number of the first row of each group.
        texts: the texts of each group.
        groups: its tokens.
        weights: its weight.
        notes: what the user should know of the rows.
    """

    indices: list[int] = field(default_factory=list)
    texts: list[GroupText] = field(default_factory=list)
    groups: list[Group] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    notes: Notes = field(default_factory=Notes)

    def skip(self, read: _Read, bad: BadRow) -> None:
        """Notes that rows cannot be used."""
        self.notes.skipped += [Skipped(index, bad.kind, bad.detail) for index in read.indices]

    def add(self, read: _Read, turns: Conversation, text: GroupText, responses: list[Response], cuts: Cuts) -> None:
        """Adds a group, of which something may have been cut. Of responses with the same tokens the first stays."""
        kept: list[int] = []
        for place, response in enumerate(responses):
            if all(not np.array_equal(response.ids, responses[other].ids) for other in kept):
                kept.append(place)
        ranks = [turns.ranks[place] for place in kept]
        if ranks[0] == ranks[-1]:
            detail = (
                "the answers that are not tied differ only beyond max_length, or in words the tokenizer does not know"
            )
            bad = BadRow("same tokens", detail)
            self.skip(read, bad)
            return
        left_out = turns.left_out.copy()
        if len(kept) < len(responses):
            left_out["with the same tokens as a better one"] += len(responses) - len(kept)
        cuts.row = read.indices[0]
        rendered = Notes(in_context=int(text.in_context), shortened=text.shortened)
        self.notes.add(replace(rendered, left_out=left_out, cuts=cuts))
        dense = {rank: number for number, rank in enumerate(dict.fromkeys(ranks))}
        scores = None if turns.scores is None else tuple(turns.scores[place] for place in kept)
        self.groups.append(Group(tuple(responses[n] for n in kept), tuple(dense[rank] for rank in ranks), scores))
        self.texts.append(replace(text, responses=tuple(text.responses[place] for place in kept), scored=()))
        self.indices.append(read.indices[0])
        self.weights.append(read.weights[0])


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
    console = open_console()
    # A split may be named `[x]`, which rich would read as markup.
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, disable=not (console.is_terminal if show is None else show))
