"""First parameters on eight devices: each array is read to where it lives, and is what the checkpoint says, to the bit."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from tiny_policies import tiny_config, varied_params
from workloads import Descent, layout

from clp_jax.host_rows import place_whole
from clp_jax.interop import orbax_item
from clp_jax.interop.arrays import LazyArray
from clp_jax.models.policy import Policy
from clp_jax.training.checkpoint_items import CheckpointError
from clp_jax.training.learner import Learner
from clp_jax.training.saved_params import load_params, save_params
from clp_jax.training.streamed_params import open_params
from clp_jax.training.supervised import SupervisedLoss
from clp_jax.training.transfer import Transfer

POLICY = Policy(tiny_config(embed_dim=16, mlp_dim=32, num_heads=4, head_dim=4, vocab_size=32))
SPECS = ((), ("fsdp",), ("fsdp", "tensor"), (None, ("tensor", "fsdp")))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint, written as training under `fsdp_tensor` writes one: an array in parts."""
    path = tmp_path_factory.mktemp("run") / "checkpoints" / "4"
    learner = Learner(SupervisedLoss(POLICY), Descent(), logical_axes=POLICY.logical_axes(), **layout("fsdp_tensor"))
    save_params(path, learner.init_state(varied_params(POLICY), 0).params, {"stage": "toy"}, step=4)
    return path


@pytest.mark.parametrize("name", ["fsdp", "fsdp_tensor", "data_parallel"])
def test_first_parameters_are_the_checkpoints_under_any_layout(saved, name):
    stored, _, step = open_params(saved)
    assert step == 4 and all(isinstance(leaf, LazyArray) for leaf in jax.tree.leaves(stored))
    learner = Learner(SupervisedLoss(POLICY), Descent(), logical_axes=POLICY.logical_axes(), **layout(name))
    first = Transfer().plan(stored, POLICY.abstract()).derived(POLICY.logical_axes(), dict)
    state, abstract = learner.init_state(first, 0), learner.abstract_state(first)
    jax.tree.map(np.testing.assert_array_equal, state.params, load_params(saved)[0])
    for leaf, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(abstract), strict=True):
        assert leaf.sharding == wanted.sharding and (leaf.shape, leaf.dtype) == (wanted.shape, wanted.dtype)
    assert (name == "data_parallel") == all(leaf.is_fully_replicated for leaf in jax.tree.leaves(state.params))


@pytest.mark.parametrize("axes", SPECS, ids=str)
def test_what_is_read_is_read_once(axes):
    """One process holds all of an array: its parts are one box, whatever the layout."""
    mesh, spec = layout("fsdp_tensor")["mesh"], PartitionSpec(*axes)
    array, read = np.arange(64.0, dtype=np.float32).reshape(8, 8), []

    def fill(out, region):
        read.append(region)
        out[...] = array[region]

    placed = place_whole(LazyArray(array.shape, array.dtype, fill), NamedSharding(mesh, spec))
    np.testing.assert_array_equal(placed, array)
    assert read == [(slice(0, 8), slice(0, 8))] and placed.sharding.spec == spec


def test_a_shard_that_differs_is_found_when_it_is_read(saved, monkeypatch):
    """The files are what was written, and what comes out of them is not."""
    stored_arrays = orbax_item.read

    def wrong(directory):
        def fill(leaf, out, region):
            leaf.fill(out, region)
            out.reshape(-1)[-1:] += 1

        leaves = stored_arrays(directory).items()
        return {name: dataclasses.replace(leaf, fill=functools.partial(fill, leaf)) for name, leaf in leaves}

    monkeypatch.setattr(orbax_item, "read", wrong)
    for read in (load_params, lambda path: place_whole(*_on_the_mesh(open_params(path)[0]))):
        with pytest.raises(CheckpointError, match=r"array params/.* has another SHA-256 than what was saved"):
            read(saved)


def _on_the_mesh(tree):
    return tree, jax.tree.map(lambda _: NamedSharding(layout("fsdp")["mesh"], PartitionSpec()), tree)
