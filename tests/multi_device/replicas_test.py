"""Copies of arrays on eight devices: a bit that is different on one of them is found, and the device named."""

import re

import jax
import numpy as np
import pytest
from flipped_bits import flip_a_bit
from jax.sharding import NamedSharding, PartitionSpec
from toy_runs import Toy, run

from clp_jax import processes
from clp_jax.partitioning import make_mesh
from clp_jax.training.checkpoint_steps import complete_steps
from clp_jax.training.replicas import ReplicaError, check_replicas

MESH = make_mesh(data=2, fsdp=4)


def put(spec, *, damaged=()):
    """A matrix on the mesh, one bit of it different on some devices."""
    values = np.arange(32, dtype=np.float32).reshape(8, 4)
    sharding = NamedSharding(MESH, PartitionSpec(*spec))
    parts = []
    for device, index in sharding.addressable_devices_indices_map(values.shape).items():
        part = values[index].copy()
        if device.id in damaged:
            part.view(np.uint32)[-1, 0] ^= 1
        parts.append(jax.device_put(part, device))
    return jax.make_array_from_single_device_arrays(values.shape, sharding, parts)


@pytest.mark.parametrize("spec", [(), ("fsdp",), ("data", "fsdp"), (None, "data")])
def test_whole_copies_are_the_same(spec):
    check_replicas({"a": put(spec), "b": {"c": put(())}}, 7)


def test_the_device_with_other_bits_is_named():
    tree = {"a": put(("fsdp",)), "b": {"c": put((), damaged=(5,))}}
    expected = "after step 7, copies of b/c have different bits: device 5 of process 0 ("
    with pytest.raises(ReplicaError, match=re.escape(expected)) as found:
        check_replicas(tree, 7)
    assert "on 7 others" in str(found.value) and "device 4" not in str(found.value)


def test_of_two_copies_nobody_knows_the_right_one():
    """Parts of two rows, each on two devices."""
    with pytest.raises(
        ReplicaError, match=r"copies of a from \(4, 0\) on have different bits: device 2 of .*device 6 of .*\)\. A"
    ):
        check_replicas({"a": put(("fsdp",), damaged=(6,))}, 7)
    check_replicas({"a": put(("data", "fsdp"), damaged=(6,))}, 7)  # There is one copy of each part.


class Forgetful(Toy):
    """A bit of the random key is another one on a device, from the third step on."""

    def setup(self, run_dir, seed):
        setup = super().setup(run_dir, seed)
        plain = setup.source.next

        def next_batch(state, frozen):
            if int(state.step) == 2:
                flip_a_bit(state.rng)
            return plain(state, frozen)

        setup.source.next = next_batch
        return setup


def test_a_run_looks_now_and_then_and_goes_on_from_before(tmp_path):
    mesh = make_mesh(data=4, devices=jax.devices()[:4])
    settings = {"mesh": mesh, "replica_check_every": 4, "checkpoint_every": 2, "evaluate_every": None}
    with pytest.raises(ReplicaError, match=r"after step 4, copies of rng have different bits: device 3 of") as found:
        run(tmp_path / "flipped", 6, Forgetful(), **settings)
    assert processes.exit_code_of(found.value) == processes.FAILURE
    assert complete_steps(tmp_path / "flipped" / "checkpoints") == [2]
    assert (
        run(tmp_path / "flipped", 6, **settings).metrics["param_digest"]
        == (run(tmp_path / "whole", 6, **settings).metrics["param_digest"])
    )
