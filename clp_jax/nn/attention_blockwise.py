"""Attention a block of queries by a block of keys at a time: memory grows with ``T + S``, never with ``T·S``.

The softmax is carried along from block to block (arXiv 1805.02867; arXiv 2112.05682), and the backward pass makes the blocks
again from the normalisers (FlashAttention, arXiv 2205.14135, algorithms 2 and 4).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from clp_jax.array_types import Array, Float, Int, PRNGKeyArray, Shaped
from clp_jax.nn.attention_dense import MASKED, cap_logits, check_bias, check_heads, scale_query, sum_examples
from clp_jax.nn.linear import dropout
from clp_jax.nn.remat import keep
from clp_jax.nn.visibility import Pattern, Places, block_extents, may_meet, position_bias, visible

# A CPU is fastest with these; larger blocks leave its caches.
QUERY_BLOCK = 256
KEY_BLOCK = 256
# Below every logit and above what is masked: weights of masked keys are zero even before a row has seen a key.
FLOOR = -1e9


def blockwise_attention(
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
    aligned: bool = False,
    query_block: int = QUERY_BLOCK,
    key_block: int = KEY_BLOCK,
) -> Float[Array, "B T N H"]:
    """`reference_attention` without its ``T·S`` logits, forward and backward.

    Args:
        query: queries; head ``n`` uses key head ``n // (N // G)``.
        key: keys, heads first.
        value: values, heads first.
        pattern: who sees whom, the scale, the cap and the kind of bias.
        queries: where queries stand.
        keys: where keys stand.
        table: relative position bias of each head and bucket; given exactly where the pattern has buckets.
        dropout_rate: of the attention weights, in ``[0, 1)``.
        dropout_key: None turns dropout off. The weights that are dropped depend on the sizes of the blocks.
        aligned: a promise: query i and key i are one token, and positions increase within a segment. Blocks that
            causality or the window hides then cost nothing.
        query_block: queries of a block.
        key_block: keys of a block.

    Returns:
        The mean of the values by the weights, in the type of `query`; zeros for a query that sees nothing.

    Raises:
        ValueError: where G does not divide N, pattern and table do not agree about a bias, a block is empty, or aligned
            sequences differ in length.
    """
    length, keys_length = query.shape[1], key.shape[2]
    check_heads(query.shape[2], key.shape[1])
    check_bias(pattern, table)
    check_aligned(aligned, length, keys_length)
    if query_block < 1 or key_block < 1:
        raise ValueError(f"attention: blocks of {query_block} queries and {key_block} keys: expected at least 1.")
    plan = _Plan(
        pattern=pattern,
        rows=min(query_block, length),
        columns=min(key_block, keys_length),
        length=length,
        keys_length=keys_length,
        aligned=aligned,
        dropout_rate=0.0 if dropout_key is None else dropout_rate,
    )
    rows, columns = -length % plan.rows, -keys_length % plan.columns
    grouped = _group_heads(scale_query(query, pattern), key.shape[1])
    out = _attend(
        plan,
        _pad(grouped, rows, 3),
        _pad(key, columns, 2),
        _pad(value, columns, 2),
        table,
        _as_pair(pad_places(queries, rows)),
        _as_pair(pad_places(keys, columns)),
        dropout_key if plan.dropout_rate else None,
    )
    return _ungroup_heads(out[:, :, :, :length])


@dataclasses.dataclass(frozen=True)
class Part:
    """Queries, and some of the keys that they see; the passes of other keys are merged by the normalisers.

    Attributes:
        query: scaled, heads first.
        key: keys.
        value: values.
        table: of the bias, where the pattern has buckets.
        queries: where queries stand.
        keys: where keys stand.
        pattern: who sees whom.
    """

    query: Float[Array, "B N T H"]
    key: Float[Array, "B G S H"]
    value: Float[Array, "B G S H"]
    table: Float[Array, "N buckets"] | None
    queries: Places
    keys: Places
    pattern: Pattern


def blockwise_part(
    part: Part, *, dropout_rate: float = 0.0, dropout_key: PRNGKeyArray | None = None
) -> tuple[Float[Array, "B N T H"], Float[Array, "B N T"]]:
    """Attention to a part of the keys.

    Args:
        part: the queries and the keys.
        dropout_rate: of the attention weights.
        dropout_key: None turns dropout off.

    Returns:
        The output in float32, and the logarithm of each query's normaliser: below every logit for one that sees nothing.
    """
    plan, inputs = _part_inputs(part, dropout_rate, dropout_key)
    out, log_z = _forward(plan, inputs)
    out, log_z = (x.reshape(x.shape[0], -1, *x.shape[3:])[:, :, : plan.length] for x in (out, log_z))
    return out, log_z


def blockwise_part_gradients(
    part: Part,
    gradient: Float[Array, "B N T H"],
    log_z: Float[Array, "B N T"],
    common: Float[Array, "B N T"],
    *,
    dropout_rate: float = 0.0,
    dropout_key: PRNGKeyArray | None = None,
) -> tuple[Array, Array, Array, Array | None]:
    """Gradients that flow through a part of the keys: of queries, keys, values and table, float32.

    Args:
        part: the queries and the keys.
        gradient: of the output over all parts.
        log_z: the logarithms of the normalisers over all parts.
        common: of each query, the sum of its gradient times its output over all parts.
        dropout_rate: as in `blockwise_part`.
        dropout_key: as in `blockwise_part`.
    """
    plan, inputs = _part_inputs(part, dropout_rate, dropout_key)
    more, groups = inputs.query.shape[3] - plan.length, part.key.shape[1]

    def grouped(x: Array) -> Array:
        return _pad(x.reshape(x.shape[0], groups, -1, *x.shape[2:]), more, 3)

    to_query, to_key, to_value, to_table = _backward(plan, inputs, grouped(gradient), grouped(log_z), grouped(common))
    to_query = to_query.reshape(to_query.shape[0], -1, *to_query.shape[3:])[:, :, : plan.length]
    return to_query, to_key[:, :, : plan.keys_length], to_value[:, :, : plan.keys_length], to_table


def _part_inputs(part: Part, dropout_rate: float, dropout_key: PRNGKeyArray | None) -> tuple["_Plan", "_Inputs"]:
    """The plan of a part, and its arrays filled up to whole blocks."""
    batch, heads, length, size = part.query.shape
    groups, keys_length = part.key.shape[1:3]
    plan = _Plan(
        pattern=part.pattern,
        rows=min(QUERY_BLOCK, length),
        columns=min(KEY_BLOCK, keys_length),
        length=length,
        keys_length=keys_length,
        aligned=False,
        dropout_rate=0.0 if dropout_key is None else dropout_rate,
    )
    more, more_keys = -length % plan.rows, -keys_length % plan.columns
    inputs = _Inputs(
        _pad(part.query.reshape(batch, groups, heads // groups, length, size), more, 3),
        _pad(part.key, more_keys, 2),
        _pad(part.value, more_keys, 2),
        part.table,
        pad_places(part.queries, more),
        pad_places(part.keys, more_keys),
        dropout_key if plan.dropout_rate else None,
    )
    return plan, inputs


def check_aligned(aligned: bool, length: int, keys_length: int) -> None:
    """Raises a ValueError for a promise that cannot hold."""
    if aligned and length != keys_length:
        raise ValueError(f"attention: aligned, with {length} queries and {keys_length} keys: expected as many.")


def pad_places(places: Places, count: int) -> Places:
    """Places with `count` more tokens, which are padding."""
    return Places(_pad(places.positions, count, 1), _pad(places.segments, count, 1))


def _pad(x: Array, count: int, axis: int) -> Array:
    if not count:
        return x
    return jnp.pad(x, [(0, count if dimension == axis else 0) for dimension in range(x.ndim)])


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What is static of one call: `rows` queries by `columns` keys are a block."""

    pattern: Pattern
    rows: int
    columns: int
    length: int
    keys_length: int
    aligned: bool
    dropout_rate: float

    @property
    def query_blocks(self) -> int:
        return -(-self.length // self.rows)

    def key_blocks(self, row: Int[Array, ""]) -> tuple[Array | int, Array | int]:
        """The first block of keys that a block of queries may see, and the one after the last."""
        first: Array | int = 0
        end: Array | int = -(-self.keys_length // self.columns)
        if not self.aligned:
            return first, end
        # Tokens that stand n indices apart are at least n positions apart, so an index tells enough.
        reach = self.keys_length if self.pattern.window is None else self.pattern.window - 1
        ahead = 0 if self.pattern.causal else reach
        first = jnp.maximum(row * self.rows - reach, 0) // self.columns
        last = ((row + 1) * self.rows - 1 + ahead) // self.columns
        return first, jnp.minimum(last + 1, end)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Inputs:
    """All that a block is cut from."""

    query: Float[Array, "B G n T H"]
    key: Float[Array, "B G S H"]
    value: Float[Array, "B G S H"]
    table: Float[Array, "N buckets"] | None
    queries: Places
    keys: Places
    dropout_key: PRNGKeyArray | None


def _as_pair(places: Places) -> tuple[Array, Array]:
    # JAX fills trees of cotangents with what is no array, which `Places` would refuse where its fields are checked.
    return places.positions, places.segments


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(plan: _Plan, query, key, value, table, queries, keys, dropout_key) -> Float[Array, "B G n T H"]:
    return _attend_forward(plan, query, key, value, table, queries, keys, dropout_key)[0]


def _attend_forward(plan: _Plan, query, key, value, table, queries, keys, dropout_key):
    inputs = _Inputs(query, key, value, table, Places(*queries), Places(*keys), dropout_key)
    out, log_z = _forward(plan, inputs)
    out, log_z = keep(out.astype(query.dtype)), keep(log_z)
    return out, (inputs, out, log_z)


def _attend_backward(plan: _Plan, saved, gradient):
    inputs, out, log_z = saved
    # A query's weights sum to 1: what is common to the gradients of its logits (FlashAttention, appendix B.2).
    common = jnp.sum(gradient.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
    gradients = _backward(plan, inputs, gradient, log_z, common)
    kinds = (inputs.query, inputs.key, inputs.value, inputs.table)
    typed = (None if g is None or x is None else g.astype(x.dtype) for g, x in zip(gradients, kinds, strict=True))
    return (*typed, None, None, None)


_attend.defvjp(_attend_forward, _attend_backward)


def _forward(plan: _Plan, inputs: _Inputs) -> tuple[Float[Array, "B G n T H"], Float[Array, "B G n T"]]:
    """The output in float32, and the logarithm of each query's normaliser."""
    met = _meetings(plan, inputs)

    def query_block(_, row):
        query, queries = _rows(plan, inputs, row)

        def seen(column, carry):
            largest, total, out = carry
            key, value, keys = _columns(plan, inputs, column)
            logits = _logits(plan, query, key, inputs.table, queries, keys)
            larger = jnp.maximum(largest, logits.max(axis=-1))
            weights = jnp.exp(logits - larger[..., None])
            shrink = jnp.exp(largest - larger)
            total = total * shrink + weights.sum(axis=-1)
            weights = _drop(plan, inputs.dropout_key, row, column, weights).astype(value.dtype)
            return larger, total, out * shrink[..., None] + _weigh_values(weights, value)

        def key_block(column, carry):
            return met(row, column, lambda: seen(column, carry), lambda: carry)

        shape = query.shape[:-1]
        start = (jnp.full(shape, FLOOR), jnp.zeros(shape), jnp.zeros(query.shape))
        largest, total, out = jax.lax.fori_loop(*plan.key_blocks(row), key_block, start)
        some = total > 0
        total = jnp.where(some, total, 1)
        log_z = jnp.where(some, largest + jnp.log(total), FLOOR)
        return None, (out / total[..., None], log_z)

    _, (out, log_z) = jax.lax.scan(query_block, None, jnp.arange(plan.query_blocks))
    return _join(out), _join(log_z)


def _backward(plan: _Plan, inputs: _Inputs, gradient, log_z, common) -> tuple[Array, Array, Array, Array | None]:
    """Gradients of queries, keys, values and table, float32."""
    met = _meetings(plan, inputs)
    no_table = None if inputs.table is None else jnp.zeros(inputs.table.shape)

    def query_block(carry, row):
        query, queries = _rows(plan, inputs, row)
        gradient_block, log_z_block, common_block = (_cut(x, row, plan.rows, 3) for x in (gradient, log_z, common))

        def seen(column):
            key, value, keys = _columns(plan, inputs, column)
            logits = _logits(plan, query, key, inputs.table, queries, keys)
            weights = jnp.exp(logits - log_z_block[..., None])
            dropped = _drop(plan, inputs.dropout_key, row, column, weights)
            to_value = _key_sums(dropped, gradient_block)
            to_weights = _drop(plan, inputs.dropout_key, row, column, _pair_logits(gradient_block, value))
            to_logits = weights * (to_weights - common_block[..., None])
            to_table = no_table
            if inputs.table is not None:
                to_table = _table_gradient(plan, inputs.table, to_logits, queries, keys)
            to_products = (to_logits * _slope(plan, query, key)).astype(query.dtype)
            return _weigh_values(to_products, key), _key_sums(to_products, query), to_value, to_table

        def unseen():
            of_keys = jnp.zeros((*inputs.key.shape[:2], plan.columns, inputs.key.shape[-1]))
            return jnp.zeros(query.shape), of_keys, of_keys, no_table

        def key_block(column, carry):
            to_query, to_key, to_value, to_table = carry
            # The sums stay outside of what may be skipped, or they would be copied for it.
            part = met(row, column, lambda: seen(column), unseen)
            to_key, to_value = _add_block(to_key, part[1], column), _add_block(to_value, part[2], column)
            to_table = None if to_table is None else to_table + part[3]
            return to_query + part[0], to_key, to_value, to_table

        to_query, *carry = jax.lax.fori_loop(*plan.key_blocks(row), key_block, (jnp.zeros(query.shape), *carry))
        return tuple(carry), to_query

    start = (jnp.zeros(inputs.key.shape), jnp.zeros(inputs.value.shape), no_table)
    (to_key, to_value, to_table), to_query = jax.lax.scan(query_block, start, jnp.arange(plan.query_blocks))
    return _join(to_query), to_key, to_value, to_table


def _meetings(plan: _Plan, inputs: _Inputs) -> Callable[..., Any]:
    """``(row, column, seen, unseen) ->`` what `seen` gives where a query of the block may see a key of it, else `unseen`."""
    if plan.aligned:
        return lambda row, column, seen, unseen: seen()  # The loop leaves out what indices tell.
    queries, keys = block_extents(inputs.queries, plan.rows), block_extents(inputs.keys, plan.columns)

    def choose(row, column, seen, unseen):
        query, key = queries[:, row], keys[:, column]
        some = may_meet(plan.pattern, [query[:, i] for i in range(4)], [key[:, i] for i in range(4)])
        return jax.lax.cond(jnp.any(some), seen, unseen)

    return choose


def _group_heads(query: Float[Array, "B T N H"], num_kv_heads: int) -> Float[Array, "B G n T H"]:
    """Heads first, those that share a key head together; batch and heads stay apart, so that both stay sharded."""
    batch, length, _, size = query.shape
    return jnp.swapaxes(query, 1, 2).reshape(batch, num_kv_heads, -1, length, size)


def _ungroup_heads(x: Float[Array, "B G n T H"]) -> Float[Array, "B T N H"]:
    """Undoes `_group_heads`."""
    return jnp.swapaxes(x.reshape(x.shape[0], -1, *x.shape[3:]), 1, 2)


def _pair_logits(query: Float[Array, "B G n T H"], key: Float[Array, "B G S H"]) -> Float[Array, "B G n T S"]:
    """Products of all pairs, float32; the heads of a group are rows of one product, so keys are not repeated."""
    batch, groups, shared, length, size = query.shape
    rows = query.reshape(batch, groups, shared * length, size)
    logits = jnp.matmul(rows, jnp.swapaxes(key, -1, -2), preferred_element_type=jnp.float32)
    return logits.reshape(batch, groups, shared, length, -1)


def _weigh_values(weights: Float[Array, "B G n T S"], value: Float[Array, "B G S H"]) -> Float[Array, "B G n T H"]:
    """Sums of values, float32."""
    batch, groups, shared, length, _ = weights.shape
    out = jnp.matmul(weights.reshape(batch, groups, shared * length, -1), value, preferred_element_type=jnp.float32)
    return out.reshape(batch, groups, shared, length, -1)


def _logits(plan: _Plan, query, key, table, queries: Places, keys: Places) -> Float[Array, "B G n T S"]:
    """Logits of a block, masked."""
    pattern = plan.pattern
    logits = cap_logits(_pair_logits(query, key), pattern.cap)
    if pattern.buckets is not None:
        bias = position_bias(pattern.buckets, table, queries, keys)
        logits = logits + bias.reshape(bias.shape[0], *logits.shape[1:3], *bias.shape[2:])
    return jnp.where(visible(pattern, queries, keys)[:, None, None], logits, MASKED)


def _slope(plan: _Plan, query, key) -> Float[Array, "B G n T S"] | float:
    """The derivative of the cap."""
    cap = plan.pattern.cap
    return 1.0 if cap is None else 1 - jnp.square(jnp.tanh(_pair_logits(query, key) / cap))


def _table_gradient(
    plan: _Plan, table: Array, to_logits: Float[Array, "B G n T S"], queries: Places, keys: Places
) -> Array:
    buckets = plan.pattern.buckets
    assert buckets is not None  # There is a table.
    bias, vjp = jax.vjp(lambda table: position_bias(buckets, table, queries, keys), table.astype(jnp.float32))
    if bias.shape[0] < to_logits.shape[0]:
        to_logits = sum_examples(to_logits)
    return vjp(to_logits.reshape(bias.shape))[0]


def _key_sums(weights: Float[Array, "B G n T S"], rows: Float[Array, "B G n T H"]) -> Float[Array, "B G S H"]:
    """For each key, the sum over the queries that use it, float32."""
    batch, groups = rows.shape[:2]
    weights = weights.astype(rows.dtype).reshape(batch, groups, -1, weights.shape[-1])
    rows = rows.reshape(batch, groups, -1, rows.shape[-1])
    return jnp.matmul(jnp.swapaxes(weights, -1, -2), rows, preferred_element_type=jnp.float32)


def _drop(plan: _Plan, key: PRNGKeyArray | None, row, column, weights: Array) -> Array:
    """Dropout of a block; the same entries each time the block is made."""
    if key is None:
        return weights
    block = row * (-(-plan.keys_length // plan.columns)) + column
    return dropout(weights, plan.dropout_rate, jax.random.fold_in(key, block))


def _rows(plan: _Plan, inputs: _Inputs, row) -> tuple[Float[Array, "B G n T H"], Places]:
    """A block of queries."""
    return _cut(inputs.query, row, plan.rows, 3), _cut_places(inputs.queries, row, plan.rows)


def _columns(plan: _Plan, inputs: _Inputs, column) -> tuple[Float[Array, "B G S H"], Float[Array, "B G S H"], Places]:
    """A block of keys."""
    size = plan.columns
    keys = _cut_places(inputs.keys, column, size)
    return _cut(inputs.key, column, size, 2), _cut(inputs.value, column, size, 2), keys


def _cut(x: Array, block, size: int, axis: int) -> Array:
    return jax.lax.dynamic_slice_in_dim(x, block * size, size, axis)


def _cut_places(places: Places, block, size: int) -> Places:
    return Places(_cut(places.positions, block, size, 1), _cut(places.segments, block, size, 1))


def _add_block(total: Float[Array, "B G S H"], part: Float[Array, "B G s H"], block) -> Float[Array, "B G S H"]:
    size = part.shape[2]
    return jax.lax.dynamic_update_slice_in_dim(total, _cut(total, block, size, 2) + part, block * size, 2)


def _join(blocks: Shaped[Array, "blocks B G n t *H"]) -> Shaped[Array, "B G n T *H"]:
    """Blocks of queries, one after another."""
    joined = jnp.moveaxis(blocks, 0, 3)
    return joined.reshape(*joined.shape[:3], -1, *joined.shape[5:])
