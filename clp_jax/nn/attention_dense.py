"""Attention with all logits of a call at once: what short inputs and single queries take, and what the kernels must equal."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from clp_jax.array_types import Array, Bool, Float, Int, PRNGKeyArray
from clp_jax.nn.linear import dropout
from clp_jax.nn.visibility import Pattern, Places, position_bias, visible

# Finite, so that a row with nothing to attend to has no NaN in it or in its gradient.
MASKED = -1e10


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantized:
    """Keys or values in eight bits: ``values·scale``.

    Attributes:
        values: ``int8[..., S, H]``.
        scale: ``float32[..., S, 1]``, one for each position of each head.
    """

    values: Int[Array, "*batch S H"]
    scale: Float[Array, "*batch S 1"]


def quantize(x: Float[Array, "*batch S H"]) -> Quantized:
    """Rounds to the nearest of 255 levels, the largest entry of each position at 127."""
    wide = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(wide), axis=-1, keepdims=True) / 127
    values = jnp.round(wide / jnp.where(scale > 0, scale, 1.0))
    return Quantized(values.astype(jnp.int8), scale)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sight:
    """How the queries of a call see one set of keys; made once for all layers that see alike.

    Attributes:
        pattern: the rules.
        queries: where the queries stand; of ``n`` samples that share keys, one after another.
        keys: where the keys stand.
        mask: True where a query may look; None where there are too many pairs to hold.
        bias: float32, of the positions; None without one, or where there are too many pairs.
        table: of the bias, where there are too many pairs; ``[N, buckets]``.
        aligned: whether query ``i`` and key ``i`` are the same token (`clp_jax.nn.attention_kernels`).
        unpacked: whether every row is one example from its start on.
    """

    pattern: Pattern = dataclasses.field(metadata={"static": True})
    queries: Places
    keys: Places
    mask: Bool[Array, "b T S"] | None
    bias: Float[Array, "c N T S"] | None
    table: Float[Array, "N buckets"] | None = None
    aligned: bool = dataclasses.field(default=False, metadata={"static": True})
    unpacked: bool = dataclasses.field(default=False, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Keys:
    """A set of keys and values, heads first, and how the queries see it.

    With ``R = B·n`` rows of queries, each row of keys serves ``n`` consecutive ones.

    Attributes:
        key: ``[B, G, S, H]``.
        value: ``[B, G, S, H]``.
        sight: of the queries.
    """

    key: Float[Array, "B G S H"] | Quantized
    value: Float[Array, "B G S H"] | Quantized
    sight: Sight


def swap_heads(x: Float[Array, "B X Y H"]) -> Float[Array, "B Y X H"]:
    """Puts the heads before the positions, or back behind them."""
    return jnp.swapaxes(x, 1, 2)


def dot_product_attention(
    query: Float[Array, "R T N H"],
    keys: Sequence[Keys],
    *,
    dropout_rate: float = 0.0,
    dropout_key: PRNGKeyArray | None = None,
    logits_dtype: jnp.dtype | None = None,
) -> Float[Array, "R T N H"]:
    """Attention to one or several sets of keys with masks and biases held whole; softmax in float32.

    Keys lead with heads, as a cache keeps them: both products are then plain batched ones. Compilers for TPUs choose
    layouts for themselves; CPUs pay for heads between positions and features with copies. A query that may see nothing
    gets zeros.

    Args:
        query: queries.
        keys: what they see; the softmax runs over all of them.
        dropout_rate: of the attention weights.
        dropout_key: None turns dropout off.
        logits_dtype: what products of queries and keys are rounded to; None is the type of `query`.
    """
    query = scale_query(query, keys[0].sight.pattern)
    logits = [_logits(query, part, logits_dtype) for part in keys]
    if len(keys) == 1:
        mask = keys[0].sight.mask
        assert mask is not None
        weights = _softmax(logits[0], mask[:, None], query.dtype, dropout_rate, dropout_key)
        return _seeing(_context(query, weights, keys[0]), mask)
    # The samples of a prompt are further positions of its row; together with keys of their own they are rows.
    rows, length = query.shape[:2]
    masks = [_mask_rows(part.sight, x, rows, length) for part, x in zip(keys, logits, strict=True)]
    joined = jnp.concatenate([_as_rows(x, rows, length) for x in logits], axis=-1)
    mask = jnp.concatenate(masks, axis=-1)
    weights = _softmax(joined, mask, query.dtype, dropout_rate, dropout_key)
    ends = [sum(x.shape[-1] for x in logits[: i + 1]) for i in range(len(keys) - 1)]
    out = jnp.zeros_like(query)
    for part, mine in zip(keys, jnp.split(weights, ends, axis=-1), strict=True):
        out = out + _context(query, _from_rows(mine, _rows_of(part)), part)
    return _seeing(out, mask[:, 0])


def look_at_all(
    pattern: Pattern,
    queries: Places,
    keys: Places,
    table: Float[Array, "N buckets"] | None = None,
    *,
    aligned: bool = False,
) -> Sight:
    """How queries see keys, masks and biases held whole; as `clp_jax.nn.attention.look`."""
    bias = None if table is None or pattern.buckets is None else position_bias(pattern.buckets, table, queries, keys)
    return Sight(pattern, queries, keys, mask=visible(pattern, queries, keys), bias=bias, aligned=aligned)


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

    `dot_product_attention` from where tokens stand, to one set of keys, whose logits are not rounded before the softmax. A
    query that sees nothing gives zeros and passes no gradient.

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
    seen = Keys(key, value, look_at_all(pattern, queries, keys, table))
    return dot_product_attention(
        query, [seen], dropout_rate=dropout_rate, dropout_key=dropout_key, logits_dtype=jnp.dtype("float32")
    )


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


def cap_logits(logits: Float[Array, "*shape"], cap: float | None) -> Float[Array, "*shape"]:
    """``cap·tanh(logits / cap)`` (Gemma 2, arXiv 2408.00118)."""
    return logits if cap is None else cap * jnp.tanh(logits / cap)


def sum_examples(x: Float[Array, "B *shape"]) -> Float[Array, "1 *shape"]:
    """The sum over examples, as a product: XLA's sum over a leading axis takes a CPU as long as all of attention."""
    ones = jnp.ones((1, x.shape[0]), x.dtype)
    total = jnp.matmul(ones, x.reshape(x.shape[0], -1), precision=jax.lax.Precision.HIGHEST)
    return total.reshape(1, *x.shape[1:])


def _mask_rows(sight: Sight, logits: Float[Array, "B N nT S"], rows: int, length: int) -> Bool[Array, "R one T S"]:
    assert sight.mask is not None
    whole = jnp.broadcast_to(sight.mask[:, None], (logits.shape[0], 1, *logits.shape[2:]))
    return _as_rows(whole, rows, length)


def _rows_of(part: Keys) -> int:
    return jax.tree.leaves(part.key)[0].shape[0]


def _split(x: Float[Array, "B G S H"] | Quantized, dtype: jnp.dtype) -> tuple[Array, Array | None]:
    """The array to multiply with, and what to multiply the product's key positions with afterwards."""
    if isinstance(x, Quantized):
        return x.values.astype(dtype), x.scale[..., 0][:, :, None]
    return x, None


def _logits(query: Float[Array, "R T N H"], part: Keys, dtype: jnp.dtype | None) -> Float[Array, "B N nT S"]:
    key, scale = _split(part.key, query.dtype)
    batch, groups, size, _ = key.shape
    grouped = _grouped(query, batch, groups)
    logits = jnp.matmul(grouped, jnp.swapaxes(key, -1, -2), preferred_element_type=dtype).astype(jnp.float32)
    if scale is not None:
        logits = logits * scale
    logits = cap_logits(logits.reshape(batch, query.shape[2], -1, size), part.sight.pattern.cap)
    return logits if part.sight.bias is None else _add_bias(logits, part.sight.bias)


def _context(query: Float[Array, "R T N H"], weights: Float[Array, "B N nT S"], part: Keys) -> Float[Array, "R T N H"]:
    value, scale = _split(part.value, query.dtype)
    batch, groups, size, head_dim = value.shape
    weights = weights.reshape(batch, groups, -1, size)
    if scale is not None:
        weights = (weights.astype(jnp.float32) * scale).astype(query.dtype)
    rows, length, heads, _ = query.shape
    out = (weights @ value).reshape(batch, heads, -1, head_dim)
    return swap_heads(out).reshape(rows, length, heads, head_dim)


def _grouped(query: Float[Array, "R T N H"], batch: int, groups: int) -> Float[Array, "B G mnT H"]:
    """Queries of the heads that share keys, and of the samples that do, as further positions."""
    _, _, heads, head_dim = query.shape
    query = swap_heads(query.reshape(batch, -1, heads, head_dim))
    return query.reshape(batch, groups, -1, head_dim)


def _softmax(
    logits: Float[Array, "R N T S"],
    mask: Bool[Array, "b one T S"],
    dtype: jnp.dtype,
    dropout_rate: float,
    dropout_key: PRNGKeyArray | None,
) -> Float[Array, "R N T S"]:
    weights = jax.nn.softmax(jnp.where(mask, logits, MASKED), axis=-1)
    return dropout(weights.astype(dtype), dropout_rate, dropout_key, salt=0)


def _seeing(out: Float[Array, "R T N H"], mask: Bool[Array, "b nT S"]) -> Float[Array, "R T N H"]:
    """Zeros for queries that see nothing, whose weights are all alike; there are fewer outputs than weights."""
    rows, length = out.shape[:2]
    seen = jnp.any(mask, axis=-1)
    seen = jnp.broadcast_to(seen, (rows * length // seen.shape[1], seen.shape[1]))
    return jnp.where(seen.reshape(rows, length, 1, 1), out, 0)


def _as_rows(x: Array, rows: int, length: int) -> Array:
    """``[B, N, n·T, S]`` to ``[B·n, N, T, S]``."""
    if x.shape[0] == rows:
        return x
    batch, heads, _, size = x.shape
    return jnp.swapaxes(x.reshape(batch, heads, -1, length, size), 1, 2).reshape(rows, heads, length, size)


def _from_rows(x: Float[Array, "R N T S"], batch: int) -> Float[Array, "B N nT S"]:
    if x.shape[0] == batch:
        return x
    _, heads, length, size = x.shape
    return jnp.swapaxes(x.reshape(batch, -1, heads, length, size), 1, 2).reshape(batch, heads, -1, size)


def _add_bias(logits: Float[Array, "B N T S"], bias: Float[Array, "b N T S"]) -> Float[Array, "B N T S"]:
    return logits + bias if bias.shape[0] == logits.shape[0] else _add_shared_bias(logits, bias)


@jax.custom_vjp
def _add_shared_bias(logits: Float[Array, "B N T S"], bias: Float[Array, "1 N T S"]) -> Float[Array, "B N T S"]:
    return logits + bias


def _add_shared_bias_backward(_: None, gradient: Float[Array, "B N T S"]) -> tuple[Array, Array]:
    return gradient, sum_examples(gradient)


_add_shared_bias.defvjp(lambda logits, bias: (_add_shared_bias(logits, bias), None), _add_shared_bias_backward)
