"""Multi-head attention: grouped queries, rotary positions, and the way to dense attention or to a kernel."""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx

from clp_jax.array_types import Array, Float, PRNGKeyArray
from clp_jax.nn.attention_dense import Keys, Quantized, Sight, dot_product_attention, look_at_all, swap_heads
from clp_jax.nn.attention_kernels import SHORT_PAIRS, attention, ring_of_sets
from clp_jax.nn.attention_ring import KeySet, ring_axes
from clp_jax.nn.linear import Linear
from clp_jax.nn.norms import RMSNorm
from clp_jax.nn.rope import rotate
from clp_jax.nn.visibility import Pattern, Places
from clp_jax.partitioning import constrain


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
    return look_at_all(pattern, queries, keys, table, aligned=aligned)


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
        batch = part.key.shape[0]  # The samples of a prompt are further positions of its row.
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
