"""Multi-head attention: grouped queries, rotary positions, position biases, caps, windows, several sets of keys."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from clp_jax.array_types import Array, Bool, Float, Int, PRNGKeyArray
from clp_jax.nn.attention_kernels import SHORT_PAIRS, attention, ring_of_sets
from clp_jax.nn.attention_ring import KeySet, ring_axes
from clp_jax.nn.linear import Linear, dropout
from clp_jax.nn.norms import RMSNorm
from clp_jax.nn.rope import rotate
from clp_jax.nn.visibility import Pattern, Places, position_bias, visible
from clp_jax.partitioning import constrain

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
    """
    scale = keys[0].sight.pattern.scale
    query = query if scale == 1 else query * jnp.asarray(scale, query.dtype)
    logits = [_logits(query, part) for part in keys]
    if len(keys) == 1:
        mask = keys[0].sight.mask
        assert mask is not None
        weights = _softmax(logits[0], mask[:, None], query.dtype, dropout_rate, dropout_key)
        return _context(query, weights, keys[0])
    # The samples of a prompt are further positions of its row; together with keys of their own they are rows.
    rows, length = query.shape[:2]
    masks = [_mask_rows(part.sight, x, rows, length) for part, x in zip(keys, logits, strict=True)]
    joined = jnp.concatenate([_as_rows(x, rows, length) for x in logits], axis=-1)
    weights = _softmax(joined, jnp.concatenate(masks, axis=-1), query.dtype, dropout_rate, dropout_key)
    ends = [sum(x.shape[-1] for x in logits[: i + 1]) for i in range(len(keys) - 1)]
    out = jnp.zeros_like(query)
    for part, mine in zip(keys, jnp.split(weights, ends, axis=-1), strict=True):
        out = out + _context(query, _from_rows(mine, _rows_of(part)), part)
    return out


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


def _logits(query: Float[Array, "R T N H"], part: Keys) -> Float[Array, "B N nT S"]:
    key, scale = _split(part.key, query.dtype)
    batch, groups, size, _ = key.shape
    grouped = _grouped(query, batch, groups)
    logits = (grouped @ jnp.swapaxes(key, -1, -2)).astype(jnp.float32)
    if scale is not None:
        logits = logits * scale
    logits = logits.reshape(batch, query.shape[2], -1, size)
    cap = part.sight.pattern.cap
    if cap is not None:
        logits = jnp.tanh(logits / cap) * cap
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
    weights = weights * jnp.any(mask, axis=-1, keepdims=True)
    return dropout(weights.astype(dtype), dropout_rate, dropout_key, salt=0)


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
    # The sum over examples, as a product: XLA's sum over a leading axis takes a CPU as long as all of attention.
    ones = jnp.ones((1, gradient.shape[0]), gradient.dtype)
    total = jnp.matmul(ones, gradient.reshape(gradient.shape[0], -1), precision=jax.lax.Precision.HIGHEST)
    return gradient, total.reshape(1, *gradient.shape[1:])


_add_shared_bias.defvjp(lambda logits, bias: (_add_shared_bias(logits, bias), None), _add_shared_bias_backward)


class Attention(nnx.Module):
    """Query, key, value and output projections.

    Keys and values come from `project_kv`, so that decoding can cache them.

    Args:
        rngs: of the initial values.
        embed_dim: ``D``.
        num_heads: ``N``.
        num_kv_heads: ``G``, divides ``N``.
        head_dim: ``H``.
        scale: multiplies the logits, see `Pattern`; here it decides the initial values alone.
        qkv_bias: biases of query, key and value.
        out_bias: a bias of the output.
        qk_norm: makes the norms of queries and keys, one function of ``H``; None for none.
        dropout_rate: of the attention weights.
        dtype: of the parameters.
    """

    def __init__(
        self,
        rngs: nnx.Rngs,
        embed_dim: int,
        num_heads: int,
        head_dim: int,
        *,
        num_kv_heads: int,
        scale: float,
        qkv_bias: bool,
        out_bias: bool,
        qk_norm: Callable[[int], RMSNorm] | None,
        dropout_rate: float,
        dtype: jnp.dtype,
    ):
        def into(heads: int, axis: str, stddev: float) -> Linear:
            inner = heads * head_dim
            return Linear(rngs, embed_dim, inner, axes=("embed", axis), stddev=stddev, dtype=dtype, bias=qkv_bias)

        inner = num_heads * head_dim
        # Logits start with a variance near 1, wherever the scale stands: T5's query carries it.
        self.query = into(num_heads, "heads", (embed_dim * head_dim) ** -0.5 / scale)
        self.key = into(num_kv_heads, "kv_heads", embed_dim**-0.5)
        self.value = into(num_kv_heads, "kv_heads", embed_dim**-0.5)
        out = ("heads", "embed")
        self.out = Linear(rngs, inner, embed_dim, axes=out, stddev=inner**-0.5, dtype=dtype, bias=out_bias)
        if qk_norm is not None:
            self.query_norm, self.key_norm = qk_norm(head_dim), qk_norm(head_dim)
        self.has_norms = qk_norm is not None
        self.head_dim = head_dim
        self.dropout_rate = dropout_rate

    def project_q(
        self, x: Float[Array, "B T D"], turned: Float[Array, "b T turned"] | None = None
    ) -> Float[Array, "B T N H"]:
        """Queries, normalised and rotated (`clp_jax.nn.rope.rotation`)."""
        query = self._heads(self.query(x))
        query = self.query_norm(query) if self.has_norms else query
        return query if turned is None else rotate(query, turned)

    def project_kv(
        self, x: Float[Array, "B S D"], turned: Float[Array, "b S turned"] | None = None
    ) -> tuple[Float[Array, "B G S H"], Float[Array, "B G S H"]]:
        """Keys, normalised and rotated, and values; heads first, as a cache keeps them."""
        key = self._heads(self.key(x))
        key = self.key_norm(key) if self.has_norms else key
        key = key if turned is None else rotate(key, turned)
        return swap_heads(key), swap_heads(self._heads(self.value(x)))

    def attend(
        self, query: Float[Array, "R T N H"], keys: Sequence[Keys], dropout_key: PRNGKeyArray | None = None
    ) -> Float[Array, "R T D"]:
        """Attention and the output projection."""
        attend = dot_product_attention if all(part.sight.mask is not None for part in keys) else _blocked_attention
        context = attend(query, keys, dropout_rate=self.dropout_rate, dropout_key=dropout_key)
        return self.out(context.reshape(*context.shape[:2], -1))

    def _heads(self, x: Float[Array, "B T NH"]) -> Float[Array, "B T N H"]:
        x = constrain(x, "batch", "length", "act_heads")
        return x.reshape(*x.shape[:2], -1, self.head_dim)


def look(
    pattern: Pattern,
    queries: Places,
    keys: Places,
    table: Float[Array, "N buckets"] | None = None,
    *,
    aligned: bool = False,
    unpacked: bool = False,
    dense: bool = False,
) -> Sight:
    """How queries see keys, made once for all the layers that see alike.

    Args:
        pattern: the rules.
        queries: where the queries stand; those of samples that share keys one after another.
        keys: where the keys stand.
        table: of the relative position bias, where the pattern has one.
        aligned: whether query ``i`` and key ``i`` are the same token.
        unpacked: whether every row is one example from its start on.
        dense: whether masks and biases are held whole, however many pairs there are: for single queries.
    """
    lengths = queries.positions.shape[1], keys.positions.shape[1]
    if not dense and (lengths[0] * lengths[1] >= SHORT_PAIRS or ring_axes(*lengths)):
        return Sight(pattern, queries, keys, None, None, table=table, aligned=aligned, unpacked=unpacked)
    bias = None if table is None or pattern.buckets is None else position_bias(pattern.buckets, table, queries, keys)
    return Sight(pattern, queries, keys, mask=visible(pattern, queries, keys), bias=bias, table=None, aligned=aligned)


def _as_set(part: Keys) -> KeySet:
    assert not isinstance(part.key, Quantized) and not isinstance(part.value, Quantized)
    return KeySet(part.key, part.value, part.sight.queries, part.sight.keys, part.sight.pattern)


def _blocked_attention(
    query: Float[Array, "R T N H"],
    keys: Sequence[Keys],
    *,
    dropout_rate: float = 0.0,
    dropout_key: PRNGKeyArray | None = None,
) -> Float[Array, "R T N H"]:
    """Attention that holds no array of all pairs."""
    rows = query.shape[0]
    first = keys[0].sight
    if ring_axes(query.shape[1], *(part.sight.keys.positions.shape[1] for part in keys)):
        sets = [_as_set(part) for part in keys]
        table = keys[-1].sight.table if first.table is None else first.table
        return ring_of_sets(query, sets, table=table, dropout_rate=dropout_rate, dropout_key=dropout_key)
    if len(keys) == 1:
        part = keys[0]
        assert not isinstance(part.key, Quantized) and not isinstance(part.value, Quantized)
        batch = _rows_of(part)  # The samples of a prompt are further positions of its row.
        merged = query.reshape(batch, -1, *query.shape[2:])
        out = attention(
            merged,
            part.key,
            part.value,
            pattern=first.pattern,
            queries=first.queries,
            keys=first.keys,
            table=first.table,
            aligned=first.aligned,
            unpacked=first.unpacked,
            dropout_rate=dropout_rate,
            dropout_key=dropout_key,
        )
        return out.reshape(query.shape)

    def join(arrays: Sequence[Any], axis: int) -> Array:
        each = [jnp.repeat(x, rows // x.shape[0], axis=0) for x in arrays]
        return jnp.concatenate(each, axis=axis)

    own, length = keys[-1].sight, query.shape[1]
    # The tokens stand where they do as the prompt sees them.
    stand = Places(first.queries.positions.reshape(rows, length), first.queries.segments.reshape(rows, length))
    return attention(
        query,
        join([part.key for part in keys], 2),
        join([part.value for part in keys], 2),
        pattern=own.pattern,
        queries=stand,
        keys=Places(
            join([jnp.broadcast_to(first.keys.positions, first.keys.segments.shape), stand.positions], 1),
            join([first.keys.segments, stand.segments], 1),
        ),
        table=first.table if own.table is None else own.table,
        dropout_rate=dropout_rate,
        dropout_key=dropout_key,
    )
