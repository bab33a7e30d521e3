"""The feed-forward block."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from clp_jax.array_types import Array, Float, PRNGKeyArray
from clp_jax.nn.linear import Linear, dropout
from clp_jax.partitioning import constrain

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
    "gelu": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_exact": lambda x: jax.nn.gelu(x, approximate=False),
    "silu": jax.nn.silu,
}


class MLP(nnx.Module):
    """``wo(act(wi_0 x) * wi_1 x)`` gated, or ``wo(act(wi x))``."""

    def __init__(
        self,
        rngs: nnx.Rngs,
        embed_dim: int,
        mlp_dim: int,
        *,
        activation: str,
        gated: bool,
        dropout_rate: float,
        dtype: jnp.dtype,
        bias: bool = False,
    ):
        def linear(size: int, out: int, axes: tuple[str, str]) -> Linear:
            return Linear(rngs, size, out, axes=axes, stddev=size**-0.5, dtype=dtype, bias=bias)

        def wi() -> Linear:
            return linear(embed_dim, mlp_dim, ("embed", "mlp"))

        self.gated = gated
        self.activation = activation
        self.dropout_rate = dropout_rate
        if gated:
            self.wi_0, self.wi_1 = wi(), wi()
        else:
            self.wi = wi()
        self.wo = linear(mlp_dim, embed_dim, ("mlp", "embed"))

    def __call__(self, x: Float[Array, "B T D"], dropout_key: PRNGKeyArray | None = None) -> Float[Array, "B T D"]:
        """Applies the block to every position."""
        act = ACTIVATIONS[self.activation]
        hidden = act(self.wi_0(x)) * self.wi_1(x) if self.gated else act(self.wi(x))
        hidden = constrain(hidden, "batch", "length", "act_mlp")
        return self.wo(dropout(hidden, self.dropout_rate, dropout_key, salt=2))
