"""Arrays in files: read when asked for, written one after another, so that one tensor is in memory at a time.

A checkpoint of any format is a mapping from names to `LazyArray`; a writer is told all shapes and dtypes first, then given the
arrays in any order. Nothing larger than a block is held beside the array that is read or written.
"""

import contextlib
import dataclasses
import functools
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, Protocol, TypeAlias, runtime_checkable

import ml_dtypes
import numpy as np

from clp_jax.array_types import ArrayLike
from clp_jax.interop.regions import Region, read_stored, shape_of, size_of

_NAMED = 8


class ArraySpec(NamedTuple):
    """Shape and dtype of an array.

    Attributes:
        shape: sizes.
        dtype: of numpy, or of ml_dtypes (bfloat16).
    """

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the array in memory."""
        return size_of(self.shape) * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class LazyArray:
    """An array that stays where it is until it is read.

    Attributes:
        shape: sizes.
        dtype: of what is read, in the machine's byte order.
        fill: puts a region of the array into an array of that region's shape and of this dtype; where it `casts`, into one of
            any, block by block, so that nothing is held twice.
        stacked: leading axes along which parts are stored by themselves: to read one costs what it has itself.
        casts: whether `fill` takes arrays of other dtypes.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    fill: Callable[[np.ndarray, Region], None] = dataclasses.field(repr=False, compare=False)
    stacked: int = 0
    casts: bool = False

    @property
    def spec(self) -> ArraySpec:
        """Shape and dtype."""
        return ArraySpec(self.shape, self.dtype)

    def fill_any(self, out: np.ndarray, region: Region) -> None:
        """Puts a region into an array of any dtype.

        Args:
            out: of the region's shape; any view.
            region: of the array.
        """
        if self.casts or out.dtype == self.dtype:
            self.fill(out, region)
        else:
            out[...] = self.read(region)

    def read(self, index: tuple[slice, ...] = ()) -> np.ndarray:
        """Reads the array, or a part of it.

        Args:
            index: a slice without step for each of the first axes; the other axes are read whole.

        Returns:
            An array that nothing else holds.

        Raises:
            IndexError: the slices have steps, or are too many.
            CheckpointFileError: the files are damaged.
            FileNotFoundError: some of them are missing.
        """
        region = _region(index, self.shape)
        out = np.empty(shape_of(region), self.dtype)
        self.fill(out, region)
        return out


# Names of arrays, read when asked for.
Source: TypeAlias = Mapping[str, LazyArray]


@runtime_checkable
class ArrayWriter(Protocol):
    """What takes arrays that it has been told of, one at a time, in any order."""

    def write(self, name: str, array: ArrayLike) -> None:
        """Stores one array.

        Args:
            name: one of the names given before, each once.
            array: of the shape given; floats are rounded to the dtype given, anything else has it.
        """


class Expected:
    """Which arrays a writer still waits for.

    Args:
        specs: all arrays by name.
    """

    def __init__(self, specs: Mapping[str, ArraySpec]):
        self._specs = dict(specs)
        self._waiting = dict.fromkeys(specs)

    def take(self, name: str, array: ArrayLike) -> np.ndarray:
        """Checks an array that came and waits for it no longer.

        Args:
            name: of the array.
            array: with that name.

        Returns:
            The array on the host, of its own dtype.

        Raises:
            ValueError: as `check`.
        """
        self.check(name, tuple(array.shape), array.dtype)
        return np.asarray(array)

    def check(self, name: str, shape: tuple[int, ...], dtype: np.dtype) -> None:
        """Checks what comes, and waits for it no longer.

        Args:
            name: of the array.
            shape: of what comes with that name.
            dtype: of it.

        Raises:
            ValueError: nobody waits for it, or its shape or dtype is another.
        """
        if name not in self._specs:
            raise ValueError(f"array {name!r} is not among the {len(self._specs)} that were to be written.")
        if name not in self._waiting:
            raise ValueError(f"array {name!r} is written a second time: expected each once.")
        spec = self._specs[name]
        if shape != spec.shape:
            raise ValueError(f"array {name!r} has shape {shape}: expected {spec.shape}.")
        if dtype != spec.dtype and not (is_float(dtype) and is_float(spec.dtype)):
            raise ValueError(f"array {name!r} is {dtype}: expected {spec.dtype}; only floats are cast.")
        del self._waiting[name]

    def finish(self) -> None:
        """Checks that nothing is missing.

        Raises:
            ValueError: it is.
        """
        if self._waiting:
            raise ValueError(f"{len(self._waiting)} arrays were not written: {some(self._waiting)}.")


def copy(source: Source, writer: ArrayWriter) -> None:
    """Writes all arrays of a checkpoint, one at a time.

    Args:
        source: the arrays.
        writer: that has been told of them.
    """
    for name, array in source.items():
        writer.write(name, array.read())


def specs_of(source: Source, dtype: np.dtype | None = None) -> dict[str, ArraySpec]:
    """What a writer is to be told of these arrays.

    Args:
        source: the arrays.
        dtype: that floats are cast to; None keeps theirs.

    Returns:
        Shapes and dtypes by name.
    """
    cast = {name: dtype for name, array in source.items() if dtype is not None and is_float(array.dtype)}
    return {name: ArraySpec(array.shape, cast.get(name, array.dtype)) for name, array in source.items()}


def in_memory(array: np.ndarray) -> LazyArray:
    """Gives an array in memory the face of one in a file.

    Args:
        array: any.

    Returns:
        The same; what is read of it is a copy.
    """

    return LazyArray(array.shape, array.dtype, functools.partial(_fill_from_memory, array), casts=True)


def _fill_from_memory(array: np.ndarray, out: np.ndarray, region: Region) -> None:
    out[...] = array[region]


def stored_at(path: Path, start: int, spec: ArraySpec) -> LazyArray:
    """An array whose bytes are in a file as they would be in memory.

    Args:
        path: of the file.
        start: the array's first byte.
        spec: of the array, in C order.

    Returns:
        The array.
    """
    return LazyArray(spec.shape, spec.dtype, functools.partial(_fill_from_file, path, start, spec), casts=True)


def _fill_from_file(path: Path, start: int, spec: ArraySpec, out: np.ndarray, region: Region) -> None:
    with path.open("rb") as file:
        file.seek(start)
        read_stored(file, *spec, out, region)


@contextlib.contextmanager
def new_directory(directory: Path) -> Iterator[Path]:
    """Makes a directory that appears whole or not at all.

    Args:
        directory: that does not exist.

    Yields:
        The directory to write into, beside the final one; renamed at the end, deleted after an error.

    Raises:
        ValueError: there is something at the path.
    """
    _refuse_existing(directory)
    directory.parent.mkdir(parents=True, exist_ok=True)
    partial = directory.with_name(f"{directory.name}.partial-{uuid.uuid4().hex[:8]}")
    partial.mkdir()
    try:
        yield partial
        _refuse_existing(directory)
        partial.rename(directory)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _refuse_existing(directory: Path) -> None:
    if os.path.lexists(directory):
        raise ValueError(f"{directory} exists: nothing is overwritten; name another directory or move this one away.")


def is_float(dtype: np.dtype) -> bool:
    """Whether numbers of this dtype are real floats, of ml_dtypes too.

    Args:
        dtype: any.

    Returns:
        As it says.
    """
    return bool(np.issubdtype(dtype, np.floating)) or dtype.name.startswith(("bfloat", "float"))


def dtype_named(name: str) -> np.dtype | None:
    """The dtype of a name, as ``"float32"`` or ``"bfloat16"``.

    Args:
        name: from a file; only plain numbers are known.

    Returns:
        The dtype in the machine's byte order, or None where there is none of that name.
    """
    return _DTYPES.get(name)


_DTYPES = {
    str(dtype): dtype
    for dtype in (
        *(np.dtype(f"float{n}") for n in (16, 32, 64)),
        *(np.dtype(f"{sign}int{n}") for sign in ("", "u") for n in (8, 16, 32, 64)),
        np.dtype(bool),
        np.dtype(ml_dtypes.bfloat16),
        np.dtype(ml_dtypes.float8_e4m3fn),
        np.dtype(ml_dtypes.float8_e5m2),
    )
}


def some(names: Mapping[str, object] | list[str]) -> str:
    """A few names, for a message.

    Args:
        names: any number.

    Returns:
        The first ones, in order.
    """
    few = sorted(names)[:_NAMED]
    return ", ".join(few) + (", ..." if len(names) > _NAMED else "")


def _region(index: tuple[slice, ...], shape: tuple[int, ...]) -> Region:
    if len(index) > len(shape) or any(not isinstance(s, slice) or s.step not in (None, 1) for s in index):
        raise IndexError(f"index {index} of an array of shape {shape}: expected one slice without step for each axis.")
    ranges = [s.indices(n) for s, n in zip((*index, *[slice(None)] * (len(shape) - len(index))), shape, strict=True)]
    return tuple(slice(start, max(start, stop)) for start, stop, _ in ranges)
