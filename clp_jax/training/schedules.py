"""Learning rates as functions of the step."""

import dataclasses
from typing import Any, Protocol, runtime_checkable

import jax.numpy as jnp
import optax

from clp_jax.array_types import Array, Float, Int


@runtime_checkable
class Schedule(Protocol):
    """A learning rate for every step."""

    def __call__(self, step: Int[Array, ""] | int) -> Float[Array, ""] | float:
        """The learning rate of the update that follows `step` updates."""


@dataclasses.dataclass(frozen=True)
class Constant:
    """One value, reached linearly from 0.

    Attributes:
        value: the learning rate.
        warmup_steps: of the linear rise.
    """

    value: float
    warmup_steps: int = 0

    def __post_init__(self):
        _check(self, positive=("value",), counts=("warmup_steps",))

    def __call__(self, step: Int[Array, ""] | int) -> Float[Array, ""] | float:
        """See `Schedule`."""
        return self.value * _warmup(step, self.warmup_steps)


@dataclasses.dataclass(frozen=True)
class InverseSquareRoot:
    """T5's: ``value / sqrt(max(step, offset))``, flat until `offset` (arXiv 1910.10683, section 3.1.2).

    Attributes:
        value: the numerator; with the pretraining defaults the rate is 0.01 for 10,000 steps, then decays.
        offset: the step where the decay begins.
        warmup_steps: of a linear rise from 0 on top; T5 has none.
    """

    value: float = 1.0
    offset: int = 10_000
    warmup_steps: int = 0

    def __post_init__(self):
        _check(self, positive=("value", "offset"), counts=("warmup_steps",))

    def __call__(self, step: Int[Array, ""] | int) -> Float[Array, ""] | float:
        """See `Schedule`."""
        decay = 1 / jnp.sqrt(jnp.maximum(jnp.asarray(step, jnp.float32), float(self.offset)))
        return self.value * decay * _warmup(step, self.warmup_steps)


@dataclasses.dataclass(frozen=True)
class Cosine:
    """A linear rise, then half a cosine down.

    Attributes:
        value: the peak.
        total_steps: where the descent ends, the rise included; constant from there on.
        warmup_steps: of the rise from 0.
        final_fraction: of the peak, where the descent ends.
    """

    value: float
    total_steps: int
    warmup_steps: int = 0
    final_fraction: float = 0.0

    def __post_init__(self):
        _check(self, positive=("value", "total_steps"), counts=("warmup_steps",))
        _check_descent(self)

    def __call__(self, step: Int[Array, ""] | int) -> Float[Array, ""] | float:
        """See `Schedule`."""
        down = optax.cosine_decay_schedule(1.0, self.total_steps - self.warmup_steps, alpha=self.final_fraction)
        return self.value * _warmup(step, self.warmup_steps) * down(jnp.maximum(step - self.warmup_steps, 0))


@dataclasses.dataclass(frozen=True)
class Linear:
    """A linear rise, then a linear descent.

    Attributes:
        value: the peak.
        total_steps: where the descent ends, the rise included; constant from there on.
        warmup_steps: of the rise from 0.
        final_fraction: of the peak, where the descent ends.
    """

    value: float
    total_steps: int
    warmup_steps: int = 0
    final_fraction: float = 0.0

    def __post_init__(self):
        _check(self, positive=("value", "total_steps"), counts=("warmup_steps",))
        _check_descent(self)

    def __call__(self, step: Int[Array, ""] | int) -> Float[Array, ""] | float:
        """See `Schedule`."""
        down = optax.linear_schedule(1.0, self.final_fraction, self.total_steps - self.warmup_steps)
        return self.value * _warmup(step, self.warmup_steps) * down(jnp.maximum(step - self.warmup_steps, 0))


def as_schedule(learning_rate: Any) -> Schedule:
    """A schedule from a schedule or a number.

    Raises:
        ValueError: for anything else, or a number that is not positive.
    """
    if isinstance(learning_rate, bool) or not (callable(learning_rate) or isinstance(learning_rate, float | int)):
        raise ValueError(f"learning_rate is {learning_rate!r}: expected a positive number or a schedule.")
    return learning_rate if callable(learning_rate) else Constant(float(learning_rate))


def _warmup(step: Array | int, warmup_steps: int) -> Array | float:
    return jnp.minimum(1.0, jnp.asarray(step, jnp.float32) / warmup_steps) if warmup_steps else 1.0


def _check(schedule: object, positive: tuple[str, ...], counts: tuple[str, ...]) -> None:
    for name in positive:
        if not 0 < getattr(schedule, name) < float("inf"):
            raise ValueError(
                f"{type(schedule).__name__}.{name} is {getattr(schedule, name)}: expected a positive number."
            )
    for name in counts:
        if getattr(schedule, name) < 0:
            raise ValueError(f"{type(schedule).__name__}.{name} is {getattr(schedule, name)}: expected 0 or more.")


def _check_descent(schedule: Cosine | Linear) -> None:
    name = type(schedule).__name__
    if schedule.warmup_steps >= schedule.total_steps:
        raise ValueError(
            f"{name}: warmup_steps={schedule.warmup_steps} must be below total_steps={schedule.total_steps} (WARMUP_STEPS and "
            "NUM_STEPS in the gin files)."
        )
    if not 0 <= schedule.final_fraction <= 1:
        raise ValueError(f"{name}.final_fraction is {schedule.final_fraction}: expected a number in [0, 1].")
