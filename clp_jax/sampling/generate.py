"""Generation: one loop for every decoder and strategy, inside one jitted program."""

import dataclasses

import jax
import jax.numpy as jnp

from clp_jax.array_types import Array, Bool, Float, Int, Key, PRNGKeyArray, UInt32
from clp_jax.objectives.log_probs import token_log_probs
from clp_jax.partitioning import constrain
from clp_jax.sampling.decoder import Decoder
from clp_jax.sampling.history import History, Span, align_right, is_one_of
from clp_jax.sampling.processors import LogitProcessor, MinLength, check_sequences, process
from clp_jax.sampling.strategies import Greedy, Sampling


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """What to generate.

    Attributes:
        max_length: tokens of a completion at most, the end of sequence included.
        strategy: how a token is chosen.
        processors: what changes the logits before the strategy, in order.
        stop: sequences of token ids; a completion ends with the first that it writes, which stays part of it.
        min_length: tokens of a completion at least before its end; a shorter one does not stop either.
    """

    max_length: int
    strategy: Sampling | Greedy = Sampling()
    processors: tuple[LogitProcessor, ...] = ()
    stop: tuple[tuple[int, ...], ...] = ()
    min_length: int = 0

    def __post_init__(self):
        check_limits("SamplingConfig", self.max_length, self.min_length)
        check_sequences("SamplingConfig.stop", self.stop)

    def processed(self, logits: Float[Array, "R V"], history: History) -> Float[Array, "R V"]:
        """The logits that the strategy sees."""
        return process((MinLength(self.min_length), *self.processors), logits, history)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Completions:
    """Generated tokens; ``R = B·n`` rows, prompt-major.

    Attributes:
        tokens: ``int32[R, T]``, up to and including the end, then padding.
        log_probs: ``float32[R, T]`` of the tokens under the decoder at temperature 1, unfiltered; 0 on padding.
        mask: ``float32[R, T]``, 1 on tokens, 0 on padding.
    """

    tokens: Int[Array, "R T"]
    log_probs: Float[Array, "R T"]
    mask: Float[Array, "R T"]


def row_keys(key: PRNGKeyArray, rows: int) -> Key[Array, "R"]:
    """One key for each row: ``fold_in(key, row)``, whatever the number of rows."""
    return jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(rows))


def request_keys(seeds: UInt32[Array, "B"], num_samples: int = 1) -> Key[Array, "R"]:
    """One key for each row of requests with seeds of their own: ``fold_in(key(seed), sample)``.

    With them a completion depends on its prompt, its seed and its number among the samples alone.

    Args:
        seeds: ``uint32[B]``, one for each prompt.
        num_samples: completions of each prompt, ``n``.

    Returns:
        ``key[R]``, ``R = B·n``, prompt-major.
    """
    samples = jnp.arange(num_samples)
    keys = jax.vmap(lambda seed: jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(samples))(seeds)
    return keys.reshape(-1)


def check_limits(name: str, max_length: int, min_length: int) -> None:
    """Refuses lengths that no completion has.

    Raises:
        ValueError: for a maximum below 1, or a minimum beyond it or below 0.
    """
    if max_length < 1:
        raise ValueError(f"{name}.max_length is {max_length}: expected at least 1.")
    if not 0 <= min_length <= max_length:
        raise ValueError(f"{name}.min_length is {min_length}: expected 0 to max_length, {max_length}.")


def has_ended(
    tokens: Int[Array, "R T"],
    length: Int[Array, "R"],
    eos_ids: tuple[int, ...],
    stop: tuple[tuple[int, ...], ...],
    min_length: int,
) -> Bool[Array, "R"]:
    """Whether completions end with their last token: it is an end of sequence, or the last of a stop sequence.

    Args:
        tokens: ``int32[R, T]`` completions, anything behind their length.
        length: ``int32[R]`` at least 1.
        eos_ids: tokens that end a completion.
        stop: sequences that end a completion, once it has `min_length` tokens.
        min_length: of the completion, for `stop`.
    """
    span = Span(tokens, jnp.zeros_like(length), length)
    ended = is_one_of(span.last(1), eos_ids)
    for sequence in stop:
        ended = ended | (span.ends_with(sequence) & (length >= min_length))
    return ended


def next_token(
    config: SamplingConfig, logits: Float[Array, "R V"], keys: Key[Array, "R"], history: History
) -> tuple[Int[Array, "R"], Float[Array, "R"]]:
    """The next token of every row and its log-probability, unfiltered; row ``i`` uses ``fold_in(keys[i], length[i])``."""
    keys = jax.vmap(jax.random.fold_in)(keys, history.length)
    chosen = config.strategy(keys, config.processed(logits, history))
    return chosen, token_log_probs(logits, chosen)


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
        inputs: prompts, padded with the decoder's `pad_id`.
        keys: one random key for each of the ``R = B·num_samples`` rows, prompt-major (`row_keys`, `request_keys`).
        config: lengths, strategy, processors, stop sequences.
        num_samples: completions of each prompt.
    """
    inputs = constrain(inputs, "batch", None)
    rows, length, pad_id = inputs.shape[0] * num_samples, config.max_length, decoder.pad_id
    first, state = decoder.start(inputs, length, num_samples)
    prompts = jnp.repeat(align_right(inputs, pad_id), num_samples, axis=0)
    limit = jnp.full((rows,), length, jnp.int32)

    def unfinished(carry):
        t, _, done, *_ = carry
        return (t < length) & ~jnp.all(done)

    def body(carry):
        t, last, done, lengths, tokens, log_probs, state = carry
        logits, state = decoder.step(last, state)
        written = jnp.full((rows,), t)
        history = History(prompts, first, tokens, written, limit, pad_id, decoder.eos_ids)
        chosen, log_prob = next_token(config, logits, keys, history)
        chosen, log_prob = jnp.where(done, pad_id, chosen), jnp.where(done, 0.0, log_prob)
        tokens = jax.lax.dynamic_update_slice(tokens, chosen[:, None], (jnp.zeros_like(t), t))
        log_probs = jax.lax.dynamic_update_slice(log_probs, log_prob[:, None], (jnp.zeros_like(t), t))
        lengths = lengths + ~done
        ended = has_ended(tokens, written + 1, decoder.eos_ids, config.stop, config.min_length)
        return t + 1, chosen, done | ended, lengths, tokens, log_probs, state

    start = (
        jnp.zeros((), jnp.int32),
        first,
        jnp.zeros((rows,), bool),
        jnp.zeros((rows,), jnp.int32),
        jnp.full((rows, length), pad_id, jnp.int32),
        jnp.zeros((rows, length), jnp.float32),
        state,
    )
    _, _, _, lengths, tokens, log_probs, _ = jax.lax.while_loop(unfinished, body, start)
    mask = jnp.arange(length)[None] < lengths[:, None]
    return Completions(tokens=tokens, log_probs=log_probs, mask=mask.astype(jnp.float32))
