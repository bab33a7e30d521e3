"""Rollouts in a layout of their own: the same tokens, and no parameter travels for each of them."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rounding import assert_same_to_rounding
from tiny_policies import tiny_config, varied_params
from workloads import layout

from clp_jax.models.conditioning import ParameterConditioning
from clp_jax.models.policy import Policy
from clp_jax.partitioning import Rules, tree_shardings, use_mesh
from clp_jax.preferences import Preference, fixed
from clp_jax.sampling.generate import SamplingConfig
from clp_jax.sampling.rollouts import RolloutWorker
from clp_jax.training.experience import ChunkRollout

POLICY = Policy(tiny_config(num_encoder_layers=1, num_decoder_layers=1))
CONDITIONING = ParameterConditioning("full", 2)
OWN = Rules((("batch", ("slice", "data", "fsdp")), ("heads", "tensor"), ("mlp", "tensor"), ("act_mlp", "tensor")))
INPUTS = jnp.asarray(np.random.default_rng(0).integers(2, 11, (16, 6)), jnp.int32)
PREFERENCE = Preference(jnp.asarray([[0.3, 0.7]]), jnp.asarray([0.2]))


def _rolled_out(rules):
    """The rollout under sharded parameters, and the program's text."""
    place = layout("fsdp")
    mesh, home = place["mesh"], place["rules"]
    reference = varied_params(POLICY)
    params = jax.tree.map(lambda x: jnp.stack([x, x[..., ::-1]]), reference)
    axes = POLICY.logical_axes()
    params = jax.device_put(params, tree_shardings(CONDITIONING.logical_axes(axes), mesh, home, params))
    reference = jax.device_put(reference, tree_shardings(axes, mesh, home, reference))
    worker = RolloutWorker(POLICY, CONDITIONING, SamplingConfig(6), num_samples=1, rules=rules)

    def run(params, reference, inputs, weights, alpha):
        rollout = worker(params, reference, inputs, Preference(weights, alpha), jax.random.key(3))
        return rollout.tokens, rollout.log_probs, rollout.reference_log_probs

    arguments = (params, reference, INPUTS, PREFERENCE.weights, PREFERENCE.alpha)
    with use_mesh(mesh, home):
        program = jax.jit(run).lower(*arguments).compile()
    return program(*arguments), program.as_text()


def _gathered_in_loops(text):
    """Collectives that gather, inside the bodies of loops."""
    bodies = set(re.findall(r"body=%?([\w.\-]+)", text))
    found = 0
    for computation in re.split(r"\n\n", text):
        name = re.match(r"\s*(?:ENTRY )?%?([\w.\-]+) ", computation)
        if name and name[1] in bodies:
            found += len(re.findall(r" all-gather(?:-start)?\(", computation))
    return found


def _chunk(num_chunks, rules):
    """A chunk of eight prompts under a pipeline, traced: two rows of each micro-batch for four devices that share it."""
    place = layout("pipeline")
    policy = Policy(tiny_config(num_encoder_layers=2, num_decoder_layers=2))
    conditioning = ParameterConditioning("full", 2)
    worker = RolloutWorker(policy, conditioning, SamplingConfig(4), rules=rules)
    chunk = ChunkRollout(worker, fixed((0.3, 0.7), 0.2), num_groups=1, num_chunks=num_chunks)
    reference = policy.abstract()
    scalar = jax.ShapeDtypeStruct((), jnp.int32)
    arguments = (jax.eval_shape(conditioning.expand, reference), reference, jax.ShapeDtypeStruct((8, 6), jnp.int32))
    with use_mesh(place["mesh"], place["rules"]):
        return jax.eval_shape(chunk, *arguments, scalar, jax.ShapeDtypeStruct((), jnp.uint32), scalar)


def test_under_a_pipeline_rollouts_score_in_their_own_layout_too():
    assert _chunk(2, dataclasses.replace(OWN, table=(("batch", ("stage", "data", "fsdp")),))).tokens.shape == (8, 4)


def test_chunks_are_named_where_their_rows_do_not_divide():
    message = "rollouts of one of num_chunks=2 parts of a batch, 8 prompts each: micro-batches of 2 rows for 4 devices"
    with pytest.raises(ValueError, match=message):
        _chunk(2, None)
    with pytest.raises(ValueError, match="^micro-batches of 2 rows"):
        _chunk(1, None)


def test_tokens_are_the_same_and_parameters_stay():
    there, text = _rolled_out(None)
    own, own_text = _rolled_out(OWN)
    np.testing.assert_array_equal(there[0], own[0])
    assert_same_to_rounding(own[1:], there[1:])
    assert len(set(np.asarray(own[0]).ravel().tolist())) > 3
    assert _gathered_in_loops(text) > 0
    assert _gathered_in_loops(own_text) == 0
