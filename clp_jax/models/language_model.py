"""What every policy has: embedded tokens in, logits out; and what passes between reading prompts and writing completions."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from clp_jax.array_types import Array, ArrayLike, Float, Int, Metrics, PRNGKeyArray
from clp_jax.models.config import ModelConfig, MoEConfig
from clp_jax.models.layer import fold
from clp_jax.nn.embeddings import Embedding
from clp_jax.nn.linear import Linear
from clp_jax.nn.routing_statistics import RoutingStatistics, balance_loss
from clp_jax.nn.visibility import Places
from clp_jax.partitioning import constrain


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Encoded:
    """Prompts that were read, as completions see them.

    Attributes:
        content: an encoder's states ``[B, S, D]``, or a decoder's keys and values; None where there are no prompts.
        tokens: ``int32[B, S]``.
        places: where they stand.
        routing: what the routers did with them; none without experts.
    """

    content: Any
    tokens: Int[Array, "B S"]
    places: Places
    routing: tuple[RoutingStatistics, ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Decoded:
    """States of completions.

    Attributes:
        hidden: ``[R, T, D]`` before the head.
        routing: what the routers of each stack did with prompts and completions, layers stacked; none without experts.
    """

    hidden: Float[Array, "R T D"]
    routing: tuple[RoutingStatistics, ...]


class LanguageModel(nnx.Module):
    """The embedding and the head."""

    logits_head: Linear  # Of an untied policy; made last.
    encode: Callable[..., Encoded]
    decode: Callable[..., Decoded]

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.config = config
        self.token_embedder = Embedding(
            rngs, config.vocab_size, config.embed_dim, stddev=1.0, dtype=jnp.dtype(config.param_dtype)
        )

    def __call__(
        self,
        inputs: Int[Array, "B S"],
        decoder_inputs: Int[Array, "R T"],
        *,
        encoder_segments: Int[Array, "B S"] | None = None,
        decoder_segments: Int[Array, "R T"] | None = None,
        dropout_key: PRNGKeyArray | None = None,
    ) -> Float[Array, "R T V"]:
        """Logits of every next token of the completions, float32; see `encode` and `decode` of each family."""
        encoded = self.encode(inputs, encoder_segments, dropout_key=fold(dropout_key, 0))
        return self.logits(
            self.decode(decoder_inputs, encoded, decoder_segments, dropout_key=fold(dropout_key, 1)).hidden
        )

    def logits(self, hidden: Float[Array, "*batch D"]) -> Float[Array, "*batch V"]:
        """The head, in float32."""
        config, hidden = self.config, hidden.astype(jnp.float32)
        if config.tied_head:
            scale = config.embed_dim**-0.5 if config.scale_tied_head else 1.0
            logits = self.token_embedder.attend(hidden * scale)
        else:
            logits = self.logits_head(hidden)
        return logits if config.logit_cap is None else jnp.tanh(logits / config.logit_cap) * config.logit_cap

    def embed(self, tokens: Int[Array, "B S"]) -> Float[Array, "B S D"]:
        """Embedded tokens."""
        x = self.token_embedder(tokens, jnp.dtype(self.config.dtype))
        if self.config.scale_embeddings:
            x = x * jnp.asarray(self.config.embed_dim**0.5, x.dtype)
        return constrain(x, "batch", "length", "act_embed")


def make_head(config: ModelConfig, rngs: nnx.Rngs) -> Linear:
    """The last linear layer of an untied policy."""
    return Linear(
        rngs,
        config.embed_dim,
        config.vocab_size,
        axes=("embed", "vocab"),
        stddev=config.embed_dim**-0.5,
        dtype=jnp.dtype(config.param_dtype),
    )


def in_order(segments: Int[Array, "B S"]) -> Places:
    """Places counted from the start of the row: within a segment, distances are what they should be."""
    return Places(jnp.arange(segments.shape[1])[None], segments)


# Loads of more experts than these are told by the largest and the smallest alone. Each is a result of the step and a curve of
# its own: of thousands, the compiler takes longer than of a model, and the host as long to fetch them as a step takes.
MAX_LOADS = 128


def routing_loss(moe: MoEConfig | None, routing: Sequence[RoutingStatistics]) -> tuple[Float[Array, ""], Metrics]:
    """The routers' auxiliary loss, of all sparse layers, and metrics.

    Args:
        moe: the weights of load-balance loss and z-loss, and what balance is taken of.
        routing: of each stack; none gives 0 and no metrics.

    Returns:
        The loss, and under ``router/``: ``balance_loss`` and ``z_loss`` as they are in it, before the weights; ``dropped``,
        ``entropy`` and ``load_NN`` (the share of expert NN), means of the layers; ``load_max`` and ``load_min``, the largest
        and smallest share of one in any layer.
    """
    if moe is None or not routing:
        return jnp.zeros(()), {}

    def of_layers(name: str) -> Array:
        return jnp.concatenate([getattr(layers, name) for layers in routing])

    balance, z_loss = _auxiliary_losses(moe.balance_by, routing, of_layers)
    metrics = {"router/balance_loss": balance, "router/z_loss": z_loss}
    metrics |= {f"router/{name}": of_layers(name).mean(0) for name in ("dropped", "entropy")}
    # The extremes of any layer: the mean of layers would hide one whose router has collapsed.
    load = of_layers("load")
    metrics |= {"router/load_max": load.max(), "router/load_min": load.min()}
    if load.shape[1] <= MAX_LOADS:
        metrics |= {f"router/load_{expert:02d}": share for expert, share in enumerate(load.mean(0))}
    return moe.balance_weight * balance + moe.z_weight * z_loss, metrics


def _auxiliary_losses(
    by: str, routing: Sequence[RoutingStatistics], of_layers: Callable[[str], Array]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The load-balance loss and the z-loss, see `MoEConfig.balance_by`."""
    if by == "layer":
        return of_layers("balance_loss").mean(), of_layers("z_loss").mean()
    if by == "stack":
        of_stacks = [balance_loss(*_pooled(each.choice_share, each.mean_probability, each.tokens)) for each in routing]
        return jnp.stack(of_stacks).sum(), jnp.stack([each.z_loss.mean() for each in routing]).sum()
    leaves = ([getattr(each, name) for each in routing] for name in ("choice_share", "mean_probability", "tokens"))
    f, p, tokens = (jnp.concatenate([x.reshape(-1, 1, *x.shape[2:]) for x in of_stacks]) for of_stacks in leaves)
    return balance_loss(*_pooled(f, p, tokens)), of_layers("z_loss").mean()


def _pooled(
    f: Float[ArrayLike, "L groups E"], p: Float[ArrayLike, "L groups E"], tokens: Float[ArrayLike, "L groups"]
) -> tuple[Float[Array, "groups E"], Float[Array, "groups E"], Float[Array, "groups"]]:
    """Each group's shares in all layers together."""
    share = (tokens / jnp.maximum(tokens.sum(0, keepdims=True), 1))[..., None]
    return (share * f).sum(0), (share * p).sum(0), tokens.sum(0)
