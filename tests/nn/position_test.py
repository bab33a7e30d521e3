"""Relative position buckets against their exact definition, in integers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from clp_jax.nn.position import RelativePositionBias, relative_position_bucket
from clp_jax.nn.visibility import Buckets, Places, position_bias

DISTANCES = np.arange(-300, 301, dtype=np.int32)


def exact_bucket(relative: int, bidirectional: bool, num_buckets: int, max_distance: int) -> int:
    """T5's bucket, logarithms replaced by powers of integers: ``e + floor((n-e) log(d/e) / log(m/e))``."""
    offset, distance = 0, max(-relative, 0)
    if bidirectional:
        num_buckets //= 2
        offset, distance = (num_buckets if relative > 0 else 0), abs(relative)
    exact = num_buckets // 2
    if distance < exact:
        return offset + distance
    steps = num_buckets - exact
    # The k-th bucket starts where (d/e)^steps >= (m/e)^k.
    further = max(k for k in range(steps) if distance**steps * exact**k >= max_distance**k * exact**steps)
    return offset + exact + further


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("num_buckets", "max_distance"), [(32, 128), (8, 20), (16, 64), (4, 10)])
def test_buckets_are_exact(bidirectional, num_buckets, max_distance, compiled):
    def bucket(relative):
        return relative_position_bucket(
            relative, bidirectional=bidirectional, num_buckets=num_buckets, max_distance=max_distance
        )

    expected = [exact_bucket(int(d), bidirectional, num_buckets, max_distance) for d in DISTANCES]
    np.testing.assert_array_equal((jax.jit(bucket) if compiled else bucket)(jnp.asarray(DISTANCES)), expected)


def test_buckets_of_t5():
    bucket = relative_position_bucket(jnp.asarray(DISTANCES), bidirectional=True, num_buckets=32, max_distance=128)
    starts = [int(-d) for d in DISTANCES[:300] if bucket[300 + d] != bucket[301 + d]]
    assert sorted(starts) == [1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 23, 32, 46, 64, 91]
    # Keys after the query have the other half, in the same steps.
    np.testing.assert_array_equal(bucket[301:], bucket[:300][::-1] + 16)


def test_the_bias_depends_on_the_distance_alone():
    table = RelativePositionBias(nnx.Rngs(0), 3, num_buckets=8, stddev=1.0, dtype=jnp.dtype("bfloat16")).embedding[...]
    buckets = Buckets(8, 20, bidirectional=False)

    def bias(queries, keys):
        def places(positions):
            return Places(positions[None], jnp.ones_like(positions)[None])

        return position_bias(buckets, table, places(queries), places(keys))

    whole = bias(jnp.arange(6), jnp.arange(6))
    assert whole.shape == (1, 3, 6, 6) and whole.dtype == jnp.float32
    for query in range(6):
        for key in range(6):
            expected = np.asarray(table, np.float32)[:, exact_bucket(key - query, False, 8, 20)]
            np.testing.assert_array_equal(whole[0, :, query, key], expected)
    # One query against all positions, as in decoding, is a row of it.
    np.testing.assert_array_equal(bias(jnp.asarray([4]), jnp.arange(6)), whole[:, :, 4:5])
