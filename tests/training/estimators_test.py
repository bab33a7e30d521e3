"""Advantages in closed form, what the baseline learns, and that no gradient reaches the policy through it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clp_jax.preferences import Preference
from clp_jax.training.estimators import LeaveOneOut, ValueBaseline, others_mean

RNG = np.random.default_rng(0)
ROWS, LENGTH, EMBED = 4, 3, 5
HIDDEN = jnp.asarray(RNG.normal(size=(ROWS, LENGTH, EMBED)), jnp.float32)
MASK = jnp.asarray([[1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1, 1]], jnp.float32)
RETURNS = jnp.asarray(RNG.normal(size=(ROWS, LENGTH)), jnp.float32) * MASK
PREFERENCE = Preference(jnp.asarray(RNG.dirichlet([1, 1], ROWS), jnp.float32), jnp.full((ROWS,), 0.1))


def moved(params, seed=1):
    """Parameters that are not zero anywhere, as after training."""
    keys = iter(jax.random.split(jax.random.key(seed), len(jax.tree.leaves(params))))
    return jax.tree.map(lambda p: p + 0.3 * jax.random.normal(next(keys), p.shape), params)


@functools.partial(jax.jit, static_argnames=("estimator", "num_samples"))
def estimate(estimator, params, hidden=HIDDEN, returns=RETURNS, num_samples=2):
    return estimator(params, hidden, PREFERENCE, returns, MASK, num_samples)


@functools.partial(jax.jit, static_argnames="scale")
def values_by_hand(params, scale):
    features = jnp.concatenate([PREFERENCE.weights, PREFERENCE.alpha[:, None]], axis=-1)
    x = HIDDEN @ params["states"]["kernel"] + (features @ params["features"]["kernel"])[:, None]
    return scale * (jax.nn.gelu(x) @ params["out"] + params["bias"])


def test_a_fresh_baseline_is_zero():
    estimator = ValueBaseline(hidden_dim=8)
    advantages, loss, metrics = estimate(estimator, estimator.init(jax.random.key(0), EMBED, 2))
    np.testing.assert_array_equal(advantages, RETURNS)
    mean_square = ((np.square(RETURNS) * MASK).sum(-1) / MASK.sum(-1)).mean()
    np.testing.assert_allclose(metrics["value_loss"], mean_square, rtol=1e-5)
    np.testing.assert_allclose(loss, ROWS * mean_square, rtol=1e-5)


@pytest.mark.parametrize("scale", [1.0, 10.0])
def test_the_baseline_reads_states_and_preference(scale):
    estimator = ValueBaseline(hidden_dim=8, output_scale=scale)
    params = moved(estimator.init(jax.random.key(0), EMBED, 2))
    advantages, _, metrics = estimate(estimator, params)
    values = values_by_hand(params, scale)
    np.testing.assert_allclose(advantages, (RETURNS - values) * MASK, rtol=1e-4, atol=1e-5)
    counted = np.asarray(MASK) > 0
    error = np.square(RETURNS - values)[counted].mean()
    explained = 1 - error / np.asarray(RETURNS)[counted].var()
    np.testing.assert_allclose(metrics["value_explained_variance"], explained, rtol=1e-4)


def test_the_loss_trains_the_baseline_and_nothing_else():
    estimator = ValueBaseline(hidden_dim=8)
    params = moved(estimator.init(jax.random.key(0), EMBED, 2))

    def loss(params, hidden, returns):
        return estimate(estimator, params, hidden, returns)[1]

    grads, to_policy, to_returns = jax.grad(loss, argnums=(0, 1, 2))(params, HIDDEN, RETURNS)
    expected = jax.grad(
        lambda p: jnp.sum(jnp.square(values_by_hand(p, 10.0) - RETURNS) * MASK / MASK.sum(-1, keepdims=True))
    )(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), grads, expected)
    assert not np.any(to_policy) and not np.any(to_returns)


@pytest.mark.parametrize("estimator", [ValueBaseline(hidden_dim=8), LeaveOneOut()])
def test_no_gradient_flows_through_advantages(estimator):
    params = moved(estimator.init(jax.random.key(0), EMBED, 2))
    grads = jax.grad(lambda p, h, r: jnp.sum(jnp.square(estimate(estimator, p, h, r)[0])), argnums=(0, 1, 2))(
        params, HIDDEN, RETURNS
    )
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(grads))


@pytest.mark.parametrize("estimator", [ValueBaseline(hidden_dim=8), LeaveOneOut()])
def test_padding_has_no_advantage(estimator):
    params = moved(estimator.init(jax.random.key(0), EMBED, 2))
    hidden = jnp.where(MASK[..., None] > 0, HIDDEN, 1e3)  # States behind the end are arbitrary.
    advantages, loss, _ = estimate(estimator, params, hidden)
    np.testing.assert_array_equal(np.asarray(advantages) * (1 - np.asarray(MASK)), 0)
    np.testing.assert_array_equal(advantages, estimate(estimator, params)[0])
    np.testing.assert_array_equal(loss, estimate(estimator, params)[1])


def test_leaving_one_out_compares_with_the_other_samples_of_the_prompt():
    advantages, loss, metrics = estimate(LeaveOneOut(), LeaveOneOut().init(jax.random.key(0), EMBED, 2))
    other = np.asarray(RETURNS)[[1, 0, 3, 2], 0]
    np.testing.assert_allclose(advantages, (RETURNS - other[:, None]) * MASK, rtol=1e-6)
    assert loss == 0 and metrics == {}
    several = estimate(LeaveOneOut(), {}, num_samples=4)[0]
    whole = np.asarray(RETURNS)[:, 0]
    np.testing.assert_allclose(several, (RETURNS - (whole.sum() - whole)[:, None] / 3) * MASK, rtol=1e-5, atol=1e-6)


def test_leaving_one_out_needs_several_samples():
    with pytest.raises(ValueError, match="num_samples is 1, expected >= 2"):
        estimate(LeaveOneOut(), {}, num_samples=1)


@pytest.mark.parametrize("settings", [{"hidden_dim": 0}, {"output_scale": 0.0}])
def test_bad_settings(settings):
    with pytest.raises(ValueError, match="expected positive numbers"):
        ValueBaseline(**settings)


def test_a_baseline_of_other_objectives_is_refused():
    estimator = ValueBaseline(hidden_dim=8)
    with pytest.raises(ValueError, match=r"'features/kernel' has shape \(4, 8\), the model's has \(3, 8\)"):
        estimate(estimator, estimator.init(jax.random.key(0), EMBED, 3))


def test_what_rows_of_one_preference_miss_together_is_taken_off():
    weights = jnp.asarray([[0.5, 0.5], [0.5, 0.5], [0.5, 0.5], [0.25, 0.75]], jnp.float32)
    preference = Preference(weights, jnp.asarray([0.1, 0.1, 0.2, 0.1]))
    # Rows 0 and 1 have each other; row 2 has another KL weight, row 3 other weights.
    np.testing.assert_array_equal(others_mean(jnp.asarray([1.0, 2.0, 4.0, 8.0]), preference), [2, 1, 0, 0])
    estimator = ValueBaseline(hidden_dim=8)
    params = estimator.init(jax.random.key(0), EMBED, 2)  # Its values are 0.
    advantages, _, _ = estimator(params, HIDDEN, preference, RETURNS, MASK, 1)
    rows = np.asarray((RETURNS * MASK).sum(-1) / MASK.sum(-1))
    np.testing.assert_allclose(advantages[0], (RETURNS[0] - rows[1]) * MASK[0], rtol=1e-5)
    np.testing.assert_allclose(advantages[3], RETURNS[3] * MASK[3], rtol=1e-5)


def test_centring_leaves_the_expected_gradient_alone():
    """Over all pairs of completions: two rows of one preference, each a Bernoulli token with one logit."""
    estimator, alone = ValueBaseline(hidden_dim=8), ValueBaseline(hidden_dim=8, centred=False)
    params = moved(estimator.init(jax.random.key(0), EMBED, 2))
    preference = Preference(jnp.full((2, 2), 0.5), jnp.full((2,), 0.1))
    mask, rewards, p = jnp.ones((2, 1)), np.asarray([0.3, -1.7]), np.asarray([0.8, 0.2])
    expected = {True: 0.0, False: 0.0}
    for i in range(2):
        for j in range(2):
            returns = jnp.asarray(rewards[[i, j]], jnp.float32)[:, None]
            score = np.asarray([(k == 0) - p[0] for k in (i, j)])  # Of log p in the logit of token 0.
            for one in (estimator, alone):
                advantages, _, _ = one(params, HIDDEN[:2, :1], preference, returns, mask, 1)
                expected[one.centred] += p[i] * p[j] * float((np.asarray(advantages)[:, 0] * score).mean())
    true = p[0] * p[1] * (rewards[0] - rewards[1])
    np.testing.assert_allclose([expected[True], expected[False]], true, rtol=1e-5)
