"""Returns to go against a loop over tokens; the leave-one-out baseline against the others' mean."""

import jax.numpy as jnp
import numpy as np
import pytest

from clp_jax.objectives.advantages import leave_one_out, return_to_go, scalarize

RNG = np.random.default_rng(3)


def test_scalarised_rewards_are_the_reward_part_of_the_objective():
    rewards, weights = RNG.normal(size=(4, 3)), RNG.dirichlet([1, 1, 1], 4)
    alpha = np.asarray([0.0, 0.1, 0.5, 1.0])
    found = scalarize(*(jnp.asarray(x, jnp.float32) for x in (rewards, weights, alpha)))
    np.testing.assert_allclose(found, (1 - alpha) * (rewards * weights).sum(-1), rtol=1e-5)
    assert found[3] == 0


def test_returns_to_go_count_the_kl_from_here_on():
    kl, reward, alpha = RNG.normal(size=(3, 5)), RNG.normal(size=3), np.asarray([0.0, 0.1, 1.0])
    mask = np.asarray([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]], np.float32)
    expected = np.zeros((3, 5))
    for b in range(3):
        for s in range(int(mask[b].sum())):
            expected[b, s] = reward[b] - alpha[b] * sum(kl[b, t] for t in range(s, int(mask[b].sum())))
    poisoned = np.where(mask > 0, kl, np.nan)
    for padding in (kl, poisoned):
        found = return_to_go(*(jnp.asarray(x, jnp.float32) for x in (reward, padding, alpha, mask)))
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_leave_one_out():
    returns = RNG.normal(size=(3, 4)).astype(np.float32)
    expected = [[row[i] - np.delete(row, i).mean() for i in range(4)] for row in returns]
    np.testing.assert_allclose(leave_one_out(jnp.asarray(returns)), expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(leave_one_out(jnp.asarray(returns)).sum(-1), 0, atol=1e-6)
    np.testing.assert_array_equal(leave_one_out(jnp.full((2, 3), 7.0)), 0)


def test_one_sample_can_not_be_left_out():
    with pytest.raises(ValueError, match="1 samples of a prompt, expected at least 2"):
        leave_one_out(jnp.ones((3, 1)))
