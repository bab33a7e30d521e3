"""Projections and dropout."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from clp_jax.nn.linear import Linear, dropout, normal_parameter, parameter
from clp_jax.partitioning import Rules, make_mesh, use_mesh

X = jax.random.normal(jax.random.key(0), (2, 3, 4))


def _linear(seed: int = 0) -> Linear:
    return Linear(nnx.Rngs(seed), 4, 6, axes=("embed", "mlp"), stddev=0.5, dtype=jnp.dtype("float32"))


def test_linear_is_a_matrix_product_on_the_last_dimension():
    layer = _linear()
    expected = np.asarray(X, np.float64).reshape(6, 4) @ np.asarray(layer.kernel[...], np.float64)
    np.testing.assert_allclose(layer(X), expected.reshape(2, 3, 6), rtol=1e-5, atol=1e-6)


def test_linear_computes_in_the_type_of_its_input():
    layer = _linear()
    assert layer(X).dtype == jnp.float32 and layer.kernel[...].dtype == jnp.float32
    narrow = X.astype(jnp.bfloat16)
    np.testing.assert_array_equal(layer(narrow), narrow @ layer.kernel[...].astype(jnp.bfloat16))
    assert layer(narrow).dtype == jnp.bfloat16


def test_sharded_positions_are_not_merged_with_the_batch():
    layer = _linear()
    with use_mesh(make_mesh(devices=jax.devices()[:1]), Rules((("batch", "data"), ("length", "fsdp")))):
        assert "reshape" not in str(jax.make_jaxpr(lambda x: layer(x))(X))
        np.testing.assert_allclose(layer(X), _linear()(X), rtol=1e-6)
    assert "reshape" in str(jax.make_jaxpr(lambda x: layer(x))(X))


def test_parameters_carry_one_name_for_each_dimension():
    assert _linear().kernel.get_metadata("logical_axes") == ("embed", "mlp")
    with pytest.raises(ValueError, match=r"shape \(2, 3\) has 1 logical axes \('embed',\)"):
        parameter(jnp.zeros((2, 3)), ("embed",))


def test_initialisation_has_the_standard_deviation_asked_for():
    values = np.asarray(normal_parameter(nnx.Rngs(0), (200, 500), ("embed", "mlp"), 0.25, jnp.dtype("float32"))[...])
    # Five standard errors of the mean and of the standard deviation of 100,000 draws.
    assert abs(values.mean()) < 5 * 0.25 / np.sqrt(values.size)
    assert abs(values.std() / 0.25 - 1) < 5 / np.sqrt(2 * values.size)


@pytest.mark.parametrize(("rate", "key"), [(0.5, None), (0.0, jax.random.key(1))])
def test_dropout_is_off_without_a_key_or_a_rate(rate, key):
    assert dropout(X, rate, key) is X


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_dropout_keeps_the_mean(rate):
    size = 40_000
    dropped = np.asarray(dropout(jnp.full((size,), 3.0), rate, jax.random.key(2)))
    kept = dropped != 0
    np.testing.assert_array_equal(dropped[kept], np.float32(3.0) / np.float32(1 - rate))
    # The number kept is binomial, so that the mean is 3 within five standard errors.
    assert abs(kept.mean() - (1 - rate)) < 5 * np.sqrt(rate * (1 - rate) / size)


def test_dropout_is_decided_by_key_and_salt():
    key, ones = jax.random.key(3), jnp.ones((64,))
    first = np.asarray(dropout(ones, 0.5, key, salt=1))
    np.testing.assert_array_equal(first, dropout(ones, 0.5, key, salt=1))
    assert np.any(first != dropout(ones, 0.5, key, salt=2))
    assert np.any(first != dropout(ones, 0.5, jax.random.key(4), salt=1))


def test_dropout_passes_gradients_where_it_passes_values():
    key, ones = jax.random.key(5), jnp.ones((64,))
    gradient = jax.grad(lambda x: dropout(x, 0.25, key).sum())(ones)
    np.testing.assert_array_equal(gradient, dropout(ones, 0.25, key))


def test_dropout_keeps_the_type():
    assert dropout(X.astype(jnp.bfloat16), 0.5, jax.random.key(6)).dtype == jnp.bfloat16
