"""Closed forms of the KL-regularised objective: what training is tested against.

The objective of a policy π at a preference ``(w, α)`` is (CLP, arXiv 2407.15762, section 2)

    V_{α,w}(π) = (1-α) Σ_y π(y) w·R(y) - α KL(π ‖ π_ref)

Its optimum is ``π*(y) ∝ π_ref(y) exp(w·R(y)/β)`` with ``β = α/(1-α)``. Among whole completions, mixing the
log-probabilities of the optima of single rewards gives the optimum of the mixed reward exactly. Token by token it does
not: soft values are convex in ``w``, not linear.

A *token policy* is a tuple of arrays, one for each position of a tree of completions: ``policy[t]``, of shape
``[n_1, ..., n_{t+1}]``, holds ``log π(y_{t+1} | y_1 .. y_t)``, normalised over its last axis.
"""

from collections.abc import Sequence
from typing import TypeAlias

import jax
import jax.numpy as jnp

from clp_jax.array_types import Array, Float

TokenPolicy: TypeAlias = tuple[Array, ...]


def optimal_policy(
    reference: Float[Array, "*batch Y"], reward: Float[Array, "*batch Y"], alpha: float
) -> Float[Array, "*batch Y"]:
    """``log π* = log π_ref + (1-α)/α · r - log Z`` over ``Y`` completions, or tokens.

    Args:
        reference: ``log π_ref``.
        reward: of each completion, scalarised: ``w·R``.
        alpha: KL weight in ``(0, 1]``.

    Raises:
        ValueError: for another `alpha`: without a KL term every optimum is a point mass.
    """
    _check(alpha)
    return jax.nn.log_softmax(reference + reward * ((1 - alpha) / alpha), axis=-1)


def optimal_value(
    reference: Float[Array, "*batch Y"], reward: Float[Array, "*batch Y"], alpha: float
) -> Float[Array, "*batch"]:
    """``max_π V = α log Σ_y π_ref(y) exp((1-α)/α · r(y))``, reached by `optimal_policy`.

    Args:
        reference: ``log π_ref``.
        reward: of each completion, scalarised.
        alpha: KL weight in ``(0, 1]``.
    """
    _check(alpha)
    return alpha * jax.nn.logsumexp(reference + reward * ((1 - alpha) / alpha), axis=-1)


def policy_value(
    policy: Float[Array, "*batch Y"],
    reference: Float[Array, "*batch Y"],
    reward: Float[Array, "*batch Y"],
    alpha: float,
) -> Float[Array, "*batch"]:
    """``V_{α,w}(π)``, exactly; differentiable.

    Args:
        policy: ``log π``, finite.
        reference: ``log π_ref``, finite.
        reward: of each completion, scalarised.
        alpha: KL weight in ``[0, 1]``.
    """
    return jnp.sum(jnp.exp(policy) * ((1 - alpha) * reward - alpha * (policy - reference)), axis=-1)


def product_of_experts(
    log_probs: Float[Array, "M *batch Y"], coefficients: Float[Array, "M"]
) -> Float[Array, "*batch Y"]:
    """``log π ∝ Σ_m c_m log π_m``, normalised over the last axis.

    With the experts' optima at ``α_min`` and the reference, and coefficients ``λ(α) w`` and ``1-λ(α)`` where
    ``λ(α) = β_min/β`` (`clp_jax.preferences.kl_mixing_weight`), it is the optimum at ``(w, α)`` exactly:

        log π*_{α,w} = (1-λ) log π_ref + λ Σ_i w_i log π*_{α_min,e_i} + const

    Args:
        log_probs: of the ``M`` policies, finite.
        coefficients: one for each.
    """
    coefficients = coefficients.reshape(-1, *[1] * (log_probs.ndim - 1))
    return jax.nn.log_softmax(jnp.sum(coefficients * log_probs, axis=0), axis=-1)


def sequence_log_probs(policy: TokenPolicy) -> Float[Array, "*tree"]:
    """``log π(y) = Σ_t log π(y_t | y_<t)`` of every completion of a tree."""
    depth = len(policy)
    return sum(level.reshape(*level.shape, *[1] * (depth - level.ndim)) for level in policy[:-1]) + policy[-1]


def soft_values(reference: TokenPolicy, reward: Float[Array, "*tree"], alpha: float) -> tuple[Array, ...]:
    """The optimal value of every prefix, by backward induction.

        V(y) = (1-α) r(y),    V(s) = α log Σ_v π_ref(v|s) exp(V(s,v)/α)

    Args:
        reference: of the tree.
        reward: of each completion, scalarised.
        alpha: KL weight in ``(0, 1]``.

    Returns:
        One array for each length of prefix, from the empty one (``[]``) to the whole completions (``[n_1, ..., n_T]``).
    """
    _check(alpha)
    values = [(1 - alpha) * reward]
    for level in reversed(reference):
        values.append(alpha * jax.nn.logsumexp(level + values[-1] / alpha, axis=-1))
    return tuple(reversed(values))


def optimal_token_policy(reference: TokenPolicy, reward: Float[Array, "*tree"], alpha: float) -> TokenPolicy:
    """``log π*(v|s) = log π_ref(v|s) + (V(s,v) - V(s))/α``: `optimal_policy` of the completions, token by token.

    Args:
        reference: of the tree.
        reward: of each completion, scalarised.
        alpha: KL weight in ``(0, 1]``.
    """
    values = soft_values(reference, reward, alpha)
    return tuple(
        level + (after - before[..., None]) / alpha
        for level, before, after in zip(reference, values[:-1], values[1:], strict=True)
    )


def mix_tokens(policies: Sequence[TokenPolicy], coefficients: Float[Array, "M"]) -> TokenPolicy:
    """`product_of_experts` at every prefix: decode-time mixing (MOD, arXiv 2406.18853), not optimal in general.

    Args:
        policies: ``M`` policies of one tree.
        coefficients: one for each.
    """
    return tuple(product_of_experts(jnp.stack(levels), coefficients) for levels in zip(*policies, strict=True))


def _check(alpha: float) -> None:
    if not 0 < alpha <= 1:
        raise ValueError(f"alpha is {alpha}: expected a KL weight in (0, 1].")
