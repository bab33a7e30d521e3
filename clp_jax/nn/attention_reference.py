"""Attention written out: all logits of a pair of sequences at once. What the other implementations must equal."""

import jax
import jax.numpy as jnp

from clp_jax.array_types import Array, Float, PRNGKeyArray
from clp_jax.nn.linear import dropout
from clp_jax.nn.visibility import Pattern, Places, position_bias, visible

# Finite, so that a row that sees nothing has a softmax; its weights are zeroed after it.
MASKED = -1e10


def reference_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B G S H"],
    value: Float[Array, "B G S H"],
    *,
    pattern: Pattern,
    queries: Places,
    keys: Places,
    table: Float[Array, "N buckets"] | None = None,
    dropout_rate: float = 0.0,
    dropout_key: PRNGKeyArray | None = None,
) -> Float[Array, "B T N H"]:
    """``softmax(cap(scale·q·k) + bias)·v`` over the keys that a query sees (arXiv 1706.03762, equation 1).

    Products are of the inputs' type with float32 sums, the softmax is float32. A query that sees nothing gives zeros and
    passes no gradient. ``T·S`` logits are held for every head.

    Args:
        query: queries; head ``n`` uses key head ``n // (N // G)`` (arXiv 2305.13245).
        key: keys, heads first, as a cache keeps them.
        value: values, heads first.
        pattern: who sees whom, the scale, the cap and the kind of bias.
        queries: where queries stand.
        keys: where keys stand.
        table: relative position bias of each head and bucket; given exactly where the pattern has buckets.
        dropout_rate: of the attention weights, in ``[0, 1)``.
        dropout_key: None turns dropout off.

    Returns:
        The mean of the values by the weights, in the type of `query`.

    Raises:
        ValueError: where G does not divide N, or pattern and table do not agree about a bias.
    """
    check_heads(query.shape[2], key.shape[1])
    check_bias(pattern, table)
    logits = pair_logits(group_heads(scale_query(query, pattern), key.shape[1]), key)
    logits = cap_logits(logits, pattern.cap)
    if pattern.buckets is not None and table is not None:
        bias = position_bias(pattern.buckets, table, queries, keys)
        logits = _add_bias(logits, bias.reshape(bias.shape[0], *logits.shape[1:3], *bias.shape[2:]))
    mask = visible(pattern, queries, keys)[:, None, None]
    weights = jax.nn.softmax(jnp.where(mask, logits, MASKED), axis=-1)
    weights = dropout(jnp.where(mask, weights, 0), dropout_rate, dropout_key).astype(value.dtype)
    return ungroup_heads(weigh_values(weights, value)).astype(query.dtype)


def check_heads(num_heads: int, num_kv_heads: int) -> None:
    """Raises a ValueError unless query heads share key heads evenly."""
    if num_heads % num_kv_heads:
        raise ValueError(f"attention: {num_heads} query heads over {num_kv_heads} key heads: expected a multiple.")


def check_bias(pattern: Pattern, table: Array | None) -> None:
    """Raises a ValueError unless there is a table exactly where the pattern has buckets, one number for each."""
    if (pattern.buckets is None) != (table is None):
        raise ValueError(
            f"attention: pattern.buckets is {pattern.buckets} and table is {'None' if table is None else 'given'}: "
            "a relative position bias needs both."
        )
    if pattern.buckets is not None and table is not None and table.shape[-1] != pattern.buckets.num_buckets:
        raise ValueError(f"attention: the table has {table.shape[-1]} buckets: expected {pattern.buckets.num_buckets}.")


def scale_query(query: Float[Array, "*shape"], pattern: Pattern) -> Float[Array, "*shape"]:
    """Queries times the pattern's scale, in their own type."""
    return query if pattern.scale == 1 else query * jnp.asarray(pattern.scale, query.dtype)


def group_heads(query: Float[Array, "B T N H"], num_kv_heads: int) -> Float[Array, "B G n T H"]:
    """Heads first, those that share a key head together; batch and heads stay apart, so that both stay sharded."""
    batch, length, _, size = query.shape
    return jnp.swapaxes(query, 1, 2).reshape(batch, num_kv_heads, -1, length, size)


def ungroup_heads(x: Float[Array, "B G n T H"]) -> Float[Array, "B T N H"]:
    """Undoes `group_heads`."""
    return jnp.swapaxes(x.reshape(x.shape[0], -1, *x.shape[3:]), 1, 2)


def pair_logits(query: Float[Array, "B G n T H"], key: Float[Array, "B G S H"]) -> Float[Array, "B G n T S"]:
    """Products of all pairs, float32; the heads of a group are rows of one product, so keys are not repeated."""
    batch, groups, shared, length, size = query.shape
    rows = query.reshape(batch, groups, shared * length, size)
    logits = jnp.matmul(rows, jnp.swapaxes(key, -1, -2), preferred_element_type=jnp.float32)
    return logits.reshape(batch, groups, shared, length, -1)


def weigh_values(weights: Float[Array, "B G n T S"], value: Float[Array, "B G S H"]) -> Float[Array, "B G n T H"]:
    """Sums of values, float32."""
    batch, groups, shared, length, _ = weights.shape
    out = jnp.matmul(weights.reshape(batch, groups, shared * length, -1), value, preferred_element_type=jnp.float32)
    return out.reshape(batch, groups, shared, length, -1)


def cap_logits(logits: Float[Array, "*shape"], cap: float | None) -> Float[Array, "*shape"]:
    """``cap·tanh(logits / cap)`` (Gemma 2, arXiv 2408.00118)."""
    return logits if cap is None else cap * jnp.tanh(logits / cap)


def sum_examples(x: Float[Array, "B G n T S"]) -> Float[Array, "1 G n T S"]:
    """The sum over examples, as a product: XLA's sum over a leading axis takes a CPU as long as all of attention."""
    ones = jnp.ones((1, x.shape[0]), x.dtype)
    total = jnp.matmul(ones, x.reshape(x.shape[0], -1), precision=jax.lax.Precision.HIGHEST)
    return total.reshape(1, *x.shape[1:])


@jax.custom_vjp
def _add_bias(logits: Float[Array, "B G n T S"], bias: Float[Array, "b G n T S"]) -> Float[Array, "B G n T S"]:
    return logits + bias


def _add_bias_backward(rows: int, gradient: Float[Array, "B G n T S"]) -> tuple[Array, Array]:
    return gradient, sum_examples(gradient) if rows < gradient.shape[0] else gradient


_add_bias.defvjp(lambda logits, bias: (_add_bias(logits, bias), bias.shape[0]), _add_bias_backward)
