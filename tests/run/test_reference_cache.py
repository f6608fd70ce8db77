"""The cache of reference log-probs: complete or continued, and never another's or damaged numbers."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from jax_simpo.errors import DataError
from jax_simpo.run.reference_cache import ReferenceCache

IDENTITY = {"weights": ["abc"], "tokens": "def", "dtype": "float32"}
SUMS = np.random.default_rng(0).normal(-50, 20, (10, 2)).astype(np.float32)


def cache_in(root: Path, **changes: object) -> ReferenceCache:
    return ReferenceCache(root, {**IDENTITY, **changes}, groups=10, responses=20, groups_per_file=4)


def written(root: Path, files: int = 3) -> ReferenceCache:
    cache = cache_in(root)
    for step in range(files):
        cache.write(step, SUMS[4 * step : 4 * step + 4].reshape(-1))
    return cache


def read(cache: ReferenceCache) -> np.ndarray:
    return np.concatenate([np.zeros(0, np.float32), *cache.read()]).reshape(-1, 2)


def test_what_was_written_is_read_to_the_bit(tmp_path: Path) -> None:
    assert written(tmp_path).steps == 3
    np.testing.assert_array_equal(read(cache_in(tmp_path)), SUMS)


@pytest.mark.parametrize("files", [0, 1, 2])
def test_a_pass_that_was_interrupted_finds_what_it_had(files: int, tmp_path: Path) -> None:
    written(tmp_path, files)
    assert len(cache_in(tmp_path).read()) == files
    np.testing.assert_array_equal(read(cache_in(tmp_path)), SUMS[: 4 * files])


@pytest.mark.parametrize("byte", [0, 31, 32, 40, 63])
def test_a_flipped_bit_is_found(byte: int, tmp_path: Path) -> None:
    file = written(tmp_path).folder / "sums-000001.bin"
    data = bytearray(file.read_bytes())
    data[byte] ^= 1
    file.write_bytes(data)
    with pytest.raises(DataError, match=rf"{re.escape(str(file))}: .* damaged.* Remove the folder .*computed again"):
        cache_in(tmp_path).read()


def test_a_file_cut_short_is_found(tmp_path: Path) -> None:
    file = written(tmp_path).folder / "sums-000002.bin"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(DataError, match="damaged"):
        cache_in(tmp_path).read()


def test_files_of_another_cache_or_another_place_are_found(tmp_path: Path) -> None:
    ours, other = written(tmp_path / "a").folder, cache_in(tmp_path / "b", dtype="bfloat16")
    other.write(0, SUMS[:4].reshape(-1))
    (other.folder / "sums-000000.bin").write_bytes((ours / "sums-000000.bin").read_bytes())
    with pytest.raises(DataError, match="belong to another cache"):
        cache_in(tmp_path / "b", dtype="bfloat16").read()
    (ours / "sums-000001.bin").write_bytes((ours / "sums-000000.bin").read_bytes())
    with pytest.raises(DataError, match="damaged"):
        cache_in(tmp_path / "a").read()


def test_the_cache_of_another_model_is_refused_with_what_differs(tmp_path: Path) -> None:
    other = cache_in(tmp_path, weights=["another"])
    written(tmp_path).folder.rename(other.folder)
    with pytest.raises(DataError, match=r"identity.json: .* \(weights is \['abc'\], here \['another'\]\)"):
        other.read()


def test_an_entry_that_does_not_say_whose_it_is_is_refused(tmp_path: Path) -> None:
    cache = written(tmp_path)
    (cache.folder / "identity.json").unlink()
    with pytest.raises(DataError, match="nobody knows whose"):
        cache_in(tmp_path).read()


@pytest.mark.parametrize("change", [{"weights": ["b"]}, {"tokens": "b"}, {"dtype": "bfloat16"}])
def test_everything_the_numbers_depend_on_gives_another_entry(change: dict, tmp_path: Path) -> None:
    assert cache_in(tmp_path, **change).folder != cache_in(tmp_path).folder
    assert cache_in(tmp_path, **change).read() == []
