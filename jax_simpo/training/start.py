"""Finds the model that a run starts from, or that a command works on: a hub id, a folder, an adapter, or a step."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from jax_simpo import hf
from jax_simpo.config import TrainConfig
from jax_simpo.errors import ModelError
from jax_simpo.hf import adapters


@dataclass(frozen=True)
class StartModel:
    """The place of each part of a model. Nothing of its weights has been read.

    Attributes:
        step: number of the step of the run whose trained parameters the model has; None where it is no step of the run.
        adapter: the folder of the adapter that lies on the base; None where there is none.
        base: hub id or folder of the model without its adapter; None for a new model with random weights.
        revision: branch, tag or commit of a base on the hub.
        note: a sentence the user should read; empty where there is none.
    """

    step: int | None
    adapter: adapters.AdapterFolder | None
    base: str | None
    revision: str | None
    note: str = ""

    def folder(self, *, weights: bool) -> Path | None:
        """Returns the folder of the base, downloaded where it is on the hub; None for a new model.

        Args:
            weights: download the weights too, not only the configuration and the tokenizer.

        Raises:
            ModelError: there is no such folder, and the hub has no such model.
        """
        return None if self.base is None else hf.resolve_model_folder(self.base, self.revision, weights=weights)


def find_start_model(config: TrainConfig, choice: str | None = None) -> StartModel:
    """Finds the parts of a model, without reading its weights.

    Args:
        config: the settings of the run.
        choice: the value of `--model`: the folder or hub id of a model or an adapter, or the number of a step of the
            run. None takes the model that the config starts from.

    Raises:
        ModelError: there is no such model, or an adapter names no base model and neither does the config.
    """
    configured = StartModel(None, None, config.model_name_or_path, config.model_revision)
    if choice is None:
        return configured
    if choice.isdecimal():
        return StartModel(int(choice), None, configured.base, configured.revision)
    if adapters.find(hf.resolve_model_folder(choice, weights=False)) is None:
        return StartModel(None, None, choice, None)
    adapter = adapters.find(hf.resolve_model_folder(choice))  # with its tensors, which say on which layers it lies
    assert adapter is not None
    if adapter.base is None:
        if configured.base is None:
            raise ModelError(
                f"{adapter.folder / adapters.CONFIG}: names no `base_model_name_or_path`; give the adapter's base "
                "model as `model_name_or_path`"
            )
        return StartModel(None, adapter, configured.base, configured.revision)
    same = configured.base is not None and Path(adapter.base).resolve() == Path(configured.base).resolve()
    note = "" if same else f"the adapter's own base model is used: {adapter.base}"
    return StartModel(None, adapter, adapter.base, adapter.revision, note)
