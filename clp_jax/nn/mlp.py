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
    "gelu": lambda x: jax.nn.gelu(x, approximate=True),
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
    ):
        def wi():
            return Linear(rngs, embed_dim, mlp_dim, axes=("embed", "mlp"), stddev=embed_dim**-0.5, dtype=dtype)

        self.gated = gated
        self.activation = activation
        self.dropout_rate = dropout_rate
        if gated:
            self.wi_0, self.wi_1 = wi(), wi()
        else:
            self.wi = wi()
        self.wo = Linear(rngs, mlp_dim, embed_dim, axes=("mlp", "embed"), stddev=mlp_dim**-0.5, dtype=dtype)

    def __call__(self, x: Float[Array, "B T D"], dropout_key: PRNGKeyArray | None = None) -> Float[Array, "B T D"]:
        """Applies the block to every position."""
        act = ACTIVATIONS[self.activation]
        hidden = act(self.wi_0(x)) * self.wi_1(x) if self.gated else act(self.wi(x))
        hidden = constrain(hidden, "batch", "length", "act_mlp")
        return self.wo(dropout(hidden, self.dropout_rate, dropout_key, salt=2))
