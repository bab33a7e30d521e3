"""Rewards to returns to advantages."""

import jax.numpy as jnp

from clp_jax.array_types import Array, Float


def scalarize(
    rewards: Float[Array, "B K"], weights: Float[Array, "B K"], alpha: Float[Array, "B"]
) -> Float[Array, "B"]:
    """``(1-α) w·r``, the reward part of the objective (CLP, arXiv 2407.15762, section 2).

    Args:
        rewards: one column for each objective.
        weights: points of the simplex.
        alpha: KL weights in ``[0, 1]``.
    """
    return (1 - alpha) * jnp.sum(rewards * weights, axis=-1)


def return_to_go(
    reward: Float[Array, "B"], kl: Float[Array, "B T"], alpha: Float[Array, "B"], mask: Float[Array, "B T"]
) -> Float[Array, "B T"]:
    """``G_s = reward - α Σ_{s' >= s} kl_{s'}`` of every token (CLP, section 4); 0 where the mask is.

    Args:
        reward: of the whole completion, scalarised.
        kl: of every token.
        alpha: KL weights.
        mask: 1 on the completion.
    """
    kl = jnp.where(mask > 0, kl, 0.0)
    to_go = jnp.flip(jnp.cumsum(jnp.flip(kl, axis=-1), axis=-1), axis=-1)
    return (reward[:, None] - alpha[:, None] * to_go) * mask


def leave_one_out(returns: Float[Array, "B n"]) -> Float[Array, "B n"]:
    """Each return minus the mean of the other samples' of its prompt; ``n >= 2``."""
    count = returns.shape[-1]
    if count < 2:
        raise ValueError(f"leave_one_out: {count} samples of a prompt, expected at least 2.")
    others = (jnp.sum(returns, axis=-1, keepdims=True) - returns) / (count - 1)
    return returns - others
