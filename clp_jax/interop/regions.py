"""Parts of arrays, and the bytes they are stored as: read and written in blocks, so that little is held beside an array."""

from collections.abc import Iterator
from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np

# What is read, cast, compressed or written at once, beside the array itself.
BLOCK_BYTES = 4 * 2**20
# Reading asks for this much at once: gzip's reader copies what it is asked for.
_PIECE_BYTES = 2**18

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


def parts_of(shape: tuple[int, ...], stacked: int) -> Iterator[Region]:
    """Cuts an array along its first axes.

    Args:
        shape: of the array.
        stacked: how many axes; with none, the array is one part.

    Yields:
        Regions of size 1 along those axes, whole along the others, in C order.
    """
    for index in np.ndindex(*shape[:stacked]):
        yield (*(slice(i, i + 1) for i in index), *whole(shape[stacked:]))


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


def read_stored(file: Readable, shape: tuple[int, ...], dtype: np.dtype, out: np.ndarray, region: Region) -> None:
    """Reads a region of an array stored in C order, through blocks where it is not contiguous or is cast.

    Args:
        file: that stands at the array's first byte.
        shape: of the stored array.
        dtype: of the stored array.
        out: filled; may be any view, and of another dtype.
        region: of the stored array, of the shape of `out`.

    Raises:
        CheckpointFileError: the file ends before.
    """
    if 0 in out.shape:
        return
    start, shape, region = _skip_rows(shape, dtype.itemsize, region)
    base = file.tell() + start
    if base != file.tell():
        file.seek(base)
    if shape == shape_of(region) and out.flags.c_contiguous and out.dtype == dtype:
        read_exactly(file, bytes_of(out))
        return
    strides = [size_of(shape[axis + 1 :]) * dtype.itemsize for axis in range(len(shape))]
    for block in blocks(shape, dtype.itemsize):
        shared = overlap(block, region)
        if shared is None:
            continue
        file.seek(base + sum(s.start * stride for s, stride in zip(block, strides, strict=True)))
        stored = np.empty(shape_of(block), dtype)
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
