"""The estimate of the KL divergence: unbiased by enumeration, and masked."""

import jax
import jax.numpy as jnp
import numpy as np

from clp_jax.objectives.kl import per_token_kl

RNG = np.random.default_rng(2)
LOG_P, LOG_Q = (jax.nn.log_softmax(jnp.asarray(RNG.normal(size=(2, 6)), jnp.float32)) for _ in range(2))
ONES = jnp.ones((2, 6))


def test_it_is_unbiased():
    """Every token is sampled once, weighted by its probability."""
    p, q = np.exp(np.asarray(LOG_P, np.float64)), np.exp(np.asarray(LOG_Q, np.float64))
    values = per_token_kl(LOG_P, LOG_Q, ONES)
    np.testing.assert_allclose((p * values).sum(-1), (p * np.log(p / q)).sum(-1), rtol=1e-5)
    assert np.any(values < 0)


def test_what_is_masked_is_zero_whatever_it_is():
    mask = jnp.asarray([[1, 1, 1, 0, 0, 0], [0] * 6], jnp.float32)
    hidden = jnp.where(mask > 0, LOG_P, jnp.asarray(np.nan))
    np.testing.assert_array_equal(per_token_kl(hidden, LOG_Q, mask), per_token_kl(LOG_P, LOG_Q, ONES) * mask)
    grads = jax.grad(lambda x: per_token_kl(x, LOG_Q, mask).sum())(hidden)
    assert np.all(np.isfinite(grads)) and not np.any(np.asarray(grads) * (1 - np.asarray(mask)))
