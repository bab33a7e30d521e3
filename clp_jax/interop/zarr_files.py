"""Zarr version 2 in plain folders: what T5X's older checkpoints keep each array in.

Chunks that are plain, gzip or zlib are read and written here, in blocks; others are TensorStore's.
"""

import dataclasses
import gzip
import json
import math
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from clp_jax.interop import tensorstore_files
from clp_jax.interop.arrays import LazyArray
from clp_jax.interop.object_store import StorePath
from clp_jax.interop.regions import (
    CheckpointFileError,
    Region,
    Writable,
    blocks,
    bytes_of,
    overlap,
    read_stored,
    shape_of,
    size_of,
    within,
)

METADATA_FILE = ".zarray"
_GZIP_LEVEL = 1
GZIP: Mapping[str, Any] = {"id": "gzip", "level": _GZIP_LEVEL}
# A chunk that is this many times smaller than it may be is not worth a file.
_TOO_SMALL = 16
_NATURAL = ("chunks", "shape")


def read(directory: Path | StorePath) -> LazyArray:
    """Opens an array.

    Args:
        directory: that holds ``.zarray`` and chunks.

    Returns:
        The array.

    Raises:
        FileNotFoundError: the directory or a chunk is missing.
        CheckpointFileError: ``.zarray`` can't be read.
    """
    path = directory / METADATA_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: copy the folder {directory.name} beside the checkpoint's file.")
    metadata = _parse(path)
    compressor = (metadata.get("compressor") or {}).get("id")
    if metadata.get("filters") or metadata.get("order") != "C" or compressor not in (None, "gzip", "zlib"):
        place, complete = tensorstore_files.files_of(directory), metadata.get("fill_value") is None
        return tensorstore_files.open_array(place, str(directory), complete=complete)
    dtype = _dtype(metadata["dtype"], path)
    array = _Folder(
        directory,
        tuple(metadata["shape"]),
        dtype,
        tuple(metadata["chunks"]),
        compressor,
        metadata.get("dimension_separator", "."),
        metadata.get("fill_value"),
    )
    # A store is not asked for each: one that is missing is told when it is read.
    for key, _ in () if isinstance(directory, StorePath) else _grid(array.shape, array.chunks):
        if array.filler is None and not array.file(key).is_file():
            raise FileNotFoundError(
                f"{array.file(key)} is missing: {array.shape} in chunks of {array.chunks} needs it; copy the folder again."
            )
    return LazyArray(array.shape, dtype, array.fill, casts=True)


@dataclasses.dataclass(frozen=True)
class _Folder:
    """An array's chunks: one that is missing holds `filler` alone."""

    directory: Path | StorePath
    shape: tuple[int, ...]
    dtype: np.dtype
    chunks: tuple[int, ...]
    compressor: str | None
    separator: str
    filler: Any

    def file(self, key: tuple[int, ...]) -> Path | StorePath:
        return self.directory / self.separator.join(map(str, key or (0,)))

    def fill(self, out: np.ndarray, region: Region) -> None:
        for key, place in _grid(self.shape, self.chunks):
            shared = overlap(place, region)
            if shared is None:
                continue
            # Of an array without axes, numpy would give a number.
            target = out[within(shared, region)] if out.ndim else out
            if self.filler is None or self.file(key).is_file():
                # Chunks at the edge are stored whole, so a chunk's place may be smaller than what is stored.
                stored = tuple(slice(i * n, (i + 1) * n) for i, n in zip(key, self.chunks, strict=True))
                _read_chunk(self.file(key), self.compressor, self.chunks, self.dtype, target, within(shared, stored))
            else:
                target[...] = self.filler


def write(directory: Path, array: np.ndarray, dtype: np.dtype, chunks: tuple[int, ...]) -> None:
    """Writes an array with chunks compressed by gzip.

    Args:
        directory: that does not exist.
        array: any view.
        dtype: of what is written.
        chunks: sizes of a chunk, each 1 or more.
    """
    directory.mkdir()
    (directory / METADATA_FILE).write_text(metadata_text(array.shape, dtype, chunks), "utf-8")
    for key, place in _grid(array.shape, chunks):
        path = directory / (".".join(map(str, key)) or "0")
        with path.open("xb") as raw, gzip.GzipFile("", "wb", _GZIP_LEVEL, raw, mtime=0) as file:
            _write_chunk(file, array, dtype, chunks, place)


def metadata_text(
    shape: tuple[int, ...], dtype: np.dtype, chunks: tuple[int, ...], compressor: Mapping[str, Any] | None = GZIP
) -> str:
    """What ``.zarray`` says of an array, as T5X writes it.

    Args:
        shape: of the array.
        dtype: stored.
        chunks: sizes of a chunk.
        compressor: of chunks; None stores them as they are.

    Returns:
        JSON.
    """
    metadata = {
        "chunks": list(chunks),
        "compressor": None if compressor is None else dict(compressor),
        "dimension_separator": ".",
        "dtype": dtype.name if _is_extended(dtype) else dtype.newbyteorder("<").str,
        "fill_value": None,
        "filters": None,
        "order": "C",
        "shape": list(shape),
        "zarr_format": 2,
    }
    return json.dumps(metadata, separators=(",", ":"))


def chunk_shape(shape: tuple[int, ...], itemsize: int, limit: int) -> tuple[int, ...]:
    """Sizes of chunks, as T5X chooses them: the largest size goes to its next divisor until a chunk is small enough.

    Where sizes have few divisors, as a vocabulary that is a prime, chunks would be far too small: then the largest size is
    halved.

    Args:
        shape: of the array.
        itemsize: bytes of an element.
        limit: bytes of a chunk.

    Returns:
        Sizes of a chunk, each 1 or more.
    """
    even = _smaller(shape, itemsize, limit, lambda below, of: next(n for n in range(below - 1, 0, -1) if of % n == 0))
    if size_of(even) * itemsize * _TOO_SMALL >= min(limit, size_of(shape) * itemsize):
        return even
    return _smaller(shape, itemsize, limit, lambda below, _: -(-below // 2))


def _smaller(shape: tuple[int, ...], itemsize: int, limit: int, shrink: Callable[[int, int], int]) -> tuple[int, ...]:
    chunk = [max(n, 1) for n in shape]
    while any(n > 1 for n in chunk) and size_of(tuple(chunk)) * itemsize > limit:
        axis = chunk.index(max(chunk))
        chunk[axis] = shrink(chunk[axis], shape[axis])
    return tuple(chunk)


def _parse(path: Path | StorePath) -> dict[str, Any]:
    try:
        metadata = json.loads(path.read_bytes())
        sizes = [metadata[name] for name in _NATURAL]
        natural = all(type(n) is int and n >= 0 for size in sizes for n in size)
        known = metadata["zarr_format"] == 2 and isinstance(metadata["dtype"], str)
        if not (known and natural and len(sizes[0]) == len(sizes[1]) and all(n > 0 for n in sizes[0])):
            raise ValueError("expected zarr_format 2, a dtype, and as many chunk sizes as sizes")
        if metadata.get("dimension_separator", ".") not in (".", "/"):
            raise ValueError("expected a dimension_separator of '.' or '/'")
        if not isinstance(metadata.get("compressor"), dict | None):
            raise ValueError("expected a compressor with an id, or null")
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointFileError(f"{path} does not describe an array: {error}. Copy it again.") from None
    return metadata


def _dtype(name: str, path: Path | StorePath) -> np.dtype:
    extended = {d.name: d for d in map(np.dtype, (ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2))}
    plain = {d: np.dtype(d) for d in ("|b1", "|i1", "|u1", *(f"<{k}{n}" for k in "iuf" for n in (2, 4, 8)))}
    if name not in extended | plain:
        raise CheckpointFileError(f"{path} says dtype {name!r}: expected one of {', '.join((*extended, *plain))}.")
    return (extended | plain)[name]


def _is_extended(dtype: np.dtype) -> bool:
    return dtype.kind == "V" or dtype.type.__module__ == "ml_dtypes"


def _grid(shape: tuple[int, ...], chunks: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], Region]]:
    """Chunks by number, and where each is in the array."""
    for key in np.ndindex(*(math.ceil(n / chunk) for n, chunk in zip(shape, chunks, strict=True))):
        places = zip(key, shape, chunks, strict=True)
        yield key, tuple(slice(i * chunk, min((i + 1) * chunk, n)) for i, n, chunk in places)


def _read_chunk(
    path: Path | StorePath,
    compressor: str | None,
    chunks: tuple[int, ...],
    dtype: np.dtype,
    out: np.ndarray,
    region: Region,
) -> None:
    try:
        with path.open("rb") as raw:
            file = _Zlib(raw) if compressor == "zlib" else gzip.GzipFile(fileobj=raw) if compressor else raw
            read_stored(file, chunks, dtype, out, region)
            # The end holds the checksum, which is compared when it is reached.
            if shape_of(region) == chunks and file.read(1):
                raise CheckpointFileError(f"{path} holds more than a chunk of {chunks} {dtype}: copy it again.")
    except (OSError, EOFError, zlib.error) as error:
        raise CheckpointFileError(f"{path} can't be read: {error}. It is damaged; copy it again.") from error


class _Zlib:
    """A file behind zlib, read forwards."""

    def __init__(self, raw: BinaryIO):
        self.name = raw.name
        self._raw, self._at = raw, 0
        self._stream = zlib.decompressobj()

    def read(self, size: int) -> bytes:
        data = b""
        while not data and not self._stream.eof:
            held = self._stream.unconsumed_tail or self._raw.read(2**16)
            if not held:
                raise EOFError("it ends early")
            data = self._stream.decompress(held, size)
        self._at += len(data)
        return data

    def tell(self) -> int:
        return self._at

    def seek(self, position: int) -> None:
        while self._at < position:
            if not self.read(min(position - self._at, 2**16)):
                raise EOFError("it ends early")


def _write_chunk(file: Writable, array: np.ndarray, dtype: np.dtype, chunks: tuple[int, ...], place: Region) -> None:
    """Writes a chunk at full size; what is beyond the array is zeros."""
    edge = shape_of(place) != chunks
    for block in blocks(chunks, max(dtype.itemsize, array.dtype.itemsize)):
        there = tuple(slice(p.start + b.start, p.start + b.stop) for p, b in zip(place, block, strict=True))
        shared = overlap(there, place) if edge else there
        if not edge:
            file.write(bytes_of(np.ascontiguousarray(array[there], dtype)))
            continue
        stored = np.zeros(shape_of(block), dtype)
        if shared is not None:
            stored[within(shared, there)] = array[shared]
        file.write(bytes_of(stored))
