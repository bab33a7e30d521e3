"""What incremental decoding remembers."""

import dataclasses

import jax

from clp_jax.array_types import Array, Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values of a decoder stack; ``R = B·n`` rows, ``n`` samples of each prompt.

    Policies that decode together have one cache, whose arrays lead with the policies.

    Attributes:
        keys: ``[L, R, T, N, H]`` of the tokens decoded so far.
        values: ``[L, R, T, N, H]``.
        cross_keys: ``[L, B, S, N, H]`` of the encoded prompt, shared by its samples.
        cross_values: ``[L, B, S, N, H]``.
        encoder_segments: ``int32[B, S]``, 0 on padding.
        index: ``int32[]``, the number of tokens decoded.
    """

    keys: Float[Array, "*M L R T N H"]
    values: Float[Array, "*M L R T N H"]
    cross_keys: Float[Array, "*M L B S N H"]
    cross_values: Float[Array, "*M L B S N H"]
    encoder_segments: Int[Array, "*M B S"]
    index: Int[Array, "*M"]
