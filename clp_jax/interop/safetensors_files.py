"""Safetensors, in one file or in shards with an index: read lazily, written as the safetensors library writes them.

A file is the length of its header in 8 bytes, the header (JSON: dtype, shape and byte range of each tensor), and the tensors.
The header is read here and not by the library: the library maps files into memory, where what was read once counts as held, and
writes only what is in memory whole.
"""

import contextlib
import functools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from clp_jax.array_types import ArrayLike
from clp_jax.interop.arrays import ArraySpec, Expected, LazyArray, new_directory, stored_at
from clp_jax.interop.regions import CheckpointFileError, write_stored

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_SHARD_BYTES = 5 * 10**9

# The library sorts tensors by dtype first, in this order.
_DTYPES = {
    "U64": np.dtype("<u8"),
    "I64": np.dtype("<i8"),
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "U32": np.dtype("<u4"),
    "I32": np.dtype("<i4"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype("<f2"),
    "U16": np.dtype("<u2"),
    "I16": np.dtype("<i2"),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
_RANK = {dtype: rank for rank, dtype in enumerate(_CODES)}
_LENGTH_BYTES = 8
_ALIGNMENT = 8
_MAX_HEADER_BYTES = 100_000_000
_METADATA = "__metadata__"
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


def read(path: Path) -> dict[str, LazyArray]:
    """Opens a model's tensors.

    Args:
        path: of a directory that holds ``model.safetensors`` or ``model.safetensors.index.json`` and its shards, or one
            ``.safetensors`` file of any name; or of such a file.

    Returns:
        Tensors by name, in the order of the files.

    Raises:
        FileNotFoundError: there is none, or a shard is missing.
        CheckpointFileError: a file is damaged, or is a pickle, which is never opened.
    """
    path = _file_of(path) if path.is_dir() else path
    refuse_pickle(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: expected a directory or file of safetensors.")
    if path.name.endswith(".json"):
        return _read_sharded(path)
    return read_file(path)


def read_file(path: Path) -> dict[str, LazyArray]:
    """Opens the tensors of one file.

    Args:
        path: of the file.

    Returns:
        Tensors by name, in the order of the file.

    Raises:
        CheckpointFileError: the header is not one, or does not describe the file exactly.
    """
    refuse_pickle(path)
    start, header = _read_header(path)
    tensors = {name: _entry(path, name, entry) for name, entry in header.items() if name != _METADATA}
    expected = 0
    for name, (_, begin, end) in sorted(tensors.items(), key=lambda item: item[1][1:]):
        if begin != expected:
            wrong = "overlaps the one before" if begin < expected else "leaves a hole"
            raise CheckpointFileError(
                f"{path}: tensor {name!r} is at bytes {begin}:{end} and {wrong}, which ends at {expected}. "
                "The file is damaged; get it again."
            )
        expected = end
    stored = path.stat().st_size - start
    if stored != expected:
        raise CheckpointFileError(
            f"{path} holds {stored} bytes of tensors: its header says {expected}. It is truncated or damaged; get it again."
        )
    return {name: stored_at(path, start + begin, spec) for name, (spec, begin, _) in tensors.items()}


def _file_of(directory: Path) -> Path:
    for name in (SINGLE_FILE, INDEX_FILE):
        if (directory / name).is_file():
            return directory / name
    files = sorted(directory.glob("*.safetensors"))
    if len(files) == 1:
        return files[0]
    for path in sorted(directory.iterdir()):
        refuse_pickle(path)
    raise FileNotFoundError(
        f"{directory} holds {len(files)} safetensors files and none of {SINGLE_FILE} and {INDEX_FILE}: expected one of these."
    )


def refuse_pickle(path: Path) -> None:
    """Raises CheckpointFileError, with advice, for a file that is a pickle by its name."""
    if path.suffix in _PICKLED or path.name.endswith(".bin.index.json"):
        raise CheckpointFileError(
            f"{path} is a pickle, which runs code when it is opened: only safetensors are read. In an environment you trust, "
            "load the model with transformers and save it with save_pretrained(directory, safe_serialization=True)."
        )


def _read_sharded(index_path: Path) -> dict[str, LazyArray]:
    index = _json_object(index_path.read_bytes(), index_path)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise CheckpointFileError(f"{index_path} has no weight_map from names to files: it is no index of shards.")
    shards = {}
    for shard in dict.fromkeys(weight_map.values()):
        path = index_path.parent / shard
        if Path(shard).name != shard:
            raise CheckpointFileError(
                f"{index_path} names the shard {shard!r}: expected a file name without a directory."
            )
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: {index_path.name} names it; copy all shards beside the index.")
        shards[shard] = read_file(path)
    for name, shard in weight_map.items():
        if name not in shards[shard]:
            raise CheckpointFileError(f"{index_path.parent / shard} has no {name!r}: {index_path.name} says it does.")
    return {name: shards[shard][name] for name, shard in weight_map.items()}


def _json_object(text: bytes, path: Path) -> dict[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a name is there twice")
        return found

    try:
        found = json.loads(text, object_pairs_hook=once)
        if not isinstance(found, dict):
            raise ValueError("it is no object")
    except (ValueError, RecursionError) as error:
        raise CheckpointFileError(
            f"{path}: its JSON can't be read: {error}. The file is damaged; get it again."
        ) from None
    return found


def _read_header(path: Path) -> tuple[int, dict[str, Any]]:
    """Where the tensors start, and the header."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        if size < _LENGTH_BYTES or length > size - _LENGTH_BYTES:
            raise CheckpointFileError(
                f"{path}: its header is said to have {length} bytes, and the file has {size}. It is truncated, or no "
                "safetensors file; get it again."
            )
        if length > _MAX_HEADER_BYTES:
            raise CheckpointFileError(f"{path}: its header has {length} bytes: expected at most {_MAX_HEADER_BYTES}.")
        return _LENGTH_BYTES + length, _json_object(file.read(length), path)


def _entry(path: Path, name: str, entry: Any) -> tuple[ArraySpec, int, int]:
    """What a tensor is, and its range of bytes among the tensors."""
    wrong = f"{path}: tensor {name!r} is described as {entry!r}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointFileError(f"{wrong}: expected dtype, shape and data_offsets.")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise CheckpointFileError(
            f"{wrong}: expected a dtype among {', '.join(_DTYPES)}; save the model in one of them."
        )
    if not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2:
        raise CheckpointFileError(f"{wrong}: expected sizes of 0 or more and two offsets.")
    spec = ArraySpec(tuple(shape), _DTYPES[dtype])
    if offsets[1] - offsets[0] != spec.nbytes:
        raise CheckpointFileError(f"{wrong}: its shape needs {spec.nbytes} bytes. The file is damaged; get it again.")
    return spec, offsets[0], offsets[1]


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)


class SafetensorsWriter:
    """Takes the tensors of files whose headers are written already.

    Attributes:
        directory: where the files are, before all is there; more files may be put beside them.
    """

    def __init__(self, directory: Path, specs: Mapping[str, ArraySpec], max_shard_bytes: int):
        self.directory = directory
        self._specs = dict(specs)
        self._expected = Expected(specs)
        self._places: dict[str, tuple[Path, int]] = {}
        shards = plan_shards(specs, max_shard_bytes)
        for shard, names in shards.items():
            self._places |= _write_header(directory / shard, {name: specs[name] for name in names})
        if len(shards) > 1:
            _write_index(directory / INDEX_FILE, specs, shards)

    def write(self, name: str, array: ArrayLike) -> None:
        """Stores one tensor.

        Args:
            name: one of those given before, each once, in any order.
            array: of the shape given; floats are rounded to the dtype given, anything else has it.

        Raises:
            ValueError: it was not announced so.
        """
        stored = self._expected.take(name, array)
        path, start = self._places[name]
        with path.open("r+b") as file:
            file.seek(start)
            write_stored(file, stored, self._specs[name].dtype)

    def finish(self) -> None:
        """Checks that all tensors are written.

        Raises:
            ValueError: some are not.
        """
        self._expected.finish()


@contextlib.contextmanager
def open_writer(
    directory: Path, specs: Mapping[str, ArraySpec], *, max_shard_bytes: int = MAX_SHARD_BYTES
) -> Iterator[SafetensorsWriter]:
    """Writes a model's tensors: one file, or shards and an index.

    Args:
        directory: that does not exist; it appears whole at the end, or not at all.
        specs: of all tensors. Shards are filled in this order.
        max_shard_bytes: of tensors in one file; a larger tensor has a file of its own.

    Yields:
        What takes the tensors, one at a time.

    Raises:
        ValueError: the directory exists, safetensors has no such dtype, or a tensor is missing at the end.
    """
    check_specs(specs)
    with new_directory(directory) as partial:
        writer = SafetensorsWriter(partial, specs, max_shard_bytes)
        yield writer
        writer.finish()


def check_specs(specs: Mapping[str, ArraySpec]) -> None:
    """Checks that safetensors can hold these tensors.

    Args:
        specs: of the tensors.

    Raises:
        ValueError: a name is reserved, or a dtype is unknown.
    """
    for name, spec in specs.items():
        if name == _METADATA:
            raise ValueError(f"tensor {name!r} can't have this name: safetensors keeps its metadata there.")
        if spec.dtype not in _CODES:
            raise ValueError(f"tensor {name!r} is {spec.dtype}: safetensors holds {', '.join(map(str, _CODES))}.")


def plan_shards(specs: Mapping[str, ArraySpec], max_shard_bytes: int) -> dict[str, list[str]]:
    """Which tensors go into which file: the next one, where this one has no room left.

    Args:
        specs: of the tensors, in order.
        max_shard_bytes: of tensors in one file, 1 or more.

    Returns:
        Names of tensors by name of file.

    Raises:
        ValueError: there is no room at all.
    """
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes is {max_shard_bytes}: expected at least 1.")
    shards: list[list[str]] = [[]]
    room = max_shard_bytes
    for name, spec in specs.items():
        if spec.nbytes > room and shards[-1]:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(name)
        room -= spec.nbytes
    if len(shards) == 1:
        return {SINGLE_FILE: shards[0]}
    stem = functools.partial("model-{:05d}-of-{:05d}.safetensors".format)
    return {stem(i, len(shards)): names for i, names in enumerate(shards, start=1)}


def _write_header(path: Path, specs: Mapping[str, ArraySpec]) -> dict[str, tuple[Path, int]]:
    """Writes a file with its tensors left out, and says where each belongs."""
    header: dict[str, Any] = {_METADATA: {"format": "pt"}}
    offset, offsets = 0, {}
    for name, spec in sorted(specs.items(), key=lambda item: (_RANK[item[1].dtype], item[0].encode())):
        offsets[name] = offset
        header[name] = {
            "dtype": _CODES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [offset, offset + spec.nbytes],
        }
        offset += spec.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    start = _LENGTH_BYTES + len(text)
    with path.open("xb") as file:
        file.write(len(text).to_bytes(_LENGTH_BYTES, "little") + text)
        file.truncate(start + offset)
    return {name: (path, start + offset) for name, offset in offsets.items()}


def _write_index(path: Path, specs: Mapping[str, ArraySpec], shards: Mapping[str, list[str]]) -> None:
    weight_map = {name: shard for shard, names in shards.items() for name in names}
    total = sum(spec.nbytes for spec in specs.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", "utf-8")
