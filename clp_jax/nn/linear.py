"""Parameters with logical axes, linear projections and dropout."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from clp_jax.array_types import Array, Float, PRNGKeyArray


def parameter(value: Array, axes: Sequence[str | None]) -> nnx.Param:
    """A parameter that carries one logical axis name, or None, for each dimension.

    Raises:
        ValueError: when the names do not match the rank.
    """
    if len(axes) != value.ndim:
        raise ValueError(f"parameter of shape {value.shape} has {len(axes)} logical axes {tuple(axes)}.")
    return nnx.Param(value, logical_axes=tuple(axes))


def normal_parameter(
    rngs: nnx.Rngs, shape: Sequence[int], axes: Sequence[str | None], stddev: float, dtype: jnp.dtype
) -> nnx.Param:
    """A parameter drawn from a normal distribution."""
    return parameter(jax.random.normal(rngs.params(), tuple(shape), dtype) * stddev, axes)


class Linear(nnx.Module):
    """``y = x W``, without a bias, in the type of `x`.

    Attributes:
        kernel: ``[in, out]``.
    """

    def __init__(
        self, rngs: nnx.Rngs, in_dim: int, out_dim: int, *, axes: Sequence[str], stddev: float, dtype: jnp.dtype
    ):
        self.kernel = normal_parameter(rngs, (in_dim, out_dim), axes, stddev, dtype)

    def __call__(self, x: Float[Array, "*batch I"]) -> Float[Array, "*batch O"]:
        """Projects the last dimension."""
        return x @ self.kernel[...].astype(x.dtype)


def fused_projection(x: Float[Array, "*batch I"], layers: Sequence[Linear]) -> list[Float[Array, "*batch O"]]:
    """Applies several layers of one shape to one input as a single matrix product.

    The kernels are stored apart, as checkpoints of other frameworks have them, and stacked on a new axis, which leaves
    their sharding alone; concatenating would not.

    Args:
        x: the input.
        layers: at least one.

    Returns:
        What each layer gives.
    """
    kernel = jnp.stack([layer.kernel[...].astype(x.dtype) for layer in layers], axis=1)
    out = jnp.einsum("...i,ico->...co", x, kernel)
    return [out[..., c, :] for c in range(len(layers))]


def dropout(x: Array, rate: float, key: PRNGKeyArray | None, salt: int = 0) -> Array:
    """Zeroes entries with probability `rate` and rescales the rest; nothing at rate 0 or without a key.

    Args:
        x: any array.
        rate: in ``[0, 1)``.
        key: random key of the layer.
        salt: tells apart the uses of one key.
    """
    if key is None or rate == 0:
        return x
    keep = jax.random.bernoulli(jax.random.fold_in(key, salt), 1 - rate, x.shape)
    return jnp.where(keep, x / (1 - rate), jnp.zeros_like(x))
