"""Lookup, the tied head, and their gradients."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from clp_jax.nn.embeddings import Embedding

TABLE = Embedding(nnx.Rngs(0), 7, 4, stddev=1.0, dtype=jnp.dtype("float32"))
ROWS = np.asarray(TABLE.embedding[...])


def test_lookup_takes_rows_in_the_type_asked_for():
    tokens = np.asarray([[0, 6, 3], [3, 3, 1]], np.int32)
    np.testing.assert_array_equal(TABLE(jnp.asarray(tokens), jnp.dtype("float32")), ROWS[tokens])
    narrow = TABLE(jnp.asarray(tokens), jnp.dtype("bfloat16"))
    assert narrow.dtype == jnp.bfloat16
    np.testing.assert_array_equal(narrow, jnp.asarray(ROWS, jnp.bfloat16)[tokens])


def test_ids_outside_the_vocabulary_are_clipped():
    np.testing.assert_array_equal(TABLE(jnp.asarray([-3, 7, 1000]), jnp.dtype("float32")), ROWS[[0, 6, 6]])


def test_the_gradient_counts_a_tokens_uses():
    graph, state = nnx.split(TABLE)

    def total(state):
        return nnx.merge(graph, state)(jnp.asarray([2, 5, 2]), jnp.dtype("float32")).sum()

    gradient = nnx.to_pure_dict(jax.grad(total)(state))["embedding"]
    np.testing.assert_array_equal(gradient[:, 0], [0, 0, 2, 0, 0, 1, 0])


def test_the_tied_head_is_float32():
    states = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)
    expected = states.astype(np.float64) @ ROWS.astype(np.float64).T
    np.testing.assert_allclose(TABLE.attend(jnp.asarray(states)), expected, rtol=1e-5, atol=1e-6)
    narrow = jnp.asarray(states, jnp.bfloat16)
    assert TABLE.attend(narrow).dtype == jnp.float32
    np.testing.assert_array_equal(TABLE.attend(narrow), TABLE.attend(narrow.astype(jnp.float32)))
