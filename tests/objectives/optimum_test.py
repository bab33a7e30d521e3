"""Closed forms: the optimum, the λ(α) identity, soft values, and the tree on which token-level mixing fails."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clp_jax.objectives import optimum
from clp_jax.preferences import kl_beta, kl_mixing_weight

# Table T3: the first token is A, B or C, the second one of two leaves; (R1, R2) of each completion.
TREE_REWARDS = np.asarray([[[1, 0], [0, 1]], [[0.9, 0.9]] * 2, [[0, 0]] * 2], np.float64)


@pytest.fixture(autouse=True)
def _double_precision():
    with jax.enable_x64(True):
        yield


def bandit(seed=0, completions=12, objectives=3, batch=()):
    rng = np.random.default_rng(seed)
    reference = jax.nn.log_softmax(jnp.asarray(rng.normal(size=(*batch, completions))), axis=-1)
    return reference, jnp.asarray(rng.normal(size=(*batch, completions, objectives)))


def random_tree(rng, *branches):
    levels = [rng.normal(size=branches[: depth + 1]) for depth in range(len(branches))]
    return tuple(jax.nn.log_softmax(jnp.asarray(level), axis=-1) for level in levels)


def uniform_tree(*branches):
    return tuple(jnp.full(branches[: depth + 1], -np.log(branches[depth])) for depth in range(len(branches)))


def test_the_optimum_is_the_reference_tilted_by_the_reward():
    reference, rewards = bandit(batch=(4,))
    reward = rewards @ jnp.asarray([0.2, 0.3, 0.5])
    policy = optimum.optimal_policy(reference, reward, 0.2)
    unnormalised = np.exp(reference) * np.exp(np.asarray(reward) / 0.25)  # β = .2/.8.
    np.testing.assert_allclose(np.exp(policy), unnormalised / unnormalised.sum(-1, keepdims=True), rtol=1e-13)
    np.testing.assert_allclose(float(kl_beta(0.2)), 0.25, rtol=1e-13)


def test_no_policy_is_better_than_the_optimum():
    reference, rewards = bandit()
    reward = rewards @ jnp.asarray([0.2, 0.3, 0.5])
    policy = optimum.optimal_policy(reference, reward, 0.1)
    best = optimum.optimal_value(reference, reward, 0.1)
    np.testing.assert_allclose(optimum.policy_value(policy, reference, reward, 0.1), best, rtol=1e-12)

    def value(logits):
        return optimum.policy_value(jax.nn.log_softmax(logits), reference, reward, 0.1)

    np.testing.assert_allclose(jax.grad(value)(policy), 0, atol=1e-12)
    rng = np.random.default_rng(1)
    for scale in (1e-3, 0.1, 3):
        assert value(policy + scale * rng.normal(size=policy.shape)) < best
    # What a policy misses is α KL(π ‖ π*).
    other = jax.nn.log_softmax(jnp.asarray(rng.normal(size=policy.shape)))
    missed = 0.1 * jnp.sum(jnp.exp(other) * (other - policy))
    np.testing.assert_allclose(best - value(other), missed, rtol=1e-12)


def test_without_rewards_that_count_the_optimum_is_the_reference():
    reference, rewards = bandit()
    np.testing.assert_array_equal(optimum.optimal_policy(reference, rewards[:, 0], 1.0), jax.nn.log_softmax(reference))
    np.testing.assert_allclose(optimum.optimal_value(reference, rewards[:, 0], 1.0), 0, atol=1e-15)


@pytest.mark.parametrize("step", range(11))
def test_mixing_the_experts_logits_is_optimal_among_whole_completions(step):
    reference, rewards = bandit(objectives=2)
    weights = jnp.asarray([step / 10, 1 - step / 10])
    experts = jnp.stack([optimum.optimal_policy(reference, rewards[:, k], 0.1) for k in range(2)])
    mixed = optimum.product_of_experts(experts, weights)
    np.testing.assert_allclose(mixed, optimum.optimal_policy(reference, rewards @ weights, 0.1), rtol=1e-12)


@pytest.mark.parametrize("alpha", [0.01, 0.05, 0.1, 0.3, 0.6, 0.9, 1.0])
def test_the_mixing_weight_of_alpha_is_exact(alpha):
    reference, rewards = bandit()
    weights = np.asarray([0.5, 0.2, 0.3])
    policies = [optimum.optimal_policy(reference, rewards[:, k], 0.01) for k in range(3)] + [reference]
    trained = (1 - alpha) / alpha / ((1 - 0.01) / 0.01)
    mixed = optimum.product_of_experts(jnp.stack(policies), jnp.asarray([*trained * weights, 1 - trained]))
    np.testing.assert_allclose(
        mixed, optimum.optimal_policy(reference, rewards @ jnp.asarray(weights), alpha), rtol=1e-12
    )
    np.testing.assert_allclose(kl_mixing_weight(alpha, 0.01), trained, rtol=1e-6)  # It works in float32.


def test_token_by_token_the_optimum_is_the_optimum_of_the_completions():
    rng = np.random.default_rng(2)
    reference = random_tree(rng, 3, 2, 4)
    reward = jnp.asarray(rng.normal(size=(3, 2, 4)))
    policy = optimum.optimal_token_policy(reference, reward, 0.15)
    for level in policy:
        np.testing.assert_allclose(np.exp(level).sum(-1), 1, rtol=1e-13)
    whole = optimum.sequence_log_probs(reference).ravel()
    np.testing.assert_allclose(
        optimum.sequence_log_probs(policy).ravel(), optimum.optimal_policy(whole, reward.ravel(), 0.15), rtol=1e-12
    )
    values = optimum.soft_values(reference, reward, 0.15)
    assert [value.shape for value in values] == [(), (3,), (3, 2), (3, 2, 4)]
    np.testing.assert_allclose(values[0], optimum.optimal_value(whole, reward.ravel(), 0.15), rtol=1e-12)


def test_soft_values_are_convex_in_the_weights_and_not_linear():
    rng = np.random.default_rng(3)
    for _ in range(20):
        reference, rewards = random_tree(rng, 4, 4), jnp.asarray(rng.normal(size=(4, 4, 2)))
        first, middle, last = (
            optimum.soft_values(reference, rewards @ jnp.asarray([w, 1 - w]), 0.09)[1] for w in (0.0, 0.5, 1.0)
        )
        assert np.all((first + last) / 2 - middle > 1e-6)


@pytest.mark.parametrize(
    ("beta", "best", "mixed_reward", "mixed_first"),
    [
        (0.2, 0.844, 0.714, (0.451, 0.543, 0.006)),
        (0.05, 0.900, 0.585, (0.787, 0.213, 0.000)),
        (0.01, 0.900, 0.500, (1, 0, 0)),
    ],
)
def test_token_level_mixing_fails_where_the_experts_disagree_later(beta, best, mixed_reward, mixed_first):
    reference, alpha = uniform_tree(3, 2), beta / (1 + beta)
    weights = jnp.asarray([0.5, 0.5])
    reward = jnp.asarray(TREE_REWARDS) @ weights
    optimal = optimum.optimal_token_policy(reference, reward, alpha)
    experts = [optimum.optimal_token_policy(reference, jnp.asarray(TREE_REWARDS[..., k]), alpha) for k in range(2)]
    mixed = optimum.mix_tokens(experts, weights)

    def expected(policy):
        return jnp.sum(jnp.exp(optimum.sequence_log_probs(policy)) * reward)

    np.testing.assert_allclose(expected(optimal), best, atol=5e-4)
    np.testing.assert_allclose(expected(mixed), mixed_reward, atol=5e-4)
    np.testing.assert_allclose(np.exp(mixed[0]), mixed_first, atol=5e-4)
    assert np.argmax(optimal[0]) == 1


@pytest.mark.parametrize("alpha", [0.0, -0.1, 1.5, float("nan")])
def test_the_kl_weight_must_count(alpha):
    reference, rewards = bandit()
    with pytest.raises(ValueError, match=r"alpha is .*: expected a KL weight in \(0, 1\]"):
        optimum.optimal_policy(reference, rewards[:, 0], alpha)
    with pytest.raises(ValueError, match="alpha is"):
        optimum.soft_values(uniform_tree(2), jnp.zeros(2), alpha)
