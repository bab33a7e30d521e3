"""Masked sums and means: what is hidden has no influence, not even as NaN, and gets no gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clp_jax.objectives.masking import completion_mask, masked_mean, masked_sum

X = np.asarray([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]], np.float32)
MASK = np.asarray([[1.0, 1.0, 0.0], [0.0, 0.0, 0.0]], np.float32)
HIDDEN = np.where(MASK > 0, X, np.nan)


@pytest.mark.parametrize("x", [X, HIDDEN])
def test_hidden_positions_do_not_count(x):
    x, mask = jnp.asarray(x), jnp.asarray(MASK)
    assert masked_sum(x, mask) == 3 and masked_mean(x, mask) == 1.5
    np.testing.assert_array_equal(masked_sum(x, mask, axis=-1), [3, 0])
    np.testing.assert_array_equal(masked_mean(x, mask, axis=-1), [1.5, 0])
    np.testing.assert_array_equal(masked_mean(x, mask, axis=0), [1, 2, 0])


def test_fractional_weights():
    weights = jnp.asarray([[0.5, 1.0, 0.0], [0.0, 0.25, 0.0]])
    assert masked_sum(jnp.asarray(X), weights) == 6.5
    np.testing.assert_allclose(masked_mean(jnp.asarray(X), weights), 6.5 / 1.75, rtol=1e-6)


@pytest.mark.parametrize("function", [masked_sum, masked_mean])
def test_gradients_are_finite_and_zero_where_hidden(function):
    grads = jax.grad(lambda x: function(x, jnp.asarray(MASK)))(jnp.asarray(HIDDEN))
    np.testing.assert_array_equal(grads, MASK / (2 if function is masked_mean else 1))


def test_a_completion_ends_with_its_first_end_of_sequence():
    tokens = jnp.asarray([[5, 1, 0, 0], [5, 6, 7, 8], [1, 1, 5, 1], [0, 5, 1, 0]], jnp.int32)
    expected = [[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 1, 0]]
    mask = completion_mask(tokens)
    assert mask.dtype == jnp.float32
    np.testing.assert_array_equal(mask, expected)
    np.testing.assert_array_equal(completion_mask(tokens, eos_id=6)[1], [1, 1, 0, 0])


def test_a_completion_ends_with_the_first_of_several_ends_or_never():
    tokens = jnp.asarray([[5, 1, 0, 6], [5, 6, 1, 1], [6, 6, 6, 6], [5, 0, 0, 7]], jnp.int32)
    expected = [[1, 1, 0, 0], [1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1]]
    np.testing.assert_array_equal(completion_mask(tokens, eos_id=(1, 6)), expected)
    np.testing.assert_array_equal(completion_mask(tokens, eos_id=()), np.ones((4, 4)))
