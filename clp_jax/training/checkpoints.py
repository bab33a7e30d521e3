"""Checkpoints of a run: asynchronous, atomic, verified, and enough by themselves to rebuild the model.

What a step consists of is in `clp_jax.training.checkpoint_manifest`, how steps come and go in `checkpoint_steps`.
"""

import dataclasses
import os
from collections.abc import Callable
from types import TracebackType
from typing import Any, TypeVar, cast

import jax
import numpy as np
from jax.experimental import multihost_utils

from clp_jax.array_types import PyTree
from clp_jax.interop.object_store import StoreError, StorePath
from clp_jax.training import array_store
from clp_jax.training.checkpoint_items import (
    EMA,
    PARAMS,
    TRAINING,
    CheckpointError,
    check_item,
    items_of,
    manifest_of,
    say,
    unreadable,
)
from clp_jax.training.checkpoint_manifest import DamagedError
from clp_jax.training.checkpoint_steps import (
    Retention,
    as_path,
    complete_steps,
    damaged_steps,
    discard,
    is_full,
    metrics_of,
    numbered_steps,
    read_run,
    remove,
    set_aside,
    unfinished_steps,
)
from clp_jax.training.checkpoint_writer import StepWriter
from clp_jax.training.guards import GuardState
from clp_jax.training.train_state import TrainState

_T = TypeVar("_T")

# Of a message that all processes must agree on.
_REASON_BYTES = 512


class Checkpoints:
    """Saves and restores the states of one run; a context manager that waits for the last save.

    All processes of a run make the same calls. What an earlier process left half written is removed; a step that is called
    one and is not complete is set aside.

    Args:
        directory: of the checkpoints; made where it is missing.
        retention: which steps are kept.
        check: is called by process 0 before anything in a store is removed or completed; what it raises prevents that.

    Raises:
        CheckpointError: when there are damaged steps only.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        retention: Retention = Retention(),
        check: Callable[[], None] = lambda: None,
    ):
        self._directory = as_path(directory)
        self._retention = retention
        self._check = check
        self._writer: StepWriter | None = None
        self._saving: int | None = None
        self._known: set[str] = (
            set()
        )  # Metrics, when it was last said that the one to keep the best by is not among them.
        if jax.process_index() == 0:
            if not isinstance(self._directory, StorePath):
                self._directory.mkdir(parents=True, exist_ok=True)
            for name in unfinished_steps(self._directory):
                discard(self._directory / name)
            for step in set(numbered_steps(self._directory)) - set(complete_steps(self._directory)):
                self._set_aside(step, "it has no manifest.json: it was not finished, or that file was deleted")
        self._raise_if_only_damaged(self.latest_step())

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.wait()
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
        owed: dict[str, float] | None = None,
    ) -> None:
        """Copies the state and writes it in the background; waits first for the save before.

        Args:
            step: that of the state.
            state: may be donated as soon as this returns.
            position: of the source.
            description: what rebuilds the model.
            metrics: of this step; may be empty.
            owed: what its line of metrics is to say, where its evaluation is still to be made.

        Raises:
            CheckpointError: when this or an earlier save failed.
        """
        self.wait()
        items = {PARAMS: state.params, TRAINING: _training_item(state)}
        if state.ema is not None:
            items[EMA] = state.ema
        run = {"step": step, "position": position, "description": description, "metrics": metrics}
        if owed is not None:
            run["owed"] = owed
        self._saving = step
        try:
            place = self._directory / str(step)
            self._writer = StepWriter(place, items, run, on_complete=self._retain, check=self._check)
        except Exception as error:
            raise self._failure(step, error) from error

    def raise_if_failed(self) -> None:
        """Raises what went wrong with a save in the background, once it is known.

        Raises:
            CheckpointError: when it failed.
        """
        if self._writer is not None and not self._writer.is_running:
            self.wait()

    def wait(self) -> None:
        """Waits until nothing is written in the background.

        Raises:
            CheckpointError: when the last save failed.
        """
        writer, self._writer = self._writer, None
        if writer is None:
            return
        try:
            writer.wait()
        except Exception as error:
            raise self._failure(self._saving, error) from error

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
        missing = self._retention.without_best(steps)
        names = {name for metrics in steps.values() for name in metrics}
        if missing is not None and not names <= self._known:
            self._known |= names
            say(f"{missing}. Until one has it, the best is not kept.")
        for step in steps.keys() - self._retention.kept(steps).keys():
            remove(self._directory / str(step))

    def _set_aside(self, step: int, reason: str) -> None:
        path = self._directory / str(step)
        place = set_aside(path, reason)
        say(f"checkpoint {path} is damaged: {reason}. It was kept as {place.name}, the reason beside it.")

    def _raise_if_only_damaged(self, latest: int | None) -> None:
        damaged = damaged_steps(self._directory) if latest is None else {}
        if damaged:
            listed = "\n".join(f"  {name}: {reason}" for name, reason in damaged.items())
            raise CheckpointError(
                f"{self._directory} has no intact checkpoint, only damaged ones:\n{listed}\nNothing was overwritten. Put a "
                "copy of a step back, train in a new run directory, or move these away to begin here again."
            )

    def _failure(self, step: int | None, error: Exception) -> CheckpointError:
        reason = str(error).strip() or type(error).__name__
        if isinstance(error, StoreError):  # The store may not answer now, and its message says what to do.
            return CheckpointError(f"the checkpoint of step {step} was not completed: {reason}")
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
    items: dict[str, Any] = {PARAMS: abstract.params, TRAINING: _training_item(abstract)}
    if abstract.ema is not None:
        items[EMA] = abstract.ema
    manifest = _all_agree(lambda: manifest_of(place))
    if manifest is not None:
        count, index = jax.process_count(), jax.process_index()
        _all_agree(lambda: manifest.verify_files(place, share=slice(index, None, count)))
    held = items_of(place, manifest)
    for item in (PARAMS, TRAINING):
        check_item(place, item, items[item])
    if (EMA in held) != (EMA in items):
        kept = "keeps" if EMA in held else "keeps no"
        raise CheckpointError(f"{place} {kept} moving average of the parameters: ema_decay was changed.")
    try:
        restored = {item: array_store.read(place / item, tree) for item, tree in items.items()}
    except Exception as error:
        raise CheckpointError(unreadable(place, error)) from error
    if manifest is not None:
        _all_agree(lambda: [manifest.verify_arrays(item, tree) for item, tree in restored.items()])
    slots = restored[TRAINING]["opt_state"]
    structure: Any = jax.tree.structure(abstract.opt_state)
    state = TrainState(
        step=restored[TRAINING]["step"],
        params=restored[PARAMS],
        opt_state=structure.unflatten([slots[name] for name in _names(abstract.opt_state)]),
        ema=restored.get(EMA),
        rng=restored[TRAINING]["rng"],
        guard=GuardState(**restored[TRAINING]["guard"]),
    )
    return state, read_run(place)["position"]


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
