"""T5X's checkpoints in the form of Orbax: the state is one item of arrays, beside an empty one for the data's position."""

import dataclasses
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from clp_jax.array_types import ArrayLike
from clp_jax.interop import orbax_item
from clp_jax.interop.arrays import ArraySpec
from clp_jax.interop.regions import CheckpointFileError
from clp_jax.interop.t5x_state import STEP, T5XCheckpoint, checkpoint_of

STATE_ITEM, DATASET_ITEM = "state", "dataset"
COMMIT_FILE = "commit_success.txt"
_FORM = "orbax"
_STEP_SPEC = ArraySpec((), np.dtype(np.int32))
_HANDLERS = {
    DATASET_ITEM: "t5x.checkpoints.DatasetCheckpointHandler",
    STATE_ITEM: "orbax.checkpoint._src.handlers.pytree_checkpoint_handler.PyTreeCheckpointHandler",
}


def item_of(directory: Path) -> Path | None:
    """Where a checkpoint in this form keeps its arrays.

    Args:
        directory: of the checkpoint.

    Returns:
        The directory of the item, or None where the checkpoint has another form.
    """
    return next((item for item in (directory / STATE_ITEM, directory) if orbax_item.is_item(item)), None)


def check_committed(directory: Path) -> None:
    """Checks that a checkpoint was finished.

    Args:
        directory: of the checkpoint.

    Raises:
        CheckpointFileError: it was not. Where directories can be renamed Orbax writes no mark; where it marked one part as
            complete, it marks them all.
    """
    parts = [directory, *(directory / item for item in (STATE_ITEM, DATASET_ITEM) if (directory / item).is_dir())]
    marked = [(part / COMMIT_FILE).is_file() for part in parts]
    if any(marked) and not all(marked):
        missing = parts[marked.index(False)] / COMMIT_FILE
        raise CheckpointFileError(
            f"{missing} is missing: the checkpoint was not finished, or not copied whole; take another."
        )


def read(directory: Path) -> T5XCheckpoint:
    """Opens a checkpoint.

    Args:
        directory: of the checkpoint; the arrays are in it or in its ``state``.

    Returns:
        The checkpoint.

    Raises:
        FileNotFoundError: a part is missing.
        CheckpointFileError: a file is damaged, or the checkpoint was not finished.
    """
    check_committed(directory)
    item = item_of(directory) or directory
    return checkpoint_of(orbax_item.read(item), _FORM, item)


@dataclasses.dataclass(frozen=True)
class OrbaxWriter:
    """Takes the arrays of a state; `finish` writes the files around them.

    Attributes:
        directory: where the files go.
        final: where they will be.
        step: of training.
        started: time in nanoseconds.
        item: of the arrays.
    """

    directory: Path
    final: Path
    step: int
    started: int
    item: orbax_item.ItemWriter

    def write(self, name: str, array: ArrayLike) -> None:
        """Stores one array.

        Args:
            name: path in the state.
            array: of the shape given.
        """
        self.item.write(name, array)

    def finish(self) -> None:
        """Writes the step and the files that name the arrays.

        Raises:
            ValueError: an array is missing.
        """
        self.item.write(STEP, np.array(self.step, _STEP_SPEC.dtype))
        self.item.finish()
        (self.directory / DATASET_ITEM).mkdir()
        (self.directory / "_CHECKPOINT_METADATA").write_text(json.dumps(self._checkpoint_metadata()), "utf-8")
        for part in (self.item.directory, self.directory / DATASET_ITEM, self.directory):
            place = self.final / part.relative_to(self.directory)
            (part / COMMIT_FILE).write_text(f"Checkpoint commit was successful to {place}", "utf-8")

    def _checkpoint_metadata(self) -> dict[str, Any]:
        return {
            "item_handlers": _HANDLERS,
            "metrics": {},
            "performance_metrics": {},
            "init_timestamp_nsecs": self.started,
            "commit_timestamp_nsecs": time.time_ns(),
            "custom_metadata": {},
        }


def writer(
    directory: Path, final: Path, step: int, specs: Mapping[str, ArraySpec], chunk_bytes: int | None
) -> OrbaxWriter:
    """Begins a checkpoint.

    Args:
        directory: that exists and is empty.
        final: what it will be renamed to.
        step: of training.
        specs: of all arrays by path in the state, without the step.
        chunk_bytes: of a chunk, at most; None goes by the largest array.

    Returns:
        What takes the arrays.
    """
    item = orbax_item.writer(directory / STATE_ITEM, {**specs, STEP: _STEP_SPEC}, chunk_bytes)
    return OrbaxWriter(directory, final, step, time.time_ns(), item)
