"""Layers in stages on devices of their own: the numbers of the stack, the steps of the schedule, and kernels that stay."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rounding import assert_same_to_rounding, natural_scales
from tiny_policies import varied_params

from clp_jax.models.config import PaLMConfig
from clp_jax.models.policy import Policy
from clp_jax.partitioning import Rules, make_mesh, tree_shardings, use_mesh
from clp_jax.sampling.score import teacher_force

LAYERS, STAGES, MICROBATCHES = 8, 4, 4
POLICY = Policy(
    PaLMConfig.palm(
        num_layers=LAYERS, vocab_size=32, embed_dim=8, mlp_dim=16, num_heads=2, head_dim=4, scan_unroll=1, remat="full"
    )
)
TABLE = (("batch", ("data",)), ("layers", "stage"))
RNG = np.random.default_rng(0)
PROMPTS = jnp.asarray(np.where(np.arange(6) < RNG.integers(2, 7, (8, 1)), RNG.integers(2, 32, (8, 6)), 0), jnp.int32)


def _completions(samples):
    return jnp.asarray(RNG.integers(2, 32, (8 * samples, 5)), jnp.int32)


def _loss(params, tokens):
    """Of completions that see their prompt's kept keys, with several samples of each."""
    forced = teacher_force(POLICY.bind(params), PROMPTS, tokens, mask=jnp.ones(tokens.shape))
    return (forced.log_probs * jnp.cos(jnp.arange(tokens.size, dtype=jnp.float32)).reshape(tokens.shape)).sum()


def _lowered(tokens, microbatches=MICROBATCHES, stages=STAGES, table=TABLE):
    mesh, rules = make_mesh(data=-1, stage=stages), Rules(table, microbatches)
    params = varied_params(POLICY)
    params = jax.device_put(params, tree_shardings(POLICY.logical_axes(), mesh, rules, params))
    with use_mesh(mesh, rules):
        return jax.jit(jax.value_and_grad(_loss)).lower(params, tokens), (params, tokens)


def test_a_pipeline_computes_what_the_stack_does():
    assert jax.device_count() == 8
    tokens = _completions(2)
    alone, params = jax.jit(jax.value_and_grad(_loss)), varied_params(POLICY)
    expected, scales = alone(params, tokens), natural_scales(alone, params, tokens)
    lowered, arguments = _lowered(tokens)
    program = lowered.compile()
    found = program(*arguments)
    assert_same_to_rounding(found, expected, scales)
    assert found[1]["decoder"]["layers"]["mlp"]["wo"]["kernel"].sharding.shard_shape((LAYERS, 16, 8))[0] == 2
    text = program.as_text()
    assert "collective-permute" in text
    # Activations pass by; no device ever gets another stage's kernels.
    gathered = [[int(n) for n in shape.split(",")] for shape in re.findall(r"f32\[([\d,]+)\][^=]* all-gather", text)]
    kernels = [p.shape[1:] for p in jax.tree.leaves(arguments[0]["decoder"]["layers"]) if p.ndim == 3]
    assert not [shape for shape in gathered for kernel in kernels if sorted(shape[-2:]) == sorted(kernel)]


@pytest.mark.parametrize(("microbatches", "stages"), [(4, 4), (2, 4), (4, 2)])
def test_it_takes_as_many_steps_as_the_schedule_says(microbatches, stages):
    mesh, rules = make_mesh(data=-1, stage=stages), Rules((("layers", "stage"),), microbatches)
    with use_mesh(mesh, rules):
        jaxpr = jax.make_jaxpr(lambda params, tokens: POLICY.bind(params).encode(tokens).content)(
            POLICY.abstract(), jax.ShapeDtypeStruct((8, 6), jnp.int32)
        )
    lengths = [eqn.params["length"] for eqn in jaxpr.jaxpr.eqns if eqn.primitive.name == "scan"]
    assert lengths == [microbatches + stages - 1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(microbatches=3), "a pipeline of 3 micro-batches for 8 rows: expected micro-batches that divide them"),
        (dict(microbatches=8), "micro-batches of 1 rows for 2 devices that share each: expected a multiple"),
    ],
)
def test_what_does_not_divide_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        _lowered(_completions(1), **settings)


def test_layers_that_do_not_divide_are_refused():
    policy = Policy(PaLMConfig.palm(num_layers=6, vocab_size=32, embed_dim=8, mlp_dim=16, num_heads=2, head_dim=4))
    with (
        use_mesh(make_mesh(stage=4), Rules(TABLE, 2)),
        pytest.raises(ValueError, match="a pipeline of 4 stages for 6 periods of layers: expected stages that divide"),
    ):
        jax.eval_shape(lambda params: policy.bind(params).encode(PROMPTS).content, policy.abstract())
