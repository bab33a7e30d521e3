"""Strategies against the distributions they stand for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clp_jax.sampling.generate import row_keys
from clp_jax.sampling.strategies import Greedy, Sampling, largest

PROBS = np.asarray([0.05, 0.4, 0.15, 0.3, 0.1])
LOGITS = jnp.asarray(np.log(PROBS)[None] + 2.0, jnp.float32)  # Unnormalised, as a model's are.


def filtered(strategy: Sampling) -> np.ndarray:
    return np.asarray(jax.nn.softmax(strategy.filter(LOGITS), axis=-1))[0]


def normalised(weights) -> np.ndarray:
    return np.asarray(weights) / np.sum(weights)


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        (Sampling(), PROBS),
        (Sampling(temperature=0.5), normalised(PROBS**2)),
        (Sampling(temperature=2.0), normalised(PROBS**0.5)),
        (Sampling(top_k=1), [0, 1, 0, 0, 0]),
        (Sampling(top_k=3), normalised([0, 0.4, 0.15, 0.3, 0])),
        (Sampling(top_k=5), PROBS),
        (Sampling(top_k=50), PROBS),
        (Sampling(top_p=0.3), [0, 1, 0, 0, 0]),
        (Sampling(top_p=0.45), normalised([0, 0.4, 0, 0.3, 0])),
        (Sampling(top_p=0.9), normalised([0, 0.4, 0.15, 0.3, 0.1])),
        (Sampling(min_p=0.3), normalised([0, 0.4, 0.15, 0.3, 0])),
        (Sampling(min_p=1.0), [0, 1, 0, 0, 0]),
        # The temperature comes first, then top-k; top-p and min-p see what is left, renormalised.
        (Sampling(top_k=3, top_p=0.5), normalised([0, 0.4, 0, 0.3, 0])),
        (Sampling(temperature=0.5, min_p=0.3), normalised([0, 0.16, 0, 0.09, 0])),
    ],
    ids=repr,
)
def test_filters(strategy, expected):
    np.testing.assert_allclose(filtered(strategy), expected, rtol=1e-5, atol=1e-7)


def test_equal_logits_are_kept_together():
    tied = jnp.asarray([[1.0, 1.0, 0.0, 1.0]])
    kept = jnp.isfinite(Sampling(top_k=2).filter(tied))
    np.testing.assert_array_equal(kept, [[True, True, False, True]])


@pytest.mark.parametrize("strategy", [Sampling(), Sampling(temperature=0.7, top_k=4), Sampling(top_p=0.9)], ids=repr)
def test_frequencies_are_the_filtered_distribution(strategy):
    count = 20_000
    keys = row_keys(jax.random.key(0), count)
    chosen = np.asarray(jax.jit(strategy)(keys, jnp.broadcast_to(LOGITS, (count, 5))))
    expected = filtered(strategy)
    frequencies = np.bincount(chosen, minlength=5) / count
    assert np.all(np.abs(frequencies - expected) <= 5 * np.sqrt(expected * (1 - expected) / count))
    assert not np.any(frequencies[expected == 0])


def test_a_row_depends_on_its_key_and_logits_alone():
    keys = row_keys(jax.random.key(1), 50)
    logits = jax.random.normal(jax.random.key(2), (50, 5))
    sample = Sampling(top_k=4)
    whole = sample(keys, logits)
    np.testing.assert_array_equal(sample(keys[20:23], logits[20:23]), whole[20:23])
    fewer = row_keys(jax.random.key(1), 7)
    np.testing.assert_array_equal(jax.random.key_data(fewer), jax.random.key_data(keys)[:7])


def test_greedy_takes_the_largest_and_the_first_of_equals():
    logits = jnp.asarray([[0.0, 3.0, 3.0], [5.0, -1.0, 2.0], [-jnp.inf, -jnp.inf, -9.0]])
    np.testing.assert_array_equal(Greedy()(row_keys(jax.random.key(0), 3), logits), [1, 0, 2])


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("temperature", 0.0, "temperature is 0.0: expected a positive number .or use greedy"),
        ("temperature", float("nan"), "temperature is nan"),
        ("top_k", -1, "top_k is -1: expected 0 .all tokens. or more"),
        ("top_p", 0.0, r"top_p is 0.0: expected a number in \(0, 1\]"),
        ("top_p", 1.1, "top_p is 1.1"),
        ("min_p", -0.1, r"min_p is -0.1: expected a number in \[0, 1\]"),
        ("min_p", 1.1, "min_p is 1.1"),
    ],
)
def test_settings_outside_their_range_are_refused(name, value, message):
    with pytest.raises(ValueError, match=rf"Sampling\.{message}"):
        Sampling(**{name: value})


def test_largest_is_the_first_argmax():
    x = jax.random.normal(jax.random.key(0), (50, 7)).round(0)  # Full of ties.
    x = x.at[0].set(-jnp.inf).at[1, 3].set(jnp.inf)
    np.testing.assert_array_equal(jax.jit(largest)(x), np.argmax(np.asarray(x), axis=-1))
    assert int(largest(jnp.asarray([1.0, jnp.nan, 2.0]))) == 2  # A token of the vocabulary still.
