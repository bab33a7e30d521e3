"""Checksums of arrays, made on the device: two computations that should be the same to the bit have the same."""

import jax
import jax.numpy as jnp

from clp_jax.array_types import Array, PyTree

_BITS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}


def digest(tree: PyTree) -> Array:
    """``uint32[]`` of all bits of a tree; pure, for use inside `jit`.

    The bits of each element as a whole number, summed modulo 2^32, times an odd number for each array. Sums of whole
    numbers do not depend on their order, so the layout does not matter. Any single bit that is different makes another digest:
    it changes the sum by a power of two, and an odd number times that is not 0.

    Args:
        tree: arrays of numbers.
    """
    total = jnp.zeros((), jnp.uint32)
    for place, leaf in enumerate(jax.tree.leaves(tree)):
        bits = jax.lax.bitcast_convert_type(leaf, _BITS.get(leaf.dtype.itemsize, jnp.uint32))
        total += jnp.uint32(2 * place + 1) * bits.astype(jnp.uint32).sum(dtype=jnp.uint32)
    return total
