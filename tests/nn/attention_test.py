"""Attention against a float64 reference, and who sees whom."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from clp_jax.nn.attention import Attention, segment_mask, swap_heads
from clp_jax.nn.attention import dot_product_attention as by_head

RNG = np.random.default_rng(0)
B, T, S, N, H = 2, 3, 5, 2, 4
QUERY = RNG.normal(size=(B, T, N, H)).astype(np.float32)
KEY, VALUE = RNG.normal(size=(2, B, S, N, H)).astype(np.float32)
BIAS = RNG.normal(size=(N, T, S)).astype(np.float32)
MASK = RNG.random((B, T, S)) < 0.6
MASK[0, 1] = False  # A row of padding sees nothing.


def dot_product_attention(query, key, value, **settings):
    """With the heads of keys and values behind their positions, as the formulas below have them."""
    return by_head(query, swap_heads(key), swap_heads(value), **settings)


def softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def reference(query, key, value, mask, bias) -> np.ndarray:
    """One head of one example at a time, the keys that are masked left out."""
    out = np.zeros(query.shape)
    for b, t, n in np.ndindex(*query.shape[:3]):
        seen = mask[b, t]
        if not seen.any():  # Nothing to see: the mean of everything.
            out[b, t, n] = value[b, :, n].mean(0)
            continue
        logits = key[b, seen, n].astype(np.float64) @ query[b, t, n].astype(np.float64) + bias[n, t, seen]
        out[b, t, n] = softmax(logits) @ value[b, seen, n].astype(np.float64)
    return out


@pytest.mark.parametrize("with_bias", [True, False])
def test_attention_is_unscaled_masked_softmax(with_bias):
    bias = BIAS if with_bias else np.zeros_like(BIAS)
    query, key, value = jax.tree.map(jnp.asarray, (QUERY, KEY, VALUE))
    out = dot_product_attention(
        query, key, value, mask=jnp.asarray(MASK), bias=jnp.asarray(BIAS) if with_bias else None
    )
    np.testing.assert_allclose(out, reference(QUERY, KEY, VALUE, MASK, bias), rtol=1e-5, atol=1e-6)


def test_masked_keys_get_no_gradient():
    def total(key, value):
        return dot_product_attention(jnp.asarray(QUERY[:1]), key, value, mask=jnp.asarray(mask)).sum()

    mask = np.broadcast_to(np.asarray([True, False, True, True, False]), (1, T, S))
    for gradient in jax.grad(total, argnums=(0, 1))(jnp.asarray(KEY[:1]), jnp.asarray(VALUE[:1])):
        assert not np.any(gradient[:, [1, 4]]) and np.all(np.any(gradient[:, [0, 2, 3]], axis=(2, 3)))


def test_softmax_is_float32_although_activations_are_bfloat16():
    query, key, value = (jnp.asarray(x, jnp.bfloat16) for x in (4 * QUERY, 4 * KEY, VALUE))
    out = dot_product_attention(query, key, value, mask=jnp.asarray(MASK), bias=jnp.asarray(BIAS))
    assert out.dtype == jnp.bfloat16
    # The logits are rounded once, by the product; a softmax in bfloat16 would round at every step after it as well.
    logits = jnp.einsum("btnh,bsnh->bnts", query, key).astype(jnp.float32) + BIAS[None]
    weights = softmax(np.asarray(jnp.where(MASK[:, None], logits, -1e10), np.float64))
    rounded = jnp.asarray(weights.astype(np.float32), jnp.bfloat16)
    np.testing.assert_array_equal(out, jnp.einsum("bnts,bsnh->btnh", rounded, value))


def test_dropped_weights_are_not_renormalised():
    ones = jnp.ones((1, S, 1, 1))
    out = dot_product_attention(
        jnp.zeros((1, 2000, 1, 1)),
        ones,
        ones,
        mask=jnp.ones((1, 2000, S), bool),
        dropout_rate=0.5,
        dropout_key=jax.random.key(0),
    )
    # Each of the S weights of 1/S is doubled or gone.
    counts = np.asarray(out).ravel() * S / 2
    np.testing.assert_allclose(counts, counts.round(), atol=1e-5)
    assert abs(counts.mean() - S / 2) < 5 * np.sqrt(S / 4 / 2000)


def test_segments_see_their_own_and_nobody_sees_padding():
    queries, keys = np.asarray([[1, 1, 2, 0], [3, 3, 3, 3]]), np.asarray([[1, 2, 2, 0, 0], [0, 1, 3, 2, 3]])
    mask = segment_mask(jnp.asarray(queries), jnp.asarray(keys))
    for b, t, s in np.ndindex(2, 4, 5):
        assert bool(mask[b, t, s]) == (queries[b, t] == keys[b, s] and keys[b, s] != 0)


def _attention() -> Attention:
    return Attention(nnx.Rngs(0), 6, N, H, dropout_rate=0.0, dtype=jnp.dtype("float32"))


def test_projections_split_the_heads_of_the_inner_dimension():
    attention = _attention()
    x = RNG.normal(size=(B, T, 6)).astype(np.float32)
    whole = attention.project_qkv(jnp.asarray(x))
    apart = (attention.project_q(jnp.asarray(x)), *attention.project_kv(jnp.asarray(x)))
    for fused, alone, layer in zip(whole, apart, (attention.query, attention.key, attention.value), strict=True):
        expected = (x.astype(np.float64) @ np.asarray(layer.kernel[...], np.float64)).reshape(B, T, N, H)
        np.testing.assert_allclose(fused, expected, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(alone, expected, rtol=1e-5, atol=1e-5)


def test_attend_projects_the_heads_together():
    attention = _attention()
    query, key, value = jax.tree.map(jnp.asarray, (QUERY, KEY, VALUE))
    out = attention.attend(query, key, value, mask=jnp.asarray(MASK), bias=jnp.asarray(BIAS))
    context = reference(QUERY, KEY, VALUE, MASK, BIAS).reshape(B, T, N * H)
    np.testing.assert_allclose(out, context @ np.asarray(attention.out.kernel[...], np.float64), rtol=1e-5, atol=1e-6)


def test_initial_attention_logits_have_a_variance_of_one():
    """T5 has no ``1/sqrt(H)``: the query's initialisation carries it."""
    attention = Attention(nnx.Rngs(0), 256, 4, 64, dropout_rate=0.0, dtype=jnp.dtype("float32"))
    for layer, stddev in (
        (attention.query, (256 * 64) ** -0.5),
        (attention.key, 256**-0.5),
        (attention.out, 256**-0.5),
    ):
        kernel = np.asarray(layer.kernel[...])
        assert abs(kernel.std() / stddev - 1) < 5 / np.sqrt(2 * kernel.size)
