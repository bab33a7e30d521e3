"""Log-probabilities against the full softmax."""

import jax
import jax.numpy as jnp
import numpy as np

from clp_jax.objectives.log_probs import token_log_probs

LOGITS = np.random.default_rng(0).normal(size=(2, 3, 5)).astype(np.float32) * 3
TARGETS = jnp.asarray([[0, 4, 2], [1, 1, 3]], jnp.int32)


def softmax(logits):
    exp = np.exp(logits.astype(np.float64))
    return exp / exp.sum(-1, keepdims=True)


def test_against_the_softmax():
    probs = softmax(LOGITS)
    chosen = np.take_along_axis(probs, np.asarray(TARGETS)[..., None], -1)[..., 0]
    np.testing.assert_allclose(token_log_probs(jnp.asarray(LOGITS), TARGETS), np.log(chosen), rtol=1e-5)


def test_the_gradient_is_one_hot_minus_probabilities():
    grads = jax.grad(lambda x: token_log_probs(x, TARGETS).sum())(jnp.asarray(LOGITS))
    np.testing.assert_allclose(grads, np.eye(5)[np.asarray(TARGETS)] - softmax(LOGITS), rtol=1e-5, atol=1e-6)


def test_large_logits_do_not_overflow_and_impossible_tokens_are_impossible():
    logits = jnp.asarray([[1e4, 0.0, -jnp.inf], [3e38, 3e38, 0.0]])
    np.testing.assert_array_equal(token_log_probs(logits, jnp.asarray([2, 0], jnp.int32))[:1], [-np.inf])
    np.testing.assert_array_equal(token_log_probs(logits[:1], jnp.asarray([0], jnp.int32)), [0])


def test_bfloat16_logits_are_normalised_in_float32():
    logits = jnp.asarray(LOGITS, jnp.bfloat16)
    found = token_log_probs(logits, TARGETS)
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found, token_log_probs(logits.astype(jnp.float32), TARGETS))
