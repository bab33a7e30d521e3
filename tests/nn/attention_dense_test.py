"""Dense attention against float64, one query at a time: from masks, with several sets of keys, and from positions."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import CASES, TWO_SIDED, assert_close, brute_force, differentiated, inputs

from clp_jax.nn.attention_dense import (
    Keys,
    Sight,
    dot_product_attention,
    quantize,
    reference_attention,
    swap_heads,
)
from clp_jax.nn.visibility import Pattern, Places

NAMES = [name for name in CASES if name != "odd"]  # Large, for one query at a time.
RNG = np.random.default_rng(0)
B, T, S, N, H = 2, 3, 5, 4, 4
QUERY = RNG.normal(size=(B, T, N, H)).astype(np.float32)
BIAS = RNG.normal(size=(1, N, T, S)).astype(np.float32)
MASK = RNG.random((B, T, S)) < 0.6
MASK[0, 1] = False  # A row of padding sees nothing.


def keys_and_values(groups: int, batch: int = B, size: int = S) -> tuple[np.ndarray, np.ndarray]:
    """Heads behind positions, as the formulas have them."""
    return tuple(RNG.normal(size=(2, batch, size, groups, H)).astype(np.float32))


def seen(key, value, mask, bias=None, cap=None, scale=1.0) -> Keys:
    """A set of keys with a mask and a bias that are written down."""
    nowhere = Places(jnp.zeros((1, 1), jnp.int32), jnp.zeros((1, 1), jnp.int32))
    bias = None if bias is None else jnp.asarray(bias)
    sight = Sight(Pattern(cap=cap, scale=scale), nowhere, nowhere, mask=jnp.asarray(mask), bias=bias)
    return Keys(swap_heads(jnp.asarray(key)), swap_heads(jnp.asarray(value)), sight)


def reference(query, parts) -> np.ndarray:
    """One head of one row at a time, the keys that are masked left out; parts are (key, value, mask, bias, cap)."""
    rows, length, heads, _ = query.shape
    out = np.zeros(query.shape)
    for r, t, n in np.ndindex(rows, length, heads):
        logits, values = [], []
        for key, value, mask, bias, cap in parts:
            shared = rows // key.shape[0]
            b, place, g = r // shared, (r % shared) * length + t, n // (heads // key.shape[2])
            for s in range(key.shape[1]):
                if not mask[b, place if mask.shape[1] > 1 else 0, s]:
                    continue
                logit = key[b, s, g].astype(np.float64) @ query[r, t, n].astype(np.float64)
                logit = cap * np.tanh(logit / cap) if cap else logit
                logits.append(logit + (0 if bias is None else bias[b % bias.shape[0], n, place, s]))
                values.append(value[b, s, g].astype(np.float64))
        if logits:  # Nothing to see: zeros.
            out[r, t, n] = softmax(np.asarray(logits)) @ np.asarray(values)
    return out


def softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize(("with_bias", "cap"), [(True, None), (False, 2.0), (True, 2.0)])
def test_attention_is_unscaled_masked_softmax(groups, with_bias, cap):
    key, value = keys_and_values(groups)
    bias = BIAS if with_bias else None
    out = dot_product_attention(jnp.asarray(QUERY), [seen(key, value, MASK, bias, cap)])
    expected = reference(QUERY, [(key, value, MASK, bias, cap)])
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)
    assert not np.any(out[0, 1])


@pytest.mark.parametrize("samples", [1, 3])
def test_several_sets_of_keys_are_one_softmax(samples):
    """A prompt's keys serve all its samples; each has keys of its own."""
    query = RNG.normal(size=(B * samples, T, N, H)).astype(np.float32)
    prompt, own = keys_and_values(2), keys_and_values(2, B * samples, T)
    prompt_mask = RNG.random((B, samples * T, S)) < 0.6
    own_mask = np.broadcast_to(np.tril(np.ones((T, T), bool)), (B * samples, T, T))
    parts = [(*prompt, prompt_mask, None, 3.0), (*own, own_mask, BIAS[..., :T], None)]
    out = dot_product_attention(jnp.asarray(query), [seen(*part) for part in parts])
    np.testing.assert_allclose(out, reference(query, parts), rtol=1e-5, atol=1e-6)


def test_the_scale_is_the_queries():
    key, value = keys_and_values(2)
    scaled = dot_product_attention(jnp.asarray(QUERY), [seen(key, value, MASK, BIAS, 2.0, scale=0.25)])
    expected = dot_product_attention(jnp.asarray(QUERY * 0.25), [seen(key, value, MASK, BIAS, 2.0)])
    np.testing.assert_array_equal(scaled, expected)


def test_a_bias_gets_the_summed_gradient_of_the_rows_that_share_it():
    key, value = keys_and_values(2)
    weight = jnp.asarray(RNG.normal(size=QUERY.shape), jnp.float32)

    def total(bias):
        return (dot_product_attention(jnp.asarray(QUERY), [seen(key, value, MASK, bias)]) * weight).sum()

    shared = jax.grad(total)(jnp.asarray(BIAS))
    apart = jax.grad(total)(jnp.broadcast_to(jnp.asarray(BIAS), (B, *BIAS.shape[1:])))
    np.testing.assert_allclose(shared[0], apart.sum(0), rtol=1e-5, atol=1e-6)


def test_masked_keys_get_no_gradient():
    mask = np.broadcast_to(np.asarray([True, False, True, True, False]), (1, T, S))
    key, value = keys_and_values(2, 1)

    def total(key, value):
        return dot_product_attention(jnp.asarray(QUERY[:1]), [seen(key, value, mask)]).sum()

    for gradient in jax.grad(total, argnums=(0, 1))(jnp.asarray(key), jnp.asarray(value)):
        assert not np.any(gradient[:, [1, 4]]) and np.all(np.any(gradient[:, [0, 2, 3]], axis=(2, 3)))


def test_softmax_is_float32_although_activations_are_bfloat16():
    key, value = keys_and_values(4)
    query, key, value = (jnp.asarray(x, jnp.bfloat16) for x in (4 * QUERY, 4 * key, value))
    out = dot_product_attention(query, [seen(key, value, MASK, BIAS)])
    assert out.dtype == jnp.bfloat16
    # The logits are rounded once, by the product; a softmax in bfloat16 would round at every step after it as well.
    logits = jnp.einsum("btnh,bsnh->bnts", query, key).astype(jnp.float32) + BIAS
    weights = softmax(np.asarray(jnp.where(MASK[:, None], logits, -1e10), np.float64)) * MASK.any(-1)[:, None, :, None]
    rounded = jnp.asarray(weights.astype(np.float32), jnp.bfloat16)
    np.testing.assert_array_equal(out, jnp.einsum("bnts,bsnh->btnh", rounded, value))


def test_eight_bits_are_the_values_they_stand_for():
    key, value = keys_and_values(2)
    part = seen(key, value, MASK, BIAS)
    stored = dataclasses.replace(part, key=quantize(part.key), value=quantize(part.value))
    wide = dataclasses.replace(
        part, key=stored.key.values * stored.key.scale, value=stored.value.values * stored.value.scale
    )
    query = jnp.asarray(QUERY)
    np.testing.assert_allclose(
        dot_product_attention(query, [stored]), dot_product_attention(query, [wide]), rtol=1e-5, atol=1e-6
    )
    # Half a level of 127, of the largest entry of each position.
    error = np.abs(np.asarray(wide.key - part.key))
    assert np.all(error <= np.abs(np.asarray(part.key)).max(-1, keepdims=True) / 254 * 1.001)
    assert not np.any(quantize(jnp.zeros((2, 3))).values)


def test_dropped_weights_are_not_renormalised():
    ones = np.ones((1, S, 1, 1), np.float32)
    out = dot_product_attention(
        jnp.zeros((1, 2000, 1, 1)),
        [seen(ones, ones, np.ones((1, 2000, S), bool))],
        dropout_rate=0.5,
        dropout_key=jax.random.key(0),
    )
    # Each of the S weights of 1/S is doubled or gone.
    counts = np.asarray(out).ravel() * S / 2
    np.testing.assert_allclose(counts, counts.round(), atol=1e-5)
    assert abs(counts.mean() - S / 2) < 5 * np.sqrt(S / 4 / 2000)


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


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_query_that_sees_nothing_gives_zeros_and_passes_no_gradient(dtype):
    case = CASES["t5_decoder"]
    arrays, (queries, keys) = inputs(case, dtype)
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
