"""Keeps the tokenised pairs of a split on disk: a memory-mapped Arrow table, named by a hash of what determines it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from filelock import FileLock
from jaxtyping import Float, Int

from jax_simpo.data.chat import PairText
from jax_simpo.data.pairs import PairLengths, Response, TokenizedPair, common_prefix_length
from jax_simpo.data.sources import RawSplit
from jax_simpo.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENISATION_VERSION = 2
"""Raise this number with every change that can change a token or the stored columns: it ends old caches."""

SHOWN_SKIPPED = 10

_SCHEMA = pa.schema(
    [
        ("index", pa.int64()),  # number of the row in the raw split
        ("chosen_ids", pa.list_(pa.int32())),
        ("chosen_prompt_length", pa.int32()),
        ("rejected_ids", pa.list_(pa.int32())),
        ("rejected_prompt_length", pa.int32()),
        ("shared_inputs", pa.int32()),
        ("weight", pa.float32()),
        ("text_prompt", pa.string()),
        ("text_chosen", pa.string()),
        ("text_rejected", pa.string()),
    ]
)


@dataclass(frozen=True)
class Skipped:
    """A row that cannot be used: its number in the raw split, and the `kind` and `detail` of its `BadRow`."""

    index: int
    kind: str
    detail: str

    @property
    def reason(self) -> str:
        return f"{self.kind}: {self.detail}"


class PairDataset:
    """The tokenised pairs of a split, in file order, read from disk on demand.

    Attributes:
        name: the split's name.
        skipped: the rows that could not be used, in file order, also when the tokens came from the cache.
        cache_hit: True if the tokens came from the cache.
        fingerprint: a hash of rows, tokenizer, template and settings. Moving a file does not change it.
    """

    def __init__(
        self, table: pa.Table, raw: RawSplit, skipped: list[Skipped], *, cache_hit: bool, fingerprint: str
    ) -> None:
        self.name = raw.name
        self.skipped = skipped
        self.cache_hit = cache_hit
        self.fingerprint = fingerprint
        self._table = table
        self._raw = replace(raw, table=raw.table.select(["file", "row", "line"]))  # without the texts, to save memory
        self._chunk_starts = np.cumsum([0] + [batch.num_rows for batch in table.to_batches()])

    def __len__(self) -> int:
        return int(self._table.num_rows)

    @cached_property
    def lengths(self) -> PairLengths:
        """The token counts of all pairs, from which every process derives the step plan."""
        chosen = _int32_array(pc.list_value_length(self._table["chosen_ids"]))
        rejected = _int32_array(pc.list_value_length(self._table["rejected_ids"]))
        return PairLengths(
            chosen_inputs=chosen - 1,
            rejected_inputs=rejected - 1,
            shared_inputs=_int32_array(self._table["shared_inputs"]),
            chosen_targets=chosen - self._prompt_lengths[0],
            rejected_targets=rejected - self._prompt_lengths[1],
        )

    @cached_property
    def weights(self) -> Float[np.ndarray, " P"]:
        """The weight of each pair, float32: 1 for all where the split has no column of weights."""
        return np.asarray(self._table["weight"].to_numpy(), np.float32)

    def pair(self, index: int) -> TokenizedPair:
        """Returns one pair; see `pairs`."""
        return self.pairs([index])[0]

    def pairs(self, indices: Sequence[int] | np.ndarray) -> list[TokenizedPair]:
        """Returns the pairs at `indices`, in that order. Their ids are views of the memory-mapped file, not copies.

        Raises:
            IndexError: an index is negative or beyond the last pair.
        """
        positions = np.asarray(indices, np.int64).reshape(-1)
        if positions.size and not (0 <= positions.min() and positions.max() < len(self)):
            raise IndexError(f"pair {positions.min()} … {positions.max()} of a dataset of {len(self)}")
        chunks = np.searchsorted(self._chunk_starts, positions, side="right") - 1
        in_chunks = positions - self._chunk_starts[chunks]
        chosen_prompt, rejected_prompt = self._prompt_lengths
        return [
            TokenizedPair(
                (
                    Response(self._ids[0][chunk][in_chunk], int(chosen_prompt[position])),
                    Response(self._ids[1][chunk][in_chunk], int(rejected_prompt[position])),
                )
            )
            for position, chunk, in_chunk in zip(positions.tolist(), chunks.tolist(), in_chunks.tolist(), strict=True)
        ]

    def texts(self, index: int) -> PairText:
        """Returns the prompt and the answers of a pair as text, after the chat template."""
        return PairText(*(self._table[f"text_{part}"][index].as_py() for part in ("prompt", "chosen", "rejected")))

    def origin(self, index: int) -> tuple[str, int]:
        """Returns the file and the row (from 0) of a pair."""
        return self._raw.origin(self._table["index"][index].as_py())

    @property
    def origins(self) -> list[tuple[str, int]]:
        """The file and the row (from 0) of every pair."""
        indices = self._table["index"]
        files, rows = (self._raw.table[name].take(indices).to_pylist() for name in ("file", "row"))
        return list(zip(files, rows, strict=True))

    @property
    def splits(self) -> dict[str, Int[np.ndarray, " _"]]:
        """The indices of the pairs of each split, by its name; a split of which every row was skipped is left out."""
        parts = self._raw.parts or ((self.name, len(self._raw)),)
        part_of_row = np.repeat(np.arange(len(parts)), [rows for _, rows in parts])
        part_of_pair = part_of_row[self._table["index"].to_numpy()]
        numbers: dict[str, list[int]] = {}
        for number, (name, _) in enumerate(parts):
            numbers.setdefault(name, []).append(number)
        indices = {name: np.flatnonzero(np.isin(part_of_pair, own)) for name, own in numbers.items()}
        return {name: own for name, own in indices.items() if own.size}

    def skipped_summary(self) -> str:
        """Counts the skipped rows by reason, in one line; empty if there are none."""
        if not self.skipped:
            return ""
        kinds = Counter(row.kind for row in self.skipped).most_common()
        total = len(self) + len(self.skipped)
        return f"{len(self.skipped)} of {total} rows skipped: " + ", ".join(f"{n} {kind}" for kind, n in kinds)

    def skipped_lines(self) -> list[str]:
        """Lists the first skipped rows with file, row and reason, one line each."""
        lines = [f"  {self._raw.place(row.index)}: {row.reason}" for row in self.skipped[:SHOWN_SKIPPED]]
        more = len(self.skipped) - SHOWN_SKIPPED
        return [*lines, f"  and {more} more"] if more > 0 else lines

    def skipped_report(self) -> str:
        """Joins `skipped_summary` and `skipped_lines`; empty if there are none."""
        return "\n".join([self.skipped_summary(), *self.skipped_lines()])

    def inspect_objects(self) -> Iterator[dict[str, Any]]:
        """Yields one object per pair in file order, as `inspect --json` writes them."""
        for batch in self._table.to_batches():
            for pair in batch.to_pylist():
                file, row = self._raw.origin(pair["index"])
                yield {
                    "file": file,
                    "row": row,
                    "text_prompt": pair["text_prompt"],
                    "text_chosen": pair["text_chosen"],
                    "text_rejected": pair["text_rejected"],
                    "chosen_input_ids": pair["chosen_ids"],
                    "rejected_input_ids": pair["rejected_ids"],
                    "chosen_response_length": len(pair["chosen_ids"]) - pair["chosen_prompt_length"],
                    "rejected_response_length": len(pair["rejected_ids"]) - pair["rejected_prompt_length"],
                }

    @cached_property
    def _prompt_lengths(self) -> tuple[np.ndarray, np.ndarray]:
        return _int32_array(self._table["chosen_prompt_length"]), _int32_array(self._table["rejected_prompt_length"])

    @cached_property
    def _ids(self) -> tuple[list[_IdLists], list[_IdLists]]:
        columns = [[_IdLists(chunk) for chunk in self._table[f"{r}_ids"].chunks] for r in ("chosen", "rejected")]
        return columns[0], columns[1]


class _IdLists:
    """Gives the lists of a column chunk as numpy views; pyarrow's own item access is a hundred times slower."""

    def __init__(self, chunk: pa.ListArray) -> None:
        self.offsets = chunk.offsets.to_numpy()
        self.values = chunk.values.to_numpy()

    def __getitem__(self, index: int) -> np.ndarray:
        ids: np.ndarray = self.values[self.offsets[index] : self.offsets[index + 1]]
        return ids


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

    @contextmanager
    def writer(self) -> Iterator[Writer]:
        """Opens the entry for writing. It appears when the block ends without an exception."""
        temporary = Path(tempfile.mkdtemp(prefix=f"{self.folder.name}.", dir=self.root))
        try:
            with pa.OSFile(str(temporary / "pairs.arrow"), "wb") as sink, pa.ipc.new_file(sink, _SCHEMA) as stream:
                writer = Writer(stream)
                yield writer
            writer.skipped.sort(key=lambda row: row.index)
            (temporary / "skipped.json").write_text(json.dumps([asdict(row) for row in writer.skipped]))
            temporary.chmod(0o755)  # mkdtemp closes its folder to other users, who may share the cache
            try:
                temporary.replace(self.folder)
            except OSError:  # another host, which the lock does not cover, wrote the same entry first
                if not self.exists():
                    raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def open(self, raw: RawSplit, cache_hit: bool) -> PairDataset:
        """Opens the written entry; `raw` gives the origins of its pairs."""
        with pa.memory_map(str(self.folder / "pairs.arrow")) as source:
            table = pa.ipc.open_file(source).read_all()
        skipped = [Skipped(**row) for row in json.loads((self.folder / "skipped.json").read_text())]
        return PairDataset(table, raw, skipped, cache_hit=cache_hit, fingerprint=self.folder.name)


class Writer:
    """Writes chunks of pairs as record batches."""

    def __init__(self, stream: pa.RecordBatchWriter) -> None:
        self._stream = stream
        self.skipped: list[Skipped] = []

    def write(
        self,
        indices: list[int],
        texts: list[PairText],
        pairs: list[TokenizedPair],
        weights: list[float],
        skipped: list[Skipped],
    ) -> None:
        """Writes the rows of a chunk that became pairs, and notes those that were skipped."""
        self.skipped += skipped
        if not pairs:
            return
        columns = [
            pa.array(indices, pa.int64()),
            _list_array([pair.chosen.ids for pair in pairs]),
            pa.array([pair.chosen.prompt_length for pair in pairs], pa.int32()),
            _list_array([pair.rejected.ids for pair in pairs]),
            pa.array([pair.rejected.prompt_length for pair in pairs], pa.int32()),
            pa.array([common_prefix_length(p.chosen.inputs, p.rejected.inputs) for p in pairs], pa.int32()),
            pa.array(weights, pa.float32()),
            pa.array([text.prompt for text in texts], pa.string()),
            pa.array([text.chosen for text in texts], pa.string()),
            pa.array([text.rejected for text in texts], pa.string()),
        ]
        self._stream.write_batch(pa.RecordBatch.from_arrays(columns, schema=_SCHEMA))


def _list_array(lists: list[np.ndarray]) -> pa.ListArray:
    offsets = np.cumsum([0] + [len(ids) for ids in lists]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate(lists), pa.int32()))
