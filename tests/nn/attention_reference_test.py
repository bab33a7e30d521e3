"""The reference of attention against float64, one query at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import CASES, TWO_SIDED, assert_close, brute_force, differentiated, inputs

from clp_jax.nn.attention_reference import reference_attention
from clp_jax.nn.visibility import Pattern, Places

NAMES = [name for name in CASES if name != "odd"]  # Large, for one query at a time.


@pytest.mark.parametrize("name", NAMES)
def test_it_is_the_formula(name):
    case = CASES[name]
    arrays, (queries, keys) = inputs(case)
    query, key, value, table = arrays
    out = reference_attention(query, key, value, pattern=case.pattern, queries=queries, keys=keys, table=table)
    assert_close(out, brute_force(arrays, case.pattern, queries, keys), 1e-6)


def test_gradients_are_those_of_the_formula():
    case = CASES["all"]
    arrays, (queries, keys) = inputs(case)
    _, gradients = differentiated(reference_attention, case)(arrays, queries, keys)
    rng = np.random.default_rng(3)
    weights = np.sin(np.arange(arrays[0].size)).reshape(arrays[0].shape)
    for number, gradient in enumerate(gradients):
        direction = rng.normal(size=gradient.shape)

        def total(step, number=number, direction=direction):
            moved = [np.asarray(x, np.float64) for x in arrays]
            moved[number] = moved[number] + step * direction
            return (brute_force(moved, case.pattern, queries, keys) * weights).sum()

        slope = (total(1e-5) - total(-1e-5)) / 2e-5
        np.testing.assert_allclose(np.vdot(gradient, direction), slope, rtol=1e-4)


def test_a_query_that_sees_nothing_gives_zeros_and_passes_no_gradient():
    case = CASES["t5_decoder"]
    arrays, (queries, keys) = inputs(case)
    blind = np.broadcast_to(np.asarray(queries.segments == 0), arrays[0].shape[:2])
    assert 0 < blind.sum() < blind.size
    out, gradients = differentiated(reference_attention, case)(arrays, queries, keys)
    assert not np.any(out[blind]) and np.all(np.any(out[~blind], axis=(1, 2)))
    assert not np.any(gradients[0][blind])
    assert not np.any(np.swapaxes(gradients[2], 1, 2)[blind])
    assert all(np.isfinite(gradient).all() for gradient in gradients)


def test_softmax_is_float32_whatever_the_inputs_are():
    case = CASES["plain"]
    arrays, (queries, keys) = inputs(case, jnp.bfloat16)
    query, key, value, _ = arrays
    out = reference_attention(query, key, value, pattern=case.pattern, queries=queries, keys=keys)
    assert out.dtype == jnp.bfloat16
    logits = jnp.einsum("btnh,bnsh->bnts", *(x.astype(jnp.float32) for x in (query, key)), precision="highest")
    weights = jax.nn.softmax(logits, axis=-1).astype(jnp.bfloat16)
    whole = jnp.einsum("bnts,bnsh->btnh", *(x.astype(jnp.float32) for x in (weights, value)), precision="highest")
    # One rounding, of the result: half a step of bfloat16.
    assert_close(out, whole, 2.0**-8)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "pattern", "table", "message"),
    [
        (3, 2, Pattern(), None, "3 query heads over 2 key heads: expected a multiple"),
        (2, 2, Pattern(buckets=TWO_SIDED), None, "table is None: a relative position bias needs both"),
        (2, 2, Pattern(), (2, 8), "table is given: a relative position bias needs both"),
        (2, 2, Pattern(buckets=TWO_SIDED), (2, 9), "table has 9 buckets: expected 8"),
    ],
)
def test_what_does_not_fit_is_refused(heads, kv_heads, pattern, table, message):
    at = Places(jnp.arange(3)[None], jnp.ones((1, 3), jnp.int32))
    key = jnp.ones((1, kv_heads, 3, 4))
    with pytest.raises(ValueError, match=message):
        reference_attention(
            jnp.ones((1, 3, heads, 4)),
            key,
            key,
            pattern=pattern,
            queries=at,
            keys=at,
            table=None if table is None else jnp.ones(table),
        )
