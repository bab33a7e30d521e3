"""Beam search on any decoder, inside one jitted program; with groups, diverse beam search (arXiv 1610.02424)."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from clp_jax.array_types import Array, Float, Int
from clp_jax.partitioning import constrain, over_rows
from clp_jax.sampling.beam_policies import (
    BrevityPenalty,
    CurrentBound,
    Finishing,
    LengthPenalty,
    PowerPenalty,
    Progress,
    ReachableBound,
    Stopping,
)
from clp_jax.sampling.decoder import Decoder
from clp_jax.sampling.generate import Completions, check_limits, has_ended
from clp_jax.sampling.history import History, align_right
from clp_jax.sampling.processors import LogitProcessor, MinLength, check_sequences, process


@dataclasses.dataclass(frozen=True)
class BeamConfig:
    """What to search for; the defaults are transformers'.

    Attributes:
        max_length: tokens of a completion at most, the end of sequence included.
        num_beams: beams of each prompt, of all groups together.
        num_returned: completions returned of each prompt, the best first.
        length_penalty: what the sum of log-probabilities is divided by.
        stopping: when the search of a prompt is over: `FirstFinished`, `CurrentBound`, `ReachableBound`.
        finishing: which candidates may finish.
        processors: what changes log-probabilities before they are added up, in order; the result is not normalised again.
        stop: sequences of token ids; a completion ends with the first that it writes, which stays part of it.
        min_length: tokens of a completion at least before its end.
        num_groups: groups of beams, searched one after the other at each step.
        diversity: taken off the log-probability of a token for each beam of an earlier group that has just written it
            (Hamming diversity, section 4 of the paper); a group whose search is over writes padding. Completions' scores
            keep what was taken off.
    """

    max_length: int
    num_beams: int = 4
    num_returned: int = 1
    length_penalty: LengthPenalty = dataclasses.field(default=PowerPenalty())
    stopping: Stopping = dataclasses.field(default=CurrentBound())
    finishing: Finishing = dataclasses.field(default=Finishing())
    processors: tuple[LogitProcessor, ...] = ()
    stop: tuple[tuple[int, ...], ...] = ()
    min_length: int = 0
    num_groups: int = 1
    diversity: float = 0.0

    def __post_init__(self):
        check_limits("BeamConfig", self.max_length, self.min_length)
        check_sequences("BeamConfig.stop", self.stop)
        if self.num_groups < 1 or self.num_beams < 1 or self.num_beams % self.num_groups:
            raise ValueError(
                f"BeamConfig.num_beams is {self.num_beams}, num_groups {self.num_groups}: expected groups of equal size, "
                "one beam in each at least."
            )
        if self.diversity < 0 or (self.diversity > 0 and self.num_groups == 1):
            raise ValueError(
                f"BeamConfig.diversity is {self.diversity} for {self.num_groups} groups: expected 0 or more, and 0 for one "
                "group, which has no earlier one to differ from."
            )
        most = min(self.num_beams, self.num_groups * self.pool_size)
        if not 1 <= self.num_returned <= most:
            raise ValueError(
                f"BeamConfig.num_returned is {self.num_returned}: expected 1 to {most}, what the search keeps."
            )

    @property
    def group_size(self) -> int:
        """Beams of a group."""
        return self.num_beams // self.num_groups

    @property
    def pool_size(self) -> int:
        """Finished completions kept of a group."""
        return self.stopping.pool_size(self.group_size)


def t5x_beam_config(max_length: int, num_beams: int = 4, alpha: float = 0.6, num_returned: int = 1) -> BeamConfig:
    """Beam search as T5X decodes: GNMT's penalty, and only an end of sequence finishes.

    Args:
        max_length: tokens of a completion at most.
        num_beams: beams of each prompt.
        alpha: of the penalty.
        num_returned: completions of each prompt.
    """
    return BeamConfig(
        max_length,
        num_beams,
        num_returned,
        length_penalty=BrevityPenalty(alpha),
        stopping=ReachableBound(),
        finishing=Finishing(spare=True, at_limit=False),
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Beams:
    """What beam search found.

    Attributes:
        completions: the `num_returned` best of each prompt, prompt-major, the best first. A row for which the search found
            nothing is all padding.
        scores: ``float32[R]`` sums of processed log-probabilities, divided by the length penalty; ``-inf`` for such a row.
    """

    completions: Completions
    scores: Float[Array, "R"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Hypotheses:
    """Completions under way or finished, with any leading dimensions and a last one ``h`` of hypotheses.

    Live ones have log-probabilities as scores; ``-inf`` marks one that is not there.
    """

    tokens: Int[Array, "*lead h T"]
    log_probs: Float[Array, "*lead h T"]
    lengths: Int[Array, "*lead h"]
    scores: Float[Array, "*lead h"]

    def take(self, chosen: Array) -> "_Hypotheses":
        """Some of them, by their numbers ``[..., k]``."""

        def pick(x: Array) -> Array:
            index = chosen.reshape(chosen.shape + (1,) * (x.ndim - chosen.ndim))
            return jnp.take_along_axis(x, index, axis=chosen.ndim - 1)

        return jax.tree.map(pick, self)

    def best(self, number: int) -> tuple["_Hypotheses", Array]:
        """Those with the highest scores, the highest first, and which they were."""
        chosen = _top_k(self.scores, number)[1]
        return self.take(chosen), chosen


def beam_search(decoder: Decoder, inputs: Int[Array, "B S"], config: BeamConfig) -> Beams:
    """Searches for the completions with the highest scores; pure, for use inside `jit`.

    At each step the best ``(1 + e)·k`` candidates of the ``k·V`` are looked at, ``e`` being the ways to end, so that ``k`` of
    them go on. The loop ends when the search of every prompt is over.

    Args:
        decoder: what gives the logits; beams are the samples of its prompts.
        inputs: prompts, padded with the decoder's `pad_id`.
        config: what to search for.
    """
    inputs = constrain(inputs, "batch", None)
    batch, groups, size = inputs.shape[0], config.num_groups, config.group_size
    first, state = decoder.start(inputs, config.max_length, config.num_beams)
    prompts = jnp.repeat(align_right(inputs, decoder.pad_id), config.num_beams, axis=0)
    processors = (MinLength(config.min_length), *config.processors)
    limit = jnp.full(first.shape, config.max_length, jnp.int32)

    def unfinished(carry):
        t, _, _, _, is_open, _ = carry
        return (t < config.max_length) & jnp.any(is_open)

    def body(carry):
        t, last, live, pool, is_open, state = carry
        logits, state = decoder.step(last, state)
        log_probs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
        tokens = _rows(live.tokens)
        history = History(prompts, first, tokens, jnp.full(first.shape, t), limit, decoder.pad_id, decoder.eos_ids)
        changed = process(processors, log_probs, history)

        def one_group(taken, xs):
            # `taken` counts the tokens that earlier groups have just written.
            *own, changed = xs
            was_open = own[2]
            live, pool, is_open, source = _advance(
                config, decoder, t, *own, changed - config.diversity * taken[:, None]
            )
            written = jnp.where(was_open[:, None], live.tokens[:, :, t], decoder.pad_id)
            written = jax.nn.one_hot(written, taken.shape[-1])
            written = jnp.where(jnp.isneginf(live.scores)[..., None], 0.0, written).sum(axis=1)
            return taken + written, (live, pool, is_open, source)

        by_group = [_by_group(x, batch, groups) for x in (log_probs, changed)]
        nothing = jnp.zeros((batch, logits.shape[-1]))
        _, (live, pool, is_open, source) = jax.lax.scan(one_group, nothing, (live, pool, is_open, *by_group))
        own = jnp.arange(batch)[None, :, None] * config.num_beams + jnp.arange(groups)[:, None, None] * size
        state = decoder.select(state, _rows(own + source))
        return t + 1, _rows(live.tokens[..., t]), live, pool, is_open, state

    live = _nothing((groups, batch, size), config.max_length, decoder.pad_id)
    # Beams of a group start alike: all but one wait until it has gone different ways.
    live = dataclasses.replace(live, scores=live.scores.at[..., 0].set(0.0))
    pool = _nothing((groups, batch, config.pool_size), config.max_length, decoder.pad_id)
    start = (jnp.zeros((), jnp.int32), first, live, pool, jnp.ones((groups, batch), bool), state)
    _, _, live, pool, _, _ = jax.lax.while_loop(unfinished, body, start)
    return _ranked(config, decoder.pad_id, live, pool)


def _advance(config: BeamConfig, decoder: Decoder, t: Array, *own: Any) -> tuple[Any, Any, Array, Array]:
    """One step of one group: its live and finished hypotheses, whether it goes on, and where its beams came from."""
    live, pool, is_open, log_probs, changed = own
    size, vocab_size = log_probs.shape[1:]
    ways_to_end = len(decoder.eos_ids) + len(config.stop)
    scores = (live.scores[..., None] + changed).reshape(-1, size * vocab_size)
    top, flat = _top_k(scores, min(max(2, 1 + ways_to_end), vocab_size) * size)
    source, token = flat // vocab_size, (flat % vocab_size).astype(jnp.int32)
    log_prob = jnp.take_along_axis(log_probs.reshape(scores.shape), flat, axis=1)
    candidates = live.take(source)
    candidates = _Hypotheses(
        tokens=candidates.tokens.at[:, :, t].set(token),
        log_probs=candidates.log_probs.at[:, :, t].set(log_prob),
        lengths=jnp.full(token.shape, t + 1),
        scores=top,
    )
    shape, flat_tokens = token.shape, candidates.tokens.reshape(-1, config.max_length)
    lengths = candidates.lengths.reshape(-1)
    ended = has_ended(flat_tokens, lengths, decoder.eos_ids, config.stop, config.min_length).reshape(shape)

    going_on = dataclasses.replace(candidates, scores=jnp.where(ended, -jnp.inf, top))
    live, chosen = going_on.best(size)

    finishes = ended | (t + 1 == config.max_length) if config.finishing.at_limit else ended
    if not config.finishing.spare:
        finishes = finishes & (jnp.arange(shape[1]) < size)[None]
    scores = jnp.where(finishes & is_open[:, None], top / config.length_penalty(t + 1), -jnp.inf)
    finished = dataclasses.replace(candidates, scores=scores)
    pool, _ = jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), pool, finished).best(config.pool_size)
    search = Progress(live.scores[:, 0], pool.scores, t + 1, config.max_length, config.length_penalty)
    return live, pool, is_open & config.stopping.goes_on(search), jnp.take_along_axis(source, chosen, axis=1)


def _ranked(config: BeamConfig, pad_id: int, live: Any, pool: Any) -> Beams:
    """The best hypotheses of each prompt, of all groups; live ones where none has finished, unless the limit finishes."""
    # [groups, B, h, ...] to [B, groups·h, ...]
    live, pool = jax.tree.map(
        lambda x: jnp.moveaxis(x, 0, 1).reshape(x.shape[1], x.shape[0] * x.shape[2], *x.shape[3:]), (live, pool)
    )
    found, _ = pool.best(config.num_returned)
    if not config.finishing.at_limit:
        others, _ = live.best(config.num_returned)
        none = jnp.isneginf(found.scores[:, 0])
        found = jax.tree.map(lambda a, b: jnp.where(none.reshape(-1, *[1] * (a.ndim - 1)), b, a), found, others)
    lengths = jnp.where(jnp.isneginf(found.scores), 0, found.lengths)
    written = jnp.arange(config.max_length)[None, None] < lengths[..., None]
    completions = Completions(
        tokens=jnp.where(written, found.tokens, pad_id).reshape(-1, config.max_length),
        log_probs=jnp.where(written, found.log_probs, 0.0).reshape(-1, config.max_length),
        mask=written.astype(jnp.float32).reshape(-1, config.max_length),
    )
    return Beams(completions, found.scores.reshape(-1))


def _top_k(scores: Float[Array, "B c"], number: int) -> tuple[Array, Array]:
    return over_rows(lambda own: tuple(jax.lax.top_k(own, number)), scores)


def _nothing(lead: tuple[int, ...], max_length: int, pad_id: int) -> Any:
    """Hypotheses that are not there."""
    return _Hypotheses(
        tokens=jnp.full((*lead, max_length), pad_id, jnp.int32),
        log_probs=jnp.zeros((*lead, max_length), jnp.float32),
        lengths=jnp.zeros(lead, jnp.int32),
        scores=jnp.full(lead, -jnp.inf, jnp.float32),
    )


def _rows(x: Array) -> Array:
    """From ``[groups, B, beams, ...]`` to the decoder's rows."""
    return jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[3:])


def _by_group(x: Array, batch: int, groups: int) -> Array:
    """From the decoder's rows to ``[groups, B, beams, ...]``."""
    return jnp.moveaxis(x.reshape(batch, groups, -1, *x.shape[1:]), 1, 0)
