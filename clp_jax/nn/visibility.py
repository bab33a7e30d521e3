"""Which key a query may see, and how its logits are formed: stated once, evaluated whole or block by block."""

import dataclasses

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
