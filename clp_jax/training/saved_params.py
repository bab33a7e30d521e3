"""Parameters alone: saved as a checkpoint, or read from the checkpoints of a run."""

import functools
import json
import os
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from clp_jax import processes
from clp_jax.array_types import Params
from clp_jax.interop.object_store import StorePath
from clp_jax.training import array_store
from clp_jax.training.checkpoint_items import (
    EMA,
    PARAMS,
    CheckpointError,
    check_item,
    items_of,
    manifest_of,
    run_of,
    say,
    unreadable,
)
from clp_jax.training.checkpoint_manifest import RUN_FILE, DamagedError, Manifest
from clp_jax.training.checkpoint_steps import (
    complete_steps,
    damaged_steps,
    is_begun,
    is_complete,
    is_full,
    numbered_steps,
    unfinished_steps,
)
from clp_jax.training.checkpoint_writer import StepWriter
from clp_jax.training.places import CHECKPOINTS_DIRECTORY, Place, as_path

_T = TypeVar("_T")


def save_params(path: str | os.PathLike, params: Params, description: dict[str, Any], step: int = 0) -> None:
    """Writes parameters alone, as a checkpoint that `load_params` reads.

    Args:
        path: a directory that does not exist, or one that holds the same description: it is left as it is then, so that
            a resumed run may call this again.
        params: nested dictionaries of arrays; in a run of several processes global ones, or of numpy, the same in all.
        description: what rebuilds the model, as JSON.
        step: updates behind these parameters.

    Raises:
        CheckpointError: when the directory holds something else, or can't be written.
    """
    place = as_path(path)
    if place.exists() and any(place.iterdir()) and not is_begun(place):
        if not is_complete(place):
            raise CheckpointError(f"{place} exists and is not a checkpoint: it was not overwritten. Save elsewhere.")
        if run_of(place)["description"] != json.loads(json.dumps(description)):
            raise CheckpointError(
                f"{place} holds the parameters of another model: it was not overwritten. Save elsewhere."
            )
        check_item(place, PARAMS, params)
        return
    if processes.count() > 1:
        processes.wait_for_all("parameters")  # Until then others may still look whether there are any.
    run = {"step": step, "position": {}, "description": description, "metrics": {}}
    try:
        if not isinstance(place, StorePath):
            place.parent.mkdir(parents=True, exist_ok=True)
            if place.exists() and jax.process_index() == 0:
                place.rmdir()
        StepWriter(place, {PARAMS: params}, run).wait()
    except (OSError, ValueError) as error:
        what = "the disk is full" if is_full(error) else error
        raise CheckpointError(f"parameters could not be written to {place}: {what}") from error


def load_params(
    path: str | os.PathLike, *, expected: Params | None = None, average: bool = True
) -> tuple[Params, dict[str, Any], int]:
    """The parameters of a run, on the default device, and what rebuilds their model.

    They are verified. Of a run, the newest intact step is read; a damaged one is left where it is, and a line says so.

    Args:
        path: a run directory (its last checkpoint is read), one checkpoint ``RUN/checkpoints/STEP``, or what
            `save_params` wrote.
        expected: shapes that the parameters must have; None takes what there is.
        average: whether to read the moving average of the parameters where the run kept one.

    Returns:
        Parameters, description, and the step.

    Raises:
        CheckpointError: when there is no intact checkpoint, or it is of another model, naming the first difference.
    """
    return _first_intact(path, lambda found: _load_intact(found, expected, average))


def find_intact(path: str | os.PathLike) -> Place:
    """The checkpoint that `load_params` reads: the newest whose parameters are what was written.

    Args:
        path: as `load_params` takes it.

    Raises:
        CheckpointError: when there is none.
    """

    def verified(found: Place) -> Place:
        _verify_item(found, average=True)
        return found

    return _first_intact(path, verified)


def find_checkpoint(path: str | os.PathLike) -> Place:
    """The directory of the last complete checkpoint; its contents are not verified.

    Args:
        path: as `load_params` takes it.

    Raises:
        CheckpointError: when there is none.
    """
    return _candidates(path)[0]


def _first_intact(path: str | os.PathLike, read: Callable[[Place], _T]) -> _T:
    """What `read` makes of the newest checkpoint that it does not find damaged."""
    found = _candidates(path)
    while True:
        try:
            return read(found[0])
        except DamagedError as damage:
            if len(found) == 1:
                raise CheckpointError(
                    f"the checkpoint {found[0]} is damaged: {damage}. Give another one, or put a copy back."
                ) from damage
            say(f"checkpoint {found[0]} is damaged: {damage}. Reading {found[1]} instead.")
            del found[0]


def _candidates(path: str | os.PathLike) -> list[Place]:
    """Complete checkpoints, the newest first."""
    place = as_path(path)
    if not place.is_dir():
        what = "is a file" if place.exists() else "does not exist"
        raise CheckpointError(f"no checkpoint at {place}: it {what}. Give a run directory, or RUN/checkpoints/STEP.")
    if is_complete(place):
        return [place]
    folder = place / CHECKPOINTS_DIRECTORY if (place / CHECKPOINTS_DIRECTORY).is_dir() else place
    steps = complete_steps(folder)
    if steps:
        return [folder / str(step) for step in reversed(steps)]
    unfinished = [*unfinished_steps(folder), *(str(step) for step in numbered_steps(folder)), *damaged_steps(folder)]
    if unfinished or place.name.split(".")[0].isdecimal():
        raise CheckpointError(
            f"no complete checkpoint at {place}: {', '.join(unfinished) or place.name} was not finished, or is damaged. "
            "Train on with the command that made it, or give another checkpoint."
        )
    empty = "the directory is empty" if not any(place.iterdir()) else "it holds none"
    raise CheckpointError(f"no checkpoint at {place}: {empty}. Give a run directory, or RUN/checkpoints/STEP.")


def _load_intact(path: Place, expected: Params | None, average: bool) -> tuple[Params, dict[str, Any], int]:
    item, manifest = _verify_item(path, average)
    run = run_of(path)
    if expected is not None:
        check_item(path, item, expected)
    check = None if manifest is None else functools.partial(manifest.verify_part, item)
    try:  # One after another: beside those on the device, one is on the host.
        params = jax.tree.map(lambda leaf: jnp.asarray(leaf.read()), array_store.open_arrays(path / item, check))
    except DamagedError:
        raise
    except Exception as error:
        raise CheckpointError(unreadable(path, error)) from error
    return params, run["description"], int(run["step"])


def _verify_item(path: Place, average: bool) -> tuple[str, Manifest | None]:
    """The item that holds the parameters, and the manifest, after a look at their files."""
    manifest = manifest_of(path)
    item = EMA if average and EMA in items_of(path, manifest) else PARAMS
    if manifest is not None:
        manifest.verify_files(path, (item, RUN_FILE))
    return item, manifest
