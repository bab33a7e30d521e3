"""Updates that are left out: those of a non-finite loss or gradient, and those of a spike.

The verdict is made inside the jitted update, of replicated scalars and arrays that are part of the train state: it is the same
on all devices, and a run that goes on judges as the uninterrupted one would.
"""

import dataclasses
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from clp_jax.array_types import Array, Float

_Arrays: TypeAlias = Any  # Shapes or shardings in place of the arrays, in the trees that describe a state.

# A spread counts as at least this share of the mean: where all values are nearly the same, a little more is no spike.
LEAST_SPREAD = 0.01


class GuardError(RuntimeError):
    """Training can't go on from the parameters it has; the last checkpoint is intact."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GuardState:
    """What the verdict on a step depends on, besides the step itself; all zeros before the first.

    Attributes:
        recent: ``float32[W, 2]`` loss and gradient norm of the last steps that were made, a ring.
        counts: ``int32[4]``, see `seen`, `skipped`, `non_finite` and `spikes`; one array, as each is a file of a checkpoint.
    """

    recent: _Arrays
    counts: _Arrays

    @property
    def seen(self) -> Array:
        """Steps that entered the ring since it began."""
        return self.counts[0]

    @property
    def skipped(self) -> Array:
        """Updates left out in all."""
        return self.counts[1]

    @property
    def non_finite(self) -> Array:
        """Non-finite steps in a row, up to now."""
        return self.counts[2]

    @property
    def spikes(self) -> Array:
        """Spikes in a row, up to now."""
        return self.counts[3]


@dataclasses.dataclass(frozen=True)
class Guards:
    """When an update is left out.

    A step whose loss or gradient norm is not finite is skipped: parameters, slots and moving average stay as they were, the
    step's number and its examples are used up. So is a spike: a loss or gradient norm above the mean of the last `window` made
    steps by more than `sigmas` standard deviations. A level that lasts is no spike: after `patience` spikes in a row the
    update is made, and the window begins anew.

    Attributes:
        window: made steps that spikes are measured against; before so many, there are no spikes.
        sigmas: standard deviations, each at least `LEAST_SPREAD` of the mean; None skips no spikes.
        patience: non-finite steps in a row that end the run; spikes in a row that are a new level.
    """

    window: int = 128
    sigmas: float | None = 6.0
    patience: int = 10

    def __post_init__(self):
        for name, least in (("window", 2), ("patience", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"Guards.{name} is {getattr(self, name)}: expected at least {least}.")
        if self.sigmas is not None and not self.sigmas > 0:
            raise ValueError(f"Guards.sigmas is {self.sigmas}: expected a positive number, or None to skip no spikes.")

    def init(self) -> GuardState:
        """The state before the first step."""
        return GuardState(jnp.zeros((self.window, 2), jnp.float32), jnp.zeros((4,), jnp.int32))

    def judge(
        self, state: GuardState, loss: Float[Array, ""], grad_norm: Float[Array, ""], weight: Float[Array, ""]
    ) -> tuple[Array, GuardState]:
        """Whether to make an update, and what later verdicts depend on; pure, for use inside `jit`.

        Args:
            state: before the step.
            loss: ``float32[]`` mean of the batch.
            grad_norm: ``float32[]`` before clipping.
            weight: ``float32[]``; a batch of weight 0 tells nothing, and does not enter the window.

        Returns:
            ``bool[]``, and the next state.
        """
        values = jnp.stack([loss, grad_norm])
        finite = jnp.isfinite(values).all()
        spike = finite & (state.seen >= self.window) & self._is_high(state.recent, values)
        lasting = spike & (state.spikes + 1 >= self.patience)
        make = finite & (~spike | lasting)
        seen = jnp.where(lasting, 0, state.seen)
        enters = make & (weight > 0)
        place = seen % self.window
        recent = state.recent.at[place].set(jnp.where(enters, values, state.recent[place]))
        non_finite = jnp.where(finite, 0, state.non_finite + 1)
        spikes = jnp.where(spike & ~lasting, state.spikes + 1, 0)
        counts = jnp.stack([seen + enters, state.skipped + ~make, non_finite, spikes])
        return make, GuardState(recent, counts)

    def _is_high(self, recent: Array, values: Array) -> Array:
        if self.sigmas is None:
            return jnp.zeros((), bool)
        mean, spread = recent.mean(axis=0), recent.std(axis=0)
        return (values > mean + self.sigmas * jnp.maximum(spread, LEAST_SPREAD * jnp.abs(mean))).any()
