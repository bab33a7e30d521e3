"""Sharding tables: names, ranks and conflicts are checked with and without a mesh."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from clp_jax import partitioning


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
