"""Parameters with logical axes, linear projections and dropout."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from clp_jax.array_types import Array, Float, PRNGKeyArray
from clp_jax.partitioning import is_sharded


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
    """``y = x W``, or ``y = x W + b``, in the type of `x`.

    Attributes:
        kernel: ``[in, out]``.
        bias: ``[out]``, zeros at first; where there is one.
    """

    def __init__(
        self,
        rngs: nnx.Rngs,
        in_dim: int,
        out_dim: int,
        *,
        axes: Sequence[str],
        stddev: float,
        dtype: jnp.dtype,
        bias: bool = False,
    ):
        self.kernel = normal_parameter(rngs, (in_dim, out_dim), axes, stddev, dtype)
        if bias:
            self.bias = parameter(jnp.zeros((out_dim,), dtype), axes[1:])
        self.has_bias = bias

    def __call__(self, x: Float[Array, "*batch I"]) -> Float[Array, "*batch O"]:
        """Projects the last dimension."""
        y = flat_product(x, self.kernel[...].astype(x.dtype))
        return y + jnp.broadcast_to(self.bias[...].astype(x.dtype), y.shape) if self.has_bias else y


def flat_product(x: Float[Array, "*batch I"], kernel: Float[Array, "I O"]) -> Float[Array, "*batch O"]:
    """``x W`` as a product of two matrices.

    The kernel's gradient then sums over one dimension; over several, XLA copies the operands on a CPU first. Positions
    that are sharded stay a dimension of their own: merged with the batch, they would have to be gathered.
    """
    if is_sharded("length"):
        return x @ kernel
    return (x.reshape(-1, x.shape[-1]) @ kernel).reshape(*x.shape[:-1], -1)


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
