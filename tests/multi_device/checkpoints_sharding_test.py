"""Checkpoints of eight devices: every shard has a digest, and is checked on whatever mesh it is read."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilations import counted
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from clp_jax.training.checkpoint_items import CheckpointError
from clp_jax.training.checkpoint_manifest import DamagedError, Manifest
from clp_jax.training.checkpoint_steps import as_path
from clp_jax.training.checkpoints import Checkpoints
from clp_jax.training.guards import Guards
from clp_jax.training.saved_params import load_params
from clp_jax.training.train_state import TrainState

SPECS = {"rows": PartitionSpec("x"), "both": PartitionSpec("x", "y"), "columns": PartitionSpec(None, ("x", "y"))}


def state_of(step, shape, specs):
    mesh = Mesh(np.array(jax.devices()).reshape(shape), ("x", "y"))
    values = jnp.arange(64.0).reshape(8, 8) * step

    def put(array, spec=PartitionSpec()):
        return jax.device_put(array, NamedSharding(mesh, spec))

    params = {name: put(values + i, spec) for i, (name, spec) in enumerate(specs.items())}
    guard = jax.tree.map(put, Guards().init())
    return TrainState(put(jnp.int32(step)), params, {"slot": put(values)}, None, put(jnp.zeros(2, jnp.uint32)), guard)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    directory = tmp_path_factory.mktemp("checkpoints")
    with Checkpoints(directory) as checkpoints:
        checkpoints.save(1, state_of(1, (4, 2), SPECS), {"examples": 1}, {"stage": "toy"}, {})
    return directory


def test_every_shard_has_one_digest(saved):
    arrays = Manifest.read(as_path(saved / "1")).arrays
    counts = {name: len(array.shards) for name, array in arrays["params"].items()}
    assert counts == {"rows": 4, "both": 8, "columns": 8}
    assert set(arrays["params"]["both"].shards) == {
        f"{i}:{i + 2},{j}:{j + 4}" for i in range(0, 8, 2) for j in range(0, 8, 4)
    }
    assert list(arrays["training"]["opt_state/slot"].shards) == ["0:8,0:8"]


@pytest.mark.parametrize("shape", [(4, 2), (2, 4), (8, 1), (1, 8)])
def test_shards_are_checked_on_any_mesh(saved, shape):
    specs = SPECS | {"rows": PartitionSpec(None, "y"), "both": PartitionSpec("y", "x")}
    wanted = state_of(1, shape, specs)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), wanted)
    with Checkpoints(saved) as checkpoints:
        restored, _ = checkpoints.restore(abstract)
    jax.tree.map(np.testing.assert_array_equal, dataclasses.asdict(restored), dataclasses.asdict(wanted))
    assert all(a.sharding == b.sharding for a, b in zip(*map(jax.tree.leaves, (restored, wanted)), strict=True))
    manifest = Manifest.read(as_path(saved / "1"))
    assert manifest.verify_arrays("params", restored.params) == (20, 20)
    one = restored.params["columns"]
    other = jax.device_put(one.at[7, 7].add(1.0), one.sharding)
    with pytest.raises(DamagedError, match=r"array params/columns \[0:8,7:8\] has another SHA-256"):
        manifest.verify_arrays("params", restored.params | {"columns": other})


def test_a_wrong_shard_is_found_where_one_process_reads_all(saved, tmp_path):
    place = as_path(saved / "1")
    manifest = Manifest.read(place)
    try:
        rows = manifest.arrays["params"]["rows"]
        wrong = dataclasses.replace(rows, shards=rows.shards | {"2:4,0:8": "0" * 64})
        arrays = manifest.arrays | {"params": manifest.arrays["params"] | {"rows": wrong}}
        dataclasses.replace(manifest, arrays=arrays).write(place)
        with pytest.raises(CheckpointError, match=r"array params/rows \[2:4,0:8\] has another SHA-256"):
            load_params(saved / "1")
    finally:
        manifest.write(place)


def test_saving_what_devices_hold_alike_compiles_nothing(tmp_path):
    """Cut into a piece for each device, every array would be a program for each of them."""
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("x", "y"))
    values = np.arange(240, dtype=np.float32).reshape(24, 10)  # Of a shape that nothing else here has.
    params = {"columns": jax.device_put(values, NamedSharding(mesh, PartitionSpec(None, "y")))}
    state = dataclasses.replace(state_of(1, (4, 2), {}), params=params)
    with Checkpoints(tmp_path) as checkpoints, counted() as programs:
        checkpoints.save(1, state, {"examples": 0}, {"stage": "toy"}, {})
    assert programs == []
    np.testing.assert_array_equal(load_params(tmp_path)[0]["columns"], values)
