"""RMS normalisation against its formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clp_jax.nn.norms import RMSNorm

X = np.random.default_rng(0).normal(size=(2, 3, 16)).astype(np.float32) * 5


def _norm(eps: float = 1e-6, dtype: str = "float32") -> RMSNorm:
    norm = RMSNorm(16, eps=eps, dtype=jnp.dtype(dtype))
    norm.scale[...] = jnp.linspace(-1, 2, 16, dtype=dtype)
    return norm


def _expected(x: np.ndarray, eps: float) -> np.ndarray:
    x = x.astype(np.float64)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps)


@pytest.mark.parametrize("eps", [1e-6, 0.5])
def test_formula(eps):
    np.testing.assert_allclose(
        _norm(eps)(jnp.asarray(X)), _expected(X, eps) * np.linspace(-1, 2, 16), rtol=1e-5, atol=1e-6
    )


def test_a_fresh_norm_gives_a_root_mean_square_of_one():
    y = RMSNorm(16, eps=0.0, dtype=jnp.dtype("float32"))(jnp.asarray(X))
    np.testing.assert_allclose(np.sqrt(np.mean(np.square(y), -1)), 1.0, rtol=1e-6)


def test_zeros_stay_zeros_with_a_finite_gradient():
    zeros = jnp.zeros((1, 16))
    np.testing.assert_array_equal(_norm()(zeros), zeros)
    gradient = jax.grad(lambda x: _norm(eps=1e-4)(x).sum())(zeros)
    np.testing.assert_allclose(gradient, np.linspace(-1, 2, 16)[None] / 1e-2, rtol=1e-5, atol=1e-5)


def test_bfloat16_is_normalised_in_float32():
    narrow = jnp.asarray(X, jnp.bfloat16)
    y = RMSNorm(16, eps=1e-6, dtype=jnp.dtype("bfloat16"))(narrow)
    assert y.dtype == jnp.bfloat16
    # One rounding only, at the end: the float64 result rounded to bfloat16.
    expected = jnp.asarray(_expected(np.asarray(narrow, np.float32), 1e-6).astype(np.float32), jnp.bfloat16)
    np.testing.assert_array_equal(y, expected)
