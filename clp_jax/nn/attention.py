"""Multi-head attention of encoder-decoder policies."""

import jax
import jax.numpy as jnp
from flax import nnx

from clp_jax.array_types import Array, Bool, Float, Int, PRNGKeyArray
from clp_jax.nn.linear import Linear, dropout
from clp_jax.partitioning import constrain

# Finite, so that a row with nothing to attend to averages its keys instead of giving NaN.
MASKED = -1e10


def segment_mask(query_segments: Int[Array, "B T"], key_segments: Int[Array, "B S"]) -> Bool[Array, "B T S"]:
    """Who may see whom: positions of one segment; segment 0 is padding and is seen by nobody."""
    return (query_segments[:, :, None] == key_segments[:, None, :]) & (key_segments > 0)[:, None, :]


def dot_product_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B N S H"],
    value: Float[Array, "B N S H"],
    *,
    mask: Bool[Array, "B T S"],
    bias: Float[Array, "N T S"] | None = None,
    dropout_rate: float = 0.0,
    dropout_key: PRNGKeyArray | None = None,
) -> Float[Array, "B T N H"]:
    """Attention without a scale (T5 folds it into the query's initialisation), softmax in float32.

    Keys and values lead with heads (`swap_heads`), as a cache keeps them: both products are then plain batched ones.
    Compilers for TPUs choose layouts for themselves; CPUs pay for heads between positions and features with copies.

    Args:
        query: queries.
        key: keys.
        value: values.
        mask: True where a query may look.
        bias: added to the logits, the same for every example.
        dropout_rate: of the attention weights.
        dropout_key: None turns dropout off.
    """
    logits = (swap_heads(query) @ jnp.swapaxes(key, -1, -2)).astype(jnp.float32)
    if bias is not None:
        logits = _add_bias(logits, bias)
    logits = jnp.where(mask[:, None], logits, MASKED)
    weights = jax.nn.softmax(logits, axis=-1).astype(query.dtype)
    weights = dropout(weights, dropout_rate, dropout_key, salt=0)
    return swap_heads(weights @ value)


def swap_heads(x: Float[Array, "B X Y H"]) -> Float[Array, "B Y X H"]:
    """Puts the heads before the positions, or back behind them."""
    return jnp.swapaxes(x, 1, 2)


@jax.custom_vjp
def _add_bias(logits: Float[Array, "B N T S"], bias: Float[Array, "N T S"]) -> Float[Array, "B N T S"]:
    return logits + bias[None]


def _add_bias_backward(_: None, gradient: Float[Array, "B N T S"]) -> tuple[Array, Array]:
    # The sum over examples, as a product: XLA's sum over a leading axis takes a CPU as long as all of attention.
    ones = jnp.ones((1, gradient.shape[0]), gradient.dtype)
    total = jnp.matmul(ones, gradient.reshape(gradient.shape[0], -1), precision=jax.lax.Precision.HIGHEST)
    return gradient, total.reshape(gradient.shape[1:])


_add_bias.defvjp(lambda logits, bias: (_add_bias(logits, bias), None), _add_bias_backward)


class Attention(nnx.Module):
    """Query, key, value and output projections.

    Keys and values come from `project_kv`, so that decoding can cache them.
    """

    def __init__(
        self, rngs: nnx.Rngs, embed_dim: int, num_heads: int, head_dim: int, *, dropout_rate: float, dtype: jnp.dtype
    ):
        inner = num_heads * head_dim
        into, out = ("embed", "heads"), ("heads", "embed")
        # The query's initialisation carries the 1/sqrt(H) that the attention logits lack.
        query_stddev = (embed_dim * head_dim) ** -0.5
        self.query = Linear(rngs, embed_dim, inner, axes=into, stddev=query_stddev, dtype=dtype)
        self.key = Linear(rngs, embed_dim, inner, axes=into, stddev=embed_dim**-0.5, dtype=dtype)
        self.value = Linear(rngs, embed_dim, inner, axes=into, stddev=embed_dim**-0.5, dtype=dtype)
        self.out = Linear(rngs, inner, embed_dim, axes=out, stddev=inner**-0.5, dtype=dtype)
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.dropout_rate = dropout_rate

    def project_q(self, x: Float[Array, "B T D"]) -> Float[Array, "B T N H"]:
        """Queries."""
        return self._heads(self.query(x))

    def project_kv(self, x: Float[Array, "B S D"]) -> tuple[Float[Array, "B S N H"], Float[Array, "B S N H"]]:
        """Keys and values."""
        return self._heads(self.key(x)), self._heads(self.value(x))

    def project_qkv(
        self, x: Float[Array, "B T D"]
    ) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N H"], Float[Array, "B T N H"]]:
        """Queries, keys and values of self-attention."""
        return (self.project_q(x), *self.project_kv(x))

    def attend(
        self,
        query: Float[Array, "B T N H"],
        key: Float[Array, "B S N H"],
        value: Float[Array, "B S N H"],
        *,
        mask: Bool[Array, "B T S"],
        bias: Float[Array, "N T S"] | None = None,
        dropout_key: PRNGKeyArray | None = None,
    ) -> Float[Array, "B T D"]:
        """Attention and the output projection."""
        key, value = swap_heads(key), swap_heads(value)
        return self.attend_cached(query, key, value, mask=mask, bias=bias, dropout_key=dropout_key)

    def attend_cached(
        self,
        query: Float[Array, "B T N H"],
        key: Float[Array, "B N S H"],
        value: Float[Array, "B N S H"],
        *,
        mask: Bool[Array, "B T S"],
        bias: Float[Array, "N T S"] | None = None,
        dropout_key: PRNGKeyArray | None = None,
    ) -> Float[Array, "B T D"]:
        """`attend` to keys and values as a `Cache` keeps them, heads first."""
        context = dot_product_attention(
            query, key, value, mask=mask, bias=bias, dropout_rate=self.dropout_rate, dropout_key=dropout_key
        )
        return self.out(context.reshape(*context.shape[:2], -1))

    def _heads(self, x: Float[Array, "B T NH"]) -> Float[Array, "B T N H"]:
        x = constrain(x, "batch", "length", "act_heads")
        return x.reshape(*x.shape[:2], self.num_heads, self.head_dim)
