"""Decides which attention backend a run takes: by trying them on the accelerator at hand, once per machine.

`auto` tries every candidate (`ops.attention.evidence`), passes over those that fail or compute wrong numbers, and takes
the fastest of the others. A backend that the config names is tried too, and refused if its numbers are wrong. What was
seen is kept in the user's cache folder (`verdicts.py`). On a CPU nothing is tried: there the tests compare the same
programs with the same oracle.
"""

from __future__ import annotations

import jax
from jax.sharding import Mesh

from jax_simpo.config import TrainConfig
from jax_simpo.data.packing import ROW_MULTIPLE, StepPlan
from jax_simpo.models.transformer import Model
from jax_simpo.ops.attention.choice import candidates, choose, place_of
from jax_simpo.ops.attention.evidence import LARGEST_BLOCK, Shape
from jax_simpo.ops.attention.mask import Room
from jax_simpo.training import verdicts
from jax_simpo.training.backend_choice import BackendChoice, choose_fastest, keep_named, try_on_first
from jax_simpo.training.capacity import least_rows

# The backends that need no trial on a kind of device: those that every change to this program is tested with there.
_KNOWN = {("CPU", "blockwise"), ("CPU", "dense")}
_TYPICAL_ROW = 8192  # tokens; rows to time backends on where there is no step plan and `row_length` is `auto`


def shape_of(config: TrainConfig, model: Model, mesh: Mesh, longest_row: int, plan: StepPlan | None = None) -> Shape:
    """Returns the part of a run's shapes that its attention depends on.

    Lengths are rounded to powers of two, rows down and what is in them up, so that runs on similar data share what was
    seen. What rows have beyond a whole number of a kernel's blocks stays as it is; where their length is not known yet,
    it is `ROW_MULTIPLE`.

    Args:
        config: the settings of the run.
        model: the model.
        mesh: the mesh, over whose `tensor` axis heads are split.
        longest_row: the longest row that fits into memory.
        plan: the step plan whose rows are computed; None takes typical ones.
    """
    sizes, tensor = model.config, mesh.shape["tensor"]
    if plan is None:
        rows, room = least_rows(config), None
        # A row holds the longest pair, whether memory is large enough for it or not.
        auto = min(_TYPICAL_ROW, max(longest_row, config.max_length))
        whole = auto if config.row_length == "auto" else config.row_length
    else:
        rows = plan.rows_per_micro_batch // (mesh.shape["data"] * mesh.shape["fsdp"])
        whole = plan.shape.length
    length = max(128, 1 << max(whole, 1).bit_length() - 1)
    remainder = (whole - length) % LARGEST_BLOCK
    if plan is None and config.row_length == "auto":
        remainder = ROW_MULTIPLE
    if plan is not None:
        longest, span = (min(length, 1 << (n - 1).bit_length()) for n in (plan.longest, plan.span))
        room = Room(1 << (plan.shape.responses - 1).bit_length(), longest, span)
    return Shape(
        dtype=model.dtype.name,
        heads=sizes.num_heads // tensor,
        kv_heads=sizes.num_kv_heads // tensor,
        head_dim=sizes.head_dim,
        windows=sizes.windows,
        scale=sizes.query_pre_attn_scalar**-0.5,
        softcap=sizes.attention_softcap,
        rows=rows,
        row_length=length,
        remainder=remainder,
        room=room,
    )


def choose_attention(config: TrainConfig, shape: Shape, device: jax.Device) -> BackendChoice:
    """Chooses the backend for a run. In a run of several processes all call it, and the first one tries for all.

    Args:
        config: the settings of the run; of them `attention` and `attention_check` count.
        shape: of `shape_of`.
        device: a device of this process in the run's mesh.

    Raises:
        ConfigError: the backend that the config names cannot run there, or computes wrong numbers there; or no backend
            computes right ones.
    """
    place = place_of(device, dtype=shape.dtype, head_dim=shape.head_dim, softcap=shape.softcap)
    backend, reason = choose(config.attention, place)
    if not config.attention_check:
        return BackendChoice(backend, f"{reason}; not tried here, `attention_check` is false")
    if (place.kind, backend) in _KNOWN:
        return BackendChoice(backend, reason)
    names = [backend] if config.attention != "auto" else list(candidates(place).reasons)
    timed = config.attention == "auto"  # one that is named need not be timed, and the timed rows may be too long
    found = try_on_first("attention", lambda: verdicts.of_backends(names, shape, device, timed=timed))
    if config.attention != "auto":
        return keep_named("attention", found[0], device)
    return choose_fastest("attention", found, device, work_of(shape))


def work_of(shape: Shape) -> str:
    """Says on what backends were timed."""
    return f"{shape.rows} x {shape.row_length} tokens"
