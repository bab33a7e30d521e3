"""Which implementation of attention computes what, and the choice among them."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh

from clp_jax.array_types import Array, Float, PRNGKeyArray
from clp_jax.nn.attention_blockwise import blockwise_attention, check_aligned
from clp_jax.nn.attention_dense import check_bias, check_heads, reference_attention
from clp_jax.nn.attention_pallas import pallas_attention
from clp_jax.nn.attention_ring import KeySet, ring_attention, ring_axes
from clp_jax.nn.visibility import Pattern, Places
from clp_jax.partitioning import activation_sharding

# Fewer pairs of a query and a key than these are not worth a loop over blocks: measured on a CPU, forward and backward.
SHORT_PAIRS = 512 * 512


@dataclasses.dataclass(frozen=True)
class Implementation:
    """What one implementation can do.

    Attributes:
        name: as `attention` takes it.
        platforms: where it runs; None is everywhere.
        linear: whether its memory grows with ``T + S``, not with ``T·S``.
        ring: whether it is for positions that devices share, and for nothing else.
        dropout: whether it drops attention weights.
        bias: whether it adds a relative position bias.
        cap: whether it caps logits.
        packed: whether rows may hold several examples, and start anywhere.
        symmetric_window: whether a window may reach to later keys as well.
        single_precision: whether float32 inputs will do.
        max_head_dim: the largest head; None sets no limit.
        head_dim_multiple: of which heads must be.
    """

    name: str
    platforms: tuple[str, ...] | None = None
    linear: bool = True
    ring: bool = False
    dropout: bool = True
    bias: bool = True
    cap: bool = True
    packed: bool = True
    symmetric_window: bool = True
    single_precision: bool = True
    max_head_dim: int | None = None
    head_dim_multiple: int = 1


GPU = ("gpu", "cuda")
REFERENCE = Implementation("reference", linear=False)
BLOCKWISE = Implementation("blockwise")
RING = Implementation("ring", ring=True)
PALLAS = Implementation("pallas", platforms=("tpu",), dropout=False)
CUDNN = Implementation(
    "cudnn",
    platforms=GPU,
    dropout=False,
    bias=False,
    cap=False,
    packed=False,
    symmetric_window=False,
    single_precision=False,
    max_head_dim=128,
    head_dim_multiple=8,
)


def implementations() -> tuple[Implementation, ...]:
    """All implementations; of those that can do what is asked, the first that is for long inputs is chosen."""
    return (RING, PALLAS, CUDNN, BLOCKWISE, REFERENCE)


def attention(
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
    unpacked: bool = False,
    implementation: str | None = None,
) -> Float[Array, "B T N H"]:
    """`reference_attention`, by the implementation that suits the inputs and the platform.

    Where the active rules share positions among devices, a ring does it. Short inputs and single queries take the reference;
    others Pallas on TPUs, cuDNN on GPUs, and blocks wherever those lack something. The platform is that of the active mesh,
    so compiling ahead of time chooses for its target.

    Args:
        query: queries; head ``n`` uses key head ``n // (N // G)``.
        key: keys, heads first.
        value: values, heads first.
        pattern: who sees whom, the scale, the cap and the kind of bias.
        queries: where queries stand.
        keys: where keys stand.
        table: relative position bias of each head and bucket; given exactly where the pattern has buckets.
        dropout_rate: of the attention weights, in ``[0, 1)``. Implementations drop different weights.
        dropout_key: None turns dropout off.
        aligned: a promise: query i and key i are one token, and positions increase within a segment.
        unpacked: a promise: each row is one example, of segment 1, with positions 0, 1, ..., and then padding.
        implementation: a name of `implementations`; None chooses.

    Returns:
        The mean of the values by the weights, in the type of `query`; zeros for a query that sees nothing.

    Raises:
        ValueError: for an unknown implementation, one that cannot do what is asked, or inputs that do not fit.
    """
    check_heads(query.shape[2], key.shape[1])
    check_bias(pattern, table)
    check_aligned(aligned, query.shape[1], key.shape[2])
    dropping = dropout_key is not None and dropout_rate > 0
    shared = bool(ring_axes(query.shape[1], key.shape[2]))
    refusals = {
        able.name: _refusal(able, query, pattern=pattern, dropping=dropping, unpacked=unpacked, shared=shared)
        for able in implementations()
    }
    chosen = _choose(refusals, query.shape[1], key.shape[2]) if implementation is None else implementation
    if chosen not in refusals:
        raise ValueError(f"attention: unknown implementation {chosen!r}: expected one of {', '.join(refusals)}.")
    if refusals[chosen] is not None:
        raise ValueError(f"attention: implementation {chosen!r} {refusals[chosen]}. Leave it out to have one chosen.")
    places: dict[str, Any] = {"pattern": pattern, "queries": queries, "keys": keys}
    if chosen == PALLAS.name:
        return pallas_attention(query, key, value, table=table, **places)
    if chosen == CUDNN.name:
        return cudnn_attention(query, key, value, **places)
    settings = places | {"table": table, "dropout_rate": dropout_rate, "dropout_key": dropout_key}
    if chosen == RING.name:
        sets = [KeySet(key, value, queries, keys, pattern)]
        return ring_of_sets(query, sets, table=table, dropout_rate=dropout_rate, dropout_key=dropout_key)
    if chosen == BLOCKWISE.name:
        return blockwise_attention(query, key, value, aligned=aligned, **settings)
    return reference_attention(query, key, value, **settings)


def ring_of_sets(
    query: Float[Array, "R T N H"],
    sets: Sequence[KeySet],
    *,
    table: Float[Array, "N buckets"] | None,
    dropout_rate: float,
    dropout_key: PRNGKeyArray | None,
) -> Float[Array, "R T N H"]:
    """`ring_attention` whose parts are computed by what suits the platform; see there for the arguments."""
    dropping = dropout_key is not None and dropout_rate > 0
    engine = PALLAS.name if _platform() in (PALLAS.platforms or ()) and not dropping else BLOCKWISE.name
    return ring_attention(query, sets, table=table, dropout_rate=dropout_rate, dropout_key=dropout_key, engine=engine)


def cudnn_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B G S H"],
    value: Float[Array, "B G S H"],
    *,
    pattern: Pattern,
    queries: Places,
    keys: Places,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> Float[Array, "B T N H"]:
    """Attention of unpacked rows as `jax.nn.dot_product_attention` has it, told by lengths what is padding.

    Args:
        query: queries, of 16 bits for cuDNN.
        key: keys, heads first.
        value: values, heads first.
        pattern: without buckets and cap, and with a window only where it is causal.
        queries: one example in each row, from its start on.
        keys: likewise.
        implementation: of JAX: ``"cudnn"``, or ``"xla"``, which means the same on every platform.
    """
    lengths, key_lengths = (_lengths(places, query.shape[0]) for places in (queries, keys))
    out = jax.nn.dot_product_attention(
        query,
        jnp.swapaxes(key, 1, 2),
        jnp.swapaxes(value, 1, 2),
        scale=pattern.scale,
        is_causal=pattern.causal,
        local_window_size=None if pattern.window is None else (pattern.window - 1, 0),
        query_seq_lengths=jnp.maximum(lengths, 1),
        key_value_seq_lengths=jnp.maximum(key_lengths, 1),
        implementation=implementation,
    )
    seeing = (jnp.arange(query.shape[1])[None, :] < lengths[:, None]) & (key_lengths > 0)[:, None]
    if pattern.window is not None:
        # Queries past the end of the keys by a window see nothing.
        seeing = seeing & (jnp.arange(query.shape[1])[None, :] < (key_lengths + pattern.window - 1)[:, None])
    return jnp.where(seeing[:, :, None, None], out, 0)


def _lengths(places: Places, batch: int) -> Array:
    return jnp.broadcast_to(jnp.sum(places.segments > 0, axis=-1, dtype=jnp.int32), (batch,))


def _choose(refusals: dict[str, str | None], length: int, keys_length: int) -> str:
    if refusals[RING.name] is None:
        return RING.name
    if length == 1 or length * keys_length < SHORT_PAIRS:
        return REFERENCE.name
    return next(able.name for able in implementations() if able.linear and refusals[able.name] is None)


def _refusal(
    able: Implementation, query: Array, *, pattern: Pattern, dropping: bool, unpacked: bool, shared: bool
) -> str | None:
    """Why an implementation cannot do what is asked, or None."""
    platform, head_dim = _platform(), query.shape[-1]
    wrong = {
        f"runs on {' and '.join(able.platforms or ())}, and this is for {platform}": able.platforms is not None
        and platform not in able.platforms,
        "is for rules that shard 'length' over devices which divide queries and keys": able.ring and not shared,
        "has no dropout of attention weights": dropping and not able.dropout,
        "has no relative position bias": pattern.buckets is not None and not able.bias,
        "has no cap of logits": pattern.cap is not None and not able.cap,
        "needs the promise unpacked=True": not unpacked and not able.packed,
        "has windows of causal patterns only": pattern.window is not None
        and not pattern.causal
        and not able.symmetric_window,
        f"takes bfloat16 or float16, not {query.dtype}": query.dtype.itemsize != 2 and not able.single_precision,
        f"takes heads of up to {able.max_head_dim}, not {head_dim}": able.max_head_dim is not None
        and head_dim > able.max_head_dim,
        f"takes heads of a multiple of {able.head_dim_multiple}, not {head_dim}": head_dim % able.head_dim_multiple > 0,
    }
    return next((reason for reason, applies in wrong.items() if applies), None)


def _platform() -> str:
    """Where what is traced will run: the active mesh, which need not be of devices that are here, or the default."""
    sharding = activation_sharding((), ())
    if sharding is None:
        return jax.default_backend()
    mesh = sharding.mesh
    device = mesh.abstract_device if isinstance(mesh, AbstractMesh) else mesh.devices.flat[0]
    return jax.default_backend() if device is None else device.platform
