"""The functional edge of a model: parameters are plain nested dictionaries of arrays everywhere outside it."""

import dataclasses
import functools
import math
from typing import Any

import jax
from flax import nnx

from clp_jax.array_types import Params, PRNGKeyArray
from clp_jax.models.config import ModelConfig
from clp_jax.models.heads import ScorerConfig


@dataclasses.dataclass(frozen=True)
class Policy:
    """A model as functions of its parameters.

    Attributes:
        config: what it is made of; hashable, and its ``build(rngs)`` gives a fresh `nnx.Module` whose parameters carry
            logical axes.
    """

    config: Any

    @functools.cached_property
    def _split(self) -> tuple[Any, Any]:
        return nnx.split(nnx.eval_shape(lambda: self.config.build(nnx.Rngs(0))))

    def init(self, key: PRNGKeyArray) -> Params:
        """Fresh parameters."""
        return self._init(key)

    @functools.cached_property
    def _init(self):
        return jax.jit(lambda key: nnx.to_pure_dict(nnx.state(self.config.build(nnx.Rngs(params=key)))))

    def bind(self, params: Params) -> Any:
        """The module with these parameters; call it inside jitted functions.

        Raises:
            ValueError: when a parameter is missing, unknown, or has another shape.
        """
        graph, abstract = self._split
        expected = nnx.to_pure_dict(abstract)
        check_parameters(expected, params)
        state = nnx.map_state(lambda path, v: v.replace(_at(params, path)), abstract)
        return nnx.merge(graph, state)

    def abstract(self) -> Params:
        """Shapes and types of the parameters, without making them."""
        return nnx.to_pure_dict(self._split[1])

    def logical_axes(self) -> Params:
        """Logical axis names, a tuple for each parameter."""
        state = nnx.map_state(lambda _, v: v.get_metadata("logical_axes"), self._split[1])
        return nnx.to_pure_dict(state)

    def num_params(self) -> int:
        """The number of parameters."""
        return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(self.abstract()))

    def served(self) -> "Policy":
        """The policy as it answers and is evaluated: experts share their room within a row, whatever shared it in training."""
        routed = isinstance(self.config, ModelConfig | ScorerConfig)
        return Policy(self.config.routed_by_row()) if routed else self


def check_parameters(expected: Params, params: Params) -> None:
    """Checks names and shapes of parameters against those of a model.

    Raises:
        ValueError: naming the first difference.
    """
    want = {_name(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(expected)}
    have = {_name(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    for name in sorted(want.keys() | have.keys()):
        if name not in have:
            raise ValueError(f"parameter {name!r} is missing: these are the parameters of another model.")
        if name not in want:
            raise ValueError(f"parameter {name!r} is unknown: these are the parameters of another model.")
        if want[name] != have[name]:
            raise ValueError(f"parameter {name!r} has shape {have[name]}, the model's has {want[name]}.")


def _name(path: tuple) -> str:
    return "/".join(str(getattr(key, "key", key)) for key in path)


def _at(tree: Params, path: tuple) -> Any:
    for key in path:
        tree = tree[key]
    return tree
