"""The layer: what is projected, normalised and rotated, how it starts, and when pairs are held whole."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from clp_jax.nn.attention import Attention, look
from clp_jax.nn.attention_dense import Keys, dot_product_attention, swap_heads
from clp_jax.nn.norms import RMSNorm
from clp_jax.nn.rope import Rope, rotate, rotation
from clp_jax.nn.visibility import Pattern, Places

RNG = np.random.default_rng(0)
B, T, S, N, H = 2, 3, 5, 4, 4


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
    query, key, value = (
        jnp.asarray(RNG.normal(size=size), jnp.float32) for size in ((B, T, N, H), *[(B, N, S, H)] * 2)
    )
    places = (Places(jnp.arange(size)[None], jnp.ones((1, size), jnp.int32)) for size in (T, S))
    keys = [Keys(key, value, look(Pattern(causal=True), *places))]
    context = np.asarray(dot_product_attention(query, keys), np.float64).reshape(B, T, N * H)
    expected = context @ np.asarray(attention.out.kernel[...], np.float64)
    np.testing.assert_allclose(attention.attend(query, keys), expected, rtol=1e-5, atol=1e-6)


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
