"""Digests: equal for equal bits whatever the layout, different for any single bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clp_jax.partitioning import Rules, make_mesh, use_mesh
from clp_jax.training.digests import digest


def expected(*arrays):
    total = 0
    for place, array in enumerate(arrays):
        bits = np.asarray(array).view({1: np.uint8, 2: np.uint16, 4: np.uint32}[array.dtype.itemsize])
        total += (2 * place + 1) * int(bits.astype(np.uint64).sum())
    return total % 2**32


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int8, jnp.int32])
def test_it_is_the_sum_of_the_bits(dtype):
    rng = np.random.default_rng(0)
    tree = [
        jnp.asarray(rng.normal(size=shape) * 50, dtype) for shape in ((3, 5), (), (7,), (2, 5, 31), (4, 64), (0, 3))
    ]
    assert int(jax.jit(digest)(tree)) == expected(*tree)
    with use_mesh(make_mesh(num_devices=1), Rules()):
        assert int(jax.jit(lambda tree: digest(tree))(tree)) == expected(*tree)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.int32, jnp.bfloat16])
def test_large_arrays_are_summed_in_slices(dtype):
    """Of any shape: there may be a rest. NaN with a payload, infinities and -0 are bits like others."""
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**32, (3, 1031, 353), np.uint32)
    tree = [jnp.asarray(rng.normal(size=(1025, 1024)), dtype), jax.lax.bitcast_convert_type(bits, jnp.float32)]
    program = jax.jit(digest).lower(tree).compile()
    assert int(program(tree)) == expected(*tree)
    if dtype != jnp.bfloat16:  # Bits are not written before they are summed.
        assert program.memory_analysis().temp_size_in_bytes < tree[0].nbytes / 4


def test_every_single_bit_counts():
    tree = {"a": jnp.linspace(-1, 1, 6), "b": jnp.ones((2, 2), jnp.bfloat16)}
    whole = int(digest(tree))
    seen = {whole}
    for name, unsigned in (("a", np.uint32), ("b", np.uint16)):
        plain = np.asarray(tree[name])
        for place in range(plain.size):
            for bit in range(8 * plain.dtype.itemsize):
                flipped = plain.copy()
                flipped.view(unsigned).reshape(-1)[place] ^= unsigned(1 << bit)
                found = expected(*{**tree, name: flipped}.values())
                assert found != whole
                seen.add(found)
    assert len(seen) > 2
    flipped = np.asarray(tree["a"]).copy()
    flipped.view(np.uint32)[3] ^= 1
    assert int(digest(tree | {"a": jnp.asarray(flipped)})) == expected(flipped, tree["b"]) != whole
