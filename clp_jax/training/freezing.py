"""Training some of the parameters and leaving the rest alone."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from clp_jax.array_types import PyTree
from clp_jax.models.conditioning import Path, map_with_names
from clp_jax.partitioning import is_axes
from clp_jax.training.optimizers import OptimizerConfig
from clp_jax.training.schedules import Schedule


def is_gate(path: Path) -> bool:
    """The routers of mixtures of experts."""
    return "mlp" in path and "router" in path


def is_expert(path: Path) -> bool:
    """The experts themselves, without what all tokens see."""
    return "mlp" in path and "experts" in path


def is_moe(path: Path) -> bool:
    """Routers and experts."""
    return is_gate(path) or is_expert(path)


GROUPS: dict[str, Callable[[Path], bool]] = {
    "gate": is_gate,
    "experts": is_expert,
    "moe": is_moe,
    "all_but_gate": lambda path: not is_gate(path),
    "all_but_experts": lambda path: not is_expert(path),
    "all_but_moe": lambda path: not is_moe(path),
}


@dataclasses.dataclass(frozen=True)
class Frozen:
    """An optimizer that leaves a group of parameters as they are (Flan-MoE, arXiv 2305.14705, section 4).

    Attributes:
        optimizer: of the others; the frozen ones' gradients do not count in what it clips.
        group: a key of `GROUPS`.
    """

    optimizer: OptimizerConfig
    group: str

    def __post_init__(self):
        if self.group not in GROUPS:
            raise ValueError(f"Frozen.group is {self.group!r}: expected one of {', '.join(GROUPS)}.")

    @property
    def schedule(self) -> Schedule:
        """See `OptimizerConfig`."""
        return self.optimizer.schedule

    def build(self, logical_axes: PyTree) -> optax.GradientTransformation:
        """See `OptimizerConfig`.

        Raises:
            ValueError: when the group selects no parameter, or every one.
        """
        zero = optax.stateless(lambda updates, params: self._without(updates))
        if logical_axes is not None:
            chosen = jax.tree.leaves(
                map_with_names(lambda path, _: self._is_frozen(path), logical_axes, is_leaf=is_axes)
            )
            if all(chosen) or not any(chosen):
                which = "every parameter" if all(chosen) else "no parameter"
                raise ValueError(f"Frozen.group {self.group!r} selects {which} of this model: nothing to do.")
        return optax.chain(zero, self.optimizer.build(logical_axes), zero)

    def _is_frozen(self, path: Path) -> bool:
        return GROUPS[self.group](path)

    def _without(self, updates: PyTree) -> PyTree:
        return map_with_names(lambda path, x: jnp.zeros_like(x) if self._is_frozen(path) else x, updates)
