"""Attention against a float64 reference: grouped heads, several sets of keys, caps, biases, eight bits; and who sees whom."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from clp_jax.nn.attention import Attention, Keys, Sight, dot_product_attention, look, quantize, swap_heads
from clp_jax.nn.norms import RMSNorm
from clp_jax.nn.rope import Rope, rotate, rotation
from clp_jax.nn.visibility import Pattern, Places

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


def make(num_kv_heads: int = N, norms: bool = False, biases: bool = False, scale: float = 1.0) -> Attention:
    def norm(size: int) -> RMSNorm:
        return RMSNorm(size, eps=1e-6, dtype=jnp.dtype("float32"))

    return Attention(
        nnx.Rngs(0),
        6,
        N,
        H,
        num_kv_heads=num_kv_heads,
        scale=scale,
        qkv_bias=biases,
        out_bias=biases,
        qk_norm=norm if norms else None,
        dropout_rate=0.0,
        dtype=jnp.dtype("float32"),
    )


@pytest.mark.parametrize("num_kv_heads", [4, 1])
def test_projections_are_split_into_heads_normalised_and_rotated(num_kv_heads):
    attention = make(num_kv_heads, norms=True, biases=True, scale=0.3)
    for layer in (attention.query, attention.key, attention.value):
        layer.bias[...] = jnp.asarray(RNG.normal(size=layer.bias.shape), jnp.float32)
    x = RNG.normal(size=(B, T, 6)).astype(np.float32)
    turned = rotation(Rope(), H, jnp.asarray([[3, 4, 5]]))
    query = attention.project_q(jnp.asarray(x), turned)
    key, value = attention.project_kv(jnp.asarray(x), turned)

    def expected(layer, norm):
        y = x.astype(np.float64) @ np.asarray(layer.kernel[...], np.float64) + np.asarray(layer.bias[...])
        y = y.reshape(B, T, -1, H)
        return y if norm is None else y / np.sqrt((y**2).mean(-1, keepdims=True) + 1e-6)

    close = {"rtol": 1e-4, "atol": 1e-5}
    q, k, v = (
        jnp.asarray(expected(layer, norm), jnp.float32)
        for layer, norm in (
            (attention.query, attention.query_norm),
            (attention.key, attention.key_norm),
            (attention.value, None),
        )
    )
    np.testing.assert_allclose(query, rotate(q, turned), **close)
    np.testing.assert_allclose(swap_heads(key), rotate(k, turned), **close)
    np.testing.assert_allclose(swap_heads(value), v, **close)


def test_attend_projects_the_heads_together():
    attention = make()
    key, value = keys_and_values(4)
    out = attention.attend(jnp.asarray(QUERY), [seen(key, value, MASK, BIAS)])
    context = reference(QUERY, [(key, value, MASK, BIAS, None)]).reshape(B, T, N * H)
    np.testing.assert_allclose(out, context @ np.asarray(attention.out.kernel[...], np.float64), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scale", [1.0, 0.125])
def test_initial_attention_logits_have_a_variance_of_one(scale):
    """Wherever the ``1/sqrt(H)`` stands: T5's query carries it in its initialisation."""
    options = dict(qkv_bias=False, out_bias=False, qk_norm=None, dropout_rate=0.0, dtype=jnp.dtype("float32"))
    attention = Attention(nnx.Rngs(0), 256, 4, 64, num_kv_heads=2, scale=scale, **options)
    for layer, stddev in (
        (attention.query, (256 * 64) ** -0.5 / scale),
        (attention.key, 256**-0.5),
        (attention.out, 256**-0.5),
    ):
        kernel = np.asarray(layer.kernel[...])
        assert abs(kernel.std() / stddev - 1) < 5 / np.sqrt(2 * kernel.size)


def test_pairs_are_held_whole_up_to_a_number():
    def places(size: int) -> Places:
        return Places(jnp.arange(size)[None], jnp.ones((1, size), jnp.int32))

    small, large = look(Pattern(), places(4), places(4)), look(Pattern(), places(2048), places(1024))
    assert small.mask is not None and large.mask is None
    assert look(Pattern(), places(2048), places(1024), dense=True).mask is not None
