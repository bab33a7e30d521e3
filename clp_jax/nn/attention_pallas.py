"""Attention as Pallas kernels for TPUs: a block of keys by a block of queries at a time, held in VMEM.

FlashAttention's passes (arXiv 2307.08691, algorithms 1 and 2). Blocks are keys by queries: what belongs to a query lies along
lanes, as it is kept, sums over keys run along sublanes, and only a key's position and segment have to be turned.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from clp_jax.array_types import Array, Float
from clp_jax.nn.attention_blockwise import FLOOR, Part, pad_places
from clp_jax.nn.attention_dense import check_bias, check_heads, scale_query
from clp_jax.nn.attention_heads import head_axes
from clp_jax.nn.attention_pallas_kernels import LANES, Plan, backward_pass, forward_pass, lay_out, round_up
from clp_jax.nn.remat import keep
from clp_jax.nn.visibility import Pattern, Places
from clp_jax.partitioning import active_mesh

BLOCK = 512


def pallas_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B G S H"],
    value: Float[Array, "B G S H"],
    *,
    pattern: Pattern,
    queries: Places,
    keys: Places,
    table: Float[Array, "N buckets"] | None = None,
    query_block: int = BLOCK,
    key_block: int = BLOCK,
    interpret: bool = False,
) -> Float[Array, "B T N H"]:
    """`reference_attention` without dropout, on TPUs; blocks in which nobody sees anybody are skipped, copies and all.

    With an active mesh, examples and heads are sharded as activations are (`clp_jax.nn.attention_heads`).

    Args:
        query: queries; head ``n`` uses key head ``n // (N // G)``.
        key: keys, heads first.
        value: values, heads first.
        pattern: who sees whom, the scale, the cap and the kind of bias.
        queries: where queries stand.
        keys: where keys stand.
        table: relative position bias of each head and bucket; given exactly where the pattern has buckets.
        query_block: queries of a block, a multiple of 128.
        key_block: keys of a block, a multiple of 128.
        interpret: runs the kernels as ordinary programs, on any backend.

    Returns:
        The mean of the values by the weights, in the type of `query`; zeros for a query that sees nothing.

    Raises:
        ValueError: where G does not divide N, pattern and table do not agree about a bias, or a block is no multiple of
            128.
    """
    check_heads(query.shape[2], key.shape[1])
    check_bias(pattern, table)
    for size in (query_block, key_block):
        if size < 1 or size % LANES:
            raise ValueError(
                f"attention: blocks of {query_block} queries and {key_block} keys: expected multiples of 128."
            )

    def attend(query, key, value, table, *places):
        queries, keys = Places(*places[:2]), Places(*places[2:])
        return _attend_padded(
            query, key, value, table, pattern, queries, keys, (query_block, key_block), interpret=interpret
        )

    places = (queries.positions, queries.segments, keys.positions, keys.segments)
    mesh = active_mesh()
    if mesh is None or mesh.size == 1:
        return attend(query, key, value, table, *places)
    lie = head_axes(query.shape[0], query.shape[2], key.shape[1])
    specs = (
        PartitionSpec(lie.rows, None, lie.queries, None),
        PartitionSpec(lie.rows, lie.keys, None, None),
        PartitionSpec(lie.rows, lie.keys, None, None),
        None if table is None else PartitionSpec(lie.queries, None),
        *(PartitionSpec(lie.rows if x.shape[0] > 1 else None, None) for x in places),
    )

    def attend_own(query, key, value, *rest):
        return attend(query, lie.own_keys(key), lie.own_keys(value), *rest)

    sharded = jax.shard_map(attend_own, mesh=mesh, in_specs=specs, out_specs=specs[0], check_vma=False)
    return sharded(query, key, value, table, *places)


def _attend_padded(query, key, value, table, pattern, queries, keys, blocks, *, interpret) -> Float[Array, "B T N H"]:
    """Fills sequences up to whole blocks; what is added is padding."""
    heads_first = jnp.swapaxes(scale_query(query, pattern), 1, 2)
    plan, arrays = _padded_part(Part(heads_first, key, value, table, queries, keys, pattern), blocks, interpret)
    return jnp.swapaxes(_attend(plan, *arrays)[:, :, : query.shape[1]], 1, 2)


def pallas_part(part: Part, *, interpret: bool = False) -> tuple[Float[Array, "B N T H"], Float[Array, "B N T"]]:
    """See `clp_jax.nn.attention_blockwise.blockwise_part`."""
    plan, arrays = _padded_part(part, (BLOCK, BLOCK), interpret)
    out, log_z = forward_pass(plan, *arrays, dtype=jnp.float32)
    return out[:, :, : part.query.shape[2]], log_z[:, :, 0, : part.query.shape[2]]


def pallas_part_gradients(
    part: Part,
    gradient: Float[Array, "B N T H"],
    log_z: Float[Array, "B N T"],
    common: Float[Array, "B N T"],
    *,
    interpret: bool = False,
) -> tuple[Array, Array, Array, Array | None]:
    """See `clp_jax.nn.attention_blockwise.blockwise_part_gradients`."""
    plan, arrays = _padded_part(part, (BLOCK, BLOCK), interpret)
    length, keys_length = part.query.shape[2], part.key.shape[2]
    more = arrays[0].shape[2] - length

    def pad(x: Array, fill: float = 0.0) -> Array:
        widths = [(0, more if axis == 2 else 0) for axis in range(x.ndim)]
        return jnp.pad(x, widths, constant_values=fill)

    rows = (pad(gradient), pad(log_z, FLOOR)[:, :, None], pad(common)[:, :, None])
    to_query, to_key, to_value, to_table = backward_pass(plan, arrays, *rows, wide=True)
    if part.table is not None and to_table is not None:
        to_table = to_table.reshape(part.table.shape)
    return to_query[:, :, :length], to_key[:, :, :keys_length], to_value[:, :, :keys_length], to_table


def _padded_part(part: Part, blocks: tuple[int, int], interpret: bool) -> tuple[Plan, tuple[Any, ...]]:
    """The plan of a part, and its arrays filled up to whole blocks."""
    query, key = part.query, part.key
    sizes = query.shape[2], key.shape[2]
    rows, columns = (min(block, round_up(size, LANES)) for block, size in zip(blocks, sizes, strict=True))
    more, more_keys = round_up(query.shape[2], rows) - query.shape[2], round_up(key.shape[2], columns) - key.shape[2]
    padding = ((0, 0), (0, 0), (0, more_keys), (0, 0))
    plan = Plan(part.pattern, rows, columns, query.shape[1] // key.shape[1], interpret)
    return plan, (
        jnp.pad(query, ((0, 0), (0, 0), (0, more), (0, 0))),
        jnp.pad(key, padding),
        jnp.pad(part.value, padding),
        None if part.table is None else part.table.astype(jnp.float32).reshape(-1),
        *lay_out(pad_places(part.queries, more), pad_places(part.keys, more_keys)),
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(plan: Plan, query, key, value, table, queries, keys) -> Float[Array, "B N T H"]:
    return _attend_forward(plan, query, key, value, table, queries, keys)[0]


def _attend_forward(plan: Plan, query, key, value, table, queries, keys):
    out, log_z = forward_pass(plan, query, key, value, table, queries, keys, dtype=query.dtype)
    out, log_z = keep(out), keep(log_z)
    return out, (query, key, value, table, queries, keys, out, log_z)


def _attend_backward(plan: Plan, saved, gradient):
    *inputs, out, log_z = saved
    common = jnp.sum(gradient.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)[:, :, None]
    return (*backward_pass(plan, inputs, gradient, log_z, common, wide=False), None, None)


_attend.defvjp(_attend_forward, _attend_backward)
