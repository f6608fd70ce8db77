"""Estimates, before anything is compiled, how long rows may be and which logits a device's memory can keep."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import jax
from jax.sharding import Mesh

from jax_simpo.data.packing import ROW_MULTIPLE
from jax_simpo.data.rows import RowShape
from jax_simpo.errors import ConfigError
from jax_simpo.models.policy import Forward
from jax_simpo.models.transformer import Model
from jax_simpo.training.host import host_memory

if TYPE_CHECKING:
    from jax_simpo.config import TrainConfig

# Per trained parameter: float32 master weight, AdamW's two moments, the step's gradient sum, a micro-batch's gradient.
_STATE_BYTES = 20
_SPARE = 0.5  # share of the remaining memory that rows may take; the rest is for temporaries that are not counted
_LONGEST = 32768  # longer rows fill no better
# TPU kernels work in large blocks: those of splash attention have up to 512 rows, and it pads a row they do not divide.
_ROW_MULTIPLES = {"tpu": 1024}
_LOGITS = 0.125  # share of the remaining memory that a micro-batch's logits may take, out of that rest


def device_memory(mesh: Mesh) -> int:
    """Returns the bytes of memory of one device; for a CPU device its share of the host's."""
    device = mesh.local_devices[0]
    stats = device.memory_stats() or {}
    return int(stats.get("bytes_limit", host_memory() // len(jax.local_devices())))


def least_rows(config: TrainConfig) -> int:
    """Returns the rows of a micro-batch on each device, as configured; 1 with `auto`, which may add to that."""
    return 1 if config.rows_per_device == "auto" else config.rows_per_device


def longest_row(model: Model, mesh: Mesh, rows_per_device: int, memory: int) -> int:
    """Returns the longest row, in tokens, with which a micro-batch fits into a device's memory; see `_most_tokens`.

    Args:
        model: the model, with its compute dtype and remat policy.
        mesh: the mesh.
        rows_per_device: rows of a micro-batch on each device.
        memory: bytes of a device.
    """
    return min(_LONGEST, _most_tokens(model, mesh, memory) // rows_per_device)


def most_rows(model: Model, mesh: Mesh, shape: RowShape, memory: int, *, keeps_logits: bool) -> int:
    """Returns how many rows of a micro-batch fit into a device's memory; at least 1.

    Where a row's logits are kept for the backward pass, all rows' are: to compute them again costs more than a
    micro-batch more.

    Args:
        model: the model, with its compute dtype and remat policy.
        mesh: the mesh.
        shape: the shape of a row.
        memory: bytes of a device.
        keeps_logits: training keeps logits where there is memory (`logprob_chunk: auto`).
    """
    rows = _most_tokens(model, mesh, memory) // shape.length
    logits = 4 * shape.targets * model.config.vocab_size // mesh.shape["tensor"]
    for_logits = logits_bytes(model, mesh, memory) if keeps_logits else 0
    if logits <= for_logits:
        rows = min(rows, for_logits // logits)
    return max(1, rows)


def _most_tokens(model: Model, mesh: Mesh, memory: int) -> int:
    """Returns how many tokens' activations fit into memory beside parameters and optimizer state.

    The estimate counts, per token, the arrays that `remat` keeps of every layer, and the arrays of one layer twice
    (forward and backward), split over `tensor` where the model is. The loss head is counted once, its logits are not.
    """
    config = model.config
    width = model.dtype.itemsize
    queries = config.num_heads * config.head_dim
    heads = queries + 2 * config.num_kv_heads * config.head_dim
    layer = 4 * config.hidden_size + (2 * heads + 3 * config.intermediate_size) // mesh.shape["tensor"]
    beside_input = {"full": 0, "attention": queries // mesh.shape["tensor"], "dots": layer // 2, "none": layer}
    kept = config.hidden_size + beside_input[model.remat]
    per_token = width * (config.num_layers * kept + 2 * layer) + 4 * 2 * config.hidden_size
    return max(0, int(_SPARE * _remaining(model, mesh, memory)) // per_token)


def row_multiple(mesh: Mesh) -> int:
    """Returns what the lengths chosen for long rows are multiples of, so that they fill the blocks of kernels."""
    return _ROW_MULTIPLES.get(mesh.devices.flat[0].platform, ROW_MULTIPLE)


def check_fits(config: TrainConfig, model: Model, mesh: Mesh, memory: int) -> None:
    """Makes sure that neither the parameters alone nor a hidden state of every token alone are more than the memory.

    Training takes several times as much, and `jax-simpo plan` computes it. This finds sizes that cannot be meant.

    Args:
        config: the settings of the run.
        model: the model that is trained.
        mesh: the mesh.
        memory: bytes of a device.

    Raises:
        ConfigError: they are.
    """
    frozen = model.parameter_count - model.trained_count
    parameters = (4 * model.trained_count + model.dtype.itemsize * frozen) // (
        mesh.shape["fsdp"] * mesh.shape["tensor"]
    )
    if parameters > memory:
        adapter = "" if model.lora is None else f", with an adapter of `lora_r` {config.lora_r}"
        raise ConfigError(
            f"the model has {model.parameter_count:,} parameters{adapter}: they alone take {parameters / 1e9:,.1f} GB "
            f"of a device, which has {memory / 1e9:,.1f} GB. Use more devices (`mesh.fsdp`), or a smaller model"
        )
    rows = least_rows(config)
    tokens = rows * (1 if config.row_length == "auto" else config.row_length)
    states = tokens * model.config.hidden_size * model.dtype.itemsize
    if states > memory:
        raise ConfigError(
            f"`rows_per_device` ({rows}) rows of `row_length` ({config.row_length}) tokens: one "
            f"hidden state of each takes {states / 1e9:,.1f} GB of a device, which has {memory / 1e9:,.1f} GB. Lower "
            "one of the two"
        )


def training_forward(forward: Forward, mesh: Mesh, memory: int) -> Forward:
    """Returns the forward pass of training, which keeps a micro-batch's logits where there is memory to spare.

    A fixed `logprob_chunk` asks for tiles of that size, so no logits are kept then.

    Args:
        forward: the forward pass of scoring.
        mesh: the mesh.
        memory: bytes of a device.
    """
    if forward.logprob_chunk != "auto":
        return forward
    return replace(forward, logits_bytes=logits_bytes(forward.model, mesh, memory))


def logits_bytes(model: Model, mesh: Mesh, memory: int) -> int:
    """Returns how many of a device's bytes training may spend on keeping logits for the backward pass.

    The answer is 0 in 16 bits on a CPU, where computing the logits again is quicker than reading them.
    """
    if mesh.devices.flat[0].platform == "cpu" and model.dtype.itemsize < 4:
        return 0
    return max(0, int(_LOGITS * _remaining(model, mesh, memory)))


def _remaining(model: Model, mesh: Mesh, memory: int) -> int:
    """Returns the bytes beside parameters, optimizer state and the loss head, which is gathered over `fsdp` for use."""
    shards = mesh.shape["fsdp"] * mesh.shape["tensor"]
    head = model.config.vocab_size * model.config.hidden_size // mesh.shape["tensor"]
    frozen = model.parameter_count - model.trained_count
    state = (_STATE_BYTES * model.trained_count + model.dtype.itemsize * frozen) // shards
    # The head in the compute dtype, and its gradient, where it has one, in float32.
    return memory - state - head * (model.dtype.itemsize + (0 if frozen else 4))
