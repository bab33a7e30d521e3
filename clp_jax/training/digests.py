"""Checksums of arrays, made on the device: two computations that should be the same to the bit have the same."""

import jax
import jax.numpy as jnp

from clp_jax.array_types import Array, PyTree
from clp_jax.partitioning import active_mesh

_BITS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}
# Slices that XLA's CPU backend adds in one pass, of arrays that are worth it; 8 and 32 are slower.
_SLICES, _LARGE = 16, 2**16


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


def _sum_of_bits(x: Array) -> Array:
    mesh = active_mesh()
    # Slices of an array that is shared out would be of one device after another.
    if x.size < _LARGE or (mesh is not None and mesh.size > 1):
        return _whole(x)
    return jax.lax.platform_dependent(x, cpu=_in_slices, default=_whole)


def _whole(x: Array) -> Array:
    return _bits(x).sum(dtype=jnp.uint32)


def _in_slices(x: Array) -> Array:
    """The same sum. A CPU would write all bits to fresh memory before it adds them up, which takes ten times as long."""
    flat = x.reshape(-1)
    size = flat.size // _SLICES
    slices = [_bits(flat[i * size : (i + 1) * size]) for i in range(_SLICES)]
    return sum(slices[1:], slices[0]).sum(dtype=jnp.uint32) + _whole(flat[_SLICES * size :])


def _bits(x: Array) -> Array:
    return jax.lax.bitcast_convert_type(x, _BITS.get(x.dtype.itemsize, jnp.uint32)).astype(jnp.uint32)
