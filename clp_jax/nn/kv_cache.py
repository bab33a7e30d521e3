"""What incremental decoding remembers."""

import dataclasses
from typing import Any

import jax

from clp_jax.array_types import Array, Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StackCache:
    """Layers that run one after another, with their keys and values; ``R = B·n`` rows, ``n`` samples of each prompt.

    Attributes:
        weights: of the layers.
        keys: ``[L, R, N, T, H]`` of the tokens decoded so far.
        values: ``[L, R, N, T, H]``.
        cross_keys: ``[L, B, N, S, H]`` of the encoded prompt, shared by its samples.
        cross_values: ``[L, B, N, S, H]``.
    """

    weights: Any
    keys: Float[Array, "*M L R N T H"]
    values: Float[Array, "*M L R N T H"]
    cross_keys: Float[Array, "*M L B N S H"]
    cross_values: Float[Array, "*M L B N S H"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """All a decoder needs for the next token.

    Policies that decode together have one cache, whose arrays lead with the policies.

    Attributes:
        stacks: one for a deep decoder; one for each layer of a shallow one (`clp_jax.nn.stack.cut`).
        encoder_segments: ``int32[B, S]``, 0 on padding.
        index: ``int32[]``, the number of tokens decoded.
    """

    stacks: tuple[StackCache, ...]
    encoder_segments: Int[Array, "*M B S"]
    index: Int[Array, "*M"]
