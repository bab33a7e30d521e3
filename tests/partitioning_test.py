"""Sharding tables: names, ranks and conflicts are checked with and without a mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from clp_jax import partitioning
from clp_jax.compilation.topology import Topology


def test_constrain_checks_without_a_mesh():
    x = jnp.ones((2, 3))
    assert partitioning.constrain(x, "batch", None) is x
    with pytest.raises(ValueError, match="unknown logical axis 'bacth'.*did you mean 'batch'"):
        partitioning.constrain(x, "bacth", None)
    with pytest.raises(ValueError, match="1 axis names"):
        partitioning.constrain(x, "batch")


def test_a_mesh_axis_is_used_once():
    rules = partitioning.Rules((("vocab", "tensor"), ("embed", ("fsdp", "tensor")), ("mlp", None)))
    assert rules.spec(("vocab", "embed")) == PartitionSpec("tensor", "fsdp")
    assert rules.spec(("embed", "vocab")) == PartitionSpec(("fsdp", "tensor"), None)
    assert rules.spec(("mlp", None, "layers")) == PartitionSpec(None, None, None)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ((("batchs", "data"),), "unknown logical axis 'batchs'"),
        ((("batch", "dta"),), "mesh axis 'dta'"),
        ((("batch", "data"), ("batch", None)), "given twice"),
    ],
)
def test_rules_are_checked(table, message):
    with pytest.raises(ValueError, match=message):
        partitioning.Rules(table)


def test_make_mesh_sizes():
    mesh = partitioning.make_mesh(devices=jax.devices()[:1])
    assert mesh.axis_names == partitioning.MESH_AXES and mesh.size == 1
    with pytest.raises(ValueError, match="must multiply to the 1 devices"):
        partitioning.make_mesh(fsdp=2, devices=jax.devices()[:1])
    with pytest.raises(ValueError, match="unknown axis 'tenser'.*did you mean 'tensor'"):
        partitioning.make_mesh(tenser=2)


def test_a_mesh_of_some_devices():
    assert partitioning.make_mesh(num_devices=1, data=1).size == 1
    with pytest.raises(ValueError, match=r"num_devices is 9\d*: expected 1 to \d"):
        partitioning.make_mesh(num_devices=99)
    with pytest.raises(ValueError, match="fsdp is 0: expected at least 1, or -1"):
        partitioning.make_mesh(fsdp=0)


def test_axes_lie_along_the_torus():
    """Devices of a topology that is only described: neighbours on the tensor axis are neighbours on the chip."""
    pytest.importorskip("libtpu", reason="describes TPUs with the extra `aot`")
    devices = Topology.parse("v5e:4x4").devices()
    mesh = partitioning.make_mesh(data=1, fsdp=4, tensor=4, devices=devices)
    places = np.asarray([device.coords[:2] for device in mesh.devices.flat]).reshape(4, 4, 2)
    assert (np.ptp(places, axis=1).max(-1) == 3).all() and (np.ptp(places, axis=1).min(-1) == 0).all()
    # Axes that are no product of whole dimensions are still laid out.
    assert partitioning.make_mesh(data=1, fsdp=8, tensor=2, devices=devices).size == 16


def test_the_slice_axis_alone_leaves_a_slice():
    pytest.importorskip("libtpu", reason="describes TPUs with the extra `aot`")
    devices = Topology.parse("v5e:2x4", num_slices=2).devices()
    mesh = partitioning.make_mesh(slice=2, data=1, fsdp=-1, devices=devices[::-1])
    slices = np.vectorize(lambda device: device.slice_index)(mesh.devices).reshape(2, 8)
    np.testing.assert_array_equal(slices, [[0] * 8, [1] * 8])
    with pytest.raises(ValueError, match="slice is 1, and the devices belong to 2 slices: expected slice=2"):
        partitioning.make_mesh(devices=devices)


def test_what_does_not_divide_is_not_sharded():
    mesh = partitioning.make_mesh(devices=jax.devices()[:1])
    rules = partitioning.Rules((("embed", ("fsdp", "tensor")),))
    assert partitioning.named_sharding(("embed",), mesh, rules, (3,)).spec == PartitionSpec(("fsdp", "tensor"))
    with pytest.raises(ValueError, match="microbatches is 0"):
        partitioning.Rules((), microbatches=0)


def test_rules_change_on_the_active_mesh():
    other = partitioning.Rules((("length", "sequence"),), microbatches=3)
    with partitioning.use_rules(other):
        assert partitioning.active_rules() is None
    with partitioning.use_mesh(partitioning.make_mesh(), partitioning.Rules()):
        with partitioning.use_rules(other):
            assert partitioning.active_rules() is other and partitioning.is_sharded("length")
        with partitioning.use_rules(None):
            assert partitioning.is_sharded("batch") and not partitioning.is_sharded("length")


def test_an_axis_is_sharded_by_the_active_rules_alone():
    assert not partitioning.is_sharded("batch")
    with partitioning.use_mesh(partitioning.make_mesh(), partitioning.Rules()):
        assert partitioning.is_sharded("batch")
        assert not partitioning.is_sharded("length")
    with pytest.raises(ValueError, match="did you mean 'length'"):
        partitioning.is_sharded("lenght")


def test_constrain_acts_under_a_mesh():
    mesh = partitioning.make_mesh(devices=jax.devices()[:1])
    with partitioning.use_mesh(mesh, partitioning.Rules()):
        text = jax.jit(lambda x: partitioning.constrain(x, "batch", None)).lower(jnp.ones((2, 2))).as_text()
    assert "sharding_constraint" in text


def test_tree_shardings():
    mesh = partitioning.make_mesh(devices=jax.devices()[:1])
    tree = {"a": ("vocab", "embed"), "b": {"c": ()}, "d": None}
    shardings = partitioning.tree_shardings(tree, mesh, partitioning.Rules((("embed", "fsdp"),)))
    assert shardings["a"].spec == PartitionSpec(None, "fsdp")
    assert shardings["b"]["c"].spec == PartitionSpec() == shardings["d"].spec
