"""T5's relative position bias (arXiv 1910.10683, section 2.1)."""

import jax.numpy as jnp
import numpy as np
from flax import nnx

from clp_jax.array_types import Array, Int
from clp_jax.nn.linear import normal_parameter


def relative_position_bucket(
    relative_position: Int[Array, "*shape"], *, bidirectional: bool, num_buckets: int, max_distance: int
) -> Int[Array, "*shape"]:
    """The bucket of a distance: exact up to half the buckets, then logarithmic up to `max_distance`.

    Args:
        relative_position: key position minus query position.
        bidirectional: half the buckets are for keys after the query; otherwise those share bucket 0.
        num_buckets: buckets in all.
        max_distance: distances from here on share the last bucket.

    Returns:
        Numbers in ``[0, num_buckets)``.
    """
    bucket = jnp.zeros_like(relative_position)
    distance = -relative_position
    if bidirectional:
        num_buckets //= 2
        bucket = bucket + (distance < 0).astype(jnp.int32) * num_buckets
        distance = jnp.abs(distance)
    else:
        distance = jnp.maximum(distance, 0)
    exact = num_buckets // 2
    # T5 adds a float32 epsilon inside the logarithm, which the clipped distances here do not need.
    ratio = jnp.log(jnp.maximum(distance, 1).astype(jnp.float32) / exact) / np.log(max_distance / exact)
    far = jnp.minimum(exact + (ratio * (num_buckets - exact)).astype(jnp.int32), num_buckets - 1)
    return bucket + jnp.where(distance < exact, distance, far)


class RelativePositionBias(nnx.Module):
    """One learned number for each head and bucket; `clp_jax.nn.visibility.position_bias` looks them up.

    Attributes:
        embedding: ``[N, buckets]``.
    """

    def __init__(self, rngs: nnx.Rngs, num_heads: int, *, num_buckets: int, stddev: float, dtype: jnp.dtype):
        self.embedding = normal_parameter(rngs, (num_heads, num_buckets), ("heads", "buckets"), stddev, dtype)
