"""The rows of one process on one device: all of them, and arrays as they were. More processes are in `multi_process`."""

import jax
import numpy as np

from clp_jax.host_rows import HostRows, place_whole, row_indices
from clp_jax.partitioning import Rules, make_mesh, named_sharding, use_mesh


def test_one_device_holds_everything():
    batch = {"x": np.arange(12).reshape(6, 2)}
    with use_mesh(make_mesh(devices=jax.devices()[:1]), Rules()):
        rows = HostRows.of(6)
        np.testing.assert_array_equal(rows.indices, np.arange(6))
        assert rows.place(batch) is batch
    assert HostRows.of(6) == HostRows(6)
    np.testing.assert_array_equal(row_indices(3), [0, 1, 2])
    np.testing.assert_array_equal(rows.fetch(jax.numpy.ones(4)), np.ones(4))


def test_whole_arrays_go_where_they_are_told():
    mesh = make_mesh(devices=jax.devices()[:1])
    placed = place_whole({"x": np.arange(3)}, {"x": named_sharding((None,), mesh, Rules())})
    assert placed["x"].sharding.mesh == mesh
    np.testing.assert_array_equal(placed["x"], np.arange(3))
