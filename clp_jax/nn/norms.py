"""Normalisation layers."""

import jax
import jax.numpy as jnp
from flax import nnx

from clp_jax.array_types import Array, Float
from clp_jax.nn.linear import parameter


class RMSNorm(nnx.Module):
    """Root-mean-square normalisation without a mean or a bias (T5), computed in float32.

    Attributes:
        scale: ``[D]``.
    """

    def __init__(self, dim: int, *, eps: float, dtype: jnp.dtype):
        self.scale = parameter(jnp.ones((dim,), dtype), ("embed",))
        self.eps = eps

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        """Normalises the last dimension; the result has the type of `x`."""
        wide = x.astype(jnp.float32)
        scale = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        return (wide * scale).astype(x.dtype) * jnp.broadcast_to(self.scale[...].astype(x.dtype), x.shape)
