"""A T5X train state as names and arrays, whatever files it is in."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from clp_jax.interop.arrays import ArraySpec, LazyArray, Source, some
from clp_jax.interop.regions import CheckpointFileError

TARGET, STATE, STEP, SLOTS = "target", "state", "state/step", "state/param_states"
_MUTABLES = "flax_mutables"
# What T5X's Adafactor keeps of each parameter.
_SLOT_NAMES = ("m", "v", "v_col", "v_row")
_UNUSED = ArraySpec((1,), np.dtype(np.float32))


@dataclasses.dataclass(frozen=True)
class T5XCheckpoint:
    """What a T5X checkpoint holds.

    Attributes:
        step: of training.
        parameters: by their path, as ``"encoder/layers_0/attention/query/kernel"``.
        slots: of the optimizer by the parameter's path and the slot's name, as ``"encoder/.../kernel/v_row"``; those the
            optimizer does not use have shape ``(1,)``. Empty where the checkpoint has none.
        form: how it is stored: ``"legacy"``, ``"placeholder"``, ``"orbax"`` or ``"mesh_tensorflow"``.
        mutables: other collections of the model's variables, by path.
    """

    step: int
    parameters: Source
    slots: Source
    form: str
    mutables: Source = dataclasses.field(default_factory=dict)


def checkpoint_of(leaves: Mapping[str, Any], form: str, where: Path) -> T5XCheckpoint:
    """Sorts the leaves of a stored state.

    Args:
        leaves: arrays and numbers by path, as ``"target/encoder/..."`` and ``"state/step"``; others are left out.
        form: how they are stored.
        where: for messages.

    Returns:
        The checkpoint.

    Raises:
        CheckpointFileError: there is no parameter, or no step.
    """
    arrays = {name: leaf for name, leaf in leaves.items() if isinstance(leaf, LazyArray)}
    parameters = _below(TARGET, arrays)
    if not parameters:
        raise CheckpointFileError(
            f"{where} has no parameters below {TARGET!r}: it holds {some(list(leaves)) or 'nothing'}."
        )
    return T5XCheckpoint(
        step=_step(leaves.get(STEP), where),
        parameters=parameters,
        slots=_below(SLOTS, arrays),
        form=form,
        mutables=_below(_MUTABLES, arrays),
    )


def flattened(tree: Mapping[str, Any], is_leaf: Any = lambda _: False) -> dict[str, Any]:
    """Leaves of nested dictionaries by path.

    Args:
        tree: the dictionaries.
        is_leaf: which dictionaries are leaves.

    Returns:
        Leaves by keys joined with slashes. What is empty or None has none.
    """
    found: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and not is_leaf(value):
            found |= {f"{key}/{name}": leaf for name, leaf in flattened(value, is_leaf).items()}
        elif value is not None:
            found[key] = value
    return found


def nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flattened`, sorted by key as JAX sorts dictionaries.

    Args:
        leaves: by path.

    Returns:
        Nested dictionaries.

    Raises:
        ValueError: a path leads through a leaf.
    """
    tree: dict[str, Any] = {}
    for name in sorted(leaves, key=lambda name: name.split("/")):
        *path, last = name.split("/")
        inner = tree
        for key in path:
            inner = inner.setdefault(key, {})
            if not isinstance(inner, dict):
                raise ValueError(f"array {name!r} is inside of another array.")
        inner[last] = leaves[name]
    return tree


def state_specs(
    parameters: Mapping[str, ArraySpec], slots: Mapping[str, ArraySpec] | None, save_dtype: np.dtype | None
) -> tuple[dict[str, ArraySpec], list[str]]:
    """What the stored state holds.

    Args:
        parameters: of the model by path.
        slots: of the optimizer by the parameter's path and the slot's name; None stores none.
        save_dtype: that parameters are rounded to; None keeps theirs.

    Returns:
        Arrays by path in the state, without the step; and which of them no one gives, because they are unused: zeros.

    Raises:
        ValueError: two parameters are in each other's place, or a slot is of no parameter.
    """
    specs = {f"{TARGET}/{name}": ArraySpec(spec.shape, save_dtype or spec.dtype) for name, spec in parameters.items()}
    _check_names(specs)
    if not slots:
        return specs, []
    homeless = [name for name in slots if name.rpartition("/")[0] not in parameters]
    if homeless:
        raise ValueError(f"{len(homeless)} slots are of no parameter: {some(homeless)}; expected PARAMETER/SLOT.")
    specs |= {f"{SLOTS}/{name}": spec for name, spec in slots.items()}
    wanted = [f"{SLOTS}/{parameter}/{slot}" for parameter in parameters for slot in _SLOT_NAMES]
    unused = [name for name in wanted if name not in specs]
    return specs | dict.fromkeys(unused, _UNUSED), unused


def _check_names(specs: Mapping[str, ArraySpec]) -> None:
    nested(specs)
    # Files are named with dots for slashes.
    named: dict[str, str] = {}
    for name in specs:
        other = named.setdefault(name.replace("/", "."), name)
        if other != name:
            raise ValueError(f"arrays {other!r} and {name!r} would have one file name: rename one.")


def _below(prefix: str, arrays: Mapping[str, LazyArray]) -> dict[str, LazyArray]:
    start = f"{prefix}/"
    return {name.removeprefix(start): array for name, array in arrays.items() if name.startswith(start)}


def _step(leaf: Any, where: Path) -> int:
    if isinstance(leaf, LazyArray) and leaf.shape in ((), (1,)) and leaf.dtype.kind in "iu":
        return int(leaf.read().reshape(()))
    if type(leaf) is int:
        return leaf
    raise CheckpointFileError(f"{where} has no step: expected a whole number {STEP!r}, not {leaf!r}.")
