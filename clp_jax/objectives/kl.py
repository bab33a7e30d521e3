"""The estimate of KL(π ‖ π_ref) from sampled tokens."""

import jax.numpy as jnp

from clp_jax.array_types import Array, Float


def per_token_kl(
    log_probs: Float[Array, "B T"], reference_log_probs: Float[Array, "B T"], mask: Float[Array, "B T"]
) -> Float[Array, "B T"]:
    """``log π - log π_ref`` of the sampled tokens: unbiased, may be negative."""
    return jnp.where(mask > 0, log_probs - reference_log_probs, 0.0)
