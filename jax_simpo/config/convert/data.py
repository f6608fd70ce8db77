"""The data that another trainer's file names, as sources of `dataset_mixer`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jax_simpo.config.convert.rules import Draft

_LOADERS = ("json", "csv", "parquet", "text", "arrow")  # names by which `datasets` loads files


@dataclass(frozen=True)
class Source:
    """A data set of another trainer's file.

    Attributes:
        name: a hub id, a file or a folder.
        split: the split to train on.
        config: its configuration on the hub.
        fraction: the share of its rows.
        format: the `dataset_format` that it is said to have; None finds it.
        columns: our name of a column -> its name there.
    """

    name: str
    split: str = "train"
    config: str | None = None
    fraction: float = 1.0
    format: str | None = None
    columns: tuple[tuple[str, str], ...] = ()


def file_or_hub(draft: Draft, key: str, path: Any, files: Any) -> str | None:
    """Returns the name of a source that is given by a path and perhaps the files in it."""
    names = [files] if isinstance(files, str) else files
    if not names:
        if not isinstance(path, str) or path in _LOADERS:
            draft.refuse(key, "it names no file; give its `data_files`")
            return None
        return path
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
        draft.refuse(key, "several data files are one source only in a folder, as shards; name the folder with --data")
        return None
    return names[0] if path in _LOADERS or path is None or path == names[0] else f"{path}/{names[0]}"


def set_sources(draft: Draft, key: str, sources: Sequence[Source], eval_splits: Sequence[str], origin: str) -> None:
    """Sets the sources and splits. `key` is their key that messages name.

    The file's own data are replaced by those that the user gives with `--data`.
    """
    if draft.options.data:
        mixer: dict[str, Any] = {name: 1.0 for name in draft.options.data}
        draft.set("dataset_mixer", mixer, "--data", of=key)
        draft.set("dataset_splits", ["train", *eval_splits], origin)
        return
    if not sources:
        return
    names = list(dict.fromkeys(source.name for source in sources))
    of_name = {name: [source for source in sources if source.name == name] for name in names}
    splits = [source.split for source in of_name[names[0]]]
    for name, own in of_name.items():
        if len({(source.config, source.fraction) for source in own}) > 1 or len({s.split for s in own}) < len(own):
            draft.refuse(key, f"{name} stands in it more than once; a source is named once here. Give --data SOURCE")
            return
        if {source.split for source in own} != set(splits):
            there = ", ".join(source.split for source in own)
            draft.refuse(
                key,
                f"its sources have different splits ({', '.join(splits)}; {there}); `dataset_splits` is for all. Give "
                "--data SOURCE",
            )
            return
    for split in splits:
        if "[" in split:
            draft.refuse(key, f"the split {split} is a part of one; name the split, and set `max_samples`")
            return
        if "train" not in split:
            draft.refuse(
                key,
                f"it trains on the split `{split}`, and training splits have `train` in their name here; save it under "
                "such a name and give it with --data",
            )
            return
    firsts = [own[0] for own in of_name.values()]
    draft.set("dataset_mixer", {source.name: source.fraction for source in firsts}, origin, of=key)
    draft.set("dataset_splits", [*splits, *eval_splits], origin)
    if any(source.config is not None for source in firsts):
        draft.set("dataset_configs", [source.config for source in firsts], origin)
    _set_by_source(draft, "dataset_format", {s.name: s.format for s in firsts if s.format is not None}, firsts, origin)
    _set_by_source(draft, "dataset_columns", {s.name: dict(s.columns) for s in firsts if s.columns}, firsts, origin)


def _set_by_source(draft: Draft, key: str, values: Mapping[str, Any], sources: Sequence[Source], origin: str) -> None:
    """Sets a key that may differ from source to source."""
    if not values:
        return
    first = next(iter(values.values()))
    same = len(values) == len(sources) and all(value == first for value in values.values())
    draft.set(key, first if same else dict(values), origin)


def need_data(draft: Draft, what: str) -> None:
    """Notes that the file names no data, unless something is known of them."""
    if "dataset_mixer" not in draft.ours and not draft.errors:
        draft.errors.append(f"the file names no data ({what}); give --data SOURCE: a file, a folder or a hub id")
