"""Checkpoints of policies that need not fit in memory: written and read one array at a time, or one layer, in one process."""

import dataclasses
import functools
import hashlib
import itertools
import json
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from clp_jax import processes
from clp_jax.array_types import ArrayLike, Params
from clp_jax.interop import orbax_item
from clp_jax.interop.arrays import ArraySpec, LazyArray, in_memory, is_float, new_directory
from clp_jax.interop.object_store import is_address
from clp_jax.interop.regions import Region, whole, within
from clp_jax.interop.slots import flatten
from clp_jax.training import array_store
from clp_jax.training.checkpoint_items import CheckpointError
from clp_jax.training.checkpoint_manifest import RUN_FILE, ArrayDigest, Manifest, digest_files, files_below
from clp_jax.training.checkpoint_steps import is_unverified, read_run
from clp_jax.training.places import as_path
from clp_jax.training.saved_params import find_intact

_PARAMS, _EMA = "params", "ema"
_BLOCK = 1 << 20
# Of an array that is written part by part: smaller ones are read at once.
_LEAST_PART_BYTES = 2 * 2**20


def write_params(path: Path, params: Params, description: dict[str, Any], step: int, dtype: str | None = None) -> None:
    """Writes what `save_params` does, but one array at a time: in one process, of arrays that need not all be in memory.

    A lazy array whose layers are stored by themselves is read and written layer by layer, so that one layer is held.

    Args:
        path: a directory that does not exist; appears whole at the end.
        params: nested dictionaries of numpy, JAX or lazy arrays (`LazyArray`).
        description: what rebuilds the model, as JSON.
        step: updates behind these parameters.
        dtype: that floats are rounded to; None keeps theirs.

    Raises:
        CheckpointError: when the directory exists, or can't be written.
    """
    if is_address(path):
        raise CheckpointError(f"{path} is in a store: expected a directory. Write to one, and copy it to the store.")
    leaves = {"/".join(keys): leaf for keys, leaf in flatten(params)}
    rounded = None if dtype is None else jnp.dtype(dtype)
    specs = {
        name: ArraySpec(tuple(leaf.shape), rounded if rounded is not None and is_float(leaf.dtype) else leaf.dtype)
        for name, leaf in leaves.items()
    }
    run = {"step": step, "position": {}, "description": description, "metrics": {}}
    arrays = {}
    try:
        with new_directory(path.expanduser().absolute()) as partial:
            stacked = {name: _stacked(leaf) for name, leaf in leaves.items() if isinstance(leaf, LazyArray)}
            writer = orbax_item.writer(partial / _PARAMS, specs, stacked=stacked)
            for name, leaf in leaves.items():
                array, shards = _digested(leaf, specs[name].dtype)
                writer.write(name, array)
                arrays[name] = ArrayDigest(specs[name].shape, specs[name].dtype.name, shards)
            writer.finish()
            (partial / RUN_FILE).write_text(json.dumps(run))
            place = as_path(partial)
            Manifest(step, 1, digest_files(place, files_below(place)), {_PARAMS: arrays}).write(place)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"parameters could not be written to {path}: {error}") from error


def open_params(path: str | os.PathLike) -> tuple[Params, dict[str, Any], int]:
    """What `load_params` gives, but with arrays that are read when asked for (`LazyArray`), in parts.

    Process 0 says, for all, which checkpoint it is, and verifies its files; shards that are read whole are verified then.

    Raises:
        CheckpointError: when there is no intact checkpoint, or it can't be read.
    """
    found = as_path(processes.decide("checkpoint", lambda: str(find_intact(path))))
    run = read_run(found)
    item = _EMA if (found / _EMA).is_dir() else _PARAMS
    check = None if is_unverified(found) else functools.partial(Manifest.read(found).verify_part, item)

    def fill(stored: LazyArray, out: np.ndarray, region: Region) -> None:
        try:
            stored.fill(out, region)
        except Exception as error:  # Readers in C++ raise what they like.
            raise CheckpointError(f"the checkpoint {found} can't be read: {error}. Give another one.") from error

    try:
        tree = array_store.open_arrays(found / item, check)
    except Exception as error:
        raise CheckpointError(f"the checkpoint {found} can't be read: {error}. Give another one.") from error
    params = jax.tree.map(lambda leaf: dataclasses.replace(leaf, fill=functools.partial(fill, leaf)), tree)
    return params, run["description"], int(run["step"])


def hold_arrays(params: Params) -> Params:
    """The same, but what is stored in one piece is held whole, and parts are taken from it until another piece is asked for.

    `write_params` stores layers by themselves: a layer is such a piece, or an expert of one. Training saves an array in large
    chunks, which can't be read in part: many parts of one would each take as long as all. Such a chunk takes up to three times
    its size to read.

    Args:
        params: `LazyArray`s.
    """
    held = _Held()
    return jax.tree.map(lambda leaf: dataclasses.replace(leaf, fill=functools.partial(held.fill, leaf)), params)


@dataclasses.dataclass
class _Held:
    """The piece of an array that parts were last taken from."""

    source: LazyArray | None = None
    piece: Region = ()
    array: np.ndarray | None = None

    def fill(self, source: LazyArray, out: np.ndarray, region: Region) -> None:
        """See `LazyArray.fill`."""
        piece = _piece(source, region)
        if self.source is not source or self.piece != piece:
            self.source, self.array = None, None
        if region == piece:
            source.fill(out, region)
            return
        if self.array is None:
            self.source, self.piece, self.array = source, piece, source.read(piece)
        out[...] = self.array[within(region, piece)]


def _piece(source: LazyArray, region: Region) -> Region:
    """What is read at the cost of a region: all of the array, but for stacked axes along which the region has size 1."""
    single = itertools.takewhile(lambda s: s.stop - s.start == 1, region[: source.stacked])
    index = tuple(single)
    return (*index, *whole(source.shape[len(index) :]))


def _stacked(leaf: LazyArray) -> int:
    """Leading axes along which an array is written part by part: no more than make the parts small."""
    axes, size = 0, leaf.spec.nbytes
    while axes < leaf.stacked and size > _LEAST_PART_BYTES:
        size //= leaf.shape[axes]
        axes += 1
    return axes


def _digested(leaf: ArrayLike | LazyArray, dtype: np.dtype) -> tuple[LazyArray, dict[str, str]]:
    """An array, and the SHA-256 of the parts that were read of it, as they are written: by place."""
    shards: dict[str, str] = {}
    source = leaf if isinstance(leaf, LazyArray) else in_memory(np.asarray(leaf))

    def fill(out: np.ndarray, region: Region) -> None:
        source.fill(out, region)
        shards[",".join(f"{s.start}:{s.stop}" for s in region)] = _sha256(out, dtype)

    return dataclasses.replace(source, fill=fill, casts=False), shards


def _sha256(array: np.ndarray, dtype: np.dtype) -> str:
    """Of an array as it is written, rounded in blocks: no second one is held."""
    found = hashlib.sha256()
    flat = np.ascontiguousarray(array).reshape(-1)
    for start in range(0, flat.size, _BLOCK):
        block: Any = flat[start : start + _BLOCK].astype(dtype, copy=False).view(np.uint8)
        found.update(block)
    return found.hexdigest()
