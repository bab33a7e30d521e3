"""One layer of a transformer, and what it is made of."""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from clp_jax.array_types import Array, Bool, Float, PRNGKeyArray
from clp_jax.models.config import LayerKind, ModelConfig
from clp_jax.nn.attention import Attention
from clp_jax.nn.attention_dense import Keys, Quantized, Sight
from clp_jax.nn.linear import dropout
from clp_jax.nn.mlp import MLP
from clp_jax.nn.moe import MoE
from clp_jax.nn.norms import RMSNorm
from clp_jax.nn.position import RelativePositionBias
from clp_jax.nn.routing_statistics import RoutingStatistics
from clp_jax.nn.visibility import position_bias
from clp_jax.partitioning import constrain

# Keys and values of one layer, heads first.
KeysValues = tuple[Float[Array, "_ _ _ H"], Float[Array, "_ _ _ H"]]
# As a cache keeps them.
Kept = KeysValues | tuple[Quantized, Quantized]


def fold(key: PRNGKeyArray | None, salt: int) -> PRNGKeyArray | None:
    """`jax.random.fold_in`, or None without a key."""
    return None if key is None else jax.random.fold_in(key, salt)


def make_norm(config: ModelConfig) -> RMSNorm:
    """A norm of the model dimension."""
    return RMSNorm(
        config.embed_dim, eps=config.norm_eps, dtype=jnp.dtype(config.param_dtype), offset=config.norm_offset
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class View:
    """What one layer's self-attention gets besides its input.

    Attributes:
        sight: how queries see the keys of their own sequence.
        prefix: how they see keys of the prompt; None without.
        turned: rotation of the sequence's queries and keys; None without.
    """

    sight: Sight
    prefix: Sight | None
    turned: Float[Array, "b T turned"] | None


class Layer(nnx.Module):
    """Self-attention, attention to an encoder where there is one, and a feed-forward block, dense or of experts."""

    def __init__(self, config: ModelConfig, kind: LayerKind, rngs: nnx.Rngs, *, causal: bool, cross: bool):
        norm = functools.partial(make_norm, config)
        self.config, self.cross, self.sparse = config, cross, kind.sparse
        if config.bias_per_layer and config.num_buckets:
            self.relpos_bias = make_position_bias(config, rngs)
        if config.pre_norm:
            self.self_attention_norm = norm()
        self.self_attention = _attention(config, rngs)
        if config.post_norm:
            self.self_attention_post_norm = norm()
        if cross:
            if config.pre_norm:
                self.cross_attention_norm = norm()
            self.cross_attention = _attention(config, rngs)
            if config.post_norm:
                self.cross_attention_post_norm = norm()
        if config.pre_norm and not config.parallel_block:
            self.mlp_norm = norm()
        self.mlp = _experts(config, rngs, causal) if kind.sparse else _mlp(config, kind.mlp_dim, rngs)
        if config.post_norm:
            self.mlp_post_norm = norm()
        if kind.sparse and config.moe is not None and config.moe.extra_mlp:
            self.extra_mlp_norm = norm()
            self.extra_mlp = _mlp(config, config.mlp_dim, rngs)

    def __call__(
        self,
        x: Float[Array, "R T D"],
        view: View,
        present: Bool[Array, "r T"],
        *,
        prefix: Kept | None = None,
        cross: tuple[Kept, Sight] | None = None,
        key: PRNGKeyArray | None = None,
        cache: Callable[[KeysValues, View], Sequence[Keys]] | None = None,
    ) -> tuple[Float[Array, "R T D"], KeysValues, RoutingStatistics | None]:
        """One layer.

        Args:
            x: states.
            view: what self-attention sees.
            present: False on padding, which experts leave out.
            prefix: keys and values of the prompt that self-attention sees too.
            cross: keys and values of the encoder's states, and how they are seen.
            key: of dropout and routing; None is evaluation.
            cache: puts new keys and values into a cache, and returns what self-attention sees in their place.

        Returns:
            The states, the keys and values of `x`, and what the router did.
        """
        rate, attention = self.config.dropout_rate, self.self_attention
        normed = self.self_attention_norm(x) if self.config.pre_norm else x
        query, new = attention.project_q(normed, view.turned), attention.project_kv(normed, view.turned)
        view = self._with_own_bias(view)
        seen = [Keys(new[0], new[1], view.sight)] if cache is None else cache(new, view)
        if prefix is not None and view.prefix is not None:
            seen = [Keys(prefix[0], prefix[1], view.prefix), *seen]
        y = attention.attend(query, seen, fold(key, 0))
        if self.config.post_norm:
            y = self.self_attention_post_norm(y)
        y = dropout(y, rate, key, salt=1)
        if self.config.parallel_block:
            z, routing = self._feed_forward(normed, present, fold(key, 2))
            x = x + (y + dropout(z, rate, key, salt=3))
            return constrain(x, "batch", "length", "act_embed"), new, routing
        x = x + y
        if cross is not None:
            kv, sight = cross
            query = self.cross_attention.project_q(self.cross_attention_norm(x) if self.config.pre_norm else x)
            y = self.cross_attention.attend(query, [Keys(kv[0], kv[1], sight)], fold(key, 4))
            if self.config.post_norm:
                y = self.cross_attention_post_norm(y)
            x = x + dropout(y, rate, key, salt=5)
        y, routing = self._feed_forward(self.mlp_norm(x) if self.config.pre_norm else x, present, fold(key, 2))
        x = x + dropout(y, rate, key, salt=3)
        if self.sparse and self.config.moe is not None and self.config.moe.extra_mlp:
            x = x + dropout(self.extra_mlp(self.extra_mlp_norm(x), fold(key, 6)), rate, key, salt=7)
        return constrain(x, "batch", "length", "act_embed"), new, routing

    def project_cross_kv(self, encoded: Float[Array, "B S D"]) -> KeysValues:
        """Keys and values of encoded prompts."""
        return self.cross_attention.project_kv(encoded)

    def _feed_forward(
        self, x: Array, present: Array, key: PRNGKeyArray | None
    ) -> tuple[Array, RoutingStatistics | None]:
        routing = None
        if isinstance(self.mlp, MoE):
            y, routing = self.mlp(x, jnp.broadcast_to(present, x.shape[:2]), key)
        else:
            y = self.mlp(x, key)
        return (self.mlp_post_norm(y) if self.config.post_norm else y), routing

    def _with_own_bias(self, view: View) -> View:
        if not (self.config.bias_per_layer and self.config.num_buckets):
            return view

        def add(sight: Sight | None) -> Sight | None:
            if sight is None or sight.pattern.buckets is None:
                return sight
            table = self.relpos_bias.embedding[...]
            if sight.mask is None:
                return dataclasses.replace(sight, table=table)
            bias = position_bias(sight.pattern.buckets, table, sight.queries, sight.keys)
            return dataclasses.replace(sight, bias=bias)

        sight = add(view.sight)
        assert sight is not None
        return dataclasses.replace(view, sight=sight, prefix=add(view.prefix))


def _attention(config: ModelConfig, rngs: nnx.Rngs) -> Attention:
    def head_norm(size: int) -> RMSNorm:
        dtype = jnp.dtype(config.param_dtype)
        return RMSNorm(size, eps=config.norm_eps, dtype=dtype, offset=config.norm_offset, axis="head_dim")

    return Attention(
        rngs,
        config.embed_dim,
        config.num_heads,
        config.head_dim,
        num_kv_heads=config.kv_heads,
        scale=config.attention_scale,
        qkv_bias=config.qkv_bias,
        out_bias=config.out_bias,
        qk_norm=head_norm if config.qk_norm else None,
        dropout_rate=config.dropout_rate,
        dtype=jnp.dtype(config.param_dtype),
    )


def _mlp(config: ModelConfig, width: int, rngs: nnx.Rngs) -> MLP:
    return MLP(
        rngs,
        config.embed_dim,
        width,
        activation=config.activation,
        gated=config.gated,
        dropout_rate=config.dropout_rate,
        dtype=jnp.dtype(config.param_dtype),
        bias=config.mlp_bias,
    )


def _experts(config: ModelConfig, rngs: nnx.Rngs, causal: bool) -> MoE:
    moe = config.moe
    assert moe is not None
    return MoE(
        rngs,
        config.embed_dim,
        moe.mlp_dim or config.mlp_dim,
        moe.num_experts,
        router=moe.router_of(causal),
        activation=config.activation,
        gated=config.gated,
        dropout_rate=config.dropout_rate if moe.dropout_rate is None else moe.dropout_rate,
        shared_dim=moe.shared_dim,
        shared_gate=moe.shared_gate,
        dispatch=moe.dispatch,
        dtype=jnp.dtype(config.param_dtype),
    )


def make_position_bias(config: ModelConfig, rngs: nnx.Rngs) -> RelativePositionBias:
    """A position bias of every head."""
    return RelativePositionBias(
        rngs,
        config.num_heads,
        num_buckets=config.num_buckets,
        stddev=config.embed_dim**-0.5,
        dtype=jnp.dtype(config.param_dtype),
    )
