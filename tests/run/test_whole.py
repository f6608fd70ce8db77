"""A file or folder is written and removed as a whole: a failed or killed writer leaves the former one."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from jax_simpo.errors import ConfigError, ModelError
from jax_simpo.run.whole import check_replaceable, remove, replacing, write_text, writing

KILLED_IN_A_FILE = """
import os, signal, sys
from jax_simpo.run.whole import writing
with writing(sys.argv[1]) as file:
    file.write("half of the new")
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""
KILLED_IN_A_FOLDER = """
import os, signal, sys
from jax_simpo.run.whole import replacing
with replacing(sys.argv[1]) as folder:
    (folder / "config.json").write_text("half of the new")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def killed(program: str, path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", program, str(path)])
    assert done.returncode == -signal.SIGKILL


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- files


def test_a_file_takes_its_place_when_all_is_written(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "scores.jsonl"
    with writing(path) as file:
        file.write("é\n")
        assert not path.exists()
    assert path.read_bytes() == "é\n".encode()
    with writing(path, "wb") as file:
        file.write(b"\x89")
    assert path.read_bytes() == b"\x89" and names(path.parent) == ["scores.jsonl"]


def test_a_failed_write_leaves_the_former_file_and_no_folder_that_it_made(tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", "former")
    for path in (tmp_path / "a.txt", tmp_path / "made" / "for" / "it.txt"):
        with pytest.raises(KeyboardInterrupt), writing(path) as file:
            file.write("half")
            raise KeyboardInterrupt
    assert names(tmp_path) == ["a.txt"] and (tmp_path / "a.txt").read_text() == "former"


def test_a_folder_that_others_use_by_now_stays(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), writing(tmp_path / "made" / "a.txt"):
        (tmp_path / "made" / "other.txt").touch()
        raise KeyboardInterrupt
    assert names(tmp_path / "made") == ["other.txt"]


def test_a_killed_write_leaves_the_former_file_and_the_next_one_cleans_up(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "former")
    killed(KILLED_IN_A_FILE, path)
    assert path.read_text() == "former"
    assert len(names(tmp_path)) == 2
    write_text(path, "new")
    assert names(tmp_path) == ["a.txt"] and path.read_text() == "new"


def test_what_a_running_writer_has_written_so_far_is_left_to_it(tmp_path: Path) -> None:
    other = tmp_path / f".a.txt.writing-{os.getppid()}"
    other.touch()
    (tmp_path / ".a.txt.writing-mine").touch()  # no number of a process: a file of the user's
    write_text(tmp_path / "a.txt", "new")
    assert set(names(tmp_path)) == {".a.txt.writing-mine", other.name, "a.txt"}


def test_a_device_is_written_to_and_a_link_keeps_pointing(tmp_path: Path) -> None:
    program = "from jax_simpo.run.whole import write_text; write_text('/dev/stdout', 'scores')"
    assert subprocess.check_output([sys.executable, "-c", program]) == b"scores"
    with writing(os.devnull) as file:
        file.write("nothing")
    assert not Path(os.devnull).is_file()
    (tmp_path / "link").symlink_to(tmp_path / "a.txt")
    write_text(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "a.txt").read_text() == "new"


@pytest.mark.parametrize(("path", "reason"), [("folder", "Is a directory"), ("file/a.txt", "Not a directory")])
def test_a_path_that_cannot_be_written_is_refused_before_the_work(path: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=f"{path} cannot be written: {reason}. Give another path"):
        with writing(tmp_path / path):
            pytest.fail("the work has begun")


# --- folders


def test_a_folder_takes_the_place_of_the_former_one_when_all_is_written(tmp_path: Path) -> None:
    model = tmp_path / "runs" / "model"
    for text in ("first", "second"):
        with replacing(model) as folder:
            (folder / "config.json").write_text(text)
            (folder / "additional_chat_templates").mkdir()
            (folder / "additional_chat_templates" / "tools.jinja").touch()
    assert (model / "config.json").read_text() == "second" and names(model.parent) == ["model"]


def test_a_failed_export_leaves_the_former_model(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("former")
    with pytest.raises(ModelError, match="the model cannot be written there"):
        with replacing(tmp_path / "model") as folder:
            (folder / "config.json").write_text("half")
            raise OSError("No space left on device")
    assert names(tmp_path) == ["model"] and (tmp_path / "model" / "config.json").read_text() == "former"


def test_a_killed_export_leaves_the_former_model_and_the_next_one_cleans_up(tmp_path: Path) -> None:
    model = tmp_path / "model"
    with replacing(model) as folder:
        (folder / "config.json").write_text("former")
    killed(KILLED_IN_A_FOLDER, model)
    assert (model / "config.json").read_text() == "former" and len(names(tmp_path)) == 2
    with replacing(model) as folder:
        (folder / "config.json").write_text("new")
    assert names(tmp_path) == ["model"]


def test_a_former_model_that_was_moved_aside_comes_back(tmp_path: Path) -> None:
    (tmp_path / ".model.former").mkdir()
    (tmp_path / ".model.former" / "config.json").write_text("former")
    with pytest.raises(KeyboardInterrupt), replacing(tmp_path / "model"):
        raise KeyboardInterrupt
    assert names(tmp_path) == ["model"] and (tmp_path / "model" / "config.json").read_text() == "former"


@pytest.mark.parametrize(
    "name", ["notes.txt", "results.json", "my-lora.safetensors", "training", "notes.md", "model.safetensors.bak"]
)
def test_a_folder_with_a_file_that_is_no_part_of_a_model_is_never_replaced(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").touch()
    (tmp_path / name).touch()
    with pytest.raises(ModelError, match=f"holds '{name}', which is not part of a model"):
        with replacing(tmp_path):
            pytest.fail("the work has begun")
    assert names(tmp_path) == sorted(["config.json", name])


def test_what_a_killed_writer_of_a_models_file_left_goes_with_the_next_export(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / ".README.md.writing-16821").touch()
    with replacing(model) as folder:
        (folder / "config.json").touch()
    assert not list(model.glob(".*"))
    (model / ".notes.md.writing-16821").touch()
    with pytest.raises(ModelError, match=r"holds '\.notes\.md\.writing-16821', which is not part of a model"):
        check_replaceable(model)


def test_a_folder_as_transformers_and_peft_write_it_is_replaceable(tmp_path: Path) -> None:
    model_files = "config.json generation_config.json model.safetensors.index.json model-00001-of-00002.safetensors "
    tokenizer_files = "tokenizer.json tokenizer_config.json special_tokens_map.json merges.txt tokenizer.model "
    adapter_files = "adapter_config.json adapter_model.safetensors chat_template.jinja README.md"
    for name in (model_files + tokenizer_files + adapter_files).split():
        (tmp_path / name).touch()
    check_replaceable(tmp_path)
    check_replaceable(tmp_path / "missing")
    with pytest.raises(ModelError, match="is a file; export to another folder"):
        check_replaceable(tmp_path / "config.json")


def test_a_removed_path_is_gone_and_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "folder" / "inner").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    remove(tmp_path / "link")
    assert (tmp_path / "folder" / "inner").is_dir()
    (tmp_path / ".folder.removed").mkdir()  # of a removal that was killed
    remove(tmp_path / "folder")
    remove(tmp_path / "missing")
    assert names(tmp_path) == []


def test_a_disk_that_fills_while_a_file_is_written_is_an_error_that_names_it(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text("former")
    with pytest.raises(ConfigError, match=r"report\.html cannot be written: No space left on device\. Make room"):
        with writing(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"] and path.read_text() == "former"
