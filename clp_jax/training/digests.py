"""Checksums of arrays, made on the device: two computations that should be the same to the bit have the same."""

import jax
import jax.numpy as jnp

from clp_jax.array_types import Array, PyTree
from clp_jax.partitioning import active_mesh

_BITS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}
# Elements that a CPU takes of a large array at a time.
_AT_ONCE = 2**16


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
        total += jnp.uint32(2 * place + 1) * _sum_of_bits(leaf)
    return total


def _sum_of_bits(leaf: Array) -> Array:
    mesh = active_mesh()
    # Parts of an array that is shared would be of one device after another.
    if leaf.dtype.itemsize != 4 or leaf.size < 16 * _AT_ONCE or (mesh is not None and mesh.size > 1):
        return _whole(leaf)
    return jax.lax.platform_dependent(leaf, cpu=_by_parts, default=_whole)


def _whole(leaf: Array) -> Array:
    bits = jax.lax.bitcast_convert_type(leaf, _BITS.get(leaf.dtype.itemsize, jnp.uint32))
    return bits.astype(jnp.uint32).sum(dtype=jnp.uint32)


def _by_parts(leaf: Array) -> Array:
    """The same sum. A CPU would write out the bits of the whole array before it adds them up, which costs more than adding."""
    flat, parts = leaf.reshape(-1), leaf.size // _AT_ONCE

    def add(part: Array, sums: Array) -> Array:
        some = jax.lax.dynamic_slice_in_dim(flat, part * _AT_ONCE, _AT_ONCE)
        return sums + jax.lax.bitcast_convert_type(some, jnp.uint32)

    sums = jax.lax.fori_loop(0, parts, add, jnp.zeros((_AT_ONCE,), jnp.uint32))
    return _whole(sums) + _whole(flat[parts * _AT_ONCE :])
