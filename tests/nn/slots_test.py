"""Rows of several groups numbered through, against the groups' own rows put in order one by one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clp_jax.nn.routing import ExpertChoice, TokenChoice
from clp_jax.nn.slots import collect, distribute, join_groups

GROUPS, TOKENS, EXPERTS, D = 3, 7, 4, 2
MASK = np.arange(TOKENS)[None] < np.asarray([[7], [4], [0]])


@functools.partial(jax.jit, static_argnums=(0,))
def _both_ways(router, probs, x, rows):
    slots = jax.vmap(functools.partial(router.assign, training=True))(probs, jnp.asarray(MASK))
    joined = join_groups(slots, TOKENS, EXPERTS)
    flat = x.reshape(-1, D)
    tokens = jnp.zeros(len(flat), bool)
    there, there_transposed = jax.vjp(lambda x: distribute(x, joined.source, joined.slot_of), flat)
    back, back_transposed = jax.vjp(lambda rows: collect(rows, joined.source, joined.slot_of, tokens), rows)
    return (
        slots.source,
        slots.gates,
        joined.source,
        joined.gates,
        (there, back_transposed(flat)[0]),
        (back, there_transposed(rows)[0]),
    )


@pytest.mark.parametrize("router", [TokenChoice(), TokenChoice(2, train_capacity=1.0), ExpertChoice(1.5)])
def test_rows_of_all_groups_are_those_of_each_in_the_order_of_the_experts(router):
    rng = np.random.default_rng(0)
    probs = jax.nn.softmax(jnp.asarray(2 * rng.normal(size=(GROUPS, TOKENS, EXPERTS)), jnp.float32))
    x = rng.normal(size=(GROUPS, TOKENS, D)).astype(np.float32)
    capacity = int(router.capacities(TOKENS, EXPERTS, True)[-1])
    rows = rng.normal(size=(EXPERTS * GROUPS * capacity, D)).astype(np.float32)
    own_source, own_gates, source, gates, there, back = jax.device_get(_both_ways(router, probs, x, rows))

    order = [(g, e * capacity + c) for e in range(EXPERTS) for g in range(GROUPS) for c in range(capacity)]
    expected_rows, expected_tokens = np.zeros_like(rows), np.zeros_like(x)
    for row, (group, own) in enumerate(order):
        assert gates[row] == own_gates[group, own]
        token = own_source[group, own]
        if token == TOKENS:
            assert source[row] == GROUPS * TOKENS
            continue
        assert source[row] == group * TOKENS + token
        expected_rows[row] = x[group, token]
        expected_tokens[group, token] += rows[row]
    assert 0 < (source < GROUPS * TOKENS).sum() < len(rows)
    for found in there:
        np.testing.assert_array_equal(found, expected_rows)
    for found in back:
        np.testing.assert_allclose(found, expected_tokens.reshape(-1, D), rtol=1e-6, atol=1e-6)
