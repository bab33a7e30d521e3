"""What one step of training turns into the next: parameters, optimizer state and random numbers."""

import dataclasses
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from clp_jax.array_types import Params, PRNGKeyArray, PyTree
from clp_jax.partitioning import is_axes
from clp_jax.training.guards import GuardState

_Arrays: TypeAlias = Any  # Shapes or shardings in place of the arrays, in the trees that describe a state.


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that a checkpoint must hold to go on, besides the position in the data.

    Attributes:
        step: ``int32[]`` steps so far; `guard` counts those whose update was left out.
        params: the trainable parameters.
        opt_state: the optimizer's slots, sharded as the parameters they belong to.
        ema: the exponential moving average of the parameters, or None.
        rng: ``uint32[2]`` data of the run's random key; it never changes, keys are derived from it and the step.
        guard: what decides whether the next update is made.
    """

    step: _Arrays
    params: _Arrays
    opt_state: _Arrays
    ema: _Arrays | None
    rng: _Arrays
    guard: GuardState

    def key(self, purpose: int) -> PRNGKeyArray:
        """The random key of this step for one purpose: ``fold_in(fold_in(seed, step), purpose)``."""
        return jax.random.fold_in(jax.random.fold_in(jax.random.wrap_key_data(self.rng), self.step), purpose)

    @property
    def averaged_params(self) -> Params:
        """The moving average where there is one, otherwise the parameters: what is evaluated and served."""
        return self.params if self.ema is None else self.ema


def new_state(params: Params, opt_state: Any, seed: int, with_ema: bool, guard: GuardState) -> TrainState:
    """The state before the first step.

    Args:
        params: the parameters to start from.
        opt_state: the optimizer's fresh state.
        seed: decides every random number of the run.
        with_ema: whether to keep a moving average, which starts as a copy of the parameters.
        guard: its first state.
    """
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=opt_state,
        # A copy: donating a state whose average shares buffers with its parameters would free them twice.
        ema=jax.tree.map(jnp.copy, params) if with_ema else None,
        rng=jax.random.key_data(jax.random.key(np.uint32(seed))),
        guard=guard,
    )


def full_axes(logical_axes: PyTree, params: PyTree) -> PyTree:
    """Logical axes for every parameter, from a tree that may stop early.

    Args:
        logical_axes: a tree of tuples of logical names; None, in place of a leaf or of a whole subtree, is replicated.
        params: arrays or shapes.

    Returns:
        A tree as `params`, with a tuple of names for each leaf.

    Raises:
        ValueError: when the two trees do not match, or a tuple has not one name for each dimension.
    """

    def fill(axes: Any, subtree: Any, path: str) -> Any:
        if axes is None:
            return jax.tree.map(lambda leaf: (None,) * len(leaf.shape), subtree)
        if is_axes(axes):
            if not hasattr(subtree, "shape") or len(subtree.shape) != len(axes):
                shape = getattr(subtree, "shape", "a subtree")
                raise ValueError(f"logical axes {axes} of {path or 'the parameters'} do not fit {shape}.")
            return axes
        if not isinstance(subtree, dict) or set(axes) != set(subtree):
            names = sorted(subtree) if isinstance(subtree, dict) else "an array"
            raise ValueError(
                f"logical axes name {sorted(axes)} under {path or 'the root'}, the parameters have {names}."
            )
        return {name: fill(axes[name], subtree[name], f"{path}/{name}".lstrip("/")) for name in subtree}

    return fill(logical_axes, params, "")
