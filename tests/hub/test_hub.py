"""Uploading with huggingface_hub itself, to a stand-in of the hub on this machine."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from io import StringIO
from pathlib import Path

import pytest
from huggingface_hub import ModelCard, constants
from rich.console import Console
from typer.testing import CliRunner

from jax_simpo.cli import app
from jax_simpo.config import TrainConfig, load_config
from jax_simpo.errors import CheckpointError, ConfigError, HubError
from jax_simpo.hub import address, push_run
from tests.hub.stand_in import TOKEN, Hub, serving
from tests.training.runs import config_of, run, run_printing
from tests.whole_runs import quick_runs

__all__ = ["quick_runs"]

pytestmark = pytest.mark.filterwarnings("ignore:Use .content=:DeprecationWarning")  # huggingface_hub's own


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """The hub, with a user who is logged in."""
    with serving(Hub()) as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.address)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


def test_a_run_uploads_the_model_of_every_save_and_at_the_end_the_model_with_its_card(hub: Hub, tmp_path: Path) -> None:
    config = config_of(tmp_path, push_to_hub=True, hub_strategy="every_save", hub_private_repo=True)
    _, printed = run_printing(config)
    output = Path(config.output_dir)
    assert hub.commits[-1] == "Model of step 12" and "Model of step 4" in hub.commits
    repository = hub.repositories["ann/run"]  # the name of the output directory, of the user who is logged in
    assert repository["visibility"] == "private"
    model = {path.name: path.read_bytes() for path in (output / "model").iterdir()}
    assert repository["files"] == model
    assert {"model.safetensors", "README.md", "curves.png", "config.json", "tokenizer.json"} <= set(model)
    assert not (output / "hub").exists()  # it was there for the saves alone
    assert f"uploaded: {hub.address}/ann/run" in printed
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) > 20 and not [path for path in written if TOKEN.encode() in path.read_bytes()]
    assert TOKEN not in printed


def model_of_a_run(folder: Path, name: str = "model.safetensors") -> TrainConfig:
    """Writes the model of a run that was trained from a base on the hub, in two weight files."""
    config = TrainConfig(model_name_or_path="org/base", output_dir=str(folder), hub_model_id="ann/tuned")
    (folder / "model").mkdir(parents=True)
    for number in (1, 2):
        (folder / f"model/model-0000{number}-of-00002.safetensors").write_bytes(os.urandom(200_000))
    (folder / "model/config.json").write_text("{}")
    (folder / "model/README.md").write_text("---\nbase_model: org/base\n---\n\n# tuned\n")
    return config


def test_an_upload_that_breaks_off_is_gone_on_with_and_sends_nothing_twice(hub: Hub, tmp_path: Path) -> None:
    config, console = model_of_a_run(tmp_path / "run"), Console(file=StringIO())
    hub.breaks_at = 2  # one of the two weight files arrives
    with pytest.raises(HubError, match=r"run/model, complete, and was not uploaded to ann/tuned.*`jax-simpo push`"):
        push_run(config, tmp_path / "run", console)
    assert len(hub.objects) == 1 and not hub.commits
    arrived = set(hub.objects)

    hub.breaks_at, hub.calls = 0, []
    push_run(config, tmp_path / "run", console)
    sent = [path.rpartition("/")[2] for method, path in hub.calls if method == "PUT"]
    assert len(sent) == 1 and arrived.isdisjoint(sent)
    model = {path.name: path.read_bytes() for path in (tmp_path / "run/model").iterdir()}
    assert hub.repositories["ann/tuned"]["files"] == model


def test_the_card_names_the_licence_of_the_base(hub: Hub, tmp_path: Path) -> None:
    hub.cards["org/base"] = {"license": "apache-2.0"}
    config = model_of_a_run(tmp_path / "run")
    push_run(config, tmp_path / "run", Console(file=StringIO()))
    card = ModelCard(hub.repositories["ann/tuned"]["files"]["README.md"].decode())
    assert card.data.license == "apache-2.0" and card.data.base_model == "org/base"


def test_the_command_uploads_a_run_that_is_over(hub: Hub, tmp_path: Path) -> None:
    model_of_a_run(tmp_path / "run")
    (tmp_path / "run.yaml").write_text("model_name_or_path: org/base\ndataset_mixer: {builtin:cafe: 1.0}\n")
    command = ["push", str(tmp_path / "run.yaml"), f"--output_dir={tmp_path / 'run'}", "--hub_model_id=other"]
    result = CliRunner().invoke(app, command, catch_exceptions=False)
    assert result.exit_code == 0 and f"uploaded: {hub.address}/ann/other" in result.stderr
    assert hub.commits == ["Upload the model"]


def test_what_cannot_be_uploaded_is_found_before_training(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="the repository others/x cannot be used"):
        run(config_of(tmp_path, push_to_hub=True, hub_model_id="others/x"))
    with pytest.raises(ConfigError, match="the repository others/theirs cannot be used"):  # it is there, to be read
        run(config_of(tmp_path, push_to_hub=True, hub_model_id="others/theirs"))
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(ConfigError, match="cannot be used: Invalid user token") as refused:
        run(config_of(tmp_path, push_to_hub=True))
    assert "hf_wrong" not in str(refused.value)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(ConfigError, match="needs a login: run `hf auth login`"):
        run(config_of(tmp_path, push_to_hub=True))
    assert not list((tmp_path / "run").iterdir())


def test_a_login_in_the_address_of_the_hub_is_not_repeated(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_login = hub.address.replace("//", "//ann:planted@")  # it takes the place of the token, which the hub asks for
    monkeypatch.setattr(constants, "ENDPOINT", with_login)
    with pytest.raises(ConfigError, match="the repository org/x cannot be used: ") as refused:
        run(config_of(tmp_path, push_to_hub=True, hub_model_id="org/x"))
    assert hub.calls and "planted" not in str(refused.value)
    assert address("org/x") == f"{hub.address}/org/x"


def test_a_run_without_a_model_has_nothing_to_upload(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no model"):
        push_run(config_of(tmp_path), tmp_path, Console(file=StringIO()))


@pytest.mark.parametrize("key", ["hub_token", "hf_token", "wandb_api_key"])
def test_a_token_in_a_config_is_refused_and_never_repeated(key: str, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    base = "model_name_or_path: org/base\ndataset_mixer: {builtin:cafe: 1.0}\n"
    for text, overrides in ((f"{base}{key}: {TOKEN}\n", []), (base, [f"--{key}={TOKEN}"])):
        file.write_text(text)
        with pytest.raises(ConfigError, match=re.escape("***")) as refused:
            load_config(file, overrides)
        assert TOKEN not in str(refused.value)
    with pytest.raises(ConfigError, match=re.escape("***")) as refused:
        TrainConfig(model_name_or_path="org/base", **{key: TOKEN})
    assert TOKEN not in str(refused.value)
