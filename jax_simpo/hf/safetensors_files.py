"""Reads the weight files of a model folder slice by slice, and writes them in blocks of rows.

Reading and writing hold at most one block of a tensor in host memory, besides the result of a read. Mapped pages count
as the process's memory as long as a file stays open, so a file is opened anew for each block.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from jax_simpo.errors import ModelError
from jax_simpo.run.listed import INDEX, SINGLE, weight_files

_WRITE_DTYPES = {"float32": ("F32", np.dtype(np.float32)), "bfloat16": ("BF16", np.dtype(ml_dtypes.bfloat16))}
_READ_DTYPES = {"F32": 4, "BF16": 2, "F16": 2}  # dtype -> bytes of a number

BLOCK_BYTES = 16 * 2**20


class WeightFiles:
    """The tensors of a folder's safetensors files, as a collection of names. Only headers are read on construction.

    Args:
        folder: the folder.
        files: names of the files to read; None takes the one file of a model, or the files that its index names.

    Raises:
        ModelError: a file is missing or cannot be read.
    """

    # What error messages call the files and what describes the model, and what they advise where the two disagree.
    holder, description = "the safetensors files", "config.json"
    remedy = "use the config.json that belongs to these weights"

    def __init__(self, folder: Path, files: Sequence[str] | None = None) -> None:
        self.folder = folder
        self._file: dict[str, str] = {}
        self._shape: dict[str, tuple[int, ...]] = {}
        self._dtype: dict[str, str] = {}
        for file in _weight_files(folder) if files is None else files:
            try:
                with safe_open(folder / file, framework="numpy") as opened:
                    for name in opened.keys():
                        self._file[name] = file
                        self._shape[name] = tuple(opened.get_slice(name).get_shape())
                        self._dtype[name] = opened.get_slice(name).get_dtype()
            except (OSError, SafetensorError) as error:
                raise ModelError(
                    f"{folder / file}: cannot be read as safetensors ({error}); it may be cut short: download or "
                    "export the model again"
                ) from error

    def __iter__(self) -> Iterator[str]:
        return iter(self._file)

    def __contains__(self, name: str) -> bool:
        return name in self._file

    def own_name(self, name: str) -> str:
        """Returns the name of a tensor in the files, for error messages."""
        return name

    def locate(self, name: str) -> str:
        """Returns the tensor's file and name, for error messages."""
        return f"{self.folder / self._file[name]}: tensor `{name}`"

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of a tensor."""
        return self._shape[name]

    def check_dtype(self, name: str) -> None:
        """Raises ModelError unless the tensor is stored as float32, bfloat16 or float16."""
        dtype = self._dtype[name]
        if dtype not in _READ_DTYPES:
            raise ModelError(
                f"{self.locate(name)} is stored as {dtype}; weights are read from float32, bfloat16 and float16. "
                "Convert the model (a quantised one has to be dequantised)"
            )

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """Reads the part of a tensor at `index` (one slice per axis) as float32. No other rows are read."""
        bounds = [i.indices(size)[:2] for i, size in zip(index, self._shape[name], strict=True)]
        part = np.empty([stop - start for start, stop in bounds], np.float32)
        first, last = bounds[0]
        row_bytes = int(np.prod(self._shape[name][1:], dtype=np.int64)) * _READ_DTYPES[self._dtype[name]]
        step = max(1, BLOCK_BYTES // row_bytes)
        for start in range(first, last, step):
            stop = min(start + step, last)
            with safe_open(self.folder / self._file[name], framework="numpy") as file:
                part[start - first : stop - first] = file.get_slice(name)[(slice(start, stop), *index[1:])]
        return part


def _weight_files(folder: Path) -> list[str]:
    """Returns the names of a model folder's weight files.

    Raises:
        ModelError: there are none, or the index names one that is missing or lies elsewhere.
    """
    if files := weight_files(folder):
        if missing := [file for file in files if not (folder / file).is_file()]:
            raise ModelError(f"{folder}: {', '.join(missing)} is named in {INDEX} but not there; download it again")
        return files
    if (folder / "adapter_config.json").is_file():
        raise ModelError(f"{folder}: holds a LoRA adapter, not a model; `jax-simpo export --merge` makes a model of it")
    pickled = sorted(path.name for path in (*folder.glob("pytorch_model*.bin*"), *folder.glob("*.pth")))
    if pickled:
        raise ModelError(
            f"{folder}: has {pickled[0]} but no {SINGLE}; weights are read from safetensors only (a .bin file can run "
            "code). Convert it in an environment you trust: "
            f'`AutoModelForCausalLM.from_pretrained("{folder}").save_pretrained("NEW_FOLDER")`'
        )
    raise ModelError(f"{folder}: no {SINGLE} or {INDEX}; give a folder with a Hugging Face model")


def split_into_files(
    shapes: dict[str, tuple[int, ...]], dtype: str, max_shard_bytes: int
) -> dict[str, dict[str, tuple[int, ...]]]:
    """Splits tensors, in order, into files of at most `max_shard_bytes`. A larger tensor gets a file of its own.

    Args:
        shapes: name -> shape of each tensor.
        dtype: of the stored tensors, `float32` or `bfloat16`.
        max_shard_bytes: most bytes of tensors per file.

    Returns:
        File name -> name -> shape.
    """
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    filled = 0
    for name, shape in shapes.items():
        size = _bytes(shape, dtype)
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = shape
        filled += size
    if len(shards) == 1:
        return {SINGLE: shards[0]}
    return {f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards)}


def write_index(folder: Path, files: dict[str, dict[str, tuple[int, ...]]], dtype: str) -> None:
    """Writes the index that says which tensor is in which file. A single file needs none and gets none."""
    if len(files) == 1:
        return
    total = sum(_bytes(shape, dtype) for shapes in files.values() for shape in shapes.values())
    weight_map = {name: file for file, shapes in files.items() for name in shapes}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


class TensorWriter:
    """Writes one safetensors file, the rows of its tensors in any order.

    The format (8 bytes of header length, a JSON header, the raw tensors; https://github.com/huggingface/safetensors)
    needs only the shapes in advance, so this class, unlike `safetensors.save_file`, never holds a whole tensor.

    Args:
        path: the file.
        shapes: name -> shape of each tensor.
        dtype: of the stored tensors, `float32` or `bfloat16`.
    """

    def __init__(self, path: Path, shapes: dict[str, tuple[int, ...]], dtype: str) -> None:
        code, self._dtype = _WRITE_DTYPES[dtype]
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers refuses files without it
        self._starts: dict[str, int] = {}
        end = 0
        for name, shape in shapes.items():
            self._starts[name], end = end, end + _bytes(shape, dtype)
            header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [self._starts[name], end]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self._shapes = shapes
        self._data = 8 + len(text)
        self._file = path.open("wb")
        self._file.write(len(text).to_bytes(8, "little") + text)
        self._file.truncate(self._data + end)

    def __enter__(self) -> TensorWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, name: str, rows: np.ndarray, start: int = 0) -> None:
        """Writes rows of a tensor, beginning at its row `start`.

        Raises:
            ValueError: the rows do not fit the tensor's shape.
        """
        shape = self._shapes[name]
        if rows.shape[1:] != shape[1:] or not 0 <= start <= start + len(rows) <= shape[0]:
            raise ValueError(f"rows {rows.shape} from {start} on are not of tensor {name} {shape}")
        data = np.ascontiguousarray(rows, dtype=self._dtype)
        self._file.seek(self._data + self._starts[name] + start * (data.nbytes // max(1, len(rows))))
        self._file.write(data.view(np.uint8).data)


def _bytes(shape: Sequence[int], dtype: str) -> int:
    """Returns the bytes of a stored tensor."""
    return int(np.prod(shape, dtype=np.int64)) * _WRITE_DTYPES[dtype][1].itemsize
