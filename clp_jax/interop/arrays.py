"""Arrays in files: read when asked for, written one after another, so that one tensor is in memory at a time.

A checkpoint of any format is a mapping from names to `LazyArray`; a writer is told all shapes and dtypes first, then given the
arrays in any order. Nothing larger than a block is held beside the array that is read or written.
"""

import contextlib
import dataclasses
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

import ml_dtypes
import numpy as np

from clp_jax.array_types import ArrayLike

# What is read, cast, compressed or written at once, beside the array itself.
BLOCK_BYTES = 4 * 2**20
# Reading asks for this much at once: gzip's reader copies what it is asked for.
_PIECE_BYTES = 2**18
_NAMED = 8

# A slice of each axis, with start and stop and without step.
Region: TypeAlias = tuple[slice, ...]


class CheckpointFileError(ValueError):
    """A checkpoint's file is not what it should be; the message names it and says what to do."""


@runtime_checkable
class Readable(Protocol):
    """A file, or what reads like one."""

    @property
    def name(self) -> Any:
        """For messages."""

    def read(self, size: int, /) -> bytes:
        """Bytes from where it stands, at most as many; none at the end only."""

    def seek(self, position: int, /) -> Any:
        """Goes to a position; some files only go forwards."""

    def tell(self) -> int:
        """Where it stands."""


@runtime_checkable
class Writable(Protocol):
    """A file, or what is written to like one."""

    def write(self, data: memoryview, /) -> Any:
        """Takes bytes."""


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
        fill: puts a region of the array into an array of that region's shape and of this dtype.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    fill: Callable[[np.ndarray, Region], None] = dataclasses.field(repr=False, compare=False)

    @property
    def spec(self) -> ArraySpec:
        """Shape and dtype."""
        return ArraySpec(self.shape, self.dtype)

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
        # A flat buffer first: numpy has no array of this size before it is filled, whatever the dtype.
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
            ValueError: nobody waits for it, or its shape or dtype is another.
        """
        if name not in self._specs:
            raise ValueError(f"array {name!r} is not among the {len(self._specs)} that were to be written.")
        if name not in self._waiting:
            raise ValueError(f"array {name!r} is written a second time: expected each once.")
        spec = self._specs[name]
        if tuple(array.shape) != spec.shape:
            raise ValueError(f"array {name!r} has shape {tuple(array.shape)}: expected {spec.shape}.")
        if array.dtype != spec.dtype and not (is_float(array.dtype) and is_float(spec.dtype)):
            raise ValueError(f"array {name!r} is {array.dtype}: expected {spec.dtype}; only floats are cast.")
        del self._waiting[name]
        return np.asarray(array)

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

    def fill(out: np.ndarray, region: Region) -> None:
        out[...] = array[region]

    return LazyArray(array.shape, array.dtype, fill)


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


def size_of(shape: tuple[int, ...]) -> int:
    """Elements of an array, without overflow.

    Args:
        shape: sizes.

    Returns:
        Their product.
    """
    size = 1
    for n in shape:
        size *= n
    return size


def shape_of(region: Region) -> tuple[int, ...]:
    """Shape of a part of an array.

    Args:
        region: the part.

    Returns:
        Lengths of its slices.
    """
    return tuple(s.stop - s.start for s in region)


def whole(shape: tuple[int, ...]) -> Region:
    """All of an array.

    Args:
        shape: of the array.

    Returns:
        The region.
    """
    return tuple(slice(0, n) for n in shape)


def overlap(a: Region, b: Region) -> Region | None:
    """What two regions of one array share.

    Args:
        a: one.
        b: the other, of the same rank.

    Returns:
        The region, or None where they share nothing.
    """
    both = tuple(slice(max(x.start, y.start), min(x.stop, y.stop)) for x, y in zip(a, b, strict=True))
    return both if all(s.start < s.stop for s in both) else None


def within(region: Region, outer: Region) -> Region:
    """A region as seen from inside another.

    Args:
        region: of the array.
        outer: a region of the same array that holds it.

    Returns:
        Where it is in an array that holds `outer` alone.
    """
    return tuple(slice(s.start - o.start, s.stop - o.start) for s, o in zip(region, outer, strict=True))


def blocks(shape: tuple[int, ...], itemsize: int, limit: int | None = None) -> Iterator[Region]:
    """Cuts an array into pieces that are each contiguous in C order, and in that order.

    Args:
        shape: of the array.
        itemsize: bytes of an element.
        limit: bytes of a piece, which is one element at least; None is `BLOCK_BYTES`.

    Yields:
        Regions that cover the array once.
    """
    if 0 in shape:
        return
    limit = BLOCK_BYTES if limit is None else limit
    axis, row = len(shape), itemsize
    while axis > 0 and row * shape[axis - 1] <= limit:
        axis -= 1
        row *= shape[axis]
    trailing = whole(shape[axis:])
    if axis == 0:
        yield trailing
        return
    rows = max(1, limit // row)
    for leading in np.ndindex(*shape[: axis - 1]):
        first = tuple(slice(i, i + 1) for i in leading)
        for start in range(0, shape[axis - 1], rows):
            yield (*first, slice(start, min(start + rows, shape[axis - 1])), *trailing)


def read_stored(file: Readable, shape: tuple[int, ...], out: np.ndarray, region: Region) -> None:
    """Reads a region of an array stored in C order, through blocks where the region is not contiguous.

    Args:
        file: that stands at the array's first byte.
        shape: of the stored array; its dtype is that of `out`.
        out: filled; may be any view.
        region: of the stored array, of the shape of `out`.

    Raises:
        CheckpointFileError: the file ends before.
    """
    if 0 in out.shape:
        return
    start, shape, region = _skip_rows(shape, out.dtype.itemsize, region)
    base = file.tell() + start
    if base != file.tell():
        file.seek(base)
    if shape == shape_of(region) and out.flags.c_contiguous:
        read_exactly(file, bytes_of(out))
        return
    strides = [size_of(shape[axis + 1 :]) * out.dtype.itemsize for axis in range(len(shape))]
    for block in blocks(shape, out.dtype.itemsize):
        shared = overlap(block, region)
        if shared is None:
            continue
        file.seek(base + sum(s.start * stride for s, stride in zip(block, strides, strict=True)))
        stored = np.empty(shape_of(block), out.dtype)
        read_exactly(file, bytes_of(stored))
        out[within(shared, region)] = stored[within(shared, block)]


def _skip_rows(shape: tuple[int, ...], itemsize: int, region: Region) -> tuple[int, tuple[int, ...], Region]:
    """Bytes before the first row of a region, and shape and region without the rows before and after it."""
    start, rows, inner = 0, list(shape), list(region)
    for axis, part in enumerate(region):
        start += part.start * size_of(shape[axis + 1 :]) * itemsize
        rows[axis] = part.stop - part.start
        inner[axis] = slice(0, rows[axis])
        if rows[axis] != 1:
            break
    return start, tuple(rows), tuple(inner)


def write_stored(file: Writable, array: np.ndarray, dtype: np.dtype) -> None:
    """Writes an array in C order, cast and made contiguous block by block.

    Args:
        file: written to where it stands.
        array: any view.
        dtype: of what is written.
    """
    for block in blocks(array.shape, max(dtype.itemsize, array.dtype.itemsize)):
        file.write(bytes_of(np.ascontiguousarray(array[block], dtype)))


def read_exactly(file: Readable, out: memoryview) -> None:
    """Fills memory from a file.

    Args:
        file: read from where it stands.
        out: bytes.

    Raises:
        CheckpointFileError: the file ends before.
    """
    done = 0
    while done < len(out):
        piece = file.read(min(_PIECE_BYTES, len(out) - done))
        if not piece:
            raise CheckpointFileError(
                f"{file.name} ends {len(out) - done} bytes early: it is truncated; copy it again from where it came."
            )
        out[done : done + len(piece)] = piece
        done += len(piece)


def bytes_of(array: np.ndarray) -> memoryview:
    """The memory of a contiguous array.

    Args:
        array: in C order.

    Returns:
        Its bytes, which change with it.
    """
    return array.reshape(-1).view(np.uint8).data


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
