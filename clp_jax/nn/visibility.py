"""Which key a query may see, and how its logits are formed: stated once, evaluated whole or block by block."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from clp_jax.array_types import Array, Bool, Float, Int
from clp_jax.nn.position import relative_position_bucket


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Places:
    """Where tokens stand. Either array may lead with 1, where all rows are alike.

    Attributes:
        positions: ``int32[B, T]``, from 0 within each example.
        segments: ``int32[B, T]``, tells packed examples apart; 0 is padding.
    """

    positions: Int[Array, "*m b T"]
    segments: Int[Array, "*m c T"]


@dataclasses.dataclass(frozen=True)
class Buckets:
    """How T5 groups distances (`relative_position_bucket`).

    Attributes:
        num_buckets: in all.
        max_distance: distances from here on share the last bucket.
        bidirectional: whether half of them are for keys behind the query.
    """

    num_buckets: int
    max_distance: int
    bidirectional: bool


@dataclasses.dataclass(frozen=True)
class Pattern:
    """How queries see keys; static.

    Attributes:
        causal: whether keys at later positions are hidden.
        window: keys at this distance or further, on either side, are hidden; None hides none.
        scale: queries are multiplied by it.
        cap: logits become ``cap·tanh(logits / cap)``, before the bias (Gemma 2); None leaves them alone.
        buckets: of a relative position bias that is added to the logits; None adds none.
    """

    causal: bool = False
    window: int | None = None
    scale: float = 1.0
    cap: float | None = None
    buckets: Buckets | None = None


def visible(pattern: Pattern, queries: Places, keys: Places) -> Bool[Array, "b T S"]:
    """True where a query may look: keys of its segment, padding never, within the window, not ahead where causal."""
    seen = (queries.segments[:, :, None] == keys.segments[:, None, :]) & (keys.segments > 0)[:, None, :]
    distance = queries.positions[:, :, None] - keys.positions[:, None, :]
    if pattern.causal:
        seen = seen & (distance >= 0)
    if pattern.window is not None:
        seen = seen & (jnp.abs(distance) < pattern.window)
    return seen


# Further than any position.
_FAR = 2**30


def block_extents(places: Places, size: int) -> Int[Array, "b blocks 4"]:
    """Of each block of `size` tokens the least and largest position, and the least and largest segment, padding left out."""
    rows = max(x.shape[0] for x in (places.positions, places.segments))
    at, of = (
        jnp.broadcast_to(x, (rows, x.shape[1])).reshape(rows, -1, size) for x in (places.positions, places.segments)
    )
    some = of > 0
    numbers = (
        jnp.where(some, at, _FAR).min(-1),
        jnp.where(some, at, -_FAR).max(-1),
        jnp.where(some, of, _FAR).min(-1),
        of.max(-1),
    )
    return jnp.stack(numbers, axis=-1)


def may_meet(pattern: Pattern, queries: Sequence[Array], keys: Sequence[Array]) -> Bool[Array, "..."]:
    """Whether a query of one block may see a key of another, by the four numbers that `block_extents` has of each."""
    first, last, lowest, highest = queries
    key_first, key_last, key_lowest, key_highest = keys
    met = (lowest <= key_highest) & (key_lowest <= highest)
    if pattern.causal:
        met = met & (key_first <= last)
    if pattern.window is not None:
        met = met & (key_first - last < pattern.window) & (first - key_last < pattern.window)
    return met


def position_bias(
    buckets: Buckets, table: Float[Array, "N buckets"], queries: Places, keys: Places
) -> Float[Array, "b N T S"]:
    """T5's relative position bias of every pair, float32; leads with 1 where positions do."""
    bucket = relative_position_bucket(
        keys.positions[:, None, :] - queries.positions[:, :, None],
        bidirectional=buckets.bidirectional,
        num_buckets=buckets.num_buckets,
        max_distance=buckets.max_distance,
    )
    return jnp.moveaxis(jnp.take(table.astype(jnp.float32), bucket, axis=1), 0, 1)
