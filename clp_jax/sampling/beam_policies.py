"""The conventions of beam search: how length is paid for, what may finish, and when to stop looking.

Libraries differ in these three alone; with them one search is transformers', T5X's, or neither's.
"""

import dataclasses
import math
from typing import Protocol, runtime_checkable

import jax.numpy as jnp

from clp_jax.array_types import Array, Bool, Float, Int


@runtime_checkable
class LengthPenalty(Protocol):
    """What a sum of log-probabilities is divided by; hashable."""

    def __call__(self, length: int | Int[Array, ""]) -> Float[Array, ""]:
        """The divisor of a completion of `length` tokens, its end included."""


@dataclasses.dataclass(frozen=True)
class PowerPenalty:
    """``length^exponent``, as in transformers.

    Attributes:
        exponent: 0 ranks by log-probability, 1 by its mean over tokens; above 1 favours long completions, below 0 short ones.
    """

    exponent: float = 1.0

    def __call__(self, length: int | Int[Array, ""]) -> Float[Array, ""]:
        """See `LengthPenalty`."""
        return jnp.asarray(length, jnp.float32) ** self.exponent


@dataclasses.dataclass(frozen=True)
class BrevityPenalty:
    """``((5 + length) / 6)^alpha``: GNMT's (arXiv 1609.08144, equation 14), as in T5X.

    Attributes:
        alpha: 0 ranks by log-probability; more favours long completions.
    """

    alpha: float = 0.6

    def __call__(self, length: int | Int[Array, ""]) -> Float[Array, ""]:
        """See `LengthPenalty`."""
        return ((5.0 + jnp.asarray(length, jnp.float32)) / 6.0) ** self.alpha


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far the search of every prompt is.

    Attributes:
        live: ``float32[B]`` log-probability of the best beam that has not finished.
        pool: ``float32[B, pool]`` scores of finished completions, ``-inf`` where there is none yet.
        length: tokens of the live beams.
        max_length: tokens they may have.
        penalty: turns log-probabilities into scores.
    """

    live: Float[Array, "B"]
    pool: Float[Array, "B pool"]
    length: Int[Array, ""]
    max_length: int
    penalty: LengthPenalty


@runtime_checkable
class Stopping(Protocol):
    """When the search of a prompt is over; hashable."""

    def pool_size(self, num_beams: int) -> int:
        """How many finished completions are kept."""

    def goes_on(self, search: Progress) -> Bool[Array, "B"]:
        """Which prompts are searched further."""


@dataclasses.dataclass(frozen=True)
class FirstFinished:
    """Stops when enough completions have finished: ``early_stopping=True`` of transformers.

    Attributes:
        patience: how many are enough, in beams; more search longer (arXiv 2204.05424, ``p·k`` of algorithm 1).
    """

    patience: float = 1.0

    def __post_init__(self):
        if not self.patience > 0:
            raise ValueError(f"FirstFinished.patience is {self.patience}: expected a positive number.")

    def pool_size(self, num_beams: int) -> int:
        """See `Stopping`."""
        return math.ceil(self.patience * num_beams)

    def goes_on(self, search: Progress) -> Bool[Array, "B"]:
        """See `Stopping`."""
        return jnp.isneginf(search.pool).any(axis=-1)


@dataclasses.dataclass(frozen=True)
class CurrentBound:
    """Stops when no live beam would be kept if it finished as it is: ``early_stopping=False`` of transformers.

    A heuristic where the penalty favours long completions.
    """

    def pool_size(self, num_beams: int) -> int:
        """See `Stopping`."""
        return num_beams

    def goes_on(self, search: Progress) -> Bool[Array, "B"]:
        """See `Stopping`."""
        return search.live / search.penalty(search.length) > jnp.min(search.pool, axis=-1)


@dataclasses.dataclass(frozen=True)
class ReachableBound:
    """Stops when no live beam can be kept whatever it still writes: ``early_stopping="never"`` of transformers, and T5X's."""

    def pool_size(self, num_beams: int) -> int:
        """See `Stopping`."""
        return num_beams

    def goes_on(self, search: Progress) -> Bool[Array, "B"]:
        """See `Stopping`."""
        # Log-probabilities only fall, and penalties are monotonous: the best end is now or at the limit.
        ends = (search.live / search.penalty(length) for length in (search.length, search.max_length))
        return jnp.maximum(*ends) > jnp.min(search.pool, axis=-1)


@dataclasses.dataclass(frozen=True)
class Finishing:
    """Which candidates may finish; the defaults are transformers'.

    Attributes:
        spare: whether candidates behind the best `num_beams` of a step may finish too, as in T5X.
        at_limit: whether beams that reach the maximum length count as finished. Where they do not and nothing of a prompt has
            finished, its live beams are returned with their log-probabilities as scores, as in T5X.
    """

    spare: bool = False
    at_limit: bool = True
