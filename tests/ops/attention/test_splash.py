"""The TPU's splash kernel: its numbers in TPU interpret mode, and its compilation for a TPU that is not there."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec

import numpy as np
import pytest

from tests.ops.attention.test_attention import inputs, layout, run

if not find_spec("tokamax"):
    pytest.skip("tokamax is not installed: it comes with the extra `tpu`", allow_module_level=True)

from jax_simpo.ops.attention import splash
from jax_simpo.plan.topology import Topology


@pytest.mark.parametrize(
    ("heads", "window", "softcap", "sharing"),
    [((4, 2), None, None, True), ((2, 2), 20, None, False), ((3, 1), None, 3.0, True), ((2, 1), 200, 3.0, True)],
)
def test_values_and_gradients_are_those_of_dense(
    heads: tuple[int, int],
    window: int | None,
    softcap: float | None,
    sharing: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(splash, "_LARGEST_BLOCK", 128)  # several blocks in a short row
    batch, arrays = layout(0, 2, 300, sharing=sharing), inputs(0, 2, 300, *heads, 16)
    oracle = run(batch, *arrays, "dense", window, softcap)
    for a, b in zip(oracle, run(batch, *arrays, "splash", window, softcap), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_long_rows_have_large_blocks_and_little_padding() -> None:
    for length in (1, 128, 300, *range(512, 32769, 128)):
        block, padded = splash._block_and_padded(length)
        assert padded >= length and padded % block == 0 and block % 128 == 0
        assert padded // block >= 4  # with fewer the kernel's gradients are wrong
        assert padded <= max(512, length * 9 / 8)
        assert block == 512 or length < 4096
    assert splash._block_and_padded(9344) == (512, 9728)
    assert splash._block_and_padded(1024) == (256, 1024)  # what divides a row is not padded


COMPILE = """
import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jax_simpo.ops.attention import attention, prepare_mask
from jax_simpo.sharding import make_mesh

topology = topologies.get_topology_desc(platform="tpu", topology_name="v5p:2x2x4")
mesh = make_mesh(data=2, fsdp=4, tensor=2, devices=list(topology.devices))
layers = ((None, None), (1024, 50.0))  # window and soft cap

def gradients(q, k, v, key_end, positions):
    def total(q, k, v):
        mask = prepare_mask(key_end, positions, (None, 1024), "splash")
        outs = (attention(q, k, v, mask, scale=0.1, window=window, softcap=cap) for window, cap in layers)
        return sum((out.astype(jnp.float32) ** 2).sum() for out in outs)
    return jax.grad(total, (0, 1, 2))(q, k, v)

def array(shape, dtype, *axes):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(("data", "fsdp"), *axes)))

heads = [array((8, 2048, n, WIDTH), jnp.bfloat16, None, "tensor") for n in (8, 4, 4)]
ints = [array((8, 2048), jnp.int32) for _ in range(2)]
with jax.set_mesh(mesh):
    program = jax.jit(gradients).lower(*heads, *ints).compile().as_text()
assert program.count("tpu_custom_call") >= 2 * len(layers), program.count("tpu_custom_call")
for kind in ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter"):
    assert kind not in program, kind
"""


@pytest.mark.slow
@pytest.mark.skipif(not find_spec("libtpu"), reason="libtpu is not installed: nothing here compiles for a TPU")
@pytest.mark.parametrize("width", [64, 128, 256])
def test_it_compiles_for_16_tpus_and_each_works_alone(width: int) -> None:
    # In a process of its own: libtpu prints, and settles for a platform, as it is loaded.
    environment = {**os.environ, **Topology.parse("v5p:2x2x4").environment()}
    run = subprocess.run(
        [sys.executable, "-c", COMPILE.replace("WIDTH", str(width))], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-2000:]
