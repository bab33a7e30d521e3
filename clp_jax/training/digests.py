"""Checksums of arrays, made on the device: two computations that should be the same to the bit have the same."""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from clp_jax.array_types import Array, PyTree
from clp_jax.partitioning import active_mesh

_BITS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}
# Slices that XLA's CPU backend adds in one pass; 8 and 32 are slower.
_SLICES = 16


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
        total += jnp.uint32(2 * place + 1) * (
            _sum_in_slices(leaf) if _is_lone_cpu() else _bits(leaf).sum(dtype=jnp.uint32)
        )
    return total


def _bits(x: Array) -> Array:
    return jax.lax.bitcast_convert_type(x, _BITS.get(x.dtype.itemsize, jnp.uint32)).astype(jnp.uint32)


def _sum_in_slices(x: Array) -> Array:
    """The sum of the bits. A CPU would write them all to fresh memory before it sums them, and take ten times as long."""
    flat = x.reshape(-1)
    size = flat.size // _SLICES
    parts = [_bits(flat[i * size : (i + 1) * size]) for i in range(_SLICES)]
    rest = _bits(flat[_SLICES * size :])
    return sum(parts[1:], parts[0]).sum(dtype=jnp.uint32) + rest.sum(dtype=jnp.uint32)


def _is_lone_cpu() -> bool:
    """Whether one CPU device computes. Others sum as they read, and lay arrays out in other ways than flat."""
    mesh = active_mesh()
    if mesh is None:
        return jax.default_backend() == "cpu"
    return isinstance(mesh, Mesh) and mesh.size == 1 and mesh.devices.flat[0].platform == "cpu"
