"""What one checkpoint holds, and how it is told that it is not what was asked for."""

import sys
from typing import Any

import jax

from clp_jax.array_types import PyTree
from clp_jax.models.policy import check_parameters
from clp_jax.training import array_store
from clp_jax.training.checkpoint_manifest import DamagedError, Manifest
from clp_jax.training.checkpoint_steps import is_unverified, read_run
from clp_jax.training.places import Place

PARAMS, EMA, TRAINING = "params", "ema", "training"


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read; the message says what to do."""


def manifest_of(path: Place) -> Manifest | None:
    """The manifest, or None, with a line that says so, for a checkpoint from before there were manifests."""
    if not is_unverified(path):
        return Manifest.read(path)
    if jax.process_index() == 0:
        say(f"checkpoint {path} was written before checkpoints had manifests: it is read unverified.")
    return None


def items_of(path: Place, manifest: Manifest | None) -> set[str]:
    """Names of the trees that a checkpoint holds."""
    if manifest is not None:
        return set(manifest.arrays)
    return {item for item in (PARAMS, EMA, TRAINING) if (path / item).is_dir()}


def run_of(path: Place) -> dict[str, Any]:
    """What `read_run` gives.

    Raises:
        CheckpointError: when it can't be read.
    """
    try:
        return read_run(path)
    except DamagedError as error:
        raise CheckpointError(unreadable(path, error)) from error


def check_item(path: Place, item: str, expected: PyTree) -> None:
    """Checks that a stored tree has the leaves, shapes and types that are expected.

    Raises:
        CheckpointError: naming the first difference, or when it can't be read.
    """
    try:
        stored = array_store.stored_tree(path / item)
    except Exception as error:
        raise CheckpointError(unreadable(path, error)) from error
    try:
        check_parameters(expected, stored)
    except ValueError as error:
        what = "another optimizer" if item == TRAINING else "another model"
        raise CheckpointError(f"{path} is a checkpoint of {what}: {error}") from error


def unreadable(path: Place, error: Exception) -> str:
    """What is said of a checkpoint that raises when it is read."""
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return f"the checkpoint {path} can't be read ({reason}): it is damaged or not complete. Give another one."


def say(text: str) -> None:
    """Prints a line for people."""
    print(text, file=sys.stderr, flush=True)
