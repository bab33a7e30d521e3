"""Losses of reward models."""

import jax
import jax.numpy as jnp

from clp_jax.array_types import Array, Float


def bradley_terry(chosen: Float[Array, "B"], rejected: Float[Array, "B"]) -> Float[Array, "B"]:
    """``-log σ(chosen - rejected)`` of each pair (Bradley and Terry, 1952)."""
    return -jax.nn.log_sigmoid(chosen - rejected)


def binary_cross_entropy(logits: Float[Array, "B"], labels: Float[Array, "B"]) -> Float[Array, "B"]:
    """Cross-entropy of labels in ``[0, 1]``, from logits, stable at both ends."""
    return jnp.maximum(logits, 0) - logits * labels + jnp.log1p(jnp.exp(-jnp.abs(logits)))
