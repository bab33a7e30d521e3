"""Where every layer's parameters lie in a policy's tree.

Layers are stacked, and a pattern of layers that repeats is stacked as a whole (`clp_jax.models.transformer.Stack`); other
frameworks name one tensor for each layer, and often for each expert. A slot is such a piece.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from clp_jax.array_types import Params
from clp_jax.models.config import ModelConfig
from clp_jax.models.policy import Policy

# Runs of a stack, in the order of their layers.
_RUNS = ("layers", "rest")


@dataclasses.dataclass(frozen=True)
class Slot:
    """A piece of a policy's parameters.

    Attributes:
        path: of the leaf that it is a piece of.
        index: of the leaf's leading axes; none where the piece is the whole leaf.
        shape: of the piece.
        name: what it is, whatever the layer: ``"decoder/self_attention/query/kernel"``, ``"logits_head/kernel"``.
        layer: counted from 0 through its stack; None outside of layers.
        expert: counted from 0; None outside of experts.
    """

    path: tuple[str, ...]
    index: tuple[int, ...]
    shape: tuple[int, ...]
    name: str
    layer: int | None = None
    expert: int | None = None


def slots(config: ModelConfig, *, split_experts: bool) -> list[Slot]:
    """Every piece of a policy's parameters, each once; together they are the whole tree.

    Args:
        config: of the policy.
        split_experts: whether every expert is a piece of its own, or those of a layer are one.
    """
    leaves = dict(flatten(Policy(config).abstract()))
    return [piece for path, leaf in leaves.items() for piece in _pieces(path, leaf.shape, leaves, split_experts)]


def _pieces(
    path: tuple[str, ...], shape: tuple[int, ...], leaves: Mapping[tuple[str, ...], Any], split_experts: bool
) -> Iterator[Slot]:
    if len(path) < 3 or path[1] not in _RUNS:
        yield Slot(path, (), shape, "/".join(path))
        return
    stack, run, *inner = path
    place = _place(inner[0])
    name = "/".join([stack, *(inner if place is None else inner[1:])])
    width = _width(leaves, stack, run)
    before = 0
    if run == "rest":
        before = _width(leaves, stack, "layers") * _depth(leaves, stack, "layers")
    for period in range(shape[0]):
        layer = before + period * width + (place or 0)
        if split_experts and "experts" in inner:
            for expert in range(shape[1]):
                yield Slot(path, (period, expert), shape[2:], name, layer, expert)
        else:
            yield Slot(path, (period,), shape[1:], name, layer)


def _place(name: str) -> int | None:
    """Of a layer within a period; None where a period is one layer."""
    return int(name.removeprefix("layer_")) if name.startswith("layer_") else None


def _width(leaves: Mapping[tuple[str, ...], Any], stack: str, run: str) -> int:
    """Layers of one period."""
    return len({path[2] for path in leaves if path[:2] == (stack, run) and _place(path[2]) is not None}) or 1


def _depth(leaves: Mapping[tuple[str, ...], Any], stack: str, run: str) -> int:
    """Periods of a run."""
    return next(leaf.shape[0] for path, leaf in leaves.items() if path[:2] == (stack, run))


def flatten(tree: Params, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Paths and leaves of a nested dictionary, in its own order."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from flatten(dict(value), (*path, str(key)))
        else:
            yield (*path, str(key)), value


def unflatten(leaves: Mapping[tuple[str, ...], Any]) -> Params:
    """The nested dictionary that `flatten` came from."""
    tree: Params = {}
    for path, leaf in leaves.items():
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = leaf
    return tree
