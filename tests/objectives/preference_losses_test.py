"""Losses of reward models against their definitions, their gradients, and where they would overflow."""

import jax
import jax.numpy as jnp
import numpy as np

from clp_jax.objectives.preference_losses import binary_cross_entropy, bradley_terry

A, B = (np.random.default_rng(seed).normal(size=7) for seed in (5, 6))


def sigmoid(x):
    return 1 / (1 + np.exp(-np.asarray(x, np.float64)))


def arrays(*xs):
    return tuple(jnp.asarray(x, jnp.float32) for x in xs)


def test_bradley_terry():
    np.testing.assert_allclose(bradley_terry(*arrays(A, B)), -np.log(sigmoid(A - B)), rtol=1e-5)
    # Only the difference counts, and the two orders of a pair have probabilities that sum to one.
    np.testing.assert_allclose(bradley_terry(*arrays(A + 5, B + 5)), bradley_terry(*arrays(A, B)), rtol=1e-4)
    both = np.exp(-bradley_terry(*arrays(A, B))) + np.exp(-bradley_terry(*arrays(B, A)))
    np.testing.assert_allclose(both, 1, rtol=1e-6)
    grads = jax.grad(lambda a, b: bradley_terry(a, b).sum(), argnums=(0, 1))(*arrays(A, B))
    np.testing.assert_allclose(grads[0], sigmoid(A - B) - 1, rtol=1e-5)
    np.testing.assert_allclose(grads[1], 1 - sigmoid(A - B), rtol=1e-5)


def test_binary_cross_entropy():
    labels = np.asarray([0, 1, 0.5, 0.25, 1, 0, 0.9])
    expected = -labels * np.log(sigmoid(A)) - (1 - labels) * np.log(sigmoid(-A))
    np.testing.assert_allclose(binary_cross_entropy(*arrays(A, labels)), expected, rtol=1e-5)
    grads = jax.grad(lambda x, y: binary_cross_entropy(x, y).sum())(*arrays(A, labels))
    np.testing.assert_allclose(grads, sigmoid(A) - labels, rtol=1e-5, atol=1e-7)


def test_certain_scores_do_not_overflow():
    big = jnp.asarray([1e4, -1e4])
    np.testing.assert_array_equal(bradley_terry(big, jnp.zeros(2)), [0, 1e4])
    np.testing.assert_array_equal(binary_cross_entropy(big, jnp.asarray([1.0, 1.0])), [0, 1e4])
    grads = jax.grad(lambda x: binary_cross_entropy(x, jnp.asarray([1.0, 1.0])).sum())(big)
    np.testing.assert_array_equal(grads, [0, -1])
