"""Checkpoints: asynchronous, atomic, and enough by themselves to rebuild the model; the only module that knows Orbax.

One checkpoint is a directory, named by its step, that appears whole or not at all:

========== ==================================================================
item       what
========== ==================================================================
params     the parameters
ema        their moving average, where the run keeps one
training   optimizer slots, step and random key
run        JSON: step, position in the data, description of the model
========== ==================================================================
"""

import dataclasses
import functools
import json
import logging
import math
import os
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from clp_jax.array_types import Params, PyTree
from clp_jax.interop import orbax_item
from clp_jax.interop.arrays import ArraySpec, LazyArray, is_float, new_directory
from clp_jax.interop.links import part_of
from clp_jax.interop.regions import Region, whole
from clp_jax.interop.slots import flatten, unflatten
from clp_jax.models.policy import check_parameters
from clp_jax.training.run_directory import CHECKPOINTS_DIRECTORY
from clp_jax.training.train_state import TrainState

_PARAMS, _EMA, _TRAINING, _RUN = "params", "ema", "training", "run"
_TEMPORARY = ".orbax-checkpoint-tmp"


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read; the message says what to do."""


@dataclasses.dataclass(frozen=True)
class KeepBest:
    """Keeps the best checkpoint beside the last ones.

    Attributes:
        metric: its name, as ``"evaluation/loss"``; only checkpoints of evaluated steps compete.
        lowest: whether low is good.
    """

    metric: str
    lowest: bool = True


class Checkpoints:
    """Saves and restores the states of one run; a context manager that waits for the last save.

    Args:
        directory: of the checkpoints; made where it is missing.
        keep: the last so many are kept.
        best: which one to keep besides; None keeps no other.
    """

    def __init__(self, directory: Path, keep: int = 2, best: KeepBest | None = None):
        import orbax.checkpoint as ocp  # Takes a second, which a complete run need not wait for.

        if keep < 1:
            raise ValueError(f"keep_checkpoints is {keep}: expected at least 1.")
        policies = ocp.checkpoint_managers
        preserve = [policies.LatestN(keep)]
        score = None
        if best is not None:
            score = functools.partial(_score, best=best)
            preserve.append(policies.BestN(get_metric_fn=score, n=1, keep_checkpoints_without_metrics=False))
        for name in ("absl", "asyncio"):
            logging.getLogger(name).addFilter(_not_from_orbax)
        self._ocp = ocp
        self._directory = directory
        self._best = best
        self._saving: int | None = None
        self._manager = ocp.CheckpointManager(
            directory.absolute(),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policies.AnyPreservationPolicy(preserve),
                best_fn=score,  # Without it the scores of earlier processes are not read.
                cleanup_tmp_directories=True,
                save_root_metadata=False,
            ),
        )

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
        finally:
            self._manager.close()

    def latest_step(self) -> int | None:
        """The last complete checkpoint's step."""
        steps = [step for step in self._manager.all_steps() if step != self._saving]
        return max(steps, default=None)

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
        args = self._ocp.args
        items = {
            _PARAMS: args.StandardSave(state.params),
            _TRAINING: args.StandardSave(_training_item(state)),
            _RUN: args.JsonSave({"step": step, "position": position, "description": description}),
        }
        if state.ema is not None:
            items[_EMA] = args.StandardSave(state.ema)
        known = {name: value for name, value in metrics.items() if self._best is not None and name == self._best.metric}
        self._saving = step
        try:
            self._manager.save(step, args=args.Composite(**items), metrics=known, force=True)
        except Exception as error:
            raise self._failure(step, error) from error

    def raise_if_failed(self) -> None:
        """Raises what went wrong with a save in the background, once it is known.

        Raises:
            CheckpointError: when it failed.
        """
        if self._saving is not None and not self._manager.is_saving_in_progress():
            self._wait()

    def restore(self, abstract: TrainState) -> tuple[TrainState, dict[str, int]]:
        """The last complete checkpoint.

        Args:
            abstract: shapes, types and shardings of the state.

        Returns:
            The state, and the position of the source.

        Raises:
            CheckpointError: when it is of another model or optimizer, naming the first difference, or can't be read.
        """
        step = self.latest_step()
        path = self._directory / str(step)
        training = _training_item(abstract)
        _check_item(path, _PARAMS, abstract.params)
        _check_item(path, _TRAINING, training)
        if (path / _EMA).is_dir() != (abstract.ema is not None):
            kept = "keeps" if (path / _EMA).is_dir() else "keeps no"
            raise CheckpointError(f"{path} {kept} moving average of the parameters: ema_decay was changed.")
        args = self._ocp.args
        items = {
            _PARAMS: args.StandardRestore(abstract.params),
            _TRAINING: args.StandardRestore(training),
            _RUN: args.JsonRestore(),
        }
        if abstract.ema is not None:
            items[_EMA] = args.StandardRestore(abstract.ema)
        try:
            restored = self._manager.restore(step, args=args.Composite(**items))
        except Exception as error:
            raise CheckpointError(_unreadable(path, error)) from error
        slots = restored[_TRAINING]["opt_state"]
        structure: Any = jax.tree.structure(abstract.opt_state)
        state = TrainState(
            step=restored[_TRAINING]["step"],
            params=restored[_PARAMS],
            opt_state=structure.unflatten([slots[name] for name in _names(abstract.opt_state)]),
            ema=restored[_EMA] if abstract.ema is not None else None,
            rng=restored[_TRAINING]["rng"],
        )
        return state, restored[_RUN]["position"]

    def _wait(self) -> None:
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._failure(self._saving, error) from error
        self._saving = None

    def _failure(self, step: int | None, error: Exception) -> CheckpointError:
        reason = str(error).strip() or type(error).__name__
        full = "No space left" in reason or "RESOURCE_EXHAUSTED" in reason or "quota" in reason.lower()
        what = "the disk is full" if full else reason.splitlines()[0]
        latest = self.latest_step()
        intact = (
            f"Step {latest} is intact: nothing before it is lost" if latest is not None else "No step was saved before"
        )
        return CheckpointError(
            f"the checkpoint of step {step} could not be written to {self._directory}: {what}. {intact}. "
            f"{'Free some space' if full else 'Fix that'} and run the same command again."
        )


def save_params(path: str | os.PathLike, params: Params, description: dict[str, Any], step: int = 0) -> None:
    """Writes parameters alone, as a checkpoint that `load_params` reads.

    Args:
        path: a directory that does not exist, or one that holds the same description: it is left as it is then, so that
            a resumed run may call this again.
        params: nested dictionaries of arrays.
        description: what rebuilds the model, as JSON.
        step: updates behind these parameters.

    Raises:
        CheckpointError: when the directory holds something else, or can't be written.
    """
    import orbax.checkpoint as ocp

    path = Path(path).expanduser().absolute()
    if path.exists() and any(path.iterdir()):
        if not _is_checkpoint(path):
            raise CheckpointError(f"{path} exists and is not a checkpoint: it was not overwritten. Save elsewhere.")
        if _read_run(path)["description"] != json.loads(json.dumps(description)):
            raise CheckpointError(
                f"{path} holds the parameters of another model: it was not overwritten. Save elsewhere."
            )
        _check_item(path, _PARAMS, params)
        return
    items = ocp.args.Composite(
        **{
            _PARAMS: ocp.args.StandardSave(params),
            _RUN: ocp.args.JsonSave({"step": step, "position": {}, "description": description}),
        }
    )
    try:
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
            checkpointer.save(path, args=items, force=True)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"parameters could not be written to {path}: {error}") from error


def write_params(path: Path, params: Params, description: dict[str, Any], step: int, dtype: str | None = None) -> None:
    """Writes what `save_params` does, but one array at a time: in one process, of arrays that need not all be in memory.

    Args:
        path: a directory that does not exist; appears whole at the end.
        params: nested dictionaries of numpy, JAX or lazy arrays (`LazyArray`).
        description: what rebuilds the model, as JSON.
        step: updates behind these parameters.
        dtype: that floats are rounded to; None keeps theirs.

    Raises:
        CheckpointError: when the directory exists, or can't be written.
    """
    import orbax.checkpoint as ocp

    leaves = {"/".join(keys): leaf for keys, leaf in flatten(params)}
    rounded = None if dtype is None else jnp.dtype(dtype)
    specs = {
        name: ArraySpec(tuple(leaf.shape), rounded if rounded is not None and is_float(leaf.dtype) else leaf.dtype)
        for name, leaf in leaves.items()
    }
    run = {"step": step, "position": {}, "description": description}
    try:
        with new_directory(path.expanduser().absolute()) as partial:
            writer = orbax_item.writer(partial / _PARAMS, specs)
            for name, leaf in leaves.items():
                writer.write(name, part_of(leaf, ()))
            writer.finish()
            (partial / _RUN).mkdir()
            ocp.JsonCheckpointHandler().save(epath.Path(partial / _RUN), args=ocp.args.JsonSave(run))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"parameters could not be written to {path}: {error}") from error


def open_params(path: str | os.PathLike) -> tuple[Params, dict[str, Any], int]:
    """What `load_params` gives, but with arrays that are read when asked for (`LazyArray`).

    One array is held, from which parts are taken until another one is asked for: training saves an array in large chunks,
    which can't be read in part. Such a chunk takes up to three times its size to read.

    Raises:
        CheckpointError: when there is no complete checkpoint.
    """
    found = find_checkpoint(path)
    run = _read_run(found)
    item = found / (_EMA if (found / _EMA).is_dir() else _PARAMS)
    held = _Held()
    try:
        leaves = {
            tuple(name.split("/")): LazyArray(leaf.shape, leaf.dtype, functools.partial(held.fill, leaf))
            for name, leaf in orbax_item.read(item).items()
        }
    except (OSError, ValueError) as error:
        raise CheckpointError(_unreadable(found, error)) from error
    return unflatten(leaves), run["description"], int(run["step"])


class _Held:
    """The array that parts were last taken from."""

    def __init__(self):
        self._source: LazyArray | None = None
        self._array: np.ndarray | None = None

    def fill(self, source: LazyArray, out: np.ndarray, region: Region) -> None:
        """See `LazyArray.fill`."""
        if self._source is not source:
            self._source, self._array = None, None
        if region == whole(source.shape):
            source.fill(out, region)
            return
        if self._array is None:
            self._source, self._array = source, source.read()
        out[...] = self._array[region]


def load_params(
    path: str | os.PathLike, *, expected: Params | None = None, average: bool = True
) -> tuple[Params, dict[str, Any], int]:
    """The parameters of a run, on the default device, and what rebuilds their model.

    Args:
        path: a run directory (its last checkpoint is read), one checkpoint ``RUN/checkpoints/STEP``, or what
            `save_params` wrote.
        expected: shapes that the parameters must have; None takes what there is.
        average: whether to read the moving average of the parameters where the run kept one.

    Returns:
        Parameters, description, and the step.

    Raises:
        CheckpointError: when there is no complete checkpoint, or it is of another model, naming the first difference.
    """
    import orbax.checkpoint as ocp

    found = find_checkpoint(path)
    run = _read_run(found)
    item = _EMA if average and (found / _EMA).is_dir() else _PARAMS
    if expected is not None:
        _check_item(found, item, expected)
    try:
        handler = ocp.PyTreeCheckpointHandler()
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), _stored_tree(found, item))
        params = handler.restore(epath.Path(found / item), args=ocp.args.PyTreeRestore(restore_args=as_numpy))
    except Exception as error:
        raise CheckpointError(_unreadable(found, error)) from error
    return jax.tree.map(jnp.asarray, params), run["description"], int(run["step"])


def find_checkpoint(path: str | os.PathLike) -> Path:
    """The directory of one complete checkpoint.

    Args:
        path: as `load_params` takes it.

    Raises:
        CheckpointError: when there is none.
    """
    path = Path(path).expanduser().absolute()
    if not path.is_dir():
        what = "is a file" if path.exists() else "does not exist"
        raise CheckpointError(f"no checkpoint at {path}: it {what}. Give a run directory, or RUN/checkpoints/STEP.")
    if _is_checkpoint(path):
        return path
    folder = path / CHECKPOINTS_DIRECTORY if (path / CHECKPOINTS_DIRECTORY).is_dir() else path
    steps = sorted(int(entry.name) for entry in folder.iterdir() if entry.name.isdecimal() and _is_checkpoint(entry))
    if steps:
        return folder / str(steps[-1])
    unfinished = [entry.name for entry in folder.iterdir() if _TEMPORARY in entry.name or entry.name.isdecimal()]
    if unfinished or _TEMPORARY in path.name or path.name.isdecimal():
        raise CheckpointError(
            f"no complete checkpoint at {path}: {', '.join(sorted(unfinished)) or path.name} was not finished. Train on with "
            "the command that made it, or give another checkpoint."
        )
    empty = "the directory is empty" if not any(path.iterdir()) else "it holds none"
    raise CheckpointError(f"no checkpoint at {path}: {empty}. Give a run directory, or RUN/checkpoints/STEP.")


def _not_from_orbax(record: logging.LogRecord) -> bool:
    # Orbax logs the traceback of a failed write from each of its threads; we raise one error that says what to do.
    return "orbax" not in record.pathname and "orbax" not in record.getMessage()


def _score(metrics: dict[str, float], best: KeepBest) -> float:
    if best.metric not in metrics:
        return -math.inf
    return -metrics[best.metric] if best.lowest else metrics[best.metric]


def _is_checkpoint(path: Path) -> bool:
    return path.is_dir() and _TEMPORARY not in path.name and (path / _PARAMS).is_dir() and (path / _RUN).is_dir()


def _read_run(path: Path) -> dict[str, Any]:
    import orbax.checkpoint as ocp

    try:
        return ocp.JsonCheckpointHandler().restore(epath.Path(path / _RUN))
    except Exception as error:
        raise CheckpointError(_unreadable(path, error)) from error


def _check_item(path: Path, item: str, expected: PyTree) -> None:
    try:
        stored = _stored_tree(path, item)
    except Exception as error:
        raise CheckpointError(_unreadable(path, error)) from error
    try:
        check_parameters(expected, stored)
    except ValueError as error:
        what = "another optimizer" if item == _TRAINING else "another model"
        raise CheckpointError(f"{path} is a checkpoint of {what}: {error}") from error


def _stored_tree(path: Path, item: str) -> PyTree:
    import orbax.checkpoint as ocp

    return ocp.PyTreeCheckpointHandler().metadata(epath.Path(path / item)).tree


def _training_item(state: TrainState) -> dict[str, Any]:
    leaves = jax.tree.leaves(state.opt_state)
    return {
        "step": state.step,
        "rng": state.rng,
        "opt_state": dict(zip(_names(state.opt_state), leaves, strict=True)),
    }


def _names(tree: PyTree) -> list[str]:
    # Flat names: the tree's own nodes are optax's private tuples, which another version may nest otherwise.
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    return [jax.tree_util.keystr(path, simple=True, separator="|") for path in paths]


def _unreadable(path: Path, error: Exception) -> str:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return f"the checkpoint {path} can't be read ({reason}): it is damaged or not complete. Give another one."
