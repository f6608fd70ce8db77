"""What a device's memory allows, estimated before anything is compiled: how long rows, and whether to keep logits."""

from __future__ import annotations

import os

import jax
from jax.sharding import Mesh

from jax_simpo.models.transformer import Model

# Per trained parameter: float32 master weight, AdamW's two moments, the step's gradient sum, a micro-batch's gradient.
_STATE_BYTES = 20
_SPARE = 0.5  # share of what is left that rows may take; the rest is for temporaries we do not count
_LONGEST = 32768  # longer rows fill no better
_LOGITS = 0.125  # share of what is left that a micro-batch's logits may take, out of that rest


def device_memory(mesh: Mesh) -> int:
    """Bytes of memory of one device; on a CPU its share of the machine's."""
    device = mesh.local_devices[0]
    stats = device.memory_stats() or {}
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return int(stats.get("bytes_limit", host // len(jax.local_devices())))


def longest_row(model: Model, mesh: Mesh, rows_per_device: int, memory: int) -> int:
    """The longest row, in tokens, whose activations fit `memory` bytes beside parameters and optimizer state.

    Counted per token: what `remat` keeps of every layer, and the widest layer's own arrays twice (forward and
    backward), split over `tensor` where the model is. The loss head is counted once, its logits are not.
    """
    config = model.config
    width = model.dtype.itemsize
    heads = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    layer = 4 * config.hidden_size + (2 * heads + 3 * config.intermediate_size) // mesh.shape["tensor"]
    kept = {"full": config.hidden_size, "dots": config.hidden_size + layer // 2, "none": config.hidden_size + layer}
    per_token = width * (config.num_layers * kept[model.remat] + 2 * layer) + 4 * 2 * config.hidden_size
    left = _left(model, mesh, memory)
    return max(0, min(_LONGEST, int(_SPARE * left) // (per_token * rows_per_device)))


def logits_bytes(model: Model, mesh: Mesh, memory: int) -> int:
    """Bytes of a device with `memory` bytes that training may spend on keeping logits for the backward pass.

    None in 16 bits on a CPU, where making them again was measured to be quicker than reading them.
    """
    if mesh.devices.flat[0].platform == "cpu" and model.dtype.itemsize < 4:
        return 0
    return max(0, int(_LOGITS * _left(model, mesh, memory)))


def _left(model: Model, mesh: Mesh, memory: int) -> int:
    """Bytes beside parameters, optimizer state and the loss head, which is whole along `fsdp` while it is used."""
    shards = mesh.shape["fsdp"] * mesh.shape["tensor"]
    head = model.config.vocab_size * model.config.hidden_size // mesh.shape["tensor"]
    frozen = model.parameter_count - model.trained_count
    held = (_STATE_BYTES * model.trained_count + model.dtype.itemsize * frozen) // shards
    # The head in the compute dtype, and its gradient, where it has one, in float32.
    return memory - held - head * (model.dtype.itemsize + (0 if frozen else 4))
