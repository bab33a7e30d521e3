"""Products of sorted rows, each with the kernel of its expert."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from clp_jax.array_types import Array, Float, Int


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def grouped_product(
    x: Float[Array, "rows I"], kernels: Float[Array, "E I O"], owned: Int[Array, "E"], block: int
) -> Float[Array, "rows O"]:
    """``y[r] = x[r] W[e]`` for the rows that expert ``e`` owns; the work does not grow with the number of experts.

    Accelerators multiply by `jax.lax.ragged_dot`. On a CPU that computes every row with every kernel, so that blocks of rows
    are multiplied one after another there.

    Args:
        x: rows sorted by expert.
        kernels: of each expert.
        owned: rows of each expert, multiples of `block`.
        block: rows in a block.

    Returns:
        The products, in the type of `x`; whatever was there in rows that nobody owns.
    """
    return jax.lax.platform_dependent(
        x, kernels, owned, cpu=functools.partial(_blocks, block=block), default=_ragged_product
    )


def _forward(x, kernels, owned, block):
    return grouped_product(x, kernels, owned, block), (x, kernels, owned)


def _backward(block, saved, dy):
    x, kernels, owned = saved
    dx, dkernels = jax.lax.platform_dependent(
        *(x, kernels, owned, dy), cpu=functools.partial(_blocks_transposed, block=block), default=_ragged_transposed
    )
    return dx, dkernels, np.zeros(owned.shape, jax.dtypes.float0)


grouped_product.defvjp(_forward, _backward)


def _ragged_product(x: Array, kernels: Array, owned: Array) -> Array:
    return jax.lax.ragged_dot(x, kernels, owned.astype(jnp.int32))


def _ragged_transposed(x: Array, kernels: Array, owned: Array, dy: Array) -> tuple[Array, Array]:
    return jax.vjp(lambda x, kernels: _ragged_product(x, kernels, owned), x, kernels)[1](dy)


def _blocks(x: Array, kernels: Array, owned: Array, *, block: int) -> Array:
    # Groups of preferences one after another: batched loops would carry copies of everything.
    @jax.custom_batching.sequential_vmap
    def product(x, kernels, owned):
        def expert(y, inputs):
            kernel, first, number = inputs

            def step(i, y):
                return _put(y, _rows(x, first, i, block) @ kernel, first, i)

            return jax.lax.fori_loop(0, number, step, y), None

        y = jnp.zeros((len(x), kernels.shape[-1]), x.dtype)
        return jax.lax.scan(expert, y, (kernels, jnp.cumsum(owned) - owned, owned // block))[0]

    return product(x, kernels, owned)


def _blocks_transposed(x: Array, kernels: Array, owned: Array, dy: Array, *, block: int) -> tuple[Array, Array]:
    @jax.custom_batching.sequential_vmap
    def transposed(x, kernels, owned, dy):
        def expert(dx, inputs):
            kernel, first, number = inputs

            def step(i, sums):
                dx, dkernel = sums
                rows = _rows(dy, first, i, block)
                product = jnp.einsum("bi,bo->io", _rows(x, first, i, block), rows, preferred_element_type=jnp.float32)
                return _put(dx, rows @ kernel.T, first, i), dkernel + product

            dx, dkernel = jax.lax.fori_loop(0, number, step, (dx, jnp.zeros(kernel.shape, jnp.float32)))
            return dx, dkernel.astype(kernels.dtype)

        return jax.lax.scan(expert, jnp.zeros_like(x), (kernels, jnp.cumsum(owned) - owned, owned // block))

    return transposed(x, kernels, owned, dy)


def _rows(x: Array, first: Array, i: Array, block: int) -> Array:
    return jax.lax.dynamic_slice_in_dim(x, first + i * block, block)


def _put(x: Array, rows: Array, first: Array, i: Array) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(x, rows, first + i * len(rows), 0)
