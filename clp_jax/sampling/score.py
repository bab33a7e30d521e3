"""Scoring: the log-probabilities of given completions, by the same forward that trains and samples."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from clp_jax.array_types import Array, Float, Int
from clp_jax.nn.vocabulary_loss import chunked_token_statistics
from clp_jax.objectives.masking import completion_mask


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Forced:
    """A model's view of given completions.

    Attributes:
        log_probs: ``float32[R, T]`` of the tokens; 0 on padding.
        hidden: ``[R, T, D]`` the states before the head, each from the tokens before it only.
        routing: what the routers did; none without experts.
    """

    log_probs: Float[Array, "R T"]
    hidden: Float[Array, "R T D"]
    routing: tuple[Any, ...] = ()


def shift_right(tokens: Int[Array, "R T"], start_id: int) -> Int[Array, "R T"]:
    """Decoder inputs of completions: the start token, then all but the last."""
    return jnp.pad(tokens[:, :-1], ((0, 0), (1, 0)), constant_values=start_id)


def teacher_force(
    model: Any, inputs: Int[Array, "B S"], tokens: Int[Array, "R T"], mask: Float[Array, "R T"] | None = None
) -> Forced:
    """Log-probabilities and states of completions, ``n = R/B`` of each prompt; every prompt is read once.

    Args:
        model: a bound policy.
        inputs: prompts, padded at the end.
        tokens: completions, padded at the end.
        mask: 1 on the tokens that count; by default those up to and including the first end of sequence.
    """
    if mask is None:
        mask = completion_mask(tokens, model.config.eos_ids)
    # Up to the last that counts: experts make no room for what is behind it.
    present = jnp.cumsum(mask[:, ::-1], axis=1)[:, ::-1] > 0
    decoded = model.decode(shift_right(tokens, model.config.start_id), model.encode(inputs), present=present)
    log_probs = chunked_token_statistics(decoded.hidden, model.logits, tokens).log_probs * mask
    return Forced(log_probs=log_probs, hidden=decoded.hidden, routing=decoded.routing)


def score(
    model: Any, inputs: Int[Array, "B S"], tokens: Int[Array, "R T"], mask: Float[Array, "R T"] | None = None
) -> Float[Array, "R T"]:
    """The log-probabilities of `teacher_force`."""
    return teacher_force(model, inputs, tokens, mask).log_probs
