"""T5X's checkpoints in the form of Orbax: all arrays in one OCDBT store, named by a file of JSON.

The store is TensorStore's; the files around it are written here as Orbax writes them, so that Orbax and T5X restore them.
"""

import base64
import dataclasses
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from clp_jax.array_types import ArrayLike
from clp_jax.interop import tensorstore_files, zarr_files
from clp_jax.interop.arrays import ArraySpec, Expected
from clp_jax.interop.regions import CheckpointFileError
from clp_jax.interop.t5x_state import STEP, T5XCheckpoint, checkpoint_of

STATE_ITEM, DATASET_ITEM = "state", "dataset"
METADATA_FILE, COMMIT_FILE = "_METADATA", "commit_success.txt"
# TensorStore holds a chunk some times over beside the array, so that a chunk is a small part of the largest array.
_CHUNKS_OF_LARGEST = 128
_LEAST_CHUNK_BYTES, _MOST_CHUNK_BYTES = 2 * 2**20, 64 * 2**20
_FORM = "orbax"
_HANDLERS = {
    DATASET_ITEM: "t5x.checkpoints.DatasetCheckpointHandler",
    STATE_ITEM: "orbax.checkpoint._src.handlers.pytree_checkpoint_handler.PyTreeCheckpointHandler",
}
_DICTIONARY_KEY = 2


def item_of(directory: Path) -> Path | None:
    """Where a checkpoint in this form keeps its arrays.

    Args:
        directory: of the checkpoint.

    Returns:
        The directory of the item, or None where the checkpoint has another form.
    """
    for item in (directory / STATE_ITEM, directory):
        if (item / METADATA_FILE).is_file() or tensorstore_files.is_store(item):
            return item
    return None


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
    path = item / METADATA_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: it names the arrays; copy the checkpoint again.")
    metadata = _metadata(path)
    driver = "zarr3" if metadata.get("use_zarr3") else "zarr"
    in_store = tensorstore_files.is_store(item)
    if metadata.get("use_ocdbt", in_store) and not in_store:
        raise FileNotFoundError(
            f"{item / tensorstore_files.MANIFEST_FILE} is missing: {path} says that it is there; copy it again."
        )
    # Orbax once left out chunks of zeros.
    complete = bool(metadata.get("store_array_data_equal_to_fill_value"))
    leaves = {}
    for name, shape in _names(metadata, path).items():
        dotted = name.replace("/", ".")
        place = tensorstore_files.place_in_store(item, dotted)
        if not in_store:
            place = {"driver": "file", "path": f"{item / dotted}/"}
        where = f"{item}: array {name!r}"
        array = tensorstore_files.open_array(place, where, driver=driver, complete=complete)
        if shape is not None and shape != array.shape:
            raise CheckpointFileError(f"{where} has shape {array.shape}: {METADATA_FILE} says {shape}.")
        leaves[name] = array
    return checkpoint_of(leaves, _FORM, item)


def _metadata(path: Path) -> dict[str, Any]:
    try:
        metadata = json.loads(path.read_bytes())
        if not isinstance(metadata, dict) or not isinstance(metadata["tree_metadata"], dict):
            raise ValueError("it is no dictionary with tree_metadata")
    except (ValueError, KeyError, RecursionError) as error:
        raise CheckpointFileError(f"{path} does not name arrays: {error!r}. Copy it again.") from None
    return metadata


def _names(metadata: Mapping[str, Any], path: Path) -> dict[str, tuple[int, ...] | None]:
    """Paths of the arrays, and their shapes where they are said."""
    names = {}
    try:
        for leaf in metadata["tree_metadata"].values():
            name = "/".join(str(key["key"]) for key in leaf["key_metadata"])
            value = leaf["value_metadata"]
            if not value.get("skip_deserialize") and value["value_type"] not in ("None", "Dict", "List", "string"):
                shape = value.get("write_shape")
                names[name] = None if shape is None else tuple(shape)
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointFileError(f"{path} does not describe its arrays: {error!r}. Copy it again.") from None
    return names


@dataclasses.dataclass(frozen=True)
class OrbaxWriter:
    """Takes the arrays of a state; `finish` writes the files that name them.

    Attributes:
        directory: where the files go.
        final: where they will be.
        step: of training.
        specs: of all arrays by path in the state, without the step.
        chunk_bytes: of a chunk, at most.
        started: time in nanoseconds.
        store: of the arrays.
        expected: which arrays did not come yet.
    """

    directory: Path
    final: Path
    step: int
    specs: Mapping[str, ArraySpec]
    chunk_bytes: int
    started: int
    store: tensorstore_files.ArrayStore
    expected: Expected

    def write(self, name: str, array: ArrayLike) -> None:
        """Stores one array.

        Args:
            name: path in the state.
            array: of the shape given.
        """
        self._write(name, self.expected.take(name, array), self.specs[name])

    def finish(self) -> None:
        """Writes the step and the files that name the arrays.

        Raises:
            ValueError: an array is missing.
        """
        self.expected.finish()
        step = np.array(self.step, np.int32)
        self._write(STEP, step, ArraySpec((), step.dtype))
        self.store.commit()
        specs = dict(self.specs) | {STEP: ArraySpec((), step.dtype)}
        ordered = {name: specs[name] for name in sorted(specs, key=lambda name: name.split("/"))}
        item = self.directory / STATE_ITEM
        (item / METADATA_FILE).write_text(json.dumps(_tree_metadata(ordered)), "utf-8")
        (item / "_sharding").write_text(_shardings(ordered), "utf-8")
        (item / "array_metadatas").mkdir()
        layouts = [_array_metadata(name, spec, self._chunks(spec)) for name, spec in ordered.items()]
        (item / "array_metadatas" / "process_0").write_text(json.dumps({"array_metadatas": layouts}), "utf-8")
        (self.directory / DATASET_ITEM).mkdir()
        (self.directory / "_CHECKPOINT_METADATA").write_text(json.dumps(self._checkpoint_metadata()), "utf-8")
        for part in (item, self.directory / DATASET_ITEM, self.directory):
            place = self.final / part.relative_to(self.directory)
            (part / COMMIT_FILE).write_text(f"Checkpoint commit was successful to {place}", "utf-8")

    def _write(self, name: str, array: np.ndarray, spec: ArraySpec) -> None:
        self.store.write(name.replace("/", "."), array, spec.dtype, self._chunks(spec))

    def _chunks(self, spec: ArraySpec) -> tuple[int, ...]:
        return zarr_files.chunk_shape(spec.shape, spec.dtype.itemsize, self.chunk_bytes)

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
    item = directory / STATE_ITEM
    item.mkdir()
    largest = max((spec.nbytes for spec in specs.values()), default=0)
    chunk_bytes = chunk_bytes or min(max(largest // _CHUNKS_OF_LARGEST, _LEAST_CHUNK_BYTES), _MOST_CHUNK_BYTES)
    store = tensorstore_files.ArrayStore(item, max(chunk_bytes, _LEAST_CHUNK_BYTES))
    return OrbaxWriter(directory, final, step, specs, chunk_bytes, time.time_ns(), store, Expected(specs))


def _tree_metadata(specs: Mapping[str, ArraySpec]) -> dict[str, Any]:
    tree = {}
    for name, spec in specs.items():
        keys = name.split("/")
        tree[str(tuple(keys))] = {
            "key_metadata": [{"key": key, "key_type": _DICTIONARY_KEY} for key in keys],
            "value_metadata": {
                "value_type": "jax.Array",
                "skip_deserialize": False,
                "write_shape": list(spec.shape),
            },
        }
    return {
        "tree_metadata": tree,
        "use_ocdbt": True,
        "use_zarr3": False,
        "store_array_data_equal_to_fill_value": True,
        "custom_metadata": None,
    }


def _array_metadata(name: str, spec: ArraySpec, chunks: tuple[int, ...]) -> dict[str, Any]:
    layout = {
        "param_name": name.replace("/", "."),
        "write_shape": list(spec.shape),
        "chunk_shape": list(chunks),
        "ext_metadata": None,
    }
    return {"array_metadata": layout}


def _shardings(specs: Mapping[str, ArraySpec]) -> str:
    """Where arrays are restored to by whoever does not say where: the first device."""
    sharding = json.dumps(
        {
            "sharding_type": "NamedSharding",
            "shape": [1, 1],
            "axis_names": ["data", "model"],
            "axis_types": ["AxisType.Auto", "AxisType.Auto"],
            "partition_spec": [],
            "device_mesh": {"mesh": [[{"id": 0}]]},
        }
    )
    names = {name: base64.b64encode(name.replace("/", ".").encode()).decode() for name in specs}
    return json.dumps(dict.fromkeys(names.values(), sharding), separators=(",", ":"))
