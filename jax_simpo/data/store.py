"""Keeps the tokenised groups of a split on disk: a memory-mapped Arrow table, named by a hash of what determines it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from filelock import FileLock
from jaxtyping import Float, Int

from jax_simpo.data.chat import GroupText
from jax_simpo.data.detection import Layout
from jax_simpo.data.groups import Group, GroupLengths, Response
from jax_simpo.data.notes import Notes, Skipped, cuts_summary, rendering_summary, rows_by_kind, special_summary
from jax_simpo.data.sources import RawSplit
from jax_simpo.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENISATION_VERSION = 7
"""Raise this number with every change that can change a token or the stored columns: it ends old caches."""

_ABANDONED_SECONDS = 24 * 3600.0

_GROUPS, _NOTES, _SUMS = "groups.arrow", "notes.json", "sums.json"  # the files of an entry

_SCHEMA = pa.schema(
    [
        ("index", pa.int64()),  # number of the row in the raw split
        ("ids", pa.list_(pa.list_(pa.int32()))),  # of each response, best first
        ("spans", pa.list_(pa.list_(pa.int32()))),  # of each response: start, stop, start, stop, ...
        ("ranks", pa.list_(pa.int32())),
        ("scores", pa.list_(pa.float32())),  # null where the data has none
        ("tree_tokens", pa.int32()),
        ("tree_visible", pa.int64()),
        ("tree_predictors", pa.int32()),
        ("weight", pa.float32()),
        ("text_prompt", pa.string()),
        ("text_responses", pa.list_(pa.string())),
    ]
)


class GroupDataset:
    """The tokenised groups of a split, in file order, read from disk on demand.

    Attributes:
        name: the split's name.
        notes: what the user should know of its rows, also when the tokens came from the cache.
        cache_hit: True if the tokens came from the cache.
        cache_damage: what was wrong with the tokens in the cache, which were made again; empty if nothing was.
        fingerprint: a hash of rows, tokenizer, template and settings. Moving a file does not change it.
    """

    def __init__(
        self,
        table: pa.Table,
        raw: RawSplit,
        notes: Notes,
        *,
        cache_hit: bool,
        cache_damage: str = "",
        fingerprint: str,
    ) -> None:
        self.name = raw.name
        self.notes = notes
        self.cache_hit, self.cache_damage = cache_hit, cache_damage
        self.fingerprint = fingerprint
        self._table = table
        self._raw = replace(raw, table=raw.table.select(["file", "row", "line"]))  # without the texts, to save memory
        self._chunk_starts = np.cumsum([0] + [batch.num_rows for batch in table.to_batches()])

    def __len__(self) -> int:
        return int(self._table.num_rows)

    @property
    def skipped(self) -> list[Skipped]:
        """The rows that could not be used, in file order."""
        return self.notes.skipped

    @cached_property
    def lengths(self) -> GroupLengths:
        """The token counts of all groups, from which every process derives the step plan."""
        spans = pa.concat_arrays([chunk.values for chunk in self._table["spans"].chunks])
        bounds, of_responses = spans.values.to_numpy(), spans.offsets.to_numpy() // 2
        scored = np.concatenate([[0], np.cumsum(bounds[1::2] - bounds[::2])])[of_responses]
        inputs = [np.diff(chunk.values.offsets.to_numpy()) - 1 for chunk in self._table["ids"].chunks]
        return GroupLengths(
            sizes=_int32_array(pc.list_value_length(self._table["ids"])),
            tree_tokens=_int32_array(self._table["tree_tokens"]),
            tree_visible=self._table["tree_visible"].to_numpy(),
            tree_predictors=_int32_array(self._table["tree_predictors"]),
            ranks=_int32_array(pc.list_flatten(self._table["ranks"])),
            inputs=np.concatenate(inputs),
            prompts=bounds[::2][of_responses[:-1]],
            targets=np.diff(scored).astype(np.int32),
        )

    @cached_property
    def weights(self) -> Float[np.ndarray, " G"]:
        """The weight of each group, float32: 1 for all where the split has no column of weights."""
        return np.asarray(self._table["weight"].to_numpy(), np.float32)

    @cached_property
    def scores(self) -> Float[np.ndarray, " R"]:
        """The score of every response, float32, group after group.

        Raises:
            DataError: a group has no scores.
        """
        column = self._table["scores"]
        if column.null_count:
            first = int(np.flatnonzero(column.is_null().to_numpy())[0])
            place = "{}, row {}".format(*self.origin(first))
            raise DataError(
                f"{place}: has no scores, by whose differences `compare_weights: score_gap` weighs comparisons. Give "
                "every row `scores`, or set `compare_weights: equal`"
            )
        return np.asarray(pc.list_flatten(column).to_numpy(), np.float32)

    def group(self, index: int) -> Group:
        """Returns one group; see `groups`."""
        return self.groups([index])[0]

    def groups(self, indices: Sequence[int] | np.ndarray) -> list[Group]:
        """Returns the groups at `indices`, in that order. Their ids are views of the memory-mapped file, not copies.

        Raises:
            IndexError: an index is negative or beyond the last group.
        """
        positions = np.asarray(indices, np.int64).reshape(-1)
        if positions.size and not (0 <= positions.min() and positions.max() < len(self)):
            raise IndexError(f"group {positions.min()} … {positions.max()} of a dataset of {len(self)}")
        chunks = np.searchsorted(self._chunk_starts, positions, side="right") - 1
        in_chunks = positions - self._chunk_starts[chunks]
        return [self._chunks[chunk].group(at) for chunk, at in zip(chunks.tolist(), in_chunks.tolist(), strict=True)]

    def texts(self, index: int) -> GroupText:
        """Returns the prompt and the responses of a group as text, after the chat template."""
        prompt, responses = (self._table[f"text_{part}"][index].as_py() for part in ("prompt", "responses"))
        return GroupText(prompt, tuple(responses))

    def origin(self, index: int) -> tuple[str, int]:
        """Returns the file and the row (from 0) of a group."""
        return self._raw.origin(self._table["index"][index].as_py())

    @property
    def origins(self) -> list[tuple[str, int]]:
        """The file and the row (from 0) of every group."""
        indices = self._table["index"]
        files, rows = (self._raw.table[name].take(indices).to_pylist() for name in ("file", "row"))
        return list(zip(files, rows, strict=True))

    @property
    def splits(self) -> dict[str, Int[np.ndarray, " _"]]:
        """The indices of the groups of each split, by its name; a split of which every row was skipped is left out."""
        parts = self._raw.parts or ((self.name, len(self._raw)),)
        part_of_row = np.repeat(np.arange(len(parts)), [rows for _, rows in parts])
        part_of_group = part_of_row[self._table["index"].to_numpy()]
        numbers: dict[str, list[int]] = {}
        for number, (name, _) in enumerate(parts):
            numbers.setdefault(name, []).append(number)
        indices = {name: np.flatnonzero(np.isin(part_of_group, own)) for name, own in numbers.items()}
        return {name: own for name, own in indices.items() if own.size}

    @property
    def layouts(self) -> tuple[Layout, ...]:
        """Describes how each source of the split was read."""
        return self._raw.layouts

    def skipped_summary(self) -> str:
        """Counts the skipped rows by reason, in one line; empty if there are none."""
        if not self.skipped:
            return ""
        kinds = Counter(row.kind for row in self.skipped).most_common()
        return f"{len(self.skipped)} of {len(self._raw)} rows skipped: " + ", ".join(f"{n} {kind}" for kind, n in kinds)

    def skipped_lines(self) -> list[str]:
        """Lists the skipped rows by kind, a line each, then the columns that are there."""
        kinds = rows_by_kind(self.skipped, self._raw.place, self._raw.origin)
        return [*kinds, *(f"  {layout.line}" for layout in self.layouts)]

    def skipped_report(self) -> str:
        """Joins `skipped_summary` and `skipped_lines`; empty if there are none."""
        return "\n".join([self.skipped_summary(), *self.skipped_lines()])

    def left_out_summary(self) -> str:
        """Counts the responses that were left out of groups by reason, in one line; empty if there are none."""
        total = sum(self.notes.left_out.values())
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.notes.left_out.items())
        return f"{total} responses left out of their groups: {reasons}" if total else ""

    def special_summary(self) -> str:
        """Counts the messages that hold the text of a special token, in one line; empty if there are none."""
        return special_summary(self.notes, self._raw.place)

    def cuts_summary(self) -> str:
        """Says how much `max_length` has cut and how to cut nothing, in one line; empty if it has cut nothing."""
        return cuts_summary(self.notes.cuts, self.lengths.noun, len(self), self._raw.place)

    def rendering_summary(self) -> str:
        """Says how the answers were rendered where not as in the original, in one line; otherwise empty."""
        return rendering_summary(self.notes, self.lengths.noun)

    def remarks(self) -> list[str]:
        """Lists what the user should know of the rows that are used, a sentence each."""
        remarks = [self.rendering_summary(), self.left_out_summary(), self.special_summary(), self.cuts_summary()]
        return [remark for remark in remarks if remark]

    def public_remarks(self) -> list[str]:
        """Lists the same for a page that is published: a file is named by the last part of its path."""

        def place(index: int) -> str:
            file, row = self._raw.origin(index)
            return f"{Path(file).name}, row {row}"

        cuts = cuts_summary(self.notes.cuts, self.lengths.noun, len(self), place)
        remarks = [self.rendering_summary(), self.left_out_summary(), special_summary(self.notes, place), cuts]
        return [remark for remark in remarks if remark]

    def inspect_objects(self) -> Iterator[dict[str, Any]]:
        """Yields one object per group in file order, as `inspect --json` writes them."""
        for batch, chunk in zip(self._table.to_batches(), self._chunks, strict=True):
            texts = batch.select(["index", "text_prompt", "text_responses"]).to_pylist()
            for number, of_group in enumerate(texts):
                file, row = self._raw.origin(of_group["index"])
                responses = [
                    {"text": text, "input_ids": r.ids.tolist(), "response_length": r.length}
                    for text, r in zip(of_group["text_responses"], chunk.group(number).responses, strict=True)
                ]
                yield {
                    "file": file,
                    "row": row,
                    "text_prompt": of_group["text_prompt"],
                    **(_as_pair(responses) if len(responses) == 2 else {}),
                    "responses": responses,
                }

    @cached_property
    def _chunks(self) -> list[_Chunk]:
        return [_Chunk(batch) for batch in self._table.to_batches()]


def _as_pair(responses: list[dict[str, Any]]) -> dict[str, Any]:
    keys = {"text_{}": "text", "{}_input_ids": "input_ids", "{}_response_length": "response_length"}
    names = ("chosen", "rejected")
    return {
        pattern.format(name): response[key]
        for pattern, key in keys.items()
        for name, response in zip(names, responses, strict=True)
    }


class _Chunk:
    """Gives the groups of a record batch as numpy views; pyarrow's own item access is a hundred times slower."""

    def __init__(self, batch: pa.RecordBatch) -> None:
        self._responses = batch["ids"].offsets.to_numpy()  # the first response of each group
        self._ids, self._spans = (batch[name].values for name in ("ids", "spans"))
        self._id_offsets, self._span_offsets = self._ids.offsets.to_numpy(), self._spans.offsets.to_numpy()
        self._id_values, self._span_values = self._ids.values.to_numpy(), self._spans.values.to_numpy()
        self._ranks = batch["ranks"].values.to_numpy()
        self._score_offsets, self._scores = batch["scores"].offsets.to_numpy(), batch["scores"].values.to_numpy()

    def group(self, index: int) -> Group:
        start, stop = self._responses[index : index + 2].tolist()
        scores = self._scores[slice(*self._score_offsets[index : index + 2])].tolist()  # none of a group without
        return Group(
            tuple(self._response(number) for number in range(start, stop)),
            tuple(self._ranks[start:stop].tolist()),
            tuple(scores) or None,
        )

    def _response(self, number: int) -> Response:
        first, last = self._id_offsets[number : number + 2]
        bounds = self._span_values[self._span_offsets[number] : self._span_offsets[number + 1]].tolist()
        return Response(self._id_values[first:last], tuple(zip(bounds[::2], bounds[1::2], strict=True)))


def _int32_array(column: pa.ChunkedArray) -> np.ndarray:
    return np.asarray(column.to_numpy(), np.int32)


# ---------------------------------------------------------------------------------------------------------------
# The cache
# ---------------------------------------------------------------------------------------------------------------


def cache_key(raw: RawSplit, tokenizer: PreTrainedTokenizerBase, settings: Mapping[str, Any]) -> str:
    """Hashes all that determines a split's tokens: rows, tokenizer, template, settings and library versions."""
    import tokenizers
    import transformers

    parts = {
        "version": [TOKENISATION_VERSION, transformers.__version__, tokenizers.__version__],
        "rows": [len(raw), raw.fingerprint],
        "tokenizer": _tokenizer_fingerprint(tokenizer),
        "settings": dict(settings),
    }
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()


def _tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    if tokenizer.is_fast:
        backend = tokenizer.backend_tokenizer
        # Truncation and padding are left over from the last call, and the tokenizer sets both again at every call.
        backend.no_truncation()
        backend.no_padding()
        content = backend.to_str()
    else:
        files = [getattr(tokenizer, name, None) for name in ("vocab_file", "merges_file")]
        hashes = [hashlib.blake2b(Path(f).read_bytes()).hexdigest() for f in files if f and Path(f).is_file()]
        content = json.dumps([sorted(tokenizer.get_vocab().items()), hashes])
    digest = hashlib.blake2b(content.encode(), digest_size=20)
    # `split_special_tokens`: if False, "<|eot_id|>" in a text becomes the special token.
    properties = [
        type(tokenizer).__name__,
        tokenizer.get_chat_template(),
        tokenizer.special_tokens_map,
        [tokenizer.bos_token_id, tokenizer.eos_token_id],
        bool(getattr(tokenizer, "split_special_tokens", False)),
    ]
    digest.update(json.dumps(properties, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def default_cache_dir() -> Path:
    """Returns our folder in the cache of Hugging Face datasets, without importing datasets (half a second)."""
    from huggingface_hub.constants import HF_HOME

    return Path(os.environ.get("HF_DATASETS_CACHE") or Path(HF_HOME) / "datasets") / "jax_simpo"


def cache_root(cache_dir: str | Path | None) -> Path:
    """Returns the folder of the cache: `cache_dir`, or else the default one."""
    return default_cache_dir() if cache_dir is None else Path(cache_dir).expanduser()


class Store:
    """One entry of the cache: a folder that is written completely or not at all.

    Raises:
        DataError: the cache folder cannot be made or written.
    """

    def __init__(self, cache_dir: str | Path | None, key: str) -> None:
        self.root = cache_root(cache_dir)
        self.folder = self.root / key
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            if not os.access(self.root, os.W_OK):
                raise PermissionError("not writable")
        except OSError as error:
            key = "HF_DATASETS_CACHE (or `data_cache_dir`)" if cache_dir is None else "`data_cache_dir`"
            raise DataError(f"cache folder {self.root}: {error}: set {key} to a folder that can be written") from error

    def lock(self) -> FileLock:
        """Returns the lock that the processes of a host take before they look for or write the entry."""
        return FileLock(f"{self.folder}.lock")

    def exists(self) -> bool:
        """Returns True if the entry has been written."""
        return self.folder.is_dir()

    def remove_if_damaged(self) -> str:
        """Removes an entry that is not as it was written, and returns what is wrong with it; empty if nothing is."""
        try:
            sums = dict(json.loads((self.folder / _SUMS).read_text(encoding="utf-8")))
            changed = [name for name in (_GROUPS, _NOTES) if sums.get(name) != _checksum(self.folder / name)]
            damage = f"{self.folder / changed[0]} has changed since it was written" if changed else ""
        except (OSError, ValueError, TypeError) as error:
            damage = f"{self.folder} cannot be read ({error})"
        if damage:
            try:
                shutil.rmtree(self.folder)
            except OSError as error:
                raise DataError(f"{damage}, and it cannot be removed: {error}. Remove the folder") from error
        return damage

    @contextmanager
    def writer(self) -> Iterator[Writer]:
        """Opens the entry for writing. It appears when the block ends without an exception."""
        for former in self.root.glob(f"{self.folder.name}.*"):  # of writers that were killed, a day ago or earlier
            if former.is_dir() and time.time() - former.stat().st_mtime > _ABANDONED_SECONDS:
                shutil.rmtree(former, ignore_errors=True)
        temporary = Path(tempfile.mkdtemp(prefix=f"{self.folder.name}.", dir=self.root))
        try:
            with pa.OSFile(str(temporary / _GROUPS), "wb") as sink, pa.ipc.new_file(sink, _SCHEMA) as stream:
                writer = Writer(stream)
                yield writer
            writer.notes.skipped.sort(key=lambda row: row.index)
            (temporary / _NOTES).write_text(json.dumps(writer.notes.to_json()), encoding="utf-8")
            sums = {name: _checksum(temporary / name) for name in (_GROUPS, _NOTES)}
            (temporary / _SUMS).write_text(json.dumps(sums), encoding="utf-8")
            temporary.chmod(0o755)  # mkdtemp closes its folder to other users, who may share the cache
            try:
                temporary.replace(self.folder)
            except OSError:  # another host, which the lock does not cover, wrote the same entry first
                if not self.exists():
                    raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def open(self, raw: RawSplit, cache_hit: bool, cache_damage: str = "") -> GroupDataset:
        """Opens the written entry; `raw` gives the origins of its groups."""
        with pa.memory_map(str(self.folder / _GROUPS)) as source:
            table = pa.ipc.open_file(source).read_all()
        notes = Notes.of_json(json.loads((self.folder / _NOTES).read_text(encoding="utf-8")))
        return GroupDataset(
            table, raw, notes, cache_hit=cache_hit, cache_damage=cache_damage, fingerprint=self.folder.name
        )


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Writer:
    """Writes chunks of groups as record batches."""

    def __init__(self, stream: pa.RecordBatchWriter) -> None:
        self._stream = stream
        self.notes = Notes()

    def write(
        self,
        indices: list[int],
        texts: list[GroupText],
        groups: list[Group],
        weights: list[float],
        notes: Notes,
    ) -> None:
        """Writes the groups of a chunk, and adds the notes on it to those of the split."""
        self.notes.add(notes)
        if not groups:
            return
        lengths = GroupLengths.of(groups)
        sizes = lengths.sizes.tolist()
        responses = [response for group in groups for response in group.responses]
        spans = [np.array(response.spans, np.int32).reshape(-1) for response in responses]
        shown = [text.shown() for text in texts]
        columns = [
            pa.array(indices, pa.int64()),
            pa.ListArray.from_arrays(_offsets(sizes), _list_array([response.ids for response in responses])),
            pa.ListArray.from_arrays(_offsets(sizes), _list_array(spans)),
            pa.array([group.ranks for group in groups], pa.list_(pa.int32())),
            pa.array([group.scores for group in groups], pa.list_(pa.float32())),
            pa.array(lengths.tree_tokens),
            pa.array(lengths.tree_visible),
            pa.array(lengths.tree_predictors),
            pa.array(weights, pa.float32()),
            pa.array([prompt for prompt, _ in shown], pa.string()),
            pa.array([responses for _, responses in shown], pa.list_(pa.string())),
        ]
        self._stream.write_batch(pa.RecordBatch.from_arrays(columns, schema=_SCHEMA))


def _list_array(lists: list[np.ndarray]) -> pa.ListArray:
    return pa.ListArray.from_arrays(_offsets([len(ids) for ids in lists]), pa.array(np.concatenate(lists), pa.int32()))


def _offsets(sizes: Sequence[int]) -> pa.Array:
    return pa.array(np.cumsum([0, *sizes]).astype(np.int32))
