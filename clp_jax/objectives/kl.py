"""Estimates of KL(π ‖ π_ref) from sampled tokens, and the exact value from logits."""

import jax
import jax.numpy as jnp

from clp_jax.array_types import Array, Float


def per_token_kl(
    log_probs: Float[Array, "B T"], reference_log_probs: Float[Array, "B T"], mask: Float[Array, "B T"]
) -> Float[Array, "B T"]:
    """``log π - log π_ref`` of the sampled tokens: unbiased, may be negative."""
    return jnp.where(mask > 0, log_probs - reference_log_probs, 0.0)


def per_token_kl_k3(
    log_probs: Float[Array, "B T"], reference_log_probs: Float[Array, "B T"], mask: Float[Array, "B T"]
) -> Float[Array, "B T"]:
    """``r - 1 - log r`` with ``r = π_ref/π``: unbiased, never negative, of lower variance near the reference."""
    log_ratio = jnp.where(mask > 0, reference_log_probs - log_probs, 0.0)
    return jnp.expm1(log_ratio) - log_ratio


def exact_kl(logits: Float[Array, "*batch V"], reference_logits: Float[Array, "*batch V"]) -> Float[Array, "*batch"]:
    """``Σ_v π log(π/π_ref)`` of the next token, in nats."""
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    log_q = jax.nn.log_softmax(reference_logits.astype(jnp.float32), axis=-1)
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)
