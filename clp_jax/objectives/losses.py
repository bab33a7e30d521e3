"""Token-level losses of supervised training."""

import jax.numpy as jnp

from clp_jax.array_types import Array, Bool, Float, Metrics


def token_cross_entropy(
    log_probs: Float[Array, "B T"],
    log_z: Float[Array, "B T"],
    correct: Bool[Array, "B T"],
    weights: Float[Array, "B T"],
    z_loss: float = 0.0,
) -> tuple[Float[Array, ""], Float[Array, ""], Metrics]:
    """Cross-entropy summed over the tokens that count.

    Args:
        log_probs: of the targets.
        log_z: logarithms of the normalisers.
        correct: whether each target has the largest logit.
        weights: 1 where a token counts, 0 on padding.
        z_loss: coefficient of ``(log Z)²``, which keeps the normaliser near 1 (PaLM, T5X: 1e-4).

    Returns:
        The summed loss (z-loss included), the summed weights, and metrics that are sums as well: the cross-entropy
        alone and the number of tokens predicted right.
    """
    cross_entropy = -jnp.sum(log_probs * weights)
    penalty = z_loss * jnp.sum(jnp.square(log_z) * weights)
    metrics = {"cross_entropy": cross_entropy, "accuracy": jnp.sum(correct * weights)}
    return cross_entropy + penalty, jnp.sum(weights), metrics
