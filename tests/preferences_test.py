"""Preferences: samplers, lattices, KL weights, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clp_jax import preferences


def test_dirichlet_draws_points_of_the_simplex_with_the_right_moments():
    draws = preferences.Dirichlet(num_objectives=3, concentration=2.0)(jax.random.key(0), 20_000).weights
    np.testing.assert_allclose(draws.sum(-1), 1.0, atol=1e-5)
    assert float(draws.min()) >= 0
    # Var of one coordinate of a symmetric Dirichlet: (1/K)(1-1/K)/(K a + 1).
    np.testing.assert_allclose(draws.mean(0), 1 / 3, atol=0.01)
    np.testing.assert_allclose(draws.var(0), (1 / 3) * (2 / 3) / 7, rtol=0.05)


def test_small_concentration_is_closer_to_the_corners():
    sharp = preferences.Dirichlet(2, concentration=0.1)(jax.random.key(0), 1000).weights
    even = preferences.Dirichlet(2, concentration=10.0)(jax.random.key(0), 1000).weights
    assert float(sharp.max(-1).mean()) > 0.9 > 0.7 > float(even.max(-1).mean())


def test_samplers_are_functions_of_the_key():
    sampler = preferences.Dirichlet(2, alpha=preferences.AlphaRange(0.01, 0.5))
    first, again = sampler(jax.random.key(3), 5), sampler(jax.random.key(3), 5)
    np.testing.assert_array_equal(first.weights, again.weights)
    np.testing.assert_array_equal(first.alpha, again.alpha)
    assert not np.array_equal(first.weights, sampler(jax.random.key(4), 5).weights)


def test_alpha_range_covers_its_range():
    alpha = preferences.AlphaRange(0.1, 0.3)(jax.random.key(0), 5000)
    assert 0.1 <= float(alpha.min()) < 0.11 and 0.29 < float(alpha.max()) <= 0.3


def test_lattice_enumerates_the_simplex():
    lattice = preferences.simplex_lattice(3, 4)
    assert lattice.shape == (15, 3)
    np.testing.assert_array_equal(lattice.sum(-1), 1.0)
    assert len({tuple(row) for row in lattice.tolist()}) == 15
    np.testing.assert_array_equal(preferences.simplex_grid(11)[:, 1], np.linspace(1, 0, 11, dtype=np.float32))
    np.testing.assert_array_equal(preferences.simplex_lattice(1, 5), [[1.0]])


def test_corners_in_order_and_a_fixed_preference():
    draws = preferences.corner_sampler(3, alpha=0.2)(jax.random.key(0), 6)
    np.testing.assert_array_equal(draws.weights, np.tile(np.eye(3), (2, 1)))
    np.testing.assert_array_equal(draws.alpha, np.full(6, 0.2, np.float32))
    np.testing.assert_array_equal(preferences.fixed([0.25, 0.75])(jax.random.key(9), 2).weights, [[0.25, 0.75]] * 2)
    with pytest.raises(ValueError, match="multiple"):
        preferences.corner_sampler(3)(jax.random.key(0), 4)


def test_table_draws_every_row():
    sampler = preferences.Table(weights=((1, 0), (0.5, 0.5), (0, 1)))
    drawn = sampler(jax.random.key(0), 300).weights[:, 0]
    assert sorted(set(np.asarray(drawn).tolist())) == [0.0, 0.5, 1.0]


def test_kl_mixing_weight_is_the_ratio_of_betas():
    alphas = np.array([0.01, 0.03, 0.1, 0.3, 0.9], np.float32)
    expected = np.asarray(preferences.kl_beta(0.01)) / np.asarray(preferences.kl_beta(alphas))
    np.testing.assert_allclose(preferences.kl_mixing_weight(alphas, 0.01), expected, rtol=1e-6)
    assert float(preferences.kl_mixing_weight(1.0, 0.01)) == 0.0
    np.testing.assert_allclose(preferences.kl_mixing_weight(0.01, 0.01), 1.0, rtol=1e-6)
    with pytest.raises(ValueError, match="alpha_min"):
        preferences.kl_mixing_weight(0.5, 0.0)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([0.5, 0.6], "sum to 1.1.*did you mean 0.4545,0.5455"),
        ([-0.5, 1.5], "negative"),
        ([float("nan"), 1.0], "finite"),
        ([float("inf"), 0.0], "finite"),
        ([1.0, 0.0, 0.0], r"3 numbers: expected 2, one per objective \(faithful, brief\)"),
        ([], "one row of weights"),
    ],
)
def test_weights_of_a_user_are_checked(weights, message):
    with pytest.raises(ValueError, match=message):
        preferences.validate_weights(weights, 2, ("faithful", "brief"))


@pytest.mark.parametrize(
    "make",
    [
        lambda: preferences.Dirichlet(0),
        lambda: preferences.Dirichlet(2, concentration=0.0),
        lambda: preferences.Dirichlet(2, alpha=1.5),
        lambda: preferences.AlphaRange(0.5, 0.1),
        lambda: preferences.Table(weights=((1.0,), (0.5, 0.5))),
        lambda: preferences.simplex_lattice(2, 0),
        lambda: preferences.simplex_grid(1),
        lambda: preferences.Preference.of([0.5, 0.5], 2.0),
    ],
)
def test_impossible_samplers_are_refused(make):
    with pytest.raises(ValueError, match="expected"):
        make()


def test_preference_is_a_pytree():
    preference = preferences.Preference.of([0.5, 0.5], 0.1)
    batched = jax.tree.map(lambda x: jnp.stack([x, x]), preference)
    assert batched.weights.shape == (2, 2) and batched.alpha.shape == (2,) and batched.num_objectives == 2
    np.testing.assert_array_equal(batched[1].weights, preference.weights)
