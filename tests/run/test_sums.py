"""An exported model lists its checksums, and a changed file of it is found before it is used."""

from __future__ import annotations

import shutil
import subprocess
from hashlib import sha256
from pathlib import Path

import pytest

from jax_simpo.errors import ModelError
from jax_simpo.run.sums import Sum, check_model_sums, write_model_sums
from jax_simpo.run.whole import replacing


@pytest.fixture
def model(tmp_path: Path) -> Path:
    with replacing(tmp_path / "model") as folder:
        (folder / "model.safetensors").write_bytes(b"weights")
        (folder / "config.json").write_text("{}")
        (folder / "additional_chat_templates").mkdir()
        (folder / "additional_chat_templates" / "tools.jinja").touch()
    return tmp_path / "model"


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="there is no sha256sum")
def test_the_list_is_one_that_sha256sum_checks(model: Path) -> None:
    done = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=model, capture_output=True, text=True)
    assert done.stdout.splitlines() == [
        *("additional_chat_templates/tools.jinja: OK", "config.json: OK", "model.safetensors: OK"),
    ]


def test_changed_weights_are_found(model: Path) -> None:
    check_model_sums(model)
    (model / "model.safetensors").write_bytes(b"Weights")
    with pytest.raises(ModelError, match="is not the file that was exported: its checksum is another one than SHA256"):
        check_model_sums(model)


def test_missing_weights_are_found_and_all_else_may_be_edited(model: Path) -> None:
    (model / "README.md").write_text("mine")
    (model / "config.json").write_text("[]")
    (model / "additional_chat_templates" / "tools.jinja").unlink()
    check_model_sums(model)
    (model / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"a file that SHA256SUMS lists cannot be read .*model.safetensors"):
        check_model_sums(model)
    (model / "SHA256SUMS").unlink()
    check_model_sums(model)  # a model from elsewhere has no list


def test_a_list_that_is_none_is_an_error_and_no_crash(model: Path) -> None:
    for text in ("model.safetensors\n", "abc  model.safetensors\n", "  no.safetensors", "x  ../no.safetensors\n"):
        (model / "SHA256SUMS").write_text(text)
        with pytest.raises(ModelError):
            check_model_sums(model)


@pytest.mark.parametrize(
    "name", ["../other.safetensors", "absolute", "sub/../../other.safetensors", "C:\\\\o.safetensors"]
)
def test_a_list_names_files_of_its_folder_only(name: str, model: Path) -> None:
    other = model.parent / "other.safetensors"
    other.write_bytes(b"weights")
    (model / "sub").mkdir()
    listed = str(other) if name == "absolute" else name
    digest = sha256(other.read_bytes()).hexdigest()
    (model / "SHA256SUMS").write_text(f"{digest}  {listed}\n")
    with pytest.raises(ModelError, match=r"SHA256SUMS: lists '.*', which is no file of this folder"):
        check_model_sums(model)
    other.rename(model / "sub" / "other.safetensors")
    (model / "SHA256SUMS").write_text(f"{digest}  ./sub/other.safetensors\n")
    check_model_sums(model)


def test_processes_share_the_reading(model: Path) -> None:
    (model / "model.safetensors").write_bytes(b"Weights")
    outcomes = []
    for share in range(3):
        try:
            check_model_sums(model, share=share, shares=3)
            outcomes.append(True)
        except ModelError:
            outcomes.append(False)
    assert sorted(outcomes) == [False, True, True]


def test_a_sum_of_the_first_bytes_is_that_of_a_shorter_file(tmp_path: Path) -> None:
    (tmp_path / "long").write_bytes(b"0123456789")
    (tmp_path / "short").write_bytes(b"0123")
    assert Sum.of_file(tmp_path / "long", first=4) == Sum.of_file(tmp_path / "short") != Sum.of_file(tmp_path / "long")
    write_model_sums(tmp_path)
    assert len((tmp_path / "SHA256SUMS").read_text().splitlines()) == 2
