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
from clp_jax.models.layer import Layer, View, make_norm, make_position_bias
from clp_jax.nn.attention import look
from clp_jax.nn.attention_dense import Sight
from clp_jax.nn.attention_ring import from_balanced, is_balanced, to_balanced
from clp_jax.nn.linear import dropout
from clp_jax.nn.pipeline import run_pipeline
from clp_jax.nn.rope import rotation
from clp_jax.nn.routing import Dropless
from clp_jax.nn.routing_statistics import RoutingStatistics
from clp_jax.nn.stack import depth, scan_layers, stacked
from clp_jax.nn.visibility import Pattern, Places
from clp_jax.partitioning import active_pipeline


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
        routing: what the routers of all layers did, stacked, in one; none without experts.
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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Around:
    """What the rows of a call bring along besides their states.

    Attributes:
        places: where the tokens stand.
        present: which tokens experts make room for.
        prefix: where the tokens stand as their prompts see them, and the prompts' keys; None without.
        cross: an encoder's states, and how they are seen.
    """

    places: Places
    present: Bool[Array, "*m r T"]
    prefix: tuple[Places, Places] | None
    cross: tuple[Float[Array, "*m B S D"], Sight] | None


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
            self.relpos_bias = make_position_bias(config, rngs)
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
        present = places.segments > 0 if present is None else present
        around = _Around(places, present, None if prefix is None else (prefix.queries, prefix.places), cross)
        length = x.shape[1]
        balanced = causal and is_balanced(length) and self._treats_positions_alike()
        if balanced:
            x, around, unpacked = to_balanced(x, length), _balanced(around, length), False
        x = dropout(x, config.dropout_rate, dropout_key, salt=1)
        before = None if prefix is None else prefix.keys_values
        x, kept, routings = self._run(x, around, before, dropout_key, keep=keep, causal=causal, unpacked=unpacked)
        states = dropout(self.norm(x), config.dropout_rate, dropout_key, salt=2)
        if balanced:
            states = from_balanced(states, length)
            kept = jax.tree.map(lambda kv: jax.vmap(lambda x: _positions_back(x, length))(kv), kept)
        return Ran(states, kept if keep else None, routings)

    def _run(
        self, x: Array, around: _Around, before: Any, dropout_key: PRNGKeyArray | None, **how: bool
    ) -> tuple[Array, tuple[Any, ...], tuple[RoutingStatistics, ...]]:
        """All layers: states, the keys and values of each run, and what the routers did."""
        kept, routings = [], []
        pipeline = active_pipeline()
        for run, periods in enumerate(self.runs()):
            keys = (
                None if dropout_key is None else _layer_keys(dropout_key, run, depth(periods), len(layers_of(periods)))
            )
            if pipeline is None:
                x, new, routing = self._run_layers(
                    periods, x, None if before is None else before[run], around, keys, **how
                )
            else:
                x, new, routing = self._run_stages(pipeline, periods, x, before and before[run], around, keys, **how)
            kept.append(new)
            routings += routing
        if routings:  # In the order of the runs and of the layers' kinds.
            routings = [jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *routings)]
        return x, tuple(kept), tuple(routings)

    def _run_layers(
        self,
        periods: Any,
        x: Array,
        before: Any,
        around: _Around,
        keys: Array | None,
        *,
        keep: bool,
        causal: bool,
        unpacked: bool,
    ) -> tuple[Array, Any, list[RoutingStatistics]]:
        """Some periods of layers, one after another."""
        config, length = self.config, len(layers_of(periods))
        views = [self._view(kind, around, causal, unpacked) for kind in self.kinds[:length]]
        present, cross = around.present, around.cross

        def body(period: Any, x: Array, inputs: Any):
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

        x, outputs = scan_layers(
            periods, body, x, (before, keys), remat=config.remat, unroll=config.scan_unroll, size=length
        )
        return x, tuple(new for new, _ in outputs), [routing for _, routing in outputs if routing is not None]

    def _run_stages(
        self,
        pipeline: tuple[tuple[str, ...], int, int],
        periods: Any,
        x: Array,
        before: Any,
        around: _Around,
        keys: Array | None,
        **how: bool,
    ) -> tuple[Array, Any, list[RoutingStatistics]]:
        """Some periods of layers as a pipeline."""
        axes, num_stages, microbatches = pipeline
        rows = x.shape[0] if around.prefix is None else around.prefix[1].segments.shape[0]
        if around.cross is not None:
            rows = around.cross[0].shape[0]
        stage_keys = None if keys is None else jax.random.key_data(keys)[:, None]

        def run(periods: Any, x: Array, per_layer: Any, around: _Around, number: Array):
            before, data = per_layer
            mine = None
            if data is not None:
                mine = jax.vmap(jax.vmap(lambda key: jax.random.fold_in(key, number)))(
                    jax.random.wrap_key_data(data[:, 0])
                )
            around = dataclasses.replace(around, cross=_seen_again(around.cross))
            return self._run_layers(periods, x, before, around, mine, **how)

        if around.cross is not None:
            # A mask that is held is of all rows.
            sight = dataclasses.replace(around.cross[1], mask=None, bias=None)
            around = dataclasses.replace(around, cross=(around.cross[0], sight))
        x, new, routings = run_pipeline(
            periods,
            run,
            x,
            (before, stage_keys),
            around,
            rows=rows,
            axes=axes,
            num_stages=num_stages,
            microbatches=microbatches,
        )
        return x, new, [routing.merged() for routing in routings]

    def _treats_positions_alike(self) -> bool:
        """Whether no layer minds the order of the tokens: experts that can be full take the first ones."""
        moe = self.config.moe
        router = None if moe is None else moe.router_of(self.causal)
        return isinstance(router, Dropless) or not any(kind.sparse for kind in self.kinds)

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

    def _view(self, kind: LayerKind, around: _Around, causal: bool, unpacked: bool) -> View:
        # The buckets stay the stack's: one table serves prompts that see both ways and completions that do not.
        pattern, table = dataclasses.replace(self.pattern(kind), causal=causal), self.table()
        places, positions = around.places, around.places.positions
        if around.prefix is not None:
            positions = around.prefix[0].positions.reshape(places.segments.shape)
        return View(
            sight=look(pattern, places, places, table, aligned=True, unpacked=unpacked),
            prefix=None if around.prefix is None else look(pattern, *around.prefix, table),
            turned=self.rotation(kind, positions),
        )


def _balanced(around: _Around, length: int) -> _Around:
    """Everything about the tokens in the order of `to_balanced`."""

    def own(places: Places) -> Places:
        """Of rows ``[R, T]``, or of the samples of prompts one after another, ``[B, n·T]``."""

        def one(x: Array) -> Array:
            return to_balanced(x.reshape(-1, length), length).reshape(x.shape)

        return Places(one(places.positions), one(places.segments))

    prefix = None if around.prefix is None else (own(around.prefix[0]), around.prefix[1])
    cross = around.cross
    if cross is not None:
        # A mask that is held is of the other order.
        sight = dataclasses.replace(cross[1], queries=own(cross[1].queries), mask=None, bias=None)
        cross = _seen_again((cross[0], sight))
    return _Around(own(around.places), to_balanced(around.present, length), prefix, cross)


def _seen_again(cross: tuple[Any, Sight] | None) -> tuple[Any, Sight] | None:
    """An encoder's states with a sight made from its places, which may be of some rows, or in another order."""
    if cross is None:
        return None
    return cross[0], look(cross[1].pattern, cross[1].queries, cross[1].keys)


def _positions_back(x: Float[Array, "B G S H"], length: int) -> Float[Array, "B G S H"]:
    return jnp.moveaxis(from_balanced(jnp.moveaxis(x, 2, 1), length), 1, 2)


def _layer_keys(key: PRNGKeyArray, run: int, count: int, length: int) -> Array:
    return jax.random.split(jax.random.fold_in(key, 10 + run), (count, length))


def _of_period(make: Sequence[Callable[[nnx.Rngs], Layer]]) -> Callable[[nnx.Rngs], nnx.Module]:
    return make[0] if len(make) == 1 else functools.partial(Period, make)
