"""Best-of-n: several samples of each prompt, of which the one with the highest score is kept."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from clp_jax.array_types import Array, Float, Int, Key
from clp_jax.objectives.masking import masked_mean, masked_sum
from clp_jax.sampling.decoder import Decoder
from clp_jax.sampling.generate import Completions, SamplingConfig, generate


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Best:
    """The best completion of each prompt.

    Attributes:
        tokens: ``int32[B, T]``, up to and including the end, then padding.
        log_probs: ``float32[B, T]`` of the tokens under the decoder at temperature 1, unfiltered; 0 on padding.
        mask: ``float32[B, T]``, 1 on tokens, 0 on padding.
        chosen: ``int32[B]`` which sample it was.
        scores: ``float32[B, n]`` of all samples.
    """

    tokens: Int[Array, "B T"]
    log_probs: Float[Array, "B T"]
    mask: Float[Array, "B T"]
    chosen: Int[Array, "B"]
    scores: Float[Array, "B n"]


def total_log_prob(completions: Completions) -> Float[Array, "R"]:
    """The log-probability of each completion under its decoder."""
    return masked_sum(completions.log_probs, completions.mask, axis=-1)


def mean_log_prob(completions: Completions) -> Float[Array, "R"]:
    """The log-probability of each completion under its decoder, divided by its tokens."""
    return masked_mean(completions.log_probs, completions.mask, axis=-1)


def best_of(completions: Completions, scores: Float[Array, "R"], num_samples: int) -> Best:
    """The completion of each prompt with the highest score, the first of those that share it.

    Args:
        completions: ``R = B·n`` rows, prompt-major.
        scores: ``float[R]``, computed wherever, higher is better; no number at all (NaN) is worse than all.
        num_samples: completions of each prompt, ``n``.

    Raises:
        ValueError: where the rows are not `num_samples` of each prompt.
    """
    rows = scores.shape[0]
    if num_samples < 1 or rows % num_samples:
        raise ValueError(f"num_samples is {num_samples}: expected a divisor of the {rows} completions.")
    table = scores.astype(jnp.float32).reshape(-1, num_samples)
    chosen = jnp.argmax(jnp.where(jnp.isnan(table), -jnp.inf, table), axis=-1).astype(jnp.int32)
    row = jnp.arange(table.shape[0]) * num_samples + chosen
    return Best(completions.tokens[row], completions.log_probs[row], completions.mask[row], chosen, table)


def generate_best(
    decoder: Decoder,
    inputs: Int[Array, "B S"],
    *,
    keys: Key[Array, "R"],
    config: SamplingConfig,
    num_samples: int,
    score: Callable[[Completions], Float[Array, "R"]] = total_log_prob,
) -> Best:
    """Samples completions and keeps the best of each prompt; pure, for use inside `jit`.

    Scores that need the text are computed between `generate` and `best_of`.

    Args:
        decoder: what gives the logits.
        inputs: prompts, padded with the decoder's `pad_id`.
        keys: one random key for each of the ``R = B·num_samples`` rows, prompt-major.
        config: lengths, strategy, processors, stop sequences.
        num_samples: completions of each prompt.
        score: gives each completion a number, higher is better.
    """
    completions = generate(decoder, inputs, keys=keys, config=config, num_samples=num_samples)
    return best_of(completions, score(completions), num_samples)
