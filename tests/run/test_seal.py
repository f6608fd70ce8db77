"""Whatever happens to a file of a sealed step is found, and the file is named."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_simpo.errors import CheckpointError
from jax_simpo.run.seal import Seal, file_names, find_damage
from jax_simpo.run.sums import NOTHING, Sum, sums_of

CONTENTS = {"params/d/0": b"weights" * 9, "params/manifest": b"", "run/metadata": b"{}"}


def make_step(folder: Path, step: int = 8) -> Path:
    for name, content in CONTENTS.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content + (str(step).encode() if content else b""))
    Seal(step, Sum(75, "ab" * 32), sums_of(folder, file_names(folder), to_disk=True)).write(folder)
    return folder


def test_a_step_as_it_was_sealed_is_whole_and_its_seal_reads_back(tmp_path: Path) -> None:
    make_step(tmp_path)
    assert find_damage(tmp_path, 8) is None
    seal = Seal.read(tmp_path)
    assert (seal.step, seal.metrics, seal.sums.keys()) == (8, Sum(75, "ab" * 32), CONTENTS.keys())
    assert seal.sums["params/manifest"] == NOTHING


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_one_flipped_bit_is_found_in_whichever_file_it_is(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = make_step(tmp_path_factory.mktemp("step"))
    name = data.draw(st.sampled_from(["params/d/0", "run/metadata", "seal.json"]))
    content = bytearray((folder / name).read_bytes())
    bit = data.draw(st.integers(0, 8 * len(content) - 1))
    content[bit // 8] ^= 1 << bit % 8
    (folder / name).write_bytes(content)
    assert (find_damage(folder, 8) or "").startswith(name)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def zero(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def make_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("harm", [cut, empty, zero, Path.unlink, make_a_folder])
@pytest.mark.parametrize("name", ["params/d/0", "run/metadata", "seal.json"])
def test_a_file_that_was_cut_zeroed_or_removed_is_named(
    harm: Callable[[Path], None], name: str, tmp_path: Path
) -> None:
    make_step(tmp_path)
    harm(tmp_path / name)
    assert (find_damage(tmp_path, 8) or "").startswith(f"{name} ")


def test_what_belongs_to_another_step_is_found(tmp_path: Path) -> None:
    make_step(tmp_path / "8"), make_step(tmp_path / "12", 12)
    assert find_damage(tmp_path / "12", 14) == "seal.json is that of step 12"  # the folder was renamed
    shutil.rmtree(tmp_path / "12" / "params")
    shutil.copytree(tmp_path / "8" / "params", tmp_path / "12" / "params")
    assert "params/d/0 has 64 bytes; it was saved with 65" == find_damage(tmp_path / "12", 12)
    (tmp_path / "8" / "params" / "d" / "1").touch()
    assert find_damage(tmp_path / "8", 8) == "params/d/1 is no file of this step"


def test_a_step_without_a_seal_was_not_finished(tmp_path: Path) -> None:
    make_step(tmp_path)
    (tmp_path / "seal.json").unlink()
    assert "the step was not finished, or an earlier version of the program wrote it" in (
        find_damage(tmp_path, 8) or ""
    )


def test_several_processes_share_the_reading(tmp_path: Path) -> None:
    make_step(tmp_path)
    for name in CONTENTS:
        cut(tmp_path / name)
        found = [find_damage(tmp_path, 8, share=share, shares=2) for share in range(2)]
        if CONTENTS[name]:
            assert [damage.partition(" ")[0] for damage in found if damage] == [name]
        make_step(tmp_path)


@pytest.mark.parametrize("share", [0, 1])
def test_a_seal_names_files_of_its_folder_only(share: int, tmp_path: Path) -> None:
    folder = make_step(tmp_path / "8")
    (tmp_path / "other").write_bytes(b"x")
    seal = Seal.read(folder)
    Seal(8, seal.metrics, {**seal.sums, "../other": Sum.of_file(tmp_path / "other")}).write(folder)
    damage = find_damage(folder, 8, share=share, shares=2)
    assert damage == "seal.json is damaged (it lists '../other', which is no file of this step)"


def test_a_hidden_file_is_not_the_runs(tmp_path: Path) -> None:
    make_step(tmp_path)
    (tmp_path / "params" / ".nfs0001").touch()
    (tmp_path / ".DS_Store").touch()
    assert find_damage(tmp_path, 8) is None


def test_a_file_that_cannot_be_read_is_not_taken_for_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_step(tmp_path)

    def stale(*_: object, **__: object) -> None:
        raise OSError(116, "Stale file handle", "params/d/0")

    monkeypatch.setattr(Sum, "of_file", stale)
    with pytest.raises(CheckpointError, match=r"params/d/0 cannot be read: Stale file handle\. Mend that"):
        find_damage(tmp_path, 8)


def test_a_seal_with_other_checksums_is_of_another_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("jax_simpo.run.seal.CHECKSUM", "md5")
        make_step(tmp_path)
    assert "another version of the program wrote it" in (find_damage(tmp_path, 8) or "")
