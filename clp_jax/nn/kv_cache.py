"""What incremental decoding remembers."""

import dataclasses

import jax

from clp_jax.array_types import Array, Float, Int
from clp_jax.nn.attention_dense import Quantized
from clp_jax.nn.visibility import Places
from clp_jax.partitioning import constrain


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerCache:
    """Keys and values of layers at one place in a stack's period; ``R = B·n`` rows, ``n`` samples of each prompt.

    The layers of a loose stack (`clp_jax.nn.stack.is_loose`) have caches of their own, without the axis of layers: XLA
    writes those in place, where it would copy a layer and its axis of 1 at every token.

    Attributes:
        keys: ``[L, R, G, T, H]`` of the tokens decoded so far: a ring, slot ``index mod T`` holds the newest.
        values: ``[L, R, G, T, H]``.
        prompt_keys: ``[L, B, G, S, H]`` of the prompt, shared by its samples.
        prompt_values: ``[L, B, G, S, H]``.
    """

    keys: Float[Array, "*L R G T H"] | Quantized
    values: Float[Array, "*L R G T H"] | Quantized
    prompt_keys: Float[Array, "*L B G S H"] | Quantized
    prompt_values: Float[Array, "*L B G S H"] | Quantized


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """All a decoder needs for the next token.

    Policies that decode together have one cache, whose arrays lead with the policies.

    Attributes:
        stacks: for each stack of periods, or each period of a loose one, and each layer of the period.
        prompts: where the keys of the prompts stand.
        index: ``int32[]``, a clock that counts decoded tokens.
        start: ``int32[R]``, the clock when each row began.
        offsets: ``int32[R]``, the position of the first token that each row fed.
    """

    stacks: tuple[tuple[LayerCache, ...], ...]
    prompts: Places
    index: Int[Array, "*M"]
    start: Int[Array, "*M R"]
    offsets: Int[Array, "*M R"]


def constrain_cache(cache: Cache) -> Cache:
    """Shares rows and heads out over the active mesh: what starts as zeros says nothing of where it should be."""

    def keys(x: Array) -> Array:
        return constrain(x, *[None] * (x.ndim - 4), "batch", "act_heads", None, None)

    def prompts(x: Array) -> Array:
        return constrain(x, *[None] * (x.ndim - 2), "batch", None)

    def rows(x: Array) -> Array:
        return constrain(x, *[None] * (x.ndim - 1), "batch")

    return dataclasses.replace(
        cache,
        stacks=jax.tree.map(keys, cache.stacks),
        prompts=jax.tree.map(prompts, cache.prompts),
        start=rows(cache.start),
        offsets=rows(cache.offsets),
    )
