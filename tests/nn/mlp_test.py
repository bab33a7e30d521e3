"""The feed-forward block against its formula in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from clp_jax.nn.mlp import MLP

X = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)


def _mlp(activation: str, gated: bool, dropout_rate: float = 0.0) -> MLP:
    return MLP(
        nnx.Rngs(0), 4, 6, activation=activation, gated=gated, dropout_rate=dropout_rate, dtype=jnp.dtype("float32")
    )


def _kernel(layer) -> np.ndarray:
    return np.asarray(layer.kernel[...], np.float64)


ACTIVATIONS = {
    "relu": lambda x: np.maximum(x, 0),
    "gelu": lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gated", [True, False])
def test_formula(activation, gated):
    mlp, act = _mlp(activation, gated), ACTIVATIONS[activation]
    hidden = act(X @ _kernel(mlp.wi_0)) * (X @ _kernel(mlp.wi_1)) if gated else act(X @ _kernel(mlp.wi))
    np.testing.assert_allclose(mlp(jnp.asarray(X)), hidden @ _kernel(mlp.wo), rtol=1e-5, atol=1e-6)


def test_dropout_needs_a_key_and_is_decided_by_it():
    mlp, plain = _mlp("relu", False, dropout_rate=0.5), _mlp("relu", False)
    np.testing.assert_array_equal(mlp(jnp.asarray(X)), plain(jnp.asarray(X)))
    dropped = mlp(jnp.asarray(X), jax.random.key(1))
    assert np.any(dropped != mlp(jnp.asarray(X)))
    np.testing.assert_array_equal(dropped, mlp(jnp.asarray(X), jax.random.key(1)))
    assert np.any(dropped != mlp(jnp.asarray(X), jax.random.key(2)))


def test_an_ungated_block_has_two_layers_only():
    assert {str(path[0]) for path, _ in nnx.to_flat_state(nnx.state(_mlp("gelu", False)))} == {"wi", "wo"}
    assert {str(path[0]) for path, _ in nnx.to_flat_state(nnx.state(_mlp("gelu", True)))} == {"wi_0", "wi_1", "wo"}
