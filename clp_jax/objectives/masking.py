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


def completion_mask(tokens: Int[Array, "B T"], eos_id: int = 1) -> Float[Array, "B T"]:
    """1 up to and including the first end of sequence, 0 after it."""
    ended = jnp.cumsum((tokens == eos_id).astype(jnp.int32), axis=-1) - (tokens == eos_id)
    return (ended == 0).astype(jnp.float32)
