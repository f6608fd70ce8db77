"""Uploads models to the Hugging Face hub: at the end of a run, at every save, or afterwards.

Who you are is known from `hf auth login` or HF_TOKEN, and never from a config. An upload that is interrupted is begun
again with `push_run`: weight files that the hub has already are not sent twice.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import HfApi, ModelCard, get_token
from rich.console import Console

from jax_simpo.config import TrainConfig
from jax_simpo.errors import CheckpointError, ConfigError, HubError, words_of
from jax_simpo.redact import redact
from jax_simpo.run import files, quiet
from jax_simpo.run.lock import locked
from jax_simpo.run.manifest import check_free
from jax_simpo.run.model_card import is_hub_id
from jax_simpo.run.whole import remove


@dataclass
class Publisher:
    """Uploads the model of a run, if its config asks for it.

    Attributes:
        config: the settings of the run.
        output: its output directory.
        console: where notes go.
        write: False turns it off: of several processes one uploads.
    """

    config: TrainConfig
    output: Path
    console: Console
    write: bool = True
    _repository: str = ""
    _running: _Upload | None = field(default=None, init=False)

    @property
    def at_saves(self) -> bool:
        """True if the model of every checkpoint is uploaded. The same in every process."""
        return self.config.push_to_hub and self.config.hub_strategy == "every_save"

    def check(self) -> None:
        """Makes sure that the model can be uploaded, and makes the repository.

        Raises:
            CheckpointError: there is a folder `hub` that no run wrote.
            ConfigError: nobody is logged in, or the hub does not let this user write to the repository.
        """
        if self.config.push_to_hub and self.write:
            check_free(self.output, (files.HUB,) if self.at_saves else ())
            self._repository = find_repository(self.config, self.output)
            self.console.print(f"the model will be uploaded to {self._repository}")

    def may_save(self) -> bool:
        """Returns True if the model of a save can be uploaded now; says so if the one before is still on its way."""
        if self._running is None or not self.write:
            return True
        if self._running.is_alive():
            self.console.print("the last save is still being uploaded; this one is passed over")
            return False
        self._warn_failed(self._running)
        return True

    def save(self, step: int) -> None:
        """Uploads the model of a save from the folder `hub`, in the background."""
        if self.write:
            self._running = _Upload(self.output / files.HUB, self._repository, f"Model of step {step}")
            self._running.start()

    def finish(self, step: int) -> None:
        """Uploads the exported model with its card, and waits for it.

        Raises:
            HubError: it cannot be uploaded. The run itself is complete.
        """
        if not (self.config.push_to_hub and self.write):
            return
        if self._running is not None:
            self._running.join()
            self._warn_failed(self._running)
        push_model(self.output, self._repository, f"Model of step {step}", self.config)
        remove(self.output / files.HUB)
        self.console.print(f"uploaded: {address(self._repository)}")

    def _warn_failed(self, ended: _Upload) -> None:
        if ended.failure:
            said = f"warning: a save was not uploaded: {ended.failure}. Training goes on"
            self.console.print(said, style="yellow")


class _Upload(threading.Thread):
    """An upload in the background. A run that is ended does not wait for it."""

    def __init__(self, folder: Path, repository: str, message: str) -> None:
        super().__init__(name="hub-upload", daemon=True)
        self._arguments, self.failure = (folder, repository, message), ""

    def run(self) -> None:
        try:
            upload(*self._arguments)
        except Exception as error:  # whatever the network does, training goes on
            self.failure = words_of(error)


def push_run(config: TrainConfig, output: Path, console: Console) -> None:
    """Uploads the exported model of a run that is over, or the rest of it.

    Raises:
        ConfigError: nobody is logged in, or the hub does not let this user write to the repository.
        CheckpointError: there is no exported model.
        HubError: it cannot be uploaded.
    """
    if not any((output / files.MODEL).glob("*.safetensors")):
        raise CheckpointError(f"{output / files.MODEL} holds no model: give the `output_dir` of a run that has ended")
    with locked(output):
        repository = find_repository(config, output)
        push_model(output, repository, "Upload the model", config)
    console.print(f"uploaded: {address(repository)}")


def find_repository(config: TrainConfig, output: Path) -> str:
    """Returns the full name of the repository to upload to, which is made if it is not there.

    Raises:
        ConfigError: nobody is logged in, or the hub refuses.
    """
    if get_token() is None:
        raise ConfigError(
            "uploading to the hub needs a login: run `hf auth login`, or set the environment variable HF_TOKEN. Else "
            "set `push_to_hub: false`; `jax-simpo push` with this config uploads the model afterwards"
        )
    quiet.hide_secrets()
    api, name = HfApi(), config.hub_model_id or output.resolve().name
    try:
        if "/" not in name:
            name = f"{api.whoami()['name']}/{name}"
        repository = api.create_repo(name, private=config.hub_private_repo, exist_ok=True).repo_id
        api.auth_check(repository, write=True)  # one that is there may be somebody else's
        return repository
    except Exception as error:  # of the hub, the network, or a name that the hub does not take
        raise ConfigError(
            f"`push_to_hub`: the repository {name} cannot be used: {words_of(error)}. Give another `hub_model_id`, "
            "log in as somebody who may write there, or set `push_to_hub: false`; `jax-simpo push` uploads the model "
            "afterwards"
        ) from error


def push_model(output: Path, repository: str, message: str, config: TrainConfig) -> None:
    """Uploads the folder `model` of an output directory, once its card names the licence of the base.

    Raises:
        HubError: it cannot be uploaded.
    """
    _add_licence(output / files.MODEL / files.CARD, config.model_name_or_path)
    try:
        upload(output / files.MODEL, repository, message)
    except Exception as error:  # whatever the network does, the run is complete
        raise HubError(
            f"the model lies in {output / files.MODEL}, complete, and was not uploaded to {repository}: "
            f"{words_of(error)}. Run `jax-simpo push` with the same config; what the hub has by now is not sent again"
        ) from error


def upload(folder: Path, repository: str, message: str) -> None:
    """Uploads a folder as one commit. Files that the hub has already, from an interrupted upload too, are not sent."""
    HfApi().upload_folder(repo_id=repository, folder_path=folder, commit_message=message, ignore_patterns=[".*"])


def address(repository: str) -> str:
    """Returns the address of a repository's page, without what HF_ENDPOINT may hold of a login."""
    return redact(f"{HfApi().endpoint}/{repository}")


def _add_licence(card: Path, base: str | None) -> None:
    """Has a model's card name the licence of its base, where the base's own card names one and this one does not."""
    if base is None or not card.is_file():
        return
    loaded = ModelCard.load(card)
    if loaded.data.license is None and (licence := _licence_of(base)):
        loaded.data.license = licence
        loaded.save(card)


def _licence_of(base: str) -> str | None:
    """Returns the licence that the card of a model names: of a folder's README.md, or of a hub model."""
    try:
        if (folder := Path(base).expanduser()).is_dir():
            data = ModelCard.load(folder / files.CARD).data if (folder / files.CARD).is_file() else None
        else:
            data = HfApi().model_info(base).card_data if is_hub_id(base) else None
        licence = None if data is None else data.get("license")
    except Exception:  # a card without a licence is no reason to lose an upload
        return None
    return licence if isinstance(licence, str) else None
