"""What a reader yields: frozen pytrees of numpy arrays that lead with examples."""

import dataclasses

import jax
import jax.numpy as jnp

from clp_jax.array_types import ArrayLike, Float, Int, stand_in


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """Examples of an encoder-decoder, packed or not; padding is token 0, segment 0, weight 0.

    Attributes:
        inputs: ``int32[B, S]``.
        input_segments: ``int32[B, S]``, 1, 2, ... for the examples of a row.
        input_positions: ``int32[B, S]``, from 0 within each example.
        decoder_inputs: ``int32[B, T]``, the targets shifted right within each example, behind the policy's start.
        targets: ``int32[B, T]``.
        target_segments: ``int32[B, T]``.
        target_positions: ``int32[B, T]``.
        loss_weights: ``float32[B, T]``.
        example_ids: ``int32[B]`` index of the record, -1 for rows that fill up a last batch.
    """

    inputs: Int[ArrayLike, "B S"]
    input_segments: Int[ArrayLike, "B S"]
    input_positions: Int[ArrayLike, "B S"]
    decoder_inputs: Int[ArrayLike, "B T"]
    targets: Int[ArrayLike, "B T"]
    target_segments: Int[ArrayLike, "B T"]
    target_positions: Int[ArrayLike, "B T"]
    loss_weights: Float[ArrayLike, "B T"]
    example_ids: Int[ArrayLike, "B"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PromptBatch:
    """Prompts and reference completions, one example a row, padded with 0.

    Attributes:
        inputs: ``int32[B, S]``.
        targets: ``int32[B, T]``.
        example_ids: ``int32[B]`` index of the record, -1 for rows that fill up a last batch.
    """

    inputs: Int[ArrayLike, "B S"]
    targets: Int[ArrayLike, "B T"]
    example_ids: Int[ArrayLike, "B"]


def abstract_batch(rows: int, inputs: int, targets: int) -> Batch:
    """The shapes and types of a `Batch`.

    Args:
        rows: ``B``.
        inputs: ``S``.
        targets: ``T``.
    """
    ids, weight = jnp.dtype("int32"), jnp.dtype("float32")
    lengths = {name: inputs if name.startswith("input") else targets for name in Batch.__dataclass_fields__}
    shapes = {name: stand_in((rows, length), ids) for name, length in lengths.items()}
    shapes |= {
        "loss_weights": stand_in((rows, targets), weight),
        "example_ids": stand_in((rows,), ids),
    }
    return Batch(**shapes)
