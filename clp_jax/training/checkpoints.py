"""Checkpoints: asynchronous, atomic, verified, and enough by themselves to rebuild the model.

What a step consists of is in `clp_jax.training.checkpoint_manifest`, how steps come and go in `checkpoint_steps`.
"""

import dataclasses
import functools
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from clp_jax import processes
from clp_jax.array_types import Params, PyTree
from clp_jax.models.policy import check_parameters
from clp_jax.training import array_store
from clp_jax.training.checkpoint_manifest import RUN_FILE, DamagedError, Manifest
from clp_jax.training.checkpoint_steps import (
    Retention,
    as_path,
    complete_steps,
    damaged_steps,
    is_complete,
    is_full,
    is_unverified,
    metrics_of,
    numbered_steps,
    read_run,
    remove,
    set_aside,
    unfinished_steps,
)
from clp_jax.training.checkpoint_writer import StepWriter
from clp_jax.training.guards import GuardState
from clp_jax.training.run_directory import CHECKPOINTS_DIRECTORY
from clp_jax.training.train_state import TrainState

_T = TypeVar("_T")

_PARAMS, _EMA, _TRAINING = "params", "ema", "training"
# Of a message that all processes must agree on.
_REASON_BYTES = 512


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read; the message says what to do."""


class Checkpoints:
    """Saves and restores the states of one run; a context manager that waits for the last save.

    All processes of a run make the same calls. What an earlier process left half written is removed; a step that is called
    one and is not complete is set aside.

    Args:
        directory: of the checkpoints; made where it is missing.
        retention: which steps are kept.

    Raises:
        CheckpointError: when there are damaged steps only.
    """

    def __init__(self, directory: str | os.PathLike, retention: Retention = Retention()):
        self._directory = as_path(directory)
        self._retention = retention
        self._writer: StepWriter | None = None
        self._saving: int | None = None
        if jax.process_index() == 0:
            self._directory.mkdir(parents=True, exist_ok=True)
            for name in unfinished_steps(self._directory):
                (self._directory / name).rmtree()
            for step in set(numbered_steps(self._directory)) - set(complete_steps(self._directory)):
                self._set_aside(step, "it has no manifest.json: it was not finished, or that file was deleted")
        self._raise_if_only_damaged(self.latest_step())

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._wait()
        except CheckpointError as failure:
            if error is None:
                raise
            error.add_note(str(failure))  # The first error is the one to look at.

    def latest_step(self) -> int | None:
        """The last complete step, as process 0 sees it."""
        steps = complete_steps(self._directory) if jax.process_index() == 0 else []
        return _from_first(steps[-1] if steps else None)

    def save(
        self,
        step: int,
        state: TrainState,
        position: dict[str, int],
        description: dict[str, Any],
        metrics: dict[str, float],
    ) -> None:
        """Copies the state and writes it in the background; waits first for the save before.

        Args:
            step: that of the state.
            state: may be donated as soon as this returns.
            position: of the source.
            description: what rebuilds the model.
            metrics: of this step; may be empty.

        Raises:
            CheckpointError: when this or an earlier save failed.
        """
        self._wait()
        items = {_PARAMS: state.params, _TRAINING: _training_item(state)}
        if state.ema is not None:
            items[_EMA] = state.ema
        run = {"step": step, "position": position, "description": description, "metrics": metrics}
        self._saving = step
        try:
            self._writer = StepWriter(self._directory / str(step), items, run, on_complete=self._retain)
        except Exception as error:
            raise self._failure(step, error) from error

    def raise_if_failed(self) -> None:
        """Raises what went wrong with a save in the background, once it is known.

        Raises:
            CheckpointError: when it failed.
        """
        if self._writer is not None and not self._writer.is_running:
            self._wait()

    def restore(self, abstract: TrainState) -> tuple[TrainState, dict[str, int]]:
        """The newest step that is what was written, on whatever mesh; damaged ones are set aside, with a line that says so.

        Args:
            abstract: shapes, types and shardings of the state.

        Returns:
            The state, and the position of the source.

        Raises:
            CheckpointError: when it is of another model or optimizer, naming the first difference, when no step is intact, or
                when it can't be read.
        """
        while (step := self.latest_step()) is not None:
            try:
                return restore_state(self._directory / str(step), abstract)
            except DamagedError as damage:
                if jax.process_index() == 0:
                    self._set_aside(step, str(damage))
        self._raise_if_only_damaged(None)
        raise CheckpointError(f"no checkpoint at {self._directory}: it holds none.")

    def _retain(self) -> None:
        """Removes the steps that are no longer kept; runs in the background, when a step is complete."""
        steps = metrics_of(self._directory, complete_steps(self._directory))
        for step in steps.keys() - self._retention.kept(steps).keys():
            remove(self._directory / str(step))

    def _set_aside(self, step: int, reason: str) -> None:
        path = self._directory / str(step)
        place = set_aside(path, reason)
        _say(f"checkpoint {path} is damaged: {reason}. It was kept as {place.name}, the reason beside it.")

    def _raise_if_only_damaged(self, latest: int | None) -> None:
        damaged = damaged_steps(self._directory) if latest is None else {}
        if damaged:
            listed = "\n".join(f"  {name}: {reason}" for name, reason in damaged.items())
            raise CheckpointError(
                f"{self._directory} has no intact checkpoint, only damaged ones:\n{listed}\nNothing was overwritten. Put a "
                "copy of a step back, train in a new run directory, or move these away to begin here again."
            )

    def _wait(self) -> None:
        writer, self._writer = self._writer, None
        if writer is None:
            return
        try:
            writer.wait()
        except Exception as error:
            raise self._failure(self._saving, error) from error

    def _failure(self, step: int | None, error: Exception) -> CheckpointError:
        reason = str(error).strip() or type(error).__name__
        full = is_full(error)
        what = "the disk is full" if full else reason.splitlines()[0]
        # Not `latest_step`: the other processes may know nothing of this.
        steps = complete_steps(self._directory)
        intact = f"Step {steps[-1]} is intact: nothing before it is lost" if steps else "No step was saved before"
        return CheckpointError(
            f"the checkpoint of step {step} could not be written to {self._directory}: {what}. {intact}. "
            f"{'Free some space' if full else 'Fix that'} and run the same command again."
        )


def restore_state(path: str | os.PathLike, abstract: TrainState) -> tuple[TrainState, dict[str, int]]:
    """The state of one step, verified, on whatever mesh; changes nothing on the disk.

    Args:
        path: of the step.
        abstract: shapes, types and shardings of the state.

    Returns:
        The state, and the position of the source.

    Raises:
        DamagedError: when it is not what was written.
        CheckpointError: when it is of another model or optimizer, or can't be read.
    """
    place = as_path(path)
    items: dict[str, Any] = {_PARAMS: abstract.params, _TRAINING: _training_item(abstract)}
    if abstract.ema is not None:
        items[_EMA] = abstract.ema
    manifest = _all_agree(lambda: _manifest(place))
    if manifest is not None:
        count, index = jax.process_count(), jax.process_index()
        _all_agree(lambda: manifest.verify_files(place, share=slice(index, None, count)))
    held = _items_of(place, manifest)
    for item in (_PARAMS, _TRAINING):
        _check_item(place, item, items[item])
    if (_EMA in held) != (_EMA in items):
        kept = "keeps" if _EMA in held else "keeps no"
        raise CheckpointError(f"{place} {kept} moving average of the parameters: ema_decay was changed.")
    try:
        restored = {item: array_store.read(place / item, tree) for item, tree in items.items()}
    except Exception as error:
        raise CheckpointError(_unreadable(place, error)) from error
    if manifest is not None:
        _all_agree(lambda: [manifest.verify_arrays(item, tree) for item, tree in restored.items()])
    slots = restored[_TRAINING]["opt_state"]
    structure: Any = jax.tree.structure(abstract.opt_state)
    state = TrainState(
        step=restored[_TRAINING]["step"],
        params=restored[_PARAMS],
        opt_state=structure.unflatten([slots[name] for name in _names(abstract.opt_state)]),
        ema=restored.get(_EMA),
        rng=restored[_TRAINING]["rng"],
        guard=GuardState(**restored[_TRAINING]["guard"]),
    )
    return state, read_run(place)["position"]


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
    if place.exists() and any(place.iterdir()):
        if not is_complete(place):
            raise CheckpointError(f"{place} exists and is not a checkpoint: it was not overwritten. Save elsewhere.")
        if _read_run(place)["description"] != json.loads(json.dumps(description)):
            raise CheckpointError(
                f"{place} holds the parameters of another model: it was not overwritten. Save elsewhere."
            )
        _check_item(place, _PARAMS, params)
        return
    if processes.count() > 1:
        processes.wait_for_all("parameters")  # Until then others may still look whether there are any.
    run = {"step": step, "position": {}, "description": description, "metrics": {}}
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        if place.exists() and jax.process_index() == 0:
            place.rmdir()
        StepWriter(place, {_PARAMS: params}, run).wait()
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


def find_intact(path: str | os.PathLike) -> Path:
    """The checkpoint that `load_params` reads: the newest whose parameters are what was written.

    Args:
        path: as `load_params` takes it.

    Raises:
        CheckpointError: when there is none.
    """

    def verified(found: epath.Path) -> epath.Path:
        _verify_item(found, average=True)
        return found

    return Path(_first_intact(path, verified))


def find_checkpoint(path: str | os.PathLike) -> Path:
    """The directory of the last complete checkpoint; its contents are not verified.

    Args:
        path: as `load_params` takes it.

    Raises:
        CheckpointError: when there is none.
    """
    return Path(_candidates(path)[0])


def _first_intact(path: str | os.PathLike, read: Callable[[epath.Path], _T]) -> _T:
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
            _say(f"checkpoint {found[0]} is damaged: {damage}. Reading {found[1]} instead.")
            del found[0]


def _candidates(path: str | os.PathLike) -> list[epath.Path]:
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


def _load_intact(path: epath.Path, expected: Params | None, average: bool) -> tuple[Params, dict[str, Any], int]:
    item, manifest = _verify_item(path, average)
    run = _read_run(path)
    if expected is not None:
        _check_item(path, item, expected)
    check = None if manifest is None else functools.partial(manifest.verify_part, item)
    try:  # One after another: beside those on the device, one is on the host.
        params = jax.tree.map(lambda leaf: jnp.asarray(leaf.read()), array_store.open_arrays(path / item, check))
    except DamagedError:
        raise
    except Exception as error:
        raise CheckpointError(_unreadable(path, error)) from error
    return params, run["description"], int(run["step"])


def _verify_item(path: epath.Path, average: bool) -> tuple[str, Manifest | None]:
    """The item that holds the parameters, and the manifest, after a look at their files."""
    manifest = _manifest(path)
    item = _EMA if average and _EMA in _items_of(path, manifest) else _PARAMS
    if manifest is not None:
        manifest.verify_files(path, (item, RUN_FILE))
    return item, manifest


def _manifest(path: epath.Path) -> Manifest | None:
    """The manifest, or None, with a line that says so, for a checkpoint from before there were manifests."""
    if not is_unverified(path):
        return Manifest.read(path)
    if jax.process_index() == 0:
        _say(f"checkpoint {path} was written before checkpoints had manifests: it is read unverified.")
    return None


def _items_of(path: epath.Path, manifest: Manifest | None) -> set[str]:
    if manifest is not None:
        return set(manifest.arrays)
    return {item for item in (_PARAMS, _EMA, _TRAINING) if (path / item).is_dir()}


def _read_run(path: epath.Path) -> dict[str, Any]:
    try:
        return read_run(path)
    except DamagedError as error:
        raise CheckpointError(_unreadable(path, error)) from error


def _check_item(path: epath.Path, item: str, expected: PyTree) -> None:
    try:
        stored = array_store.stored_tree(path / item)
    except Exception as error:
        raise CheckpointError(_unreadable(path, error)) from error
    try:
        check_parameters(expected, stored)
    except ValueError as error:
        what = "another optimizer" if item == _TRAINING else "another model"
        raise CheckpointError(f"{path} is a checkpoint of {what}: {error}") from error


def _all_agree(verify: Callable[[], _T]) -> _T:
    """Verifies a share, and raises in all processes what any of them found."""
    reason, result = "", None
    try:
        result = verify()
    except DamagedError as error:
        reason = str(error)
    if jax.process_count() > 1:
        mine = np.zeros(_REASON_BYTES, np.uint8)
        data = reason.encode()[:_REASON_BYTES]
        mine[: len(data)] = np.frombuffer(data, np.uint8)
        rows = multihost_utils.process_allgather(mine)
        texts = [bytes(row).rstrip(b"\0").decode(errors="replace") for row in rows]
        reason = next((text for text in texts if text), "")
    if reason:
        raise DamagedError(reason)
    return cast(_T, result)


def _from_first(step: int | None) -> int | None:
    """What process 0 says: another host may see a directory late."""
    if jax.process_count() == 1:
        return step
    found = int(multihost_utils.broadcast_one_to_all(np.int32(-1 if step is None else step)))
    return None if found < 0 else found


def _training_item(state: TrainState) -> dict[str, Any]:
    leaves = jax.tree.leaves(state.opt_state)
    return {
        "step": state.step,
        "rng": state.rng,
        "guard": {field.name: getattr(state.guard, field.name) for field in dataclasses.fields(state.guard)},
        "opt_state": dict(zip(_names(state.opt_state), leaves, strict=True)),
    }


def _names(tree: PyTree) -> list[str]:
    # Flat names: the tree's own nodes are optax's private tuples, which another version may nest otherwise.
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    return [jax.tree_util.keystr(path, simple=True, separator="|") for path in paths]


def _unreadable(path: epath.Path, error: Exception) -> str:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return f"the checkpoint {path} can't be read ({reason}): it is damaged or not complete. Give another one."


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
