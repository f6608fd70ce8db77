"""Trains with DeepSpeed ZeRO-3 on several ranks: on GPUs through NCCL, on CPUs through gloo.

Parameters, gradients and optimizer state are split over the ranks. In both passes, a layer's parameters are gathered
just before they are used, so no rank ever holds the whole model.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from jax_simpo.config import TrainConfig
from jax_simpo.config.builtin import configs_folder
from jax_simpo.errors import CheckpointError, ConfigError
from torch_ref.batches import Batch
from torch_ref.distributed import Ranks
from torch_ref.engine import hugging_face_names, total_norm
from torch_ref.model import Policy
from torch_ref.optim import make_adamw, parameter_groups, set_learning_rate
from torch_ref.start_weights import StartWeights

ZERO3_FILE = configs_folder() / "deepspeed_zero3.json"

# Settings that follow from the run's config, and must not stand in a DeepSpeed file.
_FROM_CONFIG = (
    *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"),
    *("bf16", "fp16", "optimizer", "scheduler"),
)


def deepspeed_settings(config: TrainConfig, file: Path | None = None) -> dict[str, Any]:
    """Returns DeepSpeed's settings: those of a file, and those that follow from the run's config.

    Args:
        config: the run's settings.
        file: a DeepSpeed JSON file; None takes `configs/deepspeed_zero3.json`.

    Raises:
        ConfigError: the file is missing, is not JSON, is not of ZeRO-3, or has a setting that follows from the config.
    """
    file = file or ZERO3_FILE
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}. Give a DeepSpeed file with `--deepspeed FILE`") from error
    except ValueError as error:
        raise ConfigError(f"{file}: is no JSON ({error})") from error
    conflicting = [key for key in _FROM_CONFIG if key in settings]
    if conflicting:
        raise ConfigError(f"{file}: `{conflicting[0]}` follows from the run's config; remove it here")
    if settings.get("zero_optimization", {}).get("stage") != 3:
        raise ConfigError(f"{file}: `zero_optimization.stage` must be 3")
    return {
        **settings,
        # These two have no effect: `Zero3Engine.backward` says itself where a step ends.
        "train_micro_batch_size_per_gpu": 1 if config.rows_per_device == "auto" else config.rows_per_device,
        "gradient_accumulation_steps": 1,
        # DeepSpeed clips to 1.0 if this is missing.
        "gradient_clipping": config.max_grad_norm,
        "bf16": {"enabled": config.dtype == "bfloat16"},
        "data_types": {"grad_accum_dtype": "fp32"},
    }


class Zero3Model:
    """Makes transformers create partitioned models for as long as this object exists. Create it before the model."""

    def __init__(self, settings: dict[str, Any]) -> None:
        from transformers.integrations import HfDeepSpeedConfig

        self.settings = settings
        self._switch = HfDeepSpeedConfig(settings)  # transformers keeps a weak reference to it


def partitioned_forward(policy: Policy, partition: Zero3Model) -> Callable[[Batch], Tensor]:
    """Returns a partitioned policy for scoring. Every rank must call it with the same number of batches."""
    import deepspeed

    engine, *_ = deepspeed.initialize(model=policy, config=partition.settings, dist_init_required=False)
    return engine


class Zero3Engine:
    """A partitioned policy with AdamW. Every rank must call every method, with the same number of micro-batches."""

    def __init__(self, policy: Policy, config: TrainConfig, ranks: Ranks, partition: Zero3Model) -> None:
        import deepspeed

        self.name = f"DeepSpeed ZeRO-3 on {ranks.world} rank{'s' if ranks.world > 1 else ''}"
        self.policy = policy
        self._ranks = ranks
        self._partition = partition
        groups = parameter_groups(policy, config.weight_decay)
        self._engine, self._optimizer, _, _ = deepspeed.initialize(
            model=policy,
            optimizer=make_adamw(groups, config),
            config=partition.settings,
            dist_init_required=False,
        )

    def start_exactly(self, start: StartWeights, dtype: torch.dtype) -> None:
        """Replaces the float32 master weights by the checkpoint's weights, where loading in 16 bits has rounded them.

        Parameters are created in the compute dtype, and DeepSpeed copies the masters from them, so without this a
        float32 checkpoint would start at rounded weights. One tensor is read at a time, and each rank takes its part.
        """
        from deepspeed.utils import safe_set_local_fp32_param

        for name, parameter in hugging_face_names(self.policy).items():
            exact = start.more_exact(name, dtype) if parameter.requires_grad else None
            if exact is not None:
                size = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
                padded = torch.nn.functional.pad(exact.flatten(), (0, size * self._ranks.world - exact.numel()))
                part = padded.narrow(0, size * self._ranks.rank, size)
                safe_set_local_fp32_param(parameter, part.to(self._ranks.device))

    def logps(self, batch: Batch) -> Float[Tensor, " N"]:
        return self._engine(batch)

    def backward(self, loss: Float[Tensor, ""], *, last: bool) -> None:
        """Adds this rank's part of the step's gradients, without DeepSpeed's divisions.

        By default DeepSpeed divides by a fixed number of micro-batches and by the number of ranks, but this loss is
        already divided by the step's denominators. `scale_wrt_gas=False` switches off the first division, and
        multiplying by the ranks undoes the second one, which is part of the sum over ranks.
        """
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss * self._ranks.world, scale_wrt_gas=False)
        if not last:
            self._engine.step()  # counts the micro-batch; parameters stay as they are

    def gradients(self) -> dict[str, Tensor]:
        from deepspeed.utils import safe_get_full_grad

        trained = {n: p for n, p in hugging_face_names(self.policy).items() if p.requires_grad}
        return {name: safe_get_full_grad(parameter) for name, parameter in trained.items()}

    def gradient_norm(self) -> float:
        from deepspeed.utils import safe_get_local_grad

        parts = [safe_get_local_grad(p) for p in self.policy.parameters() if p.requires_grad]
        own = total_norm(part for part in parts if part is not None)
        return float(np.sqrt(self._ranks.sum(np.array([float(own) ** 2]))[0]))

    def update(self, learning_rate: float, norm: float) -> None:
        """Makes one optimizer step. DeepSpeed clips by a norm that it computes itself."""
        set_learning_rate(self._optimizer, learning_rate)
        self._engine.step()

    def discard(self) -> None:
        self._optimizer.zero_grad()  # the next gradients take the place of these, and are not added to them

    def is_finite(self) -> bool:
        from deepspeed.utils import safe_get_local_fp32_param

        parts = [safe_get_local_fp32_param(p) for p in self.policy.parameters() if p.requires_grad]
        here = all(bool(torch.isfinite(part).all()) for part in parts)
        return not self._ranks.sum(np.array([not here]))[0]

    def weights(self, dtype: torch.dtype, *, trained_only: bool = False) -> dict[str, Tensor]:
        """Collects the weights, one parameter at a time; trained ones from their float32 masters, rounded once."""
        from deepspeed.runtime.zero import GatheredParameters
        from deepspeed.utils import safe_get_full_fp32_param

        weights = {}
        for name, parameter in hugging_face_names(self.policy).items():
            if parameter.requires_grad:
                value = safe_get_full_fp32_param(parameter)
                if self._ranks.is_first:
                    weights[name] = value.to("cpu", dtype)
            elif not trained_only:
                with GatheredParameters([parameter]):
                    if self._ranks.is_first:
                        weights[name] = parameter.detach().to("cpu", dtype, copy=True)
        return weights

    def save(self, folder: Path) -> None:
        self._engine.save_checkpoint(str(folder.parent), tag=folder.name, save_latest=False)

    def load(self, folder: Path) -> None:
        """Restores a checkpoint, and raises CheckpointError if it is missing, of which DeepSpeed only warns."""
        try:
            loaded, _ = self._engine.load_checkpoint(str(folder.parent), tag=folder.name)
        except (OSError, RuntimeError, KeyError, ValueError, EOFError, AssertionError) as error:
            raise CheckpointError(f"{folder}: cannot be restored ({error}). Remove it, or train elsewhere") from error
        if loaded is None:
            raise CheckpointError(f"{folder}: DeepSpeed finds no checkpoint of its own there. Remove it")
