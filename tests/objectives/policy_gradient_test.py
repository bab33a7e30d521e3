"""The surrogate's value and gradient, and that no gradient flows where none may."""

import jax
import jax.numpy as jnp
import numpy as np

from clp_jax.objectives.policy_gradient import reinforce_loss, value_loss

RNG = np.random.default_rng(4)
LOG_PROBS, ADVANTAGES = (jnp.asarray(RNG.normal(size=(3, 4)), jnp.float32) for _ in range(2))
MASK = jnp.asarray([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]], jnp.float32)


def test_the_gradient_is_the_advantage_over_rows():
    loss, _ = reinforce_loss(LOG_PROBS, ADVANTAGES, MASK)
    np.testing.assert_allclose(loss, -(LOG_PROBS * ADVANTAGES * MASK).sum() / 3, rtol=1e-6)
    grads, advantage_grads = jax.grad(lambda p, a: reinforce_loss(p, a, MASK)[0], argnums=(0, 1))(LOG_PROBS, ADVANTAGES)
    np.testing.assert_allclose(grads, -ADVANTAGES * MASK / 3, rtol=1e-6)
    np.testing.assert_array_equal(advantage_grads, 0)


def test_long_completions_are_not_weighed_down():
    """Each row's log-probabilities are summed, not averaged: the mean over rows is the policy gradient's expectation."""
    long, short = jnp.ones((1, 4)), jnp.asarray([[1.0, 0.0, 0.0, 0.0]])
    assert reinforce_loss(jnp.ones((1, 4)), jnp.ones((1, 4)), long)[0] == -4
    assert reinforce_loss(jnp.ones((1, 4)), jnp.ones((1, 4)), short)[0] == -1


def test_padding_may_hold_anything():
    poison = jnp.where(MASK > 0, 0.0, jnp.asarray(np.nan))
    clean = reinforce_loss(LOG_PROBS, ADVANTAGES, MASK)
    jax.tree.map(np.testing.assert_array_equal, reinforce_loss(LOG_PROBS + poison, ADVANTAGES + poison, MASK), clean)
    grads = jax.grad(lambda p: reinforce_loss(p, ADVANTAGES + poison, MASK)[0])(LOG_PROBS + poison)
    assert np.all(np.isfinite(grads))


def test_metrics_are_of_the_tokens_that_count():
    _, metrics = reinforce_loss(LOG_PROBS, ADVANTAGES, MASK)
    counted = np.asarray(ADVANTAGES)[np.asarray(MASK) > 0]
    np.testing.assert_allclose(metrics["advantage_mean"], counted.mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["advantage_std"], counted.std(), rtol=1e-5)


def test_values_are_regressed_on_fixed_returns():
    values, returns = LOG_PROBS, ADVANTAGES
    loss = value_loss(values, returns, MASK)
    counts, rows = MASK.sum(-1, keepdims=True), len(MASK)
    share = MASK / counts / rows  # Rows weigh the same, however many tokens count.
    np.testing.assert_allclose(loss, (np.square(values - returns) * share).sum(), rtol=1e-6)
    grads, return_grads = jax.grad(value_loss, argnums=(0, 1))(values, returns, MASK)
    np.testing.assert_allclose(grads, 2 * (values - returns) * share, rtol=1e-5)
    np.testing.assert_array_equal(return_grads, 0)
