"""Decoding one token at a time with a cache of keys and values; the layers are those of the whole forward."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from clp_jax.array_types import Array, Float, Int
from clp_jax.models.config import LayerKind
from clp_jax.models.layer import KeysValues, View
from clp_jax.models.transformer import Stack, layers_of
from clp_jax.nn.attention import look
from clp_jax.nn.attention_dense import Keys, Quantized, Sight, quantize
from clp_jax.nn.kv_cache import Cache, LayerCache
from clp_jax.nn.linear import Linear
from clp_jax.nn.moe import ExpertKernels
from clp_jax.nn.stack import cut, depth, is_loose, scan_layers
from clp_jax.nn.visibility import Pattern, Places

# A row that has not begun sees nothing: its start lies behind every clock.
NEVER = 2**30


def init_cache(
    stack: Stack,
    prompt_keys_values: Sequence[Any],
    prompts: Places,
    offsets: Int[Array, "B"],
    *,
    max_length: int,
    num_samples: int,
    int8: bool = False,
) -> Cache:
    """Makes room for the tokens to come.

    Args:
        stack: the decoder's.
        prompt_keys_values: for each run of periods and each layer of the period, keys and values ``[L, B, G, S, H]``.
        prompts: where they stand.
        offsets: the position of the first token that is fed.
        max_length: tokens that are fed at most.
        num_samples: rows of each prompt.
        int8: whether keys and values are kept in eight bits.
    """
    rows = offsets.shape[0] * num_samples
    kinds = stack.kinds[: stack.period]
    stacks = []
    for run, layers in zip(stack.runs(), prompt_keys_values, strict=True):
        for piece in range(depth(run)) if _is_loose(stack, run) else [slice(None)]:
            caches = []
            for kind, kv in zip(kinds, layers, strict=False):
                key, value = (x[piece] for x in kv)
                length = max_length if kind.window is None else min(max_length, kind.window)
                *lead, _, groups, _, head_dim = key.shape
                room = jnp.zeros((*lead, rows, groups, length, head_dim), key.dtype)
                stored = (quantize(x) for x in (room, room, key, value)) if int8 else (room, room, key, value)
                caches.append(LayerCache(*stored))
            stacks.append(tuple(caches))
    return Cache(
        stacks=tuple(stacks),
        prompts=prompts,
        index=jnp.zeros((), jnp.int32),
        start=jnp.zeros((rows,), jnp.int32),
        offsets=jnp.repeat(offsets, num_samples),
    )


def loop_weights(stack: Stack) -> tuple[Any, ...]:
    """The layers' weights as a loop over tokens wants them, made once, before it.

    Shallow stacks are cut (`clp_jax.nn.stack.cut`). Kernels have the type of activations, which they are multiplied in: a loop
    would read, and gather from other devices, all of their bytes for each token, and round them each time.
    """
    pieces = (piece for run in stack.runs() for piece in (cut(run) if _is_loose(stack, run) else (run,)))
    return tuple(_rounded(piece, jnp.dtype(stack.config.dtype)) for piece in pieces)


def _rounded(piece: Any, dtype: jnp.dtype) -> Any:
    owners = (Linear, ExpertKernels)
    kernels = {(*path, "kernel") for path, node in nnx.iter_graph(piece) if isinstance(node, owners)}
    return nnx.map_state(
        lambda path, value: value.replace(value[...].astype(dtype)) if path in kernels else value, nnx.state(piece)
    )


def decode_step(
    stack: Stack, x: Float[Array, "R 1 D"], cache: Cache, weights: tuple[Any, ...], *, cross: Pattern | None
) -> tuple[Float[Array, "R D"], Cache]:
    """The states that follow one more embedded token of every row.

    Args:
        stack: the decoder's.
        x: the embedded tokens.
        cache: of the tokens before.
        weights: `loop_weights` of the stack.
        cross: how the keys of an encoder are seen, apart from the decoder's own; None where a prompt's keys are the
            decoder's too.
    """
    positions = (cache.offsets + cache.index - cache.start)[:, None]
    prompt_queries = _of_prompts(cache, positions)
    present = jnp.ones((1, 1), bool)
    runs = [
        (nnx.graphdef(run), _is_loose(stack, run))
        for run in stack.runs()
        for _ in range(depth(run) if _is_loose(stack, run) else 1)
    ]
    stacks = []
    for (graph, loose), state, piece in zip(runs, weights, cache.stacks, strict=True):
        period = nnx.merge(graph, state)
        kinds = stack.kinds[: len(layers_of(period))]
        views = [
            _view(stack, kind, layer, cache, positions, None if cross else prompt_queries)
            for kind, layer in zip(kinds, piece, strict=True)
        ]
        cross_sight = look(cross, prompt_queries, cache.prompts, dense=True) if cross else None

        def body(period: Any, carry: Any, inputs: Any, views: list[View] = views, sight: Sight | None = cross_sight):
            x, owned = carry
            number, prompts = inputs
            after = []
            for place, (layer, view) in enumerate(zip(layers_of(period), views, strict=True)):
                written: list[Any] = []
                x, _, _ = layer(
                    x,
                    view,
                    present,
                    prefix=None if cross else prompts[place],
                    cross=(prompts[place], sight) if sight is not None else None,
                    cache=_writer(owned[place], number, cache.index, written),
                )
                after.append(written[0])
            return (x, after), None

        own = [(layer.keys, layer.values) for layer in piece]
        prompts = [(layer.prompt_keys, layer.prompt_values) for layer in piece]
        if loose:
            (x, own), _ = body(period, (x, own), (None, prompts))
        else:
            numbers, unroll = jnp.arange(depth(period)), stack.config.scan_unroll
            (x, own), _ = scan_layers(period, body, (x, own), (numbers, prompts), unroll=unroll, size=len(kinds))
        layers = tuple(
            dataclasses.replace(layer, keys=keys, values=values)
            for layer, (keys, values) in zip(piece, own, strict=True)
        )
        stacks.append(layers)
    return stack.norm(x)[:, 0], dataclasses.replace(cache, stacks=tuple(stacks), index=cache.index + 1)


def _is_loose(stack: Stack, run: Any) -> bool:
    return is_loose(run, stack.config.scan_unroll, len(layers_of(run)))


def _of_prompts(cache: Cache, positions: Int[Array, "R 1"]) -> Places:
    """Where the tokens stand as their prompts see them: the samples of a prompt one after another."""
    positions = positions.reshape(cache.prompts.segments.shape[0], -1)
    return Places(positions, jnp.ones_like(positions))


def _view(
    stack: Stack,
    kind: LayerKind,
    layer: LayerCache,
    cache: Cache,
    positions: Int[Array, "R 1"],
    prompt_queries: Places | None,
) -> View:
    """What one layer sees: its ring of own keys, each at the clock when it was written, and the prompt."""
    length = jax.tree.leaves(layer.keys)[0].shape[-2]
    times = cache.index - (cache.index - jnp.arange(length)) % length
    begun = (times[None] >= cache.start[:, None]).astype(jnp.int32)
    # Distances alone count, and clocks tell them: the same for all rows.
    now = Places(cache.index[None, None], jnp.ones_like(positions))
    pattern, table = stack.pattern(kind), stack.table()
    return View(
        sight=look(pattern, now, Places(times[None], begun), table, dense=True),
        prefix=None if prompt_queries is None else look(pattern, prompt_queries, cache.prompts, table, dense=True),
        turned=stack.rotation(kind, positions),
    )


def empty_slots(cache: Cache) -> Cache:
    """The cache of prompts that are padding alone, as one of slots to be filled: no row has begun."""
    return dataclasses.replace(cache, start=jnp.full_like(cache.start, NEVER))


def insert(cache: Cache, slots: Int[Array, "b"], fresh: Cache) -> Cache:
    """Puts prompts that were just read into slots.

    Args:
        cache: of all slots, at any clock.
        slots: of the prompts; numbers beyond the last slot are left out.
        fresh: of ``b`` prompts, with as many samples, padded to no more tokens; nothing is decoded yet.
    """
    length = cache.prompts.segments.shape[1]
    samples = cache.start.shape[0] // cache.prompts.segments.shape[0]
    rows = (slots[:, None] * samples + jnp.arange(samples)[None]).reshape(-1)

    def put(old: Array, new: Array) -> Array:
        missing = [(0, 0)] * new.ndim
        missing[-2] = (0, length - new.shape[-2])
        return old.at[..., slots, :, :, :].set(jnp.pad(new, missing), mode="drop")

    def prompts(old: LayerCache, new: LayerCache) -> LayerCache:
        pairs = ((old.prompt_keys, new.prompt_keys), (old.prompt_values, new.prompt_values))
        keys, values = (jax.tree.map(put, *pair) for pair in pairs)
        return dataclasses.replace(old, prompt_keys=keys, prompt_values=values)

    segments = jnp.pad(fresh.prompts.segments, ((0, 0), (0, length - fresh.prompts.segments.shape[1])))
    return dataclasses.replace(
        cache,
        stacks=tuple(tuple(map(prompts, *pair)) for pair in zip(cache.stacks, fresh.stacks, strict=True)),
        prompts=Places(cache.prompts.positions, cache.prompts.segments.at[slots].set(segments, mode="drop")),
        start=cache.start.at[rows].set(cache.index, mode="drop"),
        offsets=cache.offsets.at[rows].set(fresh.offsets, mode="drop"),
    )


def _writer(
    owned: tuple[Any, Any], layer: Int[Array, ""] | None, index: Int[Array, ""], written: list[Any]
) -> Callable[[KeysValues, View], list[Keys]]:
    """Puts a token's keys and values into the ring of one layer of a stack, or of a layer by itself.

    `written` gets the arrays as the cache holds them.
    """

    def write(new: KeysValues, view: View) -> list[Keys]:
        def put(old: Array, x: Array) -> Array:
            zero = jnp.zeros_like(index)
            x, at = x.astype(old.dtype), (zero, zero, index % old.shape[-2], zero)
            if layer is None:
                return jax.lax.dynamic_update_slice(old, x, at)
            return jax.lax.dynamic_update_slice(old, x[None], (layer, *at))

        def mine(x: Array) -> Array:
            return x if layer is None else jax.lax.dynamic_index_in_dim(x, layer, keepdims=False)

        stored = [quantize(x) if isinstance(old, Quantized) else x for x, old in zip(new, owned, strict=True)]
        arrays = [jax.tree.map(put, old, x) for old, x in zip(owned, stored, strict=True)]
        written.append(tuple(arrays))
        keys, values = (jax.tree.map(mine, array) for array in arrays)
        return [Keys(keys, values, view.sight)]

    return write
