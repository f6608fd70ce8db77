"""How long a row may be before the memory of a device is full: an estimate, made before anything is compiled."""

from __future__ import annotations

import os

import jax
from jax.sharding import Mesh

from jax_simpo.models.transformer import Model

# Per parameter: float32 master weight, AdamW's two moments, the step's gradient sum and a micro-batch's gradient.
_STATE_BYTES = 20
_SPARE = 0.5  # share of what is left that rows may take; the rest is for temporaries we do not count
_LONGEST = 32768  # longer rows fill no better


def device_memory(mesh: Mesh) -> int:
    """Bytes of memory of one device; on a CPU its share of the machine's."""
    device = mesh.local_devices[0]
    stats = device.memory_stats() or {}
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return int(stats.get("bytes_limit", host // len(jax.local_devices())))


def longest_row(model: Model, mesh: Mesh, rows_per_device: int, memory: int) -> int:
    """The longest row, in tokens, whose activations fit `memory` bytes beside parameters and optimizer state.

    Counted per token: what `remat` keeps of every layer, and the widest layer's own arrays twice (forward and
    backward), split over `tensor` where the model is. The loss head is counted once, the logits of a chunk are not.
    """
    config = model.config
    width = model.dtype.itemsize
    shards = mesh.shape["fsdp"] * mesh.shape["tensor"]
    heads = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    layer = 4 * config.hidden_size + (2 * heads + 3 * config.intermediate_size) // mesh.shape["tensor"]
    kept = {"full": config.hidden_size, "dots": config.hidden_size + layer // 2, "none": config.hidden_size + layer}
    per_token = width * (config.num_layers * kept[model.remat] + 2 * layer) + 4 * 2 * config.hidden_size
    # The loss head is whole along `fsdp` while it is used, and so is its float32 gradient.
    head = config.vocab_size * config.hidden_size * (width + 4) // mesh.shape["tensor"]
    left = memory - _STATE_BYTES * model.parameter_count // shards - head
    return max(0, min(_LONGEST, int(_SPARE * left) // (per_token * rows_per_device)))
