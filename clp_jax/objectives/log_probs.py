"""Log-probabilities of tokens."""

import jax
import jax.numpy as jnp

from clp_jax.array_types import Array, Float, Int


def token_log_probs(logits: Float[Array, "*batch V"], targets: Int[Array, "*batch"]) -> Float[Array, "*batch"]:
    """``log p(target)``, in float32; the normaliser is never subtracted from all ``V`` logits."""
    logits = logits.astype(jnp.float32)
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)
