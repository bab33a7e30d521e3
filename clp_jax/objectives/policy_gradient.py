"""Surrogate losses whose gradient is the policy gradient."""

import jax
import jax.numpy as jnp

from clp_jax.array_types import Array, Float, Metrics
from clp_jax.objectives.masking import masked_mean, masked_sum


def reinforce_loss(
    log_probs: Float[Array, "B T"], advantages: Float[Array, "B T"], mask: Float[Array, "B T"]
) -> tuple[Float[Array, ""], Metrics]:
    """``-mean_b Σ_s stop(A[b,s]) log π(y[b,s])`` (REINFORCE; CLP, section 4).

    Args:
        log_probs: of the sampled tokens, differentiable.
        advantages: of the tokens; no gradient flows through them.
        mask: 1 on the completion.

    Returns:
        The loss, and metrics of the advantages.
    """
    # What the mask hides may be NaN: it must reach neither the loss nor, through the product, the gradient.
    advantages = jnp.where(mask > 0, jax.lax.stop_gradient(advantages), 0.0)
    loss = -jnp.mean(masked_sum(advantages * log_probs, mask, axis=-1))
    mean = masked_mean(advantages, mask)
    spread = jnp.sqrt(masked_mean(jnp.square(advantages - mean), mask))
    return loss, {"policy_loss": loss, "advantage_mean": mean, "advantage_std": spread}


def value_loss(
    values: Float[Array, "B T"], returns: Float[Array, "B T"], mask: Float[Array, "B T"]
) -> Float[Array, ""]:
    """Squared error of a value baseline: the mean over a row's tokens that count, then over rows.

    Each row weighs the same, so that a batch cut into slices has the gradient of the whole. No gradient flows through the
    returns.
    """
    return jnp.mean(masked_mean(jnp.square(values - jax.lax.stop_gradient(returns)), mask, axis=-1))
