"""Normalisation layers."""

import jax
import jax.numpy as jnp
from flax import nnx

from clp_jax.array_types import Array, Float
from clp_jax.nn.linear import parameter


class RMSNorm(nnx.Module):
    """Root-mean-square normalisation without a mean or a bias (arXiv 1910.07467), computed in float32.

    Args:
        dim: size of the last dimension.
        eps: added to the mean square.
        dtype: of the scale.
        offset: whether the scale is stored less 1, and applied in float32 (Gemma).
        axis: logical axis of the scale.

    Attributes:
        scale: ``[D]``.
    """

    def __init__(self, dim: int, *, eps: float, dtype: jnp.dtype, offset: bool = False, axis: str = "embed"):
        self.scale = parameter(jnp.zeros((dim,), dtype) if offset else jnp.ones((dim,), dtype), (axis,))
        self.eps = eps
        self.offset = offset

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        """Normalises the last dimension; the result has the type of `x`."""
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        if self.offset:
            return (wide * jnp.broadcast_to(1 + self.scale[...].astype(jnp.float32), x.shape)).astype(x.dtype)
        return wide.astype(x.dtype) * jnp.broadcast_to(self.scale[...].astype(x.dtype), x.shape)
