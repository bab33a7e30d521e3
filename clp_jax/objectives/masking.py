"""Sums and means over the positions that count."""

import jax.numpy as jnp

from clp_jax.array_types import Array, Float, Int


def masked_sum(x: Float[Array, "*shape"], mask: Float[Array, "*shape"], axis: int | None = None) -> Array:
    """``Σ x·mask`` over `axis` (all by default); what the mask hides may be anything, NaN too."""
    return jnp.sum(jnp.where(mask > 0, x * mask, 0.0), axis=axis)


def masked_mean(x: Float[Array, "*shape"], mask: Float[Array, "*shape"], axis: int | None = None) -> Array:
    """The mean of `x` weighted by `mask`; 0 where the mask is empty."""
    total = jnp.sum(mask, axis=axis)
    return masked_sum(x, mask, axis) / jnp.where(total > 0, total, 1.0)


def completion_mask(tokens: Int[Array, "B T"], eos_id: int | tuple[int, ...] = 1) -> Float[Array, "B T"]:
    """1 up to and including the first end of sequence, 0 after it; rows that never end count whole.

    Args:
        tokens: ``int[B, T]``.
        eos_id: the token, or the tokens, that end a sequence.
    """
    ends = jnp.zeros(tokens.shape, jnp.int32)
    for token in (eos_id,) if isinstance(eos_id, int) else eos_id:
        ends = ends | (tokens == token)
    return (jnp.cumsum(ends, axis=-1) == ends).astype(jnp.float32)
