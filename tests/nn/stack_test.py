"""Stacked layers against the same layers one by one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from clp_jax.nn.linear import Linear
from clp_jax.nn.remat import REMAT_POLICIES
from clp_jax.nn.stack import cut, is_loose, scan_layers, stacked

LAYERS, WIDTH = 4, 6
X = jax.random.normal(jax.random.key(1), (3, WIDTH))
SHIFTS = jnp.arange(LAYERS, dtype=jnp.float32)


def _layer(rngs: nnx.Rngs) -> Linear:
    return Linear(rngs, WIDTH, WIDTH, axes=("embed", "mlp"), stddev=0.4, dtype=jnp.dtype("float32"))


def _stack() -> Linear:
    return stacked(_layer, LAYERS, nnx.Rngs(params=jax.random.key(0)))


def _kernels() -> np.ndarray:
    return np.asarray(_stack().kernel[...])


def _body(layer, x, shift):
    y = jnp.tanh(jnp.sin(layer(x) + shift))
    return y, y.sum()


def test_every_layer_is_initialised_by_itself():
    kernels = _kernels()
    assert kernels.shape == (LAYERS, WIDTH, WIDTH)
    assert len(np.unique(kernels)) == kernels.size
    # As that layer alone would be from its key: a copy scaled by the number of layers would not.
    keys = jax.random.split(nnx.Rngs(params=jax.random.key(0)).params(), LAYERS)
    for kernel, key in zip(kernels, keys, strict=True):
        np.testing.assert_allclose(kernel, _layer(nnx.Rngs(params=key)).kernel[...], rtol=1e-6)


def test_the_stack_has_a_logical_axis():
    assert _stack().kernel.get_metadata("logical_axes") == ("layers", "embed", "mlp")


@pytest.mark.parametrize("unroll", [None, 1, 2, LAYERS])
def test_scan_is_a_loop(unroll):
    carry, outputs = scan_layers(_stack(), _body, X, SHIFTS, unroll=unroll)
    x, expected = np.asarray(X, np.float64), []
    for number, kernel in enumerate(_kernels()):
        x = np.tanh(np.sin(x @ kernel + number))
        expected.append(x.sum())
    np.testing.assert_allclose(carry, x, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(outputs, expected, rtol=1e-5)


def test_loose_layers_one_after_another_are_the_stack():
    carry = X
    for layer, shift in zip(cut(_stack()), SHIFTS, strict=True):
        assert layer.kernel.shape == (WIDTH, WIDTH)
        carry, _ = _body(layer, carry, shift)
    np.testing.assert_allclose(carry, scan_layers(_stack(), _body, X, SHIFTS)[0], rtol=1e-6)


@pytest.mark.parametrize(
    ("unroll", "size", "loose"), [(None, 1, True), (None, 2, False), (2, 1, False), (LAYERS, 9, True)]
)
def test_layers_are_loose_where_all_are_unrolled(unroll, size, loose):
    assert is_loose(_stack(), unroll, size) == loose


def _linearised(remat: str):
    graph, state = nnx.split(_stack())

    def run(state, x):
        return scan_layers(nnx.merge(graph, state), _body, x, SHIFTS, remat=remat, unroll=1)[0].sum()

    return run, state


@pytest.mark.parametrize("remat", ["minimal", "full", "offload"])
def test_recomputing_changes_no_gradient(remat):
    expected = jax.grad(_linearised("none")[0])(_linearised("none")[1], X)
    run, state = _linearised(remat)
    gradient = jax.jit(jax.grad(run))(state, X)  # Only programs move arrays between memories.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), gradient, expected)


def test_recomputing_keeps_less_for_the_backward_pass():
    def kept(remat):
        run, state = _linearised(remat)
        return sum(x.size for x in jax.tree.leaves(jax.vjp(run, state, X)[1]))

    sizes = [kept(remat) for remat in ("none", "minimal", "full")]
    assert sizes[0] > sizes[1] > sizes[2], sizes
    assert set(REMAT_POLICIES) == {"none", "minimal", "full", "offload"}


def test_products_wait_in_the_memory_of_the_host():
    """What "minimal" keeps, and only that, goes out in the forward pass and comes back in the backward pass."""

    def placed(remat):
        run, state = _linearised(remat)
        return jax.jit(jax.grad(run)).trace(state, X).lower(lowering_platforms=("tpu",)).as_text()

    assert "pinned_host" in placed("offload") and "pinned_host" not in placed("minimal")
    run, state = _linearised("offload")
    kept = jax.eval_shape(lambda state, x: jax.vjp(run, state, x)[1], state, X)
    run, state = _linearised("minimal")
    same = jax.eval_shape(lambda state, x: jax.vjp(run, state, x)[1], state, X)
    assert sorted(leaf.shape for leaf in jax.tree.leaves(kept)) == sorted(leaf.shape for leaf in jax.tree.leaves(same))
