"""T5X's own checkpoints, which the published T5, mT5, UL2 and Flan-T5 models come in: msgpack, and zarr folders beside it."""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import ml_dtypes
import numpy as np

from clp_jax.array_types import ArrayLike
from clp_jax.interop import msgpack_files, tensorstore_files, zarr_files
from clp_jax.interop.arrays import ArraySpec, Expected, LazyArray
from clp_jax.interop.regions import CheckpointFileError, Region
from clp_jax.interop.t5x_state import STATE, STEP, T5XCheckpoint, checkpoint_of, flattened, nested

FILE_NAME = "checkpoint"
CHUNK_BYTES = 64 * 2**20
_VERSION = 3
# Later versions store bfloat16 as itself.
_LAST_WITH_WORDS = 2
_PLACEHOLDER = "PLACEHOLDER://"
_FORM, _PLACEHOLDER_FORM = "legacy", "placeholder"


def read(directory: Path) -> T5XCheckpoint:
    """Opens a checkpoint.

    Args:
        directory: that holds the msgpack file ``checkpoint`` and folders of zarr. Wherever the file says they are, they are
            beside it.

    Returns:
        The checkpoint.

    Raises:
        FileNotFoundError: a folder or a chunk is missing.
        CheckpointFileError: a file is damaged, or has a layout that no version of T5X has.
    """
    path = directory / FILE_NAME
    tree = msgpack_files.read(path)
    if not isinstance(tree, dict):
        raise CheckpointFileError(f"{path} holds a {type(tree).__name__}: expected the state of a T5X training.")
    # Before there were versions, the file was the state itself.
    version = tree.get("version", 0)
    if version not in range(_VERSION + 1):
        raise CheckpointFileError(f"{path} has version {version!r}: expected at most {_VERSION}.")
    state = tree.get("optimizer", tree)
    if not isinstance(state, dict):
        raise CheckpointFileError(f"{path} holds no state under 'optimizer': expected a T5X checkpoint.")
    leaves = flattened(state, _is_spec)
    opened = {name: _open(directory, name, leaf, version) for name, leaf in leaves.items()}
    placeholders = any(isinstance(leaf, str) for leaf in leaves.values())
    return checkpoint_of(opened, _PLACEHOLDER_FORM if placeholders else _FORM, path)


def _is_spec(value: Mapping[str, Any]) -> bool:
    return "driver" in value and "metadata" in value and ("kvstore" in value or "path" in value)


def _open(directory: Path, name: str, leaf: Any, version: int) -> Any:
    if isinstance(leaf, Mapping):
        return _open_spec(directory, name, leaf, version)
    if isinstance(leaf, str) and leaf.startswith(_PLACEHOLDER):
        folder = _beside(directory, leaf.removeprefix(_PLACEHOLDER), name)
        if not tensorstore_files.is_store(directory):
            return zarr_files.read(folder)
        place = tensorstore_files.place_in_store(directory, folder.name)
        return tensorstore_files.open_array(place, f"{directory}: array {name!r}", complete=False)
    return leaf


def _open_spec(directory: Path, name: str, spec: Mapping[str, Any], version: int) -> LazyArray:
    """The array that a TensorStore specification stands for."""
    where = f"{directory / FILE_NAME}: array {name!r}"
    if spec["driver"] != "zarr":
        raise CheckpointFileError(f"{where} has driver {spec['driver']!r}: expected 'zarr'.")
    kvstore = spec.get("kvstore")
    path = kvstore.get("path", spec.get("path")) if isinstance(kvstore, dict) else spec.get("path")
    if not isinstance(path, str):
        raise CheckpointFileError(f"{where} does not say where it is: expected a path.")
    array = zarr_files.read(_beside(directory, path, name))
    shape = spec["metadata"].get("shape") if isinstance(spec["metadata"], dict) else None
    if shape is not None and tuple(shape) != array.shape:
        raise CheckpointFileError(f"{where} has shape {tuple(shape)}, and its folder {array.shape}: copy both again.")
    return _as_bfloat16(array) if version <= _LAST_WITH_WORDS and array.dtype == np.uint16 else array


def _beside(directory: Path, path: str, name: str) -> Path:
    """The folder of an array: whatever bucket or directory it was written to, it is beside the file now."""
    last = PurePosixPath(path).name
    if last in ("", ".", "..") or "\0" in last:
        raise CheckpointFileError(
            f"{directory / FILE_NAME}: array {name!r} is said to be at {path!r}, which names no folder."
        )
    return directory / last


def _as_bfloat16(words: LazyArray) -> LazyArray:
    return LazyArray(words.shape, np.dtype(ml_dtypes.bfloat16), functools.partial(_fill_words, words))


def _fill_words(words: LazyArray, out: np.ndarray, region: Region) -> None:
    words.fill(out.view(np.uint16), region)


@dataclasses.dataclass(frozen=True)
class LegacyWriter:
    """Takes the arrays of a state; `finish` writes the file that names them.

    Attributes:
        directory: where the files go.
        step: of training.
        specs: of all arrays by path in the state, without the step.
        chunk_bytes: of a chunk, at most.
        inline: small arrays, kept for the msgpack file.
        expected: which arrays did not come yet.
    """

    directory: Path
    step: int
    specs: Mapping[str, ArraySpec]
    chunk_bytes: int
    inline: dict[str, np.ndarray]
    expected: Expected

    def write(self, name: str, array: ArrayLike) -> None:
        """Stores one array.

        Args:
            name: path in the state.
            array: of the shape given.
        """
        stored = self.expected.take(name, array)
        spec = self.specs[name]
        if _is_inline(name, spec):
            self.inline[name] = np.array(stored, spec.dtype)
        else:
            zarr_files.write(self.directory / _dotted(name), stored, spec.dtype, self._chunks(spec))

    def finish(self) -> None:
        """Writes the msgpack file.

        Raises:
            ValueError: an array is missing.
        """
        self.expected.finish()
        leaves = {name: self.inline.get(name, self._spec(name)) for name in self.specs}
        leaves[STEP] = np.array(self.step, np.int32)
        tree = {"version": _VERSION, "optimizer": nested(leaves)}
        (self.directory / FILE_NAME).write_bytes(msgpack_files.pack(tree))

    def _chunks(self, spec: ArraySpec) -> tuple[int, ...]:
        return zarr_files.chunk_shape(spec.shape, spec.dtype.itemsize, self.chunk_bytes)

    def _spec(self, name: str) -> dict[str, Any]:
        spec = self.specs[name]
        return {
            "driver": "zarr",
            "dtype": spec.dtype.name,
            "kvstore": {"driver": "file", "path": f"{_dotted(name)}/"},
            "metadata": {
                "chunks": list(self._chunks(spec)),
                "compressor": {"id": "gzip", "level": 1},
                "shape": list(spec.shape),
            },
        }


def writer(directory: Path, step: int, specs: Mapping[str, ArraySpec], chunk_bytes: int) -> LegacyWriter:
    """Begins a checkpoint.

    Args:
        directory: that exists and is empty.
        step: of training.
        specs: of all arrays by path in the state, without the step.
        chunk_bytes: of a chunk, at most.

    Returns:
        What takes the arrays.
    """
    return LegacyWriter(directory, step, specs, chunk_bytes, {}, Expected(specs))


def _is_inline(name: str, spec: ArraySpec) -> bool:
    """Whether T5X keeps the array in the msgpack file: slots that the optimizer does not use."""
    return name.startswith(f"{STATE}/") and spec.shape == (1,)


def _dotted(name: str) -> str:
    return name.replace("/", ".")
