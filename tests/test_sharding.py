"""The mesh and the processes that hold its devices."""

from __future__ import annotations

import numpy as np
import pytest

from jax_simpo import sharding
from jax_simpo.errors import MeshError
from jax_simpo.sharding import differ_along_tensor, hosts_share_tensor, local_rows, make_mesh


def test_one_process_holds_all_rows() -> None:
    np.testing.assert_array_equal(local_rows(make_mesh(fsdp=4, tensor=2), 12), np.arange(12))


@pytest.mark.parametrize(("sizes", "shared"), [((2, 2, 2), False), ((1, 2, 4), False), ((1, 1, 8), True)])
def test_tensor_is_said_to_reach_over_processes_where_it_does(sizes: tuple[int, int, int], shared: bool) -> None:
    processes = np.arange(8).reshape(sizes) // 4  # two of four devices each
    assert differ_along_tensor(processes) == shared


def test_one_process_shares_no_tensor_axis() -> None:
    assert not hosts_share_tensor(make_mesh(fsdp=1, tensor=8))


@pytest.mark.parametrize("sizes", [{"fsdp": -1}, {"data": 4, "fsdp": 2}, {"data": 1, "fsdp": 4, "tensor": 2}])
def test_parameters_are_not_split_over_the_network_between_tpu_slices(
    sizes: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sharding, "slice_count", lambda devices: 3)
    with pytest.raises(MeshError, match=r"3 TPU slices: .* Set `mesh.data` to 3, or a multiple of it"):
        make_mesh(**sizes)
