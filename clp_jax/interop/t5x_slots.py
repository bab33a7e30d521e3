"""Adafactor's state between T5X's arrays and ours, for layers by themselves, scanned ones, and experts.

T5X factors a matrix along its two dimensions, the smaller one the row. Where layers are scanned, or experts stacked, it
factors each of them by itself, whatever its size, and the row is the dimension of the model. Ours are always told by size:
the two means are the same ones, but may change places.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from clp_jax.array_types import Params
from clp_jax.interop.arrays import Source
from clp_jax.interop.links import Link, part_of
from clp_jax.interop.slots import flatten, unflatten
from clp_jax.models.policy import Policy

_STACKED = frozenset({"layers", "expert"})
# Kernels whose last dimension is the model's; of others it is the first.
_ONTO_MODEL = ("/out/kernel", "/wo/kernel")
_UNUSED = (1,)
_ROW, _COLUMN, _WHOLE = "v_row", "v_col", "v"


@dataclasses.dataclass(frozen=True)
class AdafactorSlots:
    """What T5's Adafactor keeps, as `clp_jax.training.optimizers.FactoredState` holds it; trees of numpy arrays.

    Attributes:
        count: updates so far.
        v_row: means of squared gradients over the larger dimension, which keeps its place with size 1.
        v_col: means over the smaller dimension.
        v: whole second moments. Slots that are not used are zeros of shape ``[1]``.
    """

    count: int
    v_row: Params
    v_col: Params
    v: Params


@dataclasses.dataclass(frozen=True)
class _Parameter:
    """A parameter of T5X's, whose slots are to be read or written.

    Attributes:
        link: to the piece of a leaf that it is.
        shape: of the piece.
        stacked: leading dimensions of the piece that are layers or experts.
        leading: sizes of the leaf's dimensions before the piece.
    """

    link: Link
    shape: tuple[int, ...]
    stacked: int
    leading: tuple[int, ...]

    @property
    def order(self) -> tuple[int, ...]:
        """T5X's array is ``piece.transpose(order)``."""
        return self.link.order or tuple(range(len(self.shape)))

    def averaged(self) -> dict[str, tuple[str, int]]:
        """Of each of our factored slots, T5X's name and the dimension of the piece that is averaged out."""
        small, large = (int(d) + self.stacked for d in np.argsort(self.shape[self.stacked :], kind="stable")[-2:])
        row = small
        if self.stacked:
            row = len(self.shape) - 1 if self.link.name.endswith(_ONTO_MODEL) else self.stacked
        names = (_ROW, _COLUMN) if row == small else (_COLUMN, _ROW)
        return {_ROW: (names[0], large), _COLUMN: (names[1], small)}

    def from_t5x(self, array: np.ndarray, averaged: int) -> np.ndarray:
        """A factored slot as ours: what is averaged out keeps its place with size 1."""
        return np.expand_dims(array, self.order.index(averaged)).transpose(np.argsort(self.order))

    def to_t5x(self, array: np.ndarray, averaged: int) -> np.ndarray:
        """The inverse of `from_t5x`."""
        return array.transpose(self.order).squeeze(self.order.index(averaged))

    def without(self, averaged: int) -> tuple[int, ...]:
        """Shape of T5X's slot."""
        return tuple(self.shape[d] for d in self.order if d != averaged)


def read_slots(links: Sequence[Link], source: Source, policy: Policy, step: int) -> AdafactorSlots:
    """Slots of every layer, stacked as the parameters are.

    Args:
        links: of the parameters.
        source: T5X's slots, as ``"encoder/.../kernel/v_row"``.
        policy: whose parameters they are of.
        step: updates so far.

    Raises:
        ValueError: when a slot is missing or misshapen, or the optimizer had momentum.
    """
    trees: dict[str, dict[tuple[str, ...], np.ndarray]] = {_ROW: {}, _COLUMN: {}, _WHOLE: {}}
    for each in _parameters(links, policy):
        name, path = each.link.name, each.link.path
        missing = [f"{name}/{kind}" for kind in trees if f"{name}/{kind}" not in source]
        if missing:
            raise ValueError(f"the checkpoint has no {missing[0]!r}: expected Adafactor's state; read it without.")
        momentum = source.get(f"{name}/m")
        if momentum is not None and momentum.shape != _UNUSED:
            raise ValueError(f"{name}/m has shape {momentum.shape}: Adafactor with momentum can't be carried on.")
        found: dict[str, np.ndarray] = {}
        if source[f"{name}/{_WHOLE}"].shape != _UNUSED or each.link.shape == _UNUSED:
            array = _checked(source, f"{name}/{_WHOLE}", each.link.shape)
            found[_WHOLE] = array.transpose(np.argsort(each.order))
        else:
            if len(each.shape) - each.stacked < 2:
                raise ValueError(f"{name}/{_WHOLE} has shape {_UNUSED}: expected {each.link.shape}.")
            for kind, (theirs, averaged) in each.averaged().items():
                array = _checked(source, f"{name}/{theirs}", each.without(averaged))
                found[kind] = each.from_t5x(array, averaged)
        for kind, tree in trees.items():
            part = found.get(kind)
            shape = _UNUSED if part is None else (*each.leading, *part.shape)
            leaf = tree.setdefault(path, np.zeros(shape, np.float32))
            if leaf.shape != shape:
                raise ValueError(f"{name} is factored and other layers are not, or the other way round: expected one.")
            if part is not None:
                leaf[each.link.index] = part
    return AdafactorSlots(step, *(unflatten(tree) for tree in trees.values()))


def written_slots(links: Sequence[Link], slots: AdafactorSlots, policy: Policy) -> Iterator[tuple[str, np.ndarray]]:
    """T5X's arrays of the slots that are used, parameter by parameter.

    Args:
        links: of the parameters.
        slots: ours.
        policy: whose parameters they are of.

    Raises:
        ValueError: when a slot is misshapen.
    """
    leaves = {kind: dict(flatten(getattr(slots, kind))) for kind in (_ROW, _COLUMN, _WHOLE)}
    for each in _parameters(links, policy):
        path, name, index = each.link.path, each.link.name, each.link.index
        if leaves[_WHOLE][path].shape != _UNUSED or each.link.shape == _UNUSED:
            part = part_of(leaves[_WHOLE][path], index)
            _check_shape(f"slot {_WHOLE} of {name}", part.shape, each.shape)
            yield f"{name}/{_WHOLE}", part.transpose(each.order)
            continue
        for kind, (theirs, averaged) in each.averaged().items():
            part = part_of(leaves[kind][path], index)
            expected = tuple(1 if d == averaged else n for d, n in enumerate(each.shape))
            _check_shape(f"slot {kind} of {name}", part.shape, expected)
            yield f"{name}/{theirs}", each.to_t5x(part, averaged)


def _parameters(links: Sequence[Link], policy: Policy) -> Iterator[_Parameter]:
    leaves, axes = dict(flatten(policy.abstract())), dict(flatten(policy.logical_axes()))
    for each in links:
        depth, shape = len(each.index), leaves[each.path].shape
        stacked = sum(1 for _ in itertools.takewhile(_STACKED.__contains__, axes[each.path]))
        yield _Parameter(each, shape[depth:], stacked - depth, shape[:depth])


def _checked(source: Source, name: str, shape: tuple[int, ...]) -> np.ndarray:
    _check_shape(name, source[name].shape, shape)
    return source[name].read()


def _check_shape(what: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if shape != expected:
        raise ValueError(f"{what} has shape {shape}: expected {expected}.")
