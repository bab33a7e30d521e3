"""One item of an Orbax checkpoint: a tree of arrays in an OCDBT store, named by files of JSON.

The store is TensorStore's; the files around it are written here as Orbax writes them, so that Orbax and T5X restore them. Orbax
itself copies all arrays of an item before it writes them; here one is held at a time, or a part of one, and of the store one
chunk.
"""

import base64
import dataclasses
import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from clp_jax.array_types import ArrayLike
from clp_jax.interop import tensorstore_files, zarr_files
from clp_jax.interop.arrays import ArraySpec, Expected, LazyArray
from clp_jax.interop.object_store import StorePath
from clp_jax.interop.regions import CheckpointFileError, Region, parts_of, size_of

METADATA_FILE = "_METADATA"
# TensorStore holds a chunk some times over beside the array, so that a chunk is a small part of the largest array.
_CHUNKS_OF_LARGEST = 128
_LEAST_CHUNK_BYTES, _MOST_CHUNK_BYTES = 2 * 2**20, 64 * 2**20
_DICTIONARY_KEY = 2


def is_item(directory: Path) -> bool:
    """Whether a directory holds arrays as an item does."""
    return (directory / METADATA_FILE).is_file() or tensorstore_files.is_store(directory)


def read(item: Path | StorePath) -> dict[str, LazyArray]:
    """Opens the arrays of an item.

    Args:
        item: its directory.

    Returns:
        Arrays by their keys joined with slashes; read when asked for.

    Raises:
        FileNotFoundError: a part is missing.
        CheckpointFileError: a file is damaged.
    """
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
        dotted, where = name.replace("/", "."), f"{item}: array {name!r}"
        remote = isinstance(item, StorePath)
        if isinstance(item, StorePath) and not item.has_kvstore and not in_store and driver == "zarr":
            array = zarr_files.read(item / dotted)
        else:
            place = (
                tensorstore_files.place_in_store(item, dotted)
                if in_store
                else tensorstore_files.files_of(item / dotted)
            )
            array = tensorstore_files.open_array(place, where, driver=driver, complete=complete, in_store=remote)
        if shape is not None and not _divides(shape, array.shape):
            raise CheckpointFileError(
                f"{where} has shape {array.shape}: {METADATA_FILE} says that it was written in parts of {shape}."
            )
        leaves[name] = array
    return leaves


def _divides(part: tuple[int, ...], whole: tuple[int, ...]) -> bool:
    """Whether an array is made of parts of this shape: the shards of those devices that wrote it."""
    return len(part) == len(whole) and all(a == b or (a and b % a == 0) for a, b in zip(part, whole, strict=True))


def _metadata(path: Path | StorePath) -> dict[str, Any]:
    try:
        metadata = json.loads(path.read_bytes())
        if not isinstance(metadata, dict) or not isinstance(metadata["tree_metadata"], dict):
            raise ValueError("it is no dictionary with tree_metadata")
    except (ValueError, KeyError, RecursionError) as error:
        raise CheckpointFileError(f"{path} does not name arrays: {error!r}. Copy it again.") from None
    return metadata


def _names(metadata: Mapping[str, Any], path: Path | StorePath) -> dict[str, tuple[int, ...] | None]:
    """Paths of the arrays, and the shapes of the parts they were written in, where they are said."""
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
class ItemWriter:
    """Takes the arrays of an item; `finish` writes the files that name them.

    Attributes:
        directory: where the files go.
        specs: of all arrays by path.
        stacked: leading axes of those that are read part by part.
        chunk_bytes: of a chunk, at most.
        store: of the arrays.
        expected: which arrays did not come yet.
    """

    directory: Path
    specs: Mapping[str, ArraySpec]
    stacked: Mapping[str, int]
    chunk_bytes: int
    store: tensorstore_files.ArrayStore
    expected: Expected

    def write(self, name: str, array: ArrayLike | LazyArray) -> None:
        """Stores one array; a lazy one is read part by part where it is stacked, and one part is held at a time.

        Args:
            name: its path.
            array: of the shape given.
        """
        self.expected.check(name, tuple(array.shape), np.dtype(array.dtype))
        read = array.read if isinstance(array, LazyArray) else functools.partial(_part_of, np.asarray(array))
        spec, stacked = self.specs[name], self.stacked.get(name, 0)
        self.store.write(name.replace("/", "."), spec, self._chunks(name), parts_of(spec.shape, stacked), read)

    def finish(self) -> None:
        """Writes the files that name the arrays.

        Raises:
            ValueError: an array is missing.
        """
        self.expected.finish()
        self.store.commit()
        chunks = {name: self._chunks(name) for name in self.specs}
        (self.directory / "array_metadatas").mkdir()
        for name, text in description(self.specs, chunks, in_ocdbt=True).items():
            (self.directory / name).write_text(text, "utf-8")

    def _chunks(self, name: str) -> tuple[int, ...]:
        spec, stacked = self.specs[name], self.stacked.get(name, 0)
        inner = zarr_files.chunk_shape(spec.shape[stacked:], spec.dtype.itemsize, self.chunk_bytes)
        return (*[1] * stacked, *inner)


def _part_of(array: np.ndarray, region: Region) -> np.ndarray:
    # Of a scalar, what stands at () is no array.
    return np.asarray(array[region])


def writer(
    directory: Path,
    specs: Mapping[str, ArraySpec],
    chunk_bytes: int | None = None,
    stacked: Mapping[str, int] | None = None,
) -> ItemWriter:
    """Begins an item.

    Args:
        directory: that does not exist.
        specs: of all arrays by path.
        chunk_bytes: of a chunk, at most; None goes by the largest part that is written at once.
        stacked: leading axes of those that are read part by part.

    Returns:
        What takes the arrays.
    """
    directory.mkdir()
    axes = stacked or {}
    largest = max((spec.nbytes // size_of(spec.shape[: axes.get(name, 0)]) for name, spec in specs.items()), default=0)
    chunk_bytes = chunk_bytes or min(max(largest // _CHUNKS_OF_LARGEST, _LEAST_CHUNK_BYTES), _MOST_CHUNK_BYTES)
    store = tensorstore_files.ArrayStore(directory, max(chunk_bytes, _LEAST_CHUNK_BYTES))
    return ItemWriter(directory, specs, axes, chunk_bytes, store, Expected(specs))


def description(
    specs: Mapping[str, ArraySpec], chunks: Mapping[str, tuple[int, ...]], in_ocdbt: bool = False
) -> dict[str, str]:
    """The files that name the arrays of an item, as Orbax writes them.

    Args:
        specs: of all arrays by path.
        chunks: sizes of a chunk of each.
        in_ocdbt: whether the arrays are in an OCDBT store; otherwise each is in a folder of its own.

    Returns:
        Their texts, by name.
    """
    ordered = {name: specs[name] for name in sorted(specs, key=lambda name: name.split("/"))}
    layouts = [_array_metadata(name, spec, chunks[name]) for name, spec in ordered.items()]
    return {
        METADATA_FILE: json.dumps(_tree_metadata(ordered) | {"use_ocdbt": in_ocdbt}),
        "_sharding": _shardings(ordered),
        "array_metadatas/process_0": json.dumps({"array_metadatas": layouts}),
    }


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
