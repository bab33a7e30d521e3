"""Kernels of attention run once forward, whatever else the backward pass recomputes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import Case, inputs

from clp_jax.nn.attention_blockwise import blockwise_attention
from clp_jax.nn.attention_pallas import pallas_attention
from clp_jax.nn.remat import REMAT_POLICIES
from clp_jax.nn.visibility import Pattern

CASE = Case(Pattern(causal=True), 128, 128)
LAYERS = 2
KERNELS = {
    "blockwise": functools.partial(blockwise_attention, query_block=64, key_block=64),
    "pallas": functools.partial(pallas_attention, interpret=True),
}


@pytest.mark.parametrize("name", KERNELS)
def test_what_kernels_return_is_kept(name):
    (query, key, value, _), (queries, keys) = inputs(CASE)

    def gradient(remat):
        def layer(x, scale):
            x = jnp.tanh(x * scale)
            return KERNELS[name](x, key, value, pattern=CASE.pattern, queries=queries, keys=keys), None

        policy = REMAT_POLICIES[remat]
        body = layer if policy is None else jax.checkpoint(layer, policy=policy, prevent_cse=False)
        return jax.grad(lambda x: jnp.square(jax.lax.scan(body, x, jnp.arange(1.0, 1 + LAYERS))[0]).sum())

    programs = {remat: jax.jit(gradient(remat)).lower(query).compile() for remat in ("none", "minimal", "full")}
    # Kernels are loops here. Between a forward and a backward loop over layers, the compiler can't see what is the same.
    loops = {remat: program.as_text().count(" while(") for remat, program in programs.items()}
    assert loops["none"] == loops["minimal"] < loops["full"]
    np.testing.assert_array_equal(programs["minimal"](query), programs["none"](query))
