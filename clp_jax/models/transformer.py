"""Stacks of transformer layers: the one implementation behind every policy."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from clp_jax.array_types import Array, Bool, Float, Int, PRNGKeyArray
from clp_jax.models.config import LayerKind, ModelConfig, period_of
from clp_jax.nn.attention import Attention, look
from clp_jax.nn.attention_dense import Keys, Quantized, Sight
from clp_jax.nn.linear import dropout
from clp_jax.nn.mlp import MLP
from clp_jax.nn.moe import MoE
from clp_jax.nn.norms import RMSNorm
from clp_jax.nn.position import RelativePositionBias
from clp_jax.nn.rope import rotation
from clp_jax.nn.routing import RoutingStatistics
from clp_jax.nn.stack import depth, scan_layers, stacked
from clp_jax.nn.visibility import Pattern, Places, position_bias
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
            self.relpos_bias = _position_bias(config, rngs)
        if config.pre_norm:
            self.self_attention_norm = norm()
        self.self_attention = _attention(config, rngs)
        if config.post_norm:
            self.self_attention_post_norm = norm()
        if cross:
            self.cross_attention_norm = norm()
            self.cross_attention = _attention(config, rngs)
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
            x = x + y + dropout(z, rate, key, salt=3)
            return constrain(x, "batch", "length", "act_embed"), new, routing
        x = x + y
        if cross is not None:
            kv, sight = cross
            query = self.cross_attention.project_q(self.cross_attention_norm(x))
            y = self.cross_attention.attend(query, [Keys(kv[0], kv[1], sight)], fold(key, 4))
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


class Period(nnx.Module):
    """The layers of a pattern that repeats through a stack, ``layer_0`` first."""

    def __init__(self, make: Sequence[Callable[[nnx.Rngs], Layer]], rngs: nnx.Rngs):
        for number, layer in enumerate(make):
            setattr(self, f"layer_{number}", layer(rngs))


def layers_of(period: Any) -> list[Layer]:
    """The layers of a period; a period of one layer is the layer itself."""
    if isinstance(period, Layer):
        return [period]
    return [getattr(period, f"layer_{number}") for number in range(len(nnx.state(period)))]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Ran:
    """What a stack returns.

    Attributes:
        states: after the last norm.
        keys_values: of every layer, for each run of periods and each layer of the period ``[L, B, G, S, H]``; None
            where they were not asked for.
        routing: what the routers did, each statistic of several layers, stacked; none without experts.
    """

    states: Float[Array, "R T D"]
    keys_values: Any
    routing: tuple[RoutingStatistics, ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prefix:
    """Keys and values of prompts.

    Attributes:
        keys_values: as `Ran` holds them.
        places: where they stand, ``[B, S]``.
        queries: where the tokens stand that see them, the samples of a prompt one after another, ``[B, n·T]``.
    """

    keys_values: Any
    places: Places
    queries: Places


class Stack(nnx.Module):
    """Layers run one after another, then a norm.

    The layers are stacked: with a pattern of ``p`` kinds that repeats, ``layers`` holds ``L // p`` periods, and ``rest``
    the layers that fill no period.
    """

    def __init__(self, config: ModelConfig, num_layers: int, rngs: nnx.Rngs, *, causal: bool, cross: bool = False):
        self.kinds = config.layer_kinds(num_layers, causal=causal)
        self.period = period_of(self.kinds)
        self.config, self.causal = config, causal
        if config.num_buckets and not config.bias_per_layer:
            self.relpos_bias = _position_bias(config, rngs)
        make = [functools.partial(Layer, config, kind, causal=causal, cross=cross) for kind in self.kinds]
        left = num_layers % self.period
        self.layers = stacked(_of_period(make[: self.period]), num_layers // self.period, rngs)
        if left:
            self.rest = stacked(_of_period(make[num_layers - left :]), 1, rngs)
        self.norm = make_norm(config)

    def __call__(
        self,
        x: Float[Array, "R T D"],
        places: Places,
        *,
        prefix: Prefix | None = None,
        cross: tuple[Float[Array, "B S D"], Sight] | None = None,
        present: Bool[Array, "R T"] | None = None,
        dropout_key: PRNGKeyArray | None = None,
        keep: bool = False,
        causal: bool | None = None,
        unpacked: bool = False,
    ) -> Ran:
        """States of embedded tokens.

        Args:
            x: embedded tokens.
            places: where they stand.
            prefix: keys and values of prompts that the tokens see too.
            cross: an encoder's states, and how they are seen.
            present: which tokens experts make room for; by default all that are no padding.
            dropout_key: None is evaluation.
            keep: whether keys and values are kept.
            causal: whether later tokens are hidden; None does as the stack was built.
            unpacked: a promise: every row is one example from its start on.
        """
        config = self.config
        causal = self.causal if causal is None else causal
        views = [self._view(kind, places, prefix, causal, unpacked) for kind in self.kinds[: self.period]]
        present = places.segments > 0 if present is None else present
        x = dropout(x, config.dropout_rate, dropout_key, salt=1)
        kept, routings = [], []
        for run, periods in enumerate(self.runs()):
            length, count = len(layers_of(periods)), depth(periods)
            keys = None if dropout_key is None else _layer_keys(dropout_key, run, count, length)

            def body(period: Any, x: Array, inputs: Any, views: list[View] = views[:length]):
                before, keys = inputs
                outputs = []
                for place, (layer, view) in enumerate(zip(layers_of(period), views, strict=True)):
                    x, new, routing = layer(
                        x,
                        view,
                        present,
                        prefix=None if before is None else before[place],
                        cross=None if cross is None else (layer.project_cross_kv(cross[0]), cross[1]),
                        key=None if keys is None else keys[place],
                    )
                    outputs.append((new if keep else None, routing))
                return x, outputs

            inputs = (None if prefix is None else prefix.keys_values[run], keys)
            x, outputs = scan_layers(
                periods, body, x, inputs, remat=config.remat, unroll=config.scan_unroll, size=length
            )
            kept.append(tuple(new for new, _ in outputs))
            routings += [routing for _, routing in outputs if routing is not None]
        states = dropout(self.norm(x), config.dropout_rate, dropout_key, salt=2)
        return Ran(states, tuple(kept) if keep else None, tuple(routings))

    def runs(self) -> list[Any]:
        """Stacked periods, one run after another."""
        return [self.layers, self.rest] if hasattr(self, "rest") else [self.layers]

    def table(self) -> Float[Array, "N buckets"] | None:
        """Of the position bias that the layers share."""
        return self.relpos_bias.embedding[...] if hasattr(self, "relpos_bias") else None

    def rotation(self, kind: LayerKind, positions: Int[Array, "b T"]) -> Float[Array, "b T turned"] | None:
        """Of queries and keys at these positions, in layers of a kind."""
        return None if kind.rope is None else rotation(kind.rope, self.config.head_dim, positions)

    def pattern(self, kind: LayerKind) -> Pattern:
        """How self-attention of one layer sees."""
        return self.config.pattern(kind, causal=self.causal)

    def _view(self, kind: LayerKind, places: Places, prefix: Prefix | None, causal: bool, unpacked: bool) -> View:
        # The buckets stay the stack's: one table serves prompts that see both ways and completions that do not.
        pattern, table = dataclasses.replace(self.pattern(kind), causal=causal), self.table()
        positions = places.positions
        if prefix is not None:
            positions = prefix.queries.positions.reshape(places.segments.shape)
        return View(
            sight=look(pattern, places, places, table, aligned=True, unpacked=unpacked),
            prefix=None if prefix is None else look(pattern, prefix.queries, prefix.places, table),
            turned=self.rotation(kind, positions),
        )


def _layer_keys(key: PRNGKeyArray, run: int, count: int, length: int) -> Array:
    return jax.random.split(jax.random.fold_in(key, 10 + run), (count, length))


def _of_period(make: Sequence[Callable[[nnx.Rngs], Layer]]) -> Callable[[nnx.Rngs], nnx.Module]:
    return make[0] if len(make) == 1 else functools.partial(Period, make)


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
        router=moe.decoder_router if causal and moe.decoder_router is not None else moe.router,
        activation=config.activation,
        gated=config.gated,
        dropout_rate=config.dropout_rate if moe.dropout_rate is None else moe.dropout_rate,
        shared_dim=moe.shared_dim,
        shared_gate=moe.shared_gate,
        dtype=jnp.dtype(config.param_dtype),
    )


def _position_bias(config: ModelConfig, rngs: nnx.Rngs) -> RelativePositionBias:
    return RelativePositionBias(
        rngs,
        config.num_heads,
        num_buckets=config.num_buckets,
        stddev=config.embed_dim**-0.5,
        dtype=jnp.dtype(config.param_dtype),
    )
