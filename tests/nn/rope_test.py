"""Rotary positions: what rotation means, and the frequencies of each way to stretch them."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from clp_jax.nn.rope import LinearScaling, Llama3Scaling, Rope, YarnScaling, rotate, rotation

RNG = np.random.default_rng(0)


def test_a_pair_turns_by_position_times_frequency():
    """Complex numbers say the same: the pair ``(x[i], x[i+H/2])`` times ``exp(i p f)``."""
    x = RNG.normal(size=(2, 3, 2, 8)).astype(np.float32)
    positions = np.asarray([[0, 5, 100], [7, 8, 9]])
    out = np.asarray(rotate(jnp.asarray(x), rotation(Rope(theta=50.0), 8, jnp.asarray(positions))))
    frequencies = 50.0 ** (-np.arange(4) / 4)
    turned = (x[..., :4] + 1j * x[..., 4:]) * np.exp(1j * positions[:, :, None, None] * frequencies)
    np.testing.assert_allclose(out[..., :4], turned.real, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(out[..., 4:], turned.imag, rtol=1e-4, atol=1e-4)


def test_products_depend_on_the_distance_alone():
    q, k = (jnp.asarray(RNG.normal(size=(1, 1, 1, 16)), jnp.float32) for _ in range(2))

    def product(i, j):
        turn = [rotation(Rope(), 16, jnp.asarray([[p]])) for p in (i, j)]
        return float(jnp.sum(rotate(q, turn[0]) * rotate(k, turn[1])))

    assert product(3, 1) == pytest.approx(product(103, 101), rel=1e-4)
    assert product(3, 1) != pytest.approx(product(3, 2), rel=1e-2)


def test_a_fraction_of_the_features_is_rotated():
    x = jnp.asarray(RNG.normal(size=(1, 2, 1, 8)), jnp.float32)
    out = rotate(x, rotation(Rope(fraction=0.5), 8, jnp.asarray([[4, 9]])))
    np.testing.assert_array_equal(out[..., 4:], x[..., 4:])
    np.testing.assert_array_equal(out[..., :4], rotate(x[..., :4], rotation(Rope(), 4, jnp.asarray([[4, 9]]))))


def test_linear_scaling_divides_positions():
    scaled = rotation(Rope(scaling=LinearScaling(4.0)), 8, jnp.asarray([[40]]))
    np.testing.assert_allclose(scaled, rotation(Rope(), 8, jnp.asarray([[10]])), rtol=1e-6, atol=1e-6)


def test_llama3_keeps_fast_rotations_and_divides_slow_ones():
    plain = Rope(theta=500000.0).frequencies(128)
    scaled = Rope(theta=500000.0, scaling=Llama3Scaling(8.0)).frequencies(128)
    turns = 8192 * plain / (2 * math.pi)
    np.testing.assert_array_equal(scaled[turns > 4], plain[turns > 4])
    np.testing.assert_allclose(scaled[turns < 1], plain[turns < 1] / 8, rtol=1e-6)
    between = (turns >= 1) & (turns <= 4)
    share = (turns[between] - 1) / 3
    np.testing.assert_allclose(scaled[between], plain[between] * (share + (1 - share) / 8), rtol=1e-6)
    assert between.any()


def test_yarn_interpolates_by_turns_and_warms_up():
    rope = Rope(scaling=YarnScaling(factor=4.0, original_length=64))
    plain, scaled = Rope().frequencies(64), rope.frequencies(64)
    turns = 64 * plain / (2 * math.pi)
    np.testing.assert_allclose(scaled[turns < 0.5], plain[turns < 0.5] / 4, rtol=1e-6)
    assert np.all(scaled <= plain * (1 + 1e-6)) and np.all(scaled >= plain / 4 * (1 - 1e-6)) and scaled[0] == plain[0]
    assert rope.magnitude == pytest.approx(0.1 * math.log(4) + 1)
    norm = np.linalg.norm(rotate(jnp.ones((1, 1, 1, 64)), rotation(rope, 64, jnp.asarray([[5]]))))
    assert norm == pytest.approx(8 * rope.magnitude, rel=1e-5)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (dict(theta=1.0), "Rope.theta is 1.0: expected a number above 1"),
        (dict(fraction=0.0), "Rope.fraction is 0.0: expected a number in"),
        (dict(scaling=LinearScaling(0.5)), "Rope.scaling.factor is 0.5: expected at least 1"),
    ],
)
def test_bad_settings(settings, says):
    with pytest.raises(ValueError, match=says):
        Rope(**settings)


def test_heads_that_cannot_be_rotated():
    with pytest.raises(ValueError, match="turn 2.5 of 10 features of a head: expected an even number"):
        Rope(fraction=0.25).check(10)
