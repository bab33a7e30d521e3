"""Generation: one loop for every decoder and strategy, inside one jitted program."""

import dataclasses

import jax
import jax.numpy as jnp

from clp_jax.array_types import Array, Float, Int, Key, PRNGKeyArray
from clp_jax.data.vocabulary import EOS_ID, PAD_ID
from clp_jax.objectives.log_probs import token_log_probs
from clp_jax.objectives.masking import completion_mask
from clp_jax.sampling.decoder import Decoder
from clp_jax.sampling.strategies import Greedy, Sampling


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """What to generate.

    Attributes:
        max_length: tokens of a completion at most, the end of sequence included.
        strategy: how a token is chosen.
    """

    max_length: int
    strategy: Sampling | Greedy = Sampling()

    def __post_init__(self):
        if self.max_length < 1:
            raise ValueError(f"SamplingConfig.max_length is {self.max_length}: expected at least 1.")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Completions:
    """Generated tokens; ``R = B·n`` rows, prompt-major.

    Attributes:
        tokens: ``int32[R, T]``, up to and including the end of sequence, then 0.
        log_probs: ``float32[R, T]`` of the tokens under the decoder at temperature 1, unfiltered; 0 on padding.
        mask: ``float32[R, T]``, 1 on tokens, 0 on padding.
    """

    tokens: Int[Array, "R T"]
    log_probs: Float[Array, "R T"]
    mask: Float[Array, "R T"]


def row_keys(key: PRNGKeyArray, rows: int) -> Key[Array, "R"]:
    """One key for each row: ``fold_in(key, row)``, whatever the number of rows."""
    return jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(rows))


def generate(
    decoder: Decoder,
    inputs: Int[Array, "B S"],
    *,
    keys: Key[Array, "R"],
    config: SamplingConfig,
    num_samples: int = 1,
) -> Completions:
    """Generates completions; pure, for use inside `jit`, where it never leaves the device.

    The loop ends when every row has ended. Row ``i`` uses ``fold_in(keys[i], position)`` alone, so that its completion
    does not depend on the batch it is in.

    Args:
        decoder: what gives the logits.
        inputs: prompts, padded with 0.
        keys: one random key for each of the ``R = B·num_samples`` rows, prompt-major (`row_keys`).
        config: maximum length and strategy.
        num_samples: completions of each prompt.
    """
    rows, length = inputs.shape[0] * num_samples, config.max_length
    first, state = decoder.start(inputs, length, num_samples)

    def unfinished(carry):
        t, _, done, *_ = carry
        return (t < length) & ~jnp.all(done)

    def body(carry):
        t, last, done, tokens, log_probs, state = carry
        logits, state = decoder.step(last, state)
        chosen = config.strategy(jax.vmap(lambda key: jax.random.fold_in(key, t))(keys), logits)
        chosen = jnp.where(done, PAD_ID, chosen)
        log_prob = jnp.where(done, 0.0, token_log_probs(logits, chosen))
        tokens = jax.lax.dynamic_update_slice(tokens, chosen[:, None], (jnp.zeros_like(t), t))
        log_probs = jax.lax.dynamic_update_slice(log_probs, log_prob[:, None], (jnp.zeros_like(t), t))
        return t + 1, chosen, done | (chosen == EOS_ID), tokens, log_probs, state

    start = (
        jnp.zeros((), jnp.int32),
        first,
        jnp.zeros((rows,), bool),
        jnp.full((rows, length), PAD_ID, jnp.int32),
        jnp.zeros((rows, length), jnp.float32),
        state,
    )
    _, _, _, tokens, log_probs, _ = jax.lax.while_loop(unfinished, body, start)
    return Completions(tokens=tokens, log_probs=log_probs, mask=completion_mask(tokens, EOS_ID))
