"""Flax's msgpack files, walked without loading the arrays inside; pickles have no part in them.

Arrays are extension type 1 (numpy scalars: 3): msgpack again, of shape, name of the dtype, and bytes. Arrays of more than 2^30
bytes are dictionaries of flat pieces.
"""

import dataclasses
import functools
import io
import mmap
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, cast

import msgpack
import numpy as np

from clp_jax.interop.arrays import ArraySpec, LazyArray, dtype_named, stored_at
from clp_jax.interop.regions import CheckpointFileError, Region, read_stored, size_of

_ARRAY, _SCALAR = 1, 3
_CHUNKED = "__msgpack_chunked_array__"
_MAX_DEPTH = 64

# First byte: format of what follows it.
_NUMBERS = {
    0xCA: ">f",
    0xCB: ">d",
    0xCC: ">B",
    0xCD: ">H",
    0xCE: ">I",
    0xCF: ">Q",
    0xD0: ">b",
    0xD1: ">h",
    0xD2: ">i",
    0xD3: ">q",
}
# First byte: bytes of the length that follows it.
_BIN = {0xC4: 1, 0xC5: 2, 0xC6: 4}
_EXT = {0xC7: 1, 0xC8: 2, 0xC9: 4}
_STR = {0xD9: 1, 0xDA: 2, 0xDB: 4}
_LIST = {0xDC: 2, 0xDD: 4}
_MAP = {0xDE: 2, 0xDF: 4}
_CONSTANTS = {0xC0: None, 0xC2: False, 0xC3: True}


@dataclasses.dataclass(frozen=True)
class _Piece:
    """Bytes of a file."""

    start: int
    size: int


@dataclasses.dataclass(frozen=True)
class _Stored:
    """An array, and where its bytes are."""

    spec: ArraySpec
    pieces: tuple[_Piece, ...]


def read(path: Path) -> Any:
    """Reads a file's tree.

    Args:
        path: of the file.

    Returns:
        Dictionaries, lists and plain values; arrays are `LazyArray`.

    Raises:
        CheckpointFileError: it is no such file, or it is truncated.
    """
    with path.open("rb") as file:
        if path.stat().st_size == 0:
            raise CheckpointFileError(f"{path} is empty: copy it again.")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                walk = _Walk(data)
                tree = walk.value(0)
                if walk.at != len(data):
                    raise ValueError(f"{len(data) - walk.at} bytes follow its end")
                tree = _joined(tree)
            except (ValueError, struct.error, IndexError, KeyError, TypeError) as error:
                raise CheckpointFileError(
                    f"{path} is no msgpack file of flax, or it is truncated: {error}. Copy it again from where it came."
                ) from None
    return _opened(tree, path)


def pack(tree: Any) -> bytes:
    """Packs a tree as flax does.

    Args:
        tree: dictionaries with string keys, plain values, and arrays.

    Returns:
        The bytes of the file. Arrays should be small: they are all in memory.
    """
    return cast(bytes, msgpack.packb(tree, default=_packed, strict_types=True))


def _packed(value: Any) -> msgpack.ExtType:
    if not isinstance(value, np.ndarray):
        raise TypeError(f"{type(value).__name__} {value!r} in a msgpack tree: expected arrays and plain values.")
    return msgpack.ExtType(_ARRAY, msgpack.packb((value.shape, value.dtype.name, value.tobytes())))


class _Walk:
    """Goes through msgpack, and over the arrays."""

    def __init__(self, data: mmap.mmap | bytes):
        self._data = data
        self.at = 0

    def value(self, depth: int) -> Any:
        if depth > _MAX_DEPTH:
            raise ValueError(f"it is more than {_MAX_DEPTH} deep")
        first = self._take(1)[0]
        if first < 0x80:
            return first
        if first >= 0xE0:
            return first - 0x100
        if first in _CONSTANTS:
            return _CONSTANTS[first]
        if first in _NUMBERS:
            form = _NUMBERS[first]
            return struct.unpack(form, self._take(struct.calcsize(form)))[0]
        if first < 0x90 or first in _MAP:
            return self._map(first & 0x0F if first < 0x90 else self._length(_MAP[first]), depth)
        if first < 0xA0 or first in _LIST:
            count = self._fits(first & 0x0F if first < 0xA0 else self._length(_LIST[first]))
            return [self.value(depth + 1) for _ in range(count)]
        if first < 0xC0 or first in _STR:
            return self._take(first & 0x1F if first < 0xC0 else self._length(_STR[first])).decode()
        if first in _BIN:
            return self._skip(self._length(_BIN[first]))
        if first in _EXT or 0xD4 <= first <= 0xD8:
            size = self._length(_EXT[first]) if first in _EXT else 1 << (first - 0xD4)
            return self._extension(size, depth)
        raise ValueError(f"byte {self.at - 1} is {first:#x}, which begins nothing")

    def _map(self, count: int, depth: int) -> dict[str, Any]:
        found = {}
        for _ in range(self._fits(count)):
            key = self.value(depth + 1)
            if not isinstance(key, str) or key in found:
                raise ValueError(f"key {key!r} before byte {self.at} is no string, or is there twice")
            found[key] = self.value(depth + 1)
        return found

    def _extension(self, size: int, depth: int) -> _Stored:
        kind = self._take(1)[0]
        end = self.at + self._fits(size)
        if kind not in (_ARRAY, _SCALAR):
            raise ValueError(f"the extension type before byte {self.at} is {kind}: expected {_ARRAY} or {_SCALAR}")
        shape, name, piece = self.value(depth + 1)
        name = name if isinstance(name, str) else "?"
        dtype = dtype_named(name)
        if dtype is None:
            raise ValueError(f"an array's dtype is {name!r}, which is not known")
        spec = ArraySpec(_sizes(shape), dtype)
        if not isinstance(piece, _Piece) or piece.size != spec.nbytes or self.at != end:
            raise ValueError(f"the array before byte {end} does not hold what its shape {spec.shape} needs")
        return _Stored(spec, (piece,))

    def _length(self, size: int) -> int:
        return int.from_bytes(self._take(size), "big")

    def _fits(self, size: int) -> int:
        """A number of bytes, or of things of a byte at least, that the rest of the file has room for."""
        if size > len(self._data) - self.at:
            raise ValueError(f"it ends at byte {len(self._data)}, and {size} more are to follow byte {self.at}")
        return size

    def _take(self, size: int) -> bytes:
        return self._data[(piece := self._skip(size)).start : piece.start + size]

    def _skip(self, size: int) -> _Piece:
        piece = _Piece(self.at, self._fits(size))
        self.at += size
        return piece


def _sizes(shape: Any) -> tuple[int, ...]:
    if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError(f"an array's shape is {shape!r}")
    return tuple(shape)


def _joined(tree: Any) -> Any:
    """The tree with its large arrays put together."""
    if not isinstance(tree, dict):
        return [_joined(value) for value in tree] if isinstance(tree, list) else tree
    if _CHUNKED not in tree:
        return {key: _joined(value) for key, value in tree.items()}
    shape = _sizes(_in_order(tree["shape"]))
    chunks = _in_order(tree["chunks"])
    spec = ArraySpec(shape, chunks[0].spec.dtype)
    held = sum(size_of(chunk.spec.shape) for chunk in chunks)
    if held != size_of(shape) or any(chunk.spec.dtype != spec.dtype for chunk in chunks):
        raise ValueError(f"the {len(chunks)} pieces of an array of shape {shape} hold {held} elements")
    return _Stored(spec, tuple(piece for chunk in chunks for piece in chunk.pieces))


def _in_order(numbered: dict[str, Any]) -> list[Any]:
    return [numbered[str(i)] for i in range(len(numbered))]


def _opened(tree: Any, path: Path) -> Any:
    if isinstance(tree, dict):
        return {key: _opened(value, path) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_opened(value, path) for value in tree]
    return _lazy(path, tree) if isinstance(tree, _Stored) else tree


def _lazy(path: Path, stored: _Stored) -> LazyArray:
    if len(stored.pieces) == 1:
        return stored_at(path, stored.pieces[0].start, stored.spec)
    return LazyArray(*stored.spec, functools.partial(_fill, path, stored), casts=True)


def _fill(path: Path, stored: _Stored, out: np.ndarray, region: Region) -> None:
    with path.open("rb") as file:
        read_stored(_JoinedFile(file, stored.pieces), *stored.spec, out, region)


class _JoinedFile:
    """Pieces of a file, read as one."""

    def __init__(self, file: BinaryIO, pieces: Sequence[_Piece]):
        self.name = file.name
        self._file, self._pieces, self._at = file, pieces, 0

    def tell(self) -> int:
        return self._at

    def seek(self, position: int) -> None:
        self._at = position

    def read(self, size: int) -> bytes:
        before = 0
        for piece in self._pieces:
            if self._at < before + piece.size:
                inside = self._at - before
                self._file.seek(piece.start + inside, io.SEEK_SET)
                data = self._file.read(min(size, piece.size - inside))
                self._at += len(data)
                return data
            before += piece.size
        return b""
