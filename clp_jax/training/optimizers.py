"""Optimizers as optax transformations: T5's Adafactor, and AdamW.

Layers and mixture components are stacked on leading axes of one array. Adafactor's factoring, clipping and scaling are
per parameter, so every function here reduces over the axes of one layer of one component only: a stacked model trains
as the unstacked one would.
"""

import dataclasses
import math
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from clp_jax.array_types import Array, Int, PyTree
from clp_jax.training.schedules import Schedule, as_schedule
from clp_jax.training.train_state import full_axes

STACKED_AXES = frozenset({"component", "layers", "expert"})


@runtime_checkable
class OptimizerConfig(Protocol):
    """Settings of an optimizer."""

    @property
    def schedule(self) -> Schedule:
        """The learning rate of each step."""

    def build(self, logical_axes: PyTree) -> optax.GradientTransformation:
        """The transformation.

        Args:
            logical_axes: names for each dimension of each parameter, which tell stacked axes apart; None has no names.
        """


@dataclasses.dataclass(frozen=True)
class Adafactor:
    """T5's Adafactor: no momentum, steps relative to the parameter's size (arXiv 1804.04235, algorithm 4).

    Attributes:
        learning_rate: a number or a schedule; relative to the root mean square of each parameter.
        decay_exponent: the second moment decays by ``1 - (step+1)^-decay_exponent``.
        min_dim_to_factor: the second moment is factored where the second-largest dimension is at least this.
        clipping_threshold: root mean square of an update before the learning rate, per parameter, at most.
        min_scale: a parameter counts as at least this large.
        multiply_by_scale: whether steps are relative to the parameter's size at all.
        epsilon: added to squared gradients.
        max_grad_norm: the gradient's global norm is clipped to this first; None leaves it alone, as T5 does.
    """

    learning_rate: Schedule | float = 1e-3
    decay_exponent: float = 0.8
    min_dim_to_factor: int = 128
    clipping_threshold: float = 1.0
    min_scale: float = 1e-3
    multiply_by_scale: bool = True
    epsilon: float = 1e-30
    max_grad_norm: float | None = None

    def __post_init__(self):
        as_schedule(self.learning_rate)
        _check_positive(
            self, "decay_exponent", "min_dim_to_factor", "clipping_threshold", "min_scale", "epsilon", "max_grad_norm"
        )

    @property
    def schedule(self) -> Schedule:
        """See `OptimizerConfig`."""
        return as_schedule(self.learning_rate)

    def build(self, logical_axes: PyTree) -> optax.GradientTransformation:
        """See `OptimizerConfig`."""
        scale = scale_by_parameter_rms(logical_axes, self.min_scale) if self.multiply_by_scale else optax.identity()
        return optax.chain(
            _clip(self.max_grad_norm),
            scale_by_factored_rms(logical_axes, self.decay_exponent, self.min_dim_to_factor, self.epsilon),
            clip_by_rms(logical_axes, self.clipping_threshold),
            scale,
            optax.scale_by_learning_rate(self.schedule),
        )


@dataclasses.dataclass(frozen=True)
class AdamW:
    """Adam with decoupled weight decay (arXiv 1711.05101); matrices decay, vectors (norms, biases) do not.

    Attributes:
        learning_rate: a number or a schedule.
        b1: decay of the first moment, in [0, 1).
        b2: decay of the second moment, in [0, 1).
        epsilon: added to the root of the second moment.
        weight_decay: times the learning rate, subtracted from the matrices.
        max_grad_norm: the gradient's global norm is clipped to this first; None leaves it alone.
    """

    learning_rate: Schedule | float = 1e-3
    b1: float = 0.9
    b2: float = 0.999
    epsilon: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float | None = 1.0

    def __post_init__(self):
        as_schedule(self.learning_rate)
        _check_positive(self, "epsilon", "max_grad_norm")
        for name in ("b1", "b2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"AdamW.{name} is {getattr(self, name)}: expected a number in [0, 1).")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"AdamW.weight_decay is {self.weight_decay}: expected 0 or more.")

    @property
    def schedule(self) -> Schedule:
        """See `OptimizerConfig`."""
        return as_schedule(self.learning_rate)

    def build(self, logical_axes: PyTree) -> optax.GradientTransformation:
        """See `OptimizerConfig`."""

        def decays(params: PyTree) -> PyTree:
            return jax.tree.map(lambda p, stacked: p.ndim - stacked >= 2, params, _stacked_dims(logical_axes, params))

        return optax.chain(
            _clip(self.max_grad_norm),
            optax.scale_by_adam(self.b1, self.b2, self.epsilon),
            optax.add_decayed_weights(self.weight_decay, decays) if self.weight_decay else optax.identity(),
            optax.scale_by_learning_rate(self.schedule),
        )


class FactoredState(NamedTuple):
    """Slots of `scale_by_factored_rms`.

    Attributes:
        count: ``int32[]`` updates so far.
        v_row: means of squared gradients over the larger dimension, which keeps its place with size 1.
        v_col: means over the smaller dimension.
        v: whole second moments, where a parameter is not factored. Slots that are not used are zeros of shape ``[1]``.
    """

    count: Int[Array, ""]  # type: ignore[assignment]  # Hides `tuple.count`.
    v_row: PyTree
    v_col: PyTree
    v: PyTree


def scale_by_factored_rms(
    logical_axes: PyTree, decay_exponent: float = 0.8, min_dim_to_factor: int = 128, epsilon: float = 1e-30
) -> optax.GradientTransformation:
    """Divides gradients by the root of a factored second moment, per parameter of a stack.

    Args:
        logical_axes: names that tell stacked axes apart.
        decay_exponent: the moment decays by ``1 - (step+1)^-decay_exponent``.
        min_dim_to_factor: dimensions below are not factored.
        epsilon: added to squared gradients.
    """

    def init(params: PyTree) -> FactoredState:
        def slots(p: Array, stacked: int) -> tuple[Array, Array, Array]:
            unused = jnp.zeros((1,), jnp.float32)
            dims = _factored_dims(p.shape, stacked, min_dim_to_factor)
            if dims is None:
                return unused, unused, jnp.zeros(p.shape, jnp.float32)
            small, large = dims
            row, col = (tuple(1 if i == d else n for i, n in enumerate(p.shape)) for d in (large, small))
            return jnp.zeros(row, jnp.float32), jnp.zeros(col, jnp.float32), unused

        made = jax.tree.map(slots, params, _stacked_dims(logical_axes, params))
        return FactoredState(jnp.zeros((), jnp.int32), *_unzip(params, made, 3))

    def update(grads: PyTree, state: FactoredState, params: PyTree) -> tuple[PyTree, FactoredState]:
        decay = 1 - (state.count + 1).astype(jnp.float32) ** -decay_exponent

        def one(g: Array, v_row: Array, v_col: Array, v: Array, stacked: int) -> tuple[Array, Array, Array, Array]:
            g = g.astype(jnp.float32)
            # Squares alone under a mean: XLA's CPU backend writes sums of other things before it takes theirs.
            square = jnp.square(g)
            dims = _factored_dims(g.shape, stacked, min_dim_to_factor)
            if dims is None:
                v = decay * v + (1 - decay) * (square + epsilon)
                return g * v**-0.5, v_row, v_col, v
            small, large = dims
            v_row = decay * v_row + (1 - decay) * (square.mean(large, keepdims=True) + epsilon)
            v_col = decay * v_col + (1 - decay) * (square.mean(small, keepdims=True) + epsilon)
            row_factor = (v_row / v_row.mean(small, keepdims=True)) ** -0.5
            return g * row_factor * v_col**-0.5, v_row, v_col, v

        made = jax.tree.map(one, grads, state.v_row, state.v_col, state.v, _stacked_dims(logical_axes, grads))
        scaled, *slots = _unzip(grads, made, 4)
        return scaled, FactoredState(optax.safe_increment(state.count), *slots)

    return optax.GradientTransformation(init, update)


def clip_by_rms(logical_axes: PyTree, threshold: float) -> optax.GradientTransformation:
    """Divides the update of each parameter of a stack by ``max(1, rms / threshold)``."""

    def clip(updates: PyTree, params: PyTree) -> PyTree:
        return jax.tree.map(
            lambda u, stacked: u / jnp.maximum(1.0, _rms(u, stacked) / threshold),
            updates,
            _stacked_dims(logical_axes, updates),
        )

    return optax.stateless(clip)


def scale_by_parameter_rms(logical_axes: PyTree, min_scale: float) -> optax.GradientTransformation:
    """Multiplies the update of each parameter of a stack by ``max(rms of the parameter, min_scale)``."""

    def scale(updates: PyTree, params: PyTree) -> PyTree:
        return jax.tree.map(
            lambda u, p, stacked: u * jnp.maximum(_rms(p.astype(jnp.float32), stacked), min_scale),
            updates,
            params,
            _stacked_dims(logical_axes, updates),
        )

    return optax.stateless(scale)


def _clip(max_grad_norm: float | None) -> optax.GradientTransformation:
    """Clips the global norm, as `optax.clip_by_global_norm` does but for rounding.

    That one divides every gradient, and XLA keeps quotients where several things read them: another copy of the gradient,
    written once and read by both moments and the step. What is multiplied is computed where it is read.
    """
    if max_grad_norm is None:
        return optax.identity()

    def update(updates: PyTree, params: PyTree | None = None) -> PyTree:
        del params
        # No quotient of 0 by 0. Where the norm is not finite, `Guards` leave the update out whatever it is.
        factor = max_grad_norm / jnp.maximum(optax.tree.norm(updates), max_grad_norm)
        return jax.tree.map(lambda g: g * factor.astype(g.dtype), updates)

    return optax.stateless(update)


def _rms(x: Array, stacked: int) -> Array:
    return jnp.sqrt(jnp.mean(jnp.square(x), axis=tuple(range(stacked, x.ndim)), keepdims=True))


def _factored_dims(shape: tuple[int, ...], stacked: int, min_dim: int) -> tuple[int, int] | None:
    """The two largest of the dimensions that are not stacked, the smaller first; of equals the first is the smaller."""
    if len(shape) - stacked < 2:
        return None
    small, large = (int(d) + stacked for d in np.argsort(shape[stacked:], kind="stable")[-2:])
    return (small, large) if shape[small] >= min_dim else None


def _stacked_dims(logical_axes: PyTree, params: PyTree) -> PyTree:
    """How many leading axes of each parameter are stacked."""

    def count(leaf: Any, names: tuple[str | None, ...]) -> int:
        stacked = [name in STACKED_AXES for name in names]
        depth = sum(stacked)
        if not all(stacked[:depth]):
            raise ValueError(f"logical axes {names}: stacked axes ({', '.join(sorted(STACKED_AXES))}) must come first.")
        return depth

    return jax.tree.map(count, params, full_axes(logical_axes, params))


def _unzip(like: PyTree, tree_of_tuples: PyTree, width: int) -> list[PyTree]:
    structure: Any = jax.tree.structure(like)
    rows = structure.flatten_up_to(tree_of_tuples)
    return [structure.unflatten([row[i] for row in rows]) for i in range(width)]


def _check_positive(config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{type(config).__name__}.{name} is {value}: expected a positive number.")
