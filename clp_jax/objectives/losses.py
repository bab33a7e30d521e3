"""Token-level losses of supervised training."""

import jax
import jax.numpy as jnp

from clp_jax.array_types import Array, Float, Int, Metrics


def token_cross_entropy(
    logits: Float[Array, "B T V"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    z_loss: float = 0.0,
) -> tuple[Float[Array, ""], Float[Array, ""], Metrics]:
    """Cross-entropy summed over the tokens that count.

    Args:
        logits: unnormalised, any float type; float32 inside.
        targets: token ids.
        weights: 1 where a token counts, 0 on padding.
        z_loss: coefficient of ``(log Z)²``, which keeps the normaliser near 1 (PaLM, T5X: 1e-4).

    Returns:
        The summed loss (z-loss included), the summed weights, and metrics that are sums as well: the cross-entropy
        alone and the number of tokens predicted right.
    """
    logits = logits.astype(jnp.float32)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    cross_entropy = jnp.sum((log_z - chosen) * weights)
    correct = jnp.sum((jnp.argmax(logits, axis=-1) == targets) * weights)
    penalty = z_loss * jnp.sum(jnp.square(log_z) * weights)
    return cross_entropy + penalty, jnp.sum(weights), {"cross_entropy": cross_entropy, "accuracy": correct}
