"""Arrays that TensorStore reads and writes: what Orbax keeps in its key-value store.

TensorStore decodes whole chunks: beside an array, one chunk of it is held, compressed and not. Training on many devices leaves
chunks that are small parts of an array; one that was saved as a single chunk takes up to three times its size to read.
"""

import collections
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from clp_jax.interop.arrays import ArraySpec, LazyArray
from clp_jax.interop.object_store import StorePath
from clp_jax.interop.regions import CheckpointFileError, Region, shape_of, within

MANIFEST_FILE = "manifest.ocdbt"
_COMPRESSOR = {"id": "zstd", "level": 1}
# Chunks asked for at once: a disk is as fast with one; a store answers late.
_AT_ONCE_IN_STORES = 8


def open_array(
    kvstore: Mapping[str, Any], where: str, *, driver: str = "zarr", complete: bool, in_store: bool = False
) -> LazyArray:
    """Opens an array.

    Args:
        kvstore: TensorStore's specification of where the array's keys are.
        where: the array, for messages.
        driver: ``"zarr"`` or ``"zarr3"``.
        complete: whether all chunks are there; otherwise one that is missing holds the array's fill value alone.
        in_store: whether it is in an object store, where some chunks are asked for at once.

    Returns:
        The array, read chunk by chunk.

    Raises:
        FileNotFoundError: there is no such array.
        CheckpointFileError: it can't be opened.
    """
    spec = {"driver": driver, "kvstore": dict(kvstore), "fill_missing_data_reads": not complete}
    store = _wait(ts.open(spec, open=True, read=True), where)
    chunk = tuple(store.chunk_layout.read_chunk.shape or ())  # None for a scalar.

    fill = functools.partial(_fill, store, chunk, where, _AT_ONCE_IN_STORES if in_store else 1)
    stacked = sum(1 for _ in itertools.takewhile(lambda size: size == 1, chunk))
    return LazyArray(tuple(store.shape), np.dtype(store.dtype.numpy_dtype), fill, stacked, casts=True)


def _fill(
    store: ts.TensorStore, chunk: tuple[int, ...], where: str, at_once: int, out: np.ndarray, region: Region
) -> None:
    # TensorStore holds what it reads at once twice, compressed and not.
    asked: collections.deque[tuple[Region, Any]] = collections.deque()
    for place in _chunks(region, chunk):
        asked.append((place, store[place].read()))
        if len(asked) == at_once:
            _take(asked, where, out, region)
    while asked:
        _take(asked, where, out, region)


def _take(asked: collections.deque[tuple[Region, Any]], where: str, out: np.ndarray, region: Region) -> None:
    place, future = asked.popleft()
    out[within(place, region)] = _wait(future, where)


def is_store(directory: Path | StorePath) -> bool:
    """Whether a directory is an OCDBT store.

    Args:
        directory: any.

    Returns:
        As it says.
    """
    return (directory / MANIFEST_FILE).is_file()


def files_of(directory: Path | StorePath) -> dict[str, Any]:
    """What TensorStore calls the files of a directory, or the objects below a name.

    Args:
        directory: any.

    Returns:
        TensorStore's specification.
    """
    return directory.kvstore if isinstance(directory, StorePath) else {"driver": "file", "path": f"{directory}/"}


def place_in_store(directory: Path | StorePath, name: str) -> dict[str, Any]:
    """Where an array's keys are in an OCDBT store.

    Args:
        directory: of the store.
        name: of the array.

    Returns:
        TensorStore's specification.
    """
    return {"driver": "ocdbt", "base": files_of(directory), "path": f"{name}/"}


class ArrayStore:
    """An OCDBT store that arrays are written to.

    Each commit writes the tree of keys anew, so that small arrays are committed together.

    Args:
        directory: of the store.
        pending_bytes: of arrays, held until they are committed.
    """

    def __init__(self, directory: Path, pending_bytes: int):
        self._directory = directory
        self._limit = pending_bytes
        # Copies and files at once would each hold a chunk, and keep the memory afterwards.
        self._context = ts.Context({"data_copy_concurrency": {"limit": 1}, "file_io_concurrency": {"limit": 1}})
        self._transaction = ts.Transaction()
        self._pending = 0

    def write(
        self,
        name: str,
        spec: ArraySpec,
        chunks: tuple[int, ...],
        parts: Iterable[Region],
        read: Callable[[Region], np.ndarray],
    ) -> None:
        """Writes an array as Orbax does.

        Args:
            name: of the array.
            spec: of what is written.
            chunks: sizes of a chunk, each 1 or more.
            parts: regions that cover the array once, and no chunk in part.
            read: gives what is in a part, as any view; one is held at a time.
        """
        where = f"{self._directory}: array {name!r}"
        described = {
            "driver": "zarr",
            "kvstore": place_in_store(self._directory, name),
            "metadata": {"shape": list(spec.shape), "chunks": list(chunks), "compressor": _COMPRESSOR},
            "dtype": spec.dtype.name,
            "store_data_equal_to_fill_value": True,
        }
        for region in parts:
            # The part without a name of its own here: one that has one is held while the next is read.
            self._write_part(described, where, region, chunks, read(region), spec.dtype)
        if 0 in spec.shape:
            _wait(self._opened(described), where)

    def _write_part(
        self,
        described: Mapping[str, Any],
        where: str,
        region: Region,
        chunks: tuple[int, ...],
        part: np.ndarray,
        dtype: np.dtype,
    ) -> None:
        store = None
        for place in _chunks(region, chunks):
            if store is None:
                store = _wait(self._opened(described), where)
            chunk = np.ascontiguousarray(part[within(place, region)], dtype).reshape(shape_of(place))
            _wait(store[place].write(chunk), where)
            self._pending += chunk.nbytes
            if self._pending >= self._limit:
                self.commit()
                store = None

    def _opened(self, described: Mapping[str, Any]) -> Any:
        return ts.open(dict(described), open=True, create=True, context=self._context, transaction=self._transaction)

    def commit(self) -> None:
        """Puts what is pending into files."""
        _wait(self._transaction.commit_async(), str(self._directory))
        self._transaction = ts.Transaction()
        self._pending = 0


def _chunks(region: Region, chunk: tuple[int, ...]) -> Iterator[Region]:
    """The chunks that a region touches, cut where the region ends."""
    if any(s.start == s.stop for s in region):
        return
    numbers = [range(s.start // n, -(-s.stop // n)) for s, n in zip(region, chunk, strict=True)]
    for key in np.ndindex(*map(len, numbers)):
        cells = zip(numbers, key, region, chunk, strict=True)
        starts = [(count[i] * n, s, n) for count, i, s, n in cells]
        yield tuple(slice(max(start, s.start), min(start + n, s.stop)) for start, s, n in starts)


def _wait(future: Any, where: str) -> Any:
    try:
        return future.result()
    except ValueError as error:
        if "NOT_FOUND" in str(error):
            raise FileNotFoundError(
                f"{where} is missing, or part of it: copy the checkpoint again. ({error})"
            ) from None
        raise CheckpointFileError(
            f"{where} can't be read: {error}. It is damaged; copy the checkpoint again."
        ) from error
