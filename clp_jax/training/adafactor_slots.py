"""Adafactor's state beside a converted policy: kept by `clp convert`, and where finetuning goes on from."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from clp_jax.array_types import PyTree
from clp_jax.host_rows import place_whole
from clp_jax.interop.t5x_slots import AdafactorSlots
from clp_jax.training.optimizers import FactoredState
from clp_jax.training.places import SLOTS_DIRECTORY, as_path
from clp_jax.training.streamed_params import open_params, write_params
from clp_jax.training.train_state import TrainState


def save_slots(run_dir: Path, slots: AdafactorSlots) -> None:
    """Writes slots into a run directory.

    Raises:
        CheckpointError: when there are some, or they can't be written.
    """
    trees = {field.name: getattr(slots, field.name) for field in dataclasses.fields(slots)}
    write_params(run_dir / SLOTS_DIRECTORY, trees | {"count": np.asarray(slots.count)}, {}, slots.count)


def load_slots(run_dir: Path) -> AdafactorSlots | None:
    """The slots in a run directory; None where there are none.

    Raises:
        CheckpointError: when they can't be read.
    """
    if not as_path(run_dir / SLOTS_DIRECTORY).is_dir():
        return None
    trees, _, _ = open_params(run_dir / SLOTS_DIRECTORY)
    return AdafactorSlots(**trees | {"count": int(trees["count"].read())})


def take_over(state: TrainState, slots: AdafactorSlots) -> TrainState:
    """A first state whose Adafactor goes on from these slots: its moments, and the count that their decay goes by.

    The step, and with it the learning rate, begins at 0 nevertheless: the schedule is the new run's.

    Args:
        state: fresh.
        slots: of the same parameters.

    Returns:
        The state; the same one, where the optimizer is not Adafactor.

    Raises:
        ValueError: when the optimizer factors a parameter that is not factored in the slots, or the other way round.
    """

    def put(fresh: Any) -> Any:
        if not isinstance(fresh, FactoredState):
            return fresh
        count = jax.device_put(jnp.asarray(slots.count, fresh.count.dtype), fresh.count.sharding)
        trees = (_placed(getattr(fresh, kind), getattr(slots, kind), kind) for kind in ("v_row", "v_col", "v"))
        return FactoredState(count, *trees)

    def is_adafactor(node: Any) -> bool:
        return isinstance(node, FactoredState)

    if not any(map(is_adafactor, jax.tree.leaves(state.opt_state, is_leaf=is_adafactor))):
        return state
    opt_state = jax.tree.map(put, state.opt_state, is_leaf=is_adafactor)
    return dataclasses.replace(state, opt_state=opt_state)


def _placed(fresh: PyTree, slots: PyTree, kind: str) -> PyTree:
    """Slots in place of fresh ones, on the same devices."""

    def place(path: Any, leaf: Any) -> Any:
        slot = slots
        for key in path:
            slot = slot[key.key]
        if slot.shape != leaf.shape:
            name = "/".join(str(key.key) for key in path)
            raise ValueError(
                f"the optimizer's state of the initial checkpoint has {kind} of {name} in the shape {slot.shape}, "
                f"Adafactor here in {leaf.shape}: set Adafactor.min_dim_to_factor as it was there, or convert the "
                "checkpoint without --optimizer."
            )
        # A copy: the state is donated, the slots are the caller's.
        return jnp.array(place_whole(slot, leaf.sharding), leaf.dtype, copy=True)

    return jax.tree_util.tree_map_with_path(place, fresh)
