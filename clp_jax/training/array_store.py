"""Trees of arrays on disk; the only module that knows Orbax."""

import asyncio
import dataclasses
import functools
import logging
import math
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from etils import epath

from clp_jax.array_types import PyTree
from clp_jax.interop import orbax_item
from clp_jax.interop.arrays import LazyArray
from clp_jax.interop.object_store import StorePath, each
from clp_jax.interop.regions import Region
from clp_jax.training.checkpoint_manifest import leaves_by_path
from clp_jax.training.places import Place

# Orbax cuts what several devices hold alike, so that each writes a part; every piece on every device is a program to compile.
LEAST_CUT_BYTES = 2**24

_T = TypeVar("_T")


def begin_write(directory: epath.Path, tree: PyTree) -> Callable[[float], None]:
    """Copies a tree to the host and begins to write this process's part of it.

    Args:
        directory: exists, and is empty; the same for all processes.
        tree: nested dictionaries of arrays; may be donated as soon as this returns.

    Returns:
        Waits for the writing, so many seconds at most, and raises what went wrong.
    """
    handler, save = _writer(), _orbax().args.PyTreeSave(tree)
    # Not `asyncio.run`: it touches the tasks of all threads, and Orbax's threads have their own.
    loop = asyncio.new_event_loop()
    try:
        futures = loop.run_until_complete(_with_all_it_began(handler.async_save(directory, args=save)))
    finally:
        loop.close()

    def wait(seconds: float) -> None:
        for future in futures or ():
            future.result(timeout=None if math.isinf(seconds) else seconds)

    return wait


async def _with_all_it_began(save: Awaitable[_T]) -> _T:
    """Waits for a save, and after one that fails for the arrays that it still writes: they report to the loop."""
    try:
        return await save
    finally:
        while others := asyncio.all_tasks() - {asyncio.current_task()}:
            await asyncio.wait(others)


def finish_write(directory: epath.Path) -> None:
    """Joins what all processes have written; called by one of them, when all are done."""
    handler = _writer()
    handler.finalize(directory)
    handler.close()


def read(directory: Place, abstract: PyTree) -> PyTree:
    """Reads a tree onto the devices.

    Args:
        directory: that was written.
        abstract: shapes, types and shardings, which need not be those of writing.
    """
    if isinstance(directory, StorePath):
        return _read_store(directory, abstract)
    ocp = _orbax()
    return ocp.StandardCheckpointHandler().restore(directory, args=ocp.args.StandardRestore(abstract))


def _read_store(directory: StorePath, abstract: PyTree) -> PyTree:
    """Each process reads what its devices hold, once."""
    stored = orbax_item.read(directory)

    def place(name: str, leaf: Any) -> jax.Array:
        sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        indices = {_bounds(i, leaf.shape): i for i in sharding.addressable_devices_indices_map(leaf.shape).values()}
        # An index may leave the last axes out, or bounds.
        regions = [tuple(slice(start, stop) for start, stop in bounds) for bounds in indices]
        parts = dict(zip(indices, each(stored[name].read, regions), strict=True))
        return jax.make_array_from_callback(
            leaf.shape, sharding, lambda index: parts[_bounds(index, leaf.shape)].astype(leaf.dtype, copy=False)
        )

    leaves = [place(name, leaf) for name, leaf in leaves_by_path(abstract).items()]
    structure: Any = jax.tree.structure(abstract)
    return structure.unflatten(leaves)


def _bounds(index: Region | None, shape: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    given = index or ()
    pieces = [*given, *(slice(None) for _ in shape[len(given) :])]
    return tuple(piece.indices(size)[:2] for piece, size in zip(pieces, shape, strict=True))


def read_to_host(directory: Place) -> PyTree:
    """Reads a tree as it was written, as NumPy arrays."""
    if isinstance(directory, StorePath):
        return jax.tree.map(LazyArray.read, open_arrays(directory))
    ocp = _orbax()
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), stored_tree(directory))
    return ocp.PyTreeCheckpointHandler().restore(directory, args=ocp.args.PyTreeRestore(restore_args=as_numpy))


def open_arrays(directory: Place, check: Callable[[str, np.ndarray, Region], None] | None = None) -> PyTree:
    """The tree as it was written, each array read when asked for, or a part of it (`LazyArray`).

    Args:
        directory: that was written.
        check: is called with the path of an array, a part of it that was read, and where that is.
    """

    def fill(name: str, stored: LazyArray, out: np.ndarray, region: Region) -> None:
        stored.fill(out, region)
        if check is not None:
            check(name, out, region)

    local = directory if isinstance(directory, StorePath) else Path(directory)
    arrays, tree = orbax_item.read(local), stored_tree(directory)
    structure: Any = jax.tree.structure(tree)
    return structure.unflatten(
        dataclasses.replace(arrays[name], fill=functools.partial(fill, name, arrays[name]), casts=False)
        for name in leaves_by_path(tree)
    )


def stored_tree(directory: Place) -> PyTree:
    """The tree that is stored, with shapes and types in place of its arrays."""
    if isinstance(directory, StorePath):
        tree: dict[str, Any] = {}
        for name, array in orbax_item.read(directory).items():
            *folders, last = name.split("/")
            functools.reduce(lambda inside, key: inside.setdefault(key, {}), folders, tree)[last] = (
                jax.ShapeDtypeStruct(array.shape, array.dtype)
            )
        return tree
    return _orbax().PyTreeCheckpointHandler().metadata(directory).tree


def barrier() -> Callable[[str, float], None]:
    """A function that waits, so many seconds at most, until all processes have called it with the same, unused name.

    It needs no device: a thread may wait while steps are computed.
    """
    wait = _orbax().multihost.get_barrier_sync_fn()
    return lambda name, seconds: wait(key=name, timeout_ms=int(seconds * 1000))


def _writer() -> Any:
    ocp, handlers = _orbax(), _orbax().type_handlers
    arrays = handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=LEAST_CUT_BYTES)
    kinds = ((jax.Array, arrays), (np.ndarray, handlers.NumpyHandler()))
    return ocp.PyTreeCheckpointHandler(type_handler_registry=handlers.create_type_handler_registry(*kinds))


@functools.cache
def _orbax() -> Any:
    import orbax.checkpoint as ocp  # Takes a second, which a complete run need not wait for.

    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(_not_from_orbax)
    sys.unraisablehook = functools.partial(_say_unless_late, sys.unraisablehook)
    return ocp


def _not_from_orbax(record: logging.LogRecord) -> bool:
    # Orbax logs the traceback of a failed write from each of its threads; we raise one error that says what to do.
    return "orbax" not in record.pathname and "orbax" not in record.getMessage()


def _say_unless_late(say: Callable[[Any], object], found: Any) -> None:
    # TensorStore's threads tell the loops of Orbax when an array is written. After a write that failed, its loop is closed
    # while others are still being written, and each of these would print a traceback.
    late = isinstance(found.exc_value, RuntimeError) and str(found.exc_value) == "Event loop is closed"
    if not (late and found.object is None):
        say(found)
