"""Logit processors: what is done to the logits of the next token in view of the tokens before it.

They are called in order, before the strategy samples and before beam search adds up, and hold no arrays, so that a
configuration with processors stays hashable. What they do agrees with the processors of the same purpose in transformers.
"""

import dataclasses
from typing import Protocol, runtime_checkable

import jax.numpy as jnp

from clp_jax.array_types import Array, Float
from clp_jax.sampling.history import Before, History


@runtime_checkable
class LogitProcessor(Protocol):
    """Changes logits; hashable."""

    def __call__(self, logits: Float[Array, "R V"], history: History) -> Float[Array, "R V"]:
        """The changed logits, float32."""


def process(
    processors: tuple[LogitProcessor, ...], logits: Float[Array, "R V"], history: History
) -> Float[Array, "R V"]:
    """Applies processors, the first one first, in float32."""
    logits = logits.astype(jnp.float32)
    for processor in processors:
        logits = processor(logits, history)
    return logits


@dataclasses.dataclass(frozen=True)
class RepetitionPenalty:
    """Makes tokens that have occurred less likely: CTRL (arXiv 1909.05858, equation of section 4.1).

    Positive logits of such tokens are divided by the penalty, negative ones multiplied with it.

    Attributes:
        penalty: above 0; 1 changes nothing, more than 1 discourages.
        before: what counts as occurred besides the completion.
    """

    penalty: float
    before: Before = "start"

    def __post_init__(self):
        if not self.penalty > 0:
            raise ValueError(f"RepetitionPenalty.penalty is {self.penalty}: expected a positive number.")

    def __call__(self, logits: Float[Array, "R V"], history: History) -> Float[Array, "R V"]:
        """See `LogitProcessor`."""
        seen = history.span(self.before).counts(logits.shape[-1]) > 0
        penalised = jnp.where(logits < 0, logits * self.penalty, logits / self.penalty)
        return jnp.where(seen, penalised, logits)


@dataclasses.dataclass(frozen=True)
class OccurrencePenalty:
    """Subtracts from the logits of tokens that have occurred: ``presence·[count > 0] + frequency·count``.

    Attributes:
        presence: taken off once; negative numbers encourage.
        frequency: taken off for each occurrence; negative numbers encourage.
        before: what counts as occurred besides the completion.
    """

    presence: float = 0.0
    frequency: float = 0.0
    before: Before = "nothing"

    def __call__(self, logits: Float[Array, "R V"], history: History) -> Float[Array, "R V"]:
        """See `LogitProcessor`."""
        counts = history.span(self.before).counts(logits.shape[-1])
        return logits - self.presence * (counts > 0) - self.frequency * counts


@dataclasses.dataclass(frozen=True)
class NoRepeatNGram:
    """Bans tokens that would complete a sequence of tokens which has occurred.

    Attributes:
        size: tokens of a sequence; 1 bans every repetition.
        before: where sequences may have occurred, or begun, besides the completion.
    """

    size: int
    before: Before = "start"

    def __post_init__(self):
        if self.size < 1:
            raise ValueError(f"NoRepeatNGram.size is {self.size}: expected at least 1.")

    def __call__(self, logits: Float[Array, "R V"], history: History) -> Float[Array, "R V"]:
        """See `LogitProcessor`."""
        span = history.span(self.before)
        size, known = self.size - 1, span.tokens.shape[1]
        if size >= known:
            return logits
        # One comparison of the whole row for each token of a sequence but its last.
        follows = span.inside()[:, size:] & span.inside()[:, : known - size]
        for place in range(size):
            window = span.tokens[:, place : known - size + place]
            follows = follows & (window == span.last(size - place)[:, None])
        rows = jnp.arange(span.tokens.shape[0])[:, None]
        banned = jnp.where(follows, span.tokens[:, size:], logits.shape[-1])
        return logits.at[rows, banned].set(-jnp.inf, mode="drop")


@dataclasses.dataclass(frozen=True)
class BannedSequences:
    """Bans sequences of tokens: the last token of each, behind the others.

    Attributes:
        sequences: token ids; a sequence of one is never written.
        before: where a sequence may have begun, besides the completion.
    """

    sequences: tuple[tuple[int, ...], ...]
    before: Before = "start"

    def __post_init__(self):
        check_sequences("BannedSequences.sequences", self.sequences)

    def __call__(self, logits: Float[Array, "R V"], history: History) -> Float[Array, "R V"]:
        """See `LogitProcessor`."""
        highest = max((max(sequence) for sequence in self.sequences), default=0)
        if highest >= logits.shape[-1]:
            raise ValueError(
                f"BannedSequences.sequences has token {highest}: expected ids below the {logits.shape[-1]} of the vocabulary."
            )
        span = history.span(self.before)
        for *prefix, last in self.sequences:
            banned = jnp.where(span.ends_with(prefix), -jnp.inf, logits[:, last])
            logits = logits.at[:, last].set(banned)
        return logits


@dataclasses.dataclass(frozen=True)
class MinLength:
    """Bans the tokens that end a completion while it is short.

    Attributes:
        length: tokens of a completion at least, its end not among them.
    """

    length: int

    def __call__(self, logits: Float[Array, "R V"], history: History) -> Float[Array, "R V"]:
        """See `LogitProcessor`."""
        if self.length <= 0 or not history.eos_ids:
            return logits
        ends = jnp.asarray(history.eos_ids)
        banned = jnp.where((history.length < self.length)[:, None], -jnp.inf, logits[:, ends])
        return logits.at[:, ends].set(banned)


@dataclasses.dataclass(frozen=True)
class ForcedFirst:
    """Makes a completion begin with a token.

    Attributes:
        token: its id.
    """

    token: int

    def __call__(self, logits: Float[Array, "R V"], history: History) -> Float[Array, "R V"]:
        """See `LogitProcessor`."""
        return _forced(logits, history.length == 0, (self.token,))


@dataclasses.dataclass(frozen=True)
class ForcedLast:
    """Makes the last token that the limit allows one of a few.

    Attributes:
        tokens: their ids, all equally likely; the decoder's ends where empty.
    """

    tokens: tuple[int, ...] = ()

    def __call__(self, logits: Float[Array, "R V"], history: History) -> Float[Array, "R V"]:
        """See `LogitProcessor`."""
        tokens = self.tokens or history.eos_ids
        return _forced(logits, history.length == history.limit - 1, tokens) if tokens else logits


def _forced(logits: Array, now: Array, tokens: tuple[int, ...]) -> Array:
    """Logits of 0 for the tokens and ``-inf`` for all others, in the rows where it is time."""
    only = jnp.full(logits.shape[-1:], -jnp.inf).at[jnp.asarray(tokens)].set(0.0)
    return jnp.where(now[:, None], only[None], logits)


def check_sequences(name: str, sequences: tuple[tuple[int, ...], ...]) -> None:
    """Refuses what is not sequences of token ids.

    Raises:
        ValueError: for an empty sequence or a negative id.
    """
    for sequence in sequences:
        if not sequence or min(sequence) < 0:
            raise ValueError(f"{name} has {sequence!r}: expected one or more token ids of at least 0.")
