"""Estimates of the KL divergence: unbiased by enumeration, masked, and zero between equals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clp_jax.objectives.kl import exact_kl, per_token_kl, per_token_kl_k3

RNG = np.random.default_rng(2)
LOG_P, LOG_Q = (jax.nn.log_softmax(jnp.asarray(RNG.normal(size=(2, 6)), jnp.float32)) for _ in range(2))
ONES = jnp.ones((2, 6))


def test_the_exact_value():
    p, q = np.exp(np.asarray(LOG_P, np.float64)), np.exp(np.asarray(LOG_Q, np.float64))
    expected = (p * np.log(p / q)).sum(-1)
    np.testing.assert_allclose(exact_kl(LOG_P + 3.0, LOG_Q - 2.0), expected, rtol=1e-5)
    np.testing.assert_allclose(exact_kl(LOG_P, LOG_P), 0, atol=1e-7)


@pytest.mark.parametrize("estimate", [per_token_kl, per_token_kl_k3])
def test_estimates_are_unbiased(estimate):
    """Every token is sampled once, weighted by its probability."""
    values = estimate(LOG_P, LOG_Q, ONES)
    np.testing.assert_allclose((jnp.exp(LOG_P) * values).sum(-1), exact_kl(LOG_P, LOG_Q), rtol=1e-5)


def test_only_k3_is_never_negative():
    assert np.any(per_token_kl(LOG_P, LOG_Q, ONES) < 0)
    assert np.all(per_token_kl_k3(LOG_P, LOG_Q, ONES) > 0)
    ratio = np.exp(np.asarray(LOG_Q - LOG_P, np.float64))
    np.testing.assert_allclose(per_token_kl_k3(LOG_P, LOG_Q, ONES), ratio - 1 - np.log(ratio), rtol=1e-5)


@pytest.mark.parametrize("estimate", [per_token_kl, per_token_kl_k3])
def test_what_is_masked_is_zero_whatever_it_is(estimate):
    mask = jnp.asarray([[1, 1, 1, 0, 0, 0], [0] * 6], jnp.float32)
    hidden = jnp.where(mask > 0, LOG_P, jnp.asarray(np.nan))
    np.testing.assert_array_equal(estimate(hidden, LOG_Q, mask), estimate(LOG_P, LOG_Q, ONES) * mask)
    grads = jax.grad(lambda x: estimate(x, LOG_Q, mask).sum())(hidden)
    assert np.all(np.isfinite(grads)) and not np.any(np.asarray(grads) * (1 - np.asarray(mask)))
