"""What routers of mixtures of experts did with their tokens, and the losses that are made of it."""

import dataclasses

import jax
import jax.numpy as jnp

from clp_jax.array_types import Array, ArrayLike, Bool, Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RoutingStatistics:
    """What one layer's router did, over valid tokens; ``float32``. A leading dimension for layers, if any.

    Attributes:
        z_loss: mean squared log-sum-exp of the logits, in nats squared.
        load: each expert's share of the computed (token, choice) pairs; sums to 1.
        dropped: fraction of the (token, choice) pairs that found no room; of the tokens that no expert took where
            experts choose.
        entropy: mean entropy of the router's distribution, in nats, at most ``log E``.
        choice_share: ``f_e`` of each group, the fraction of its tokens that chose each expert, before any is cut; 0 where
            experts choose.
        mean_probability: ``P_e`` of each group, the mean of the router's distribution.
        tokens: valid ones of each group.
    """

    z_loss: Float[ArrayLike, "*layers"]
    load: Float[ArrayLike, "*layers E"]
    dropped: Float[ArrayLike, "*layers"]
    entropy: Float[ArrayLike, "*layers"]
    choice_share: Float[ArrayLike, "*layers groups E"]
    mean_probability: Float[ArrayLike, "*layers groups E"]
    tokens: Float[ArrayLike, "*layers groups"]

    @property
    def balance_loss(self) -> Float[Array, "*layers"]:
        """Of each layer, k if balanced; 0 where experts choose; see the function of that name."""
        return balance_loss(self.choice_share, self.mean_probability, self.tokens)

    def joined(self, other: "RoutingStatistics") -> "RoutingStatistics":
        """What the same layers did with these groups and with others."""
        means = {name: jnp.stack([getattr(self, name), getattr(other, name)], 1) for name in _MEANS}
        groups = {name: jnp.concatenate([getattr(self, name), getattr(other, name)], 1) for name in _OF_GROUPS}
        tokens = jnp.stack([self.tokens.sum(-1), other.tokens.sum(-1)], 1)
        return RoutingStatistics(**_weighted(means, tokens), **groups)

    def merged(self) -> "RoutingStatistics":
        """What layers did with several batches, one after another in the second dimension, as with one batch of all groups."""
        means = {name: getattr(self, name) for name in _MEANS}
        groups = {name: getattr(self, name) for name in _OF_GROUPS}
        groups = {name: leaf.reshape(len(leaf), -1, *leaf.shape[3:]) for name, leaf in groups.items()}
        return RoutingStatistics(**_weighted(means, self.tokens.sum(-1)), **groups)


_MEANS = ("z_loss", "load", "dropped", "entropy")
_OF_GROUPS = ("choice_share", "mean_probability", "tokens")


def _weighted(leaves: dict[str, Array], tokens: Float[Array, "L batches"]) -> dict[str, Array]:
    """Means over batches, by their tokens."""
    share = tokens / jnp.maximum(tokens.sum(1, keepdims=True), 1)
    return {name: (share.reshape(*share.shape, *[1] * (x.ndim - 2)) * x).sum(1) for name, x in leaves.items()}


def shares(
    probs: Float[Array, "groups tokens E"], chosen: Float[Array, "groups tokens E"], mask: Bool[Array, "groups tokens"]
) -> tuple[Float[Array, "groups E"], Float[Array, "groups E"], Float[Array, "groups"]]:
    """What the load-balance loss is made of: ``f`` (no gradient), ``P`` and the valid tokens of each group.

    Args:
        probs: the router's distributions.
        chosen: how many choices a token gave an expert.
        mask: which tokens are valid.
    """
    tokens = mask.sum(-1).astype(jnp.float32)
    share = 1.0 / jnp.maximum(tokens, 1)[:, None]
    f = jax.lax.stop_gradient(jnp.sum(chosen * mask[..., None], 1) * share)
    return f, jnp.sum(probs * mask[..., None], 1) * share, tokens


def balance_loss(
    choice_share: Float[ArrayLike, "*layers groups E"],
    mean_probability: Float[ArrayLike, "*layers groups E"],
    tokens: Float[ArrayLike, "*layers groups"],
) -> Float[Array, "*layers"]:
    """The load-balance loss ``E Σ_e f_e P_e`` of each group, averaged over groups by their valid tokens.

    ``f_e`` is the fraction of the tokens that chose ``e``, before any is cut, ``P_e`` the mean probability: k where both are
    uniform (Switch, arXiv 2101.03961, equations 4 to 6; GShard, arXiv 2006.16668, algorithm 1).

    Args:
        choice_share: ``f`` (`shares`).
        mean_probability: ``P``.
        tokens: valid ones.
    """
    loss = choice_share.shape[-1] * jnp.sum(choice_share * mean_probability, -1)
    return jnp.sum(loss * tokens, -1) / jnp.maximum(tokens.sum(-1), 1)


def router_z_loss(logits: Float[Array, "*groups E"], mask: Bool[Array, "*groups"]) -> Float[Array, ""]:
    """The mean of ``logsumexp(logits)²`` over valid tokens (ST-MoE, arXiv 2202.08906, equation 5)."""
    return _mean(jax.nn.logsumexp(logits, -1) ** 2, mask)


def router_entropy(logits: Float[Array, "*groups E"], mask: Bool[Array, "*groups"]) -> Float[Array, ""]:
    """The mean entropy of the router's distribution over valid tokens, in nats."""
    log_probs = jax.nn.log_softmax(logits, -1)
    return _mean(-jnp.sum(jnp.exp(log_probs) * log_probs, -1), mask)


def routing_statistics(
    logits: Float[Array, "groups tokens E"],
    mask: Bool[Array, "groups tokens"],
    chosen: Float[Array, "groups tokens E"],
    kept: Int[Array, "E"],
    dropped: Float[Array, ""],
) -> RoutingStatistics:
    """What a layer's router did with its groups.

    Args:
        logits: ``float32``, of the router.
        mask: which tokens are valid.
        chosen: as in `shares`.
        kept: tokens that each expert computes.
        dropped: the fraction of the choices that found no room.
    """
    choice_share, mean_probability, tokens = shares(jax.nn.softmax(logits, -1), chosen, mask)
    return RoutingStatistics(
        z_loss=router_z_loss(logits, mask),
        load=kept / jnp.maximum(kept.sum(), 1).astype(jnp.float32),
        dropped=dropped,
        entropy=router_entropy(logits, mask),
        choice_share=choice_share,
        mean_probability=mean_probability,
        tokens=tokens,
    )


def _mean(values: Float[Array, "*groups"], mask: Bool[Array, "*groups"]) -> Float[Array, ""]:
    return jnp.sum(jnp.where(mask, values, 0.0)) / jnp.maximum(mask.sum(), 1)
