"""TensorFlow's checkpoint bundles, in which Mesh TensorFlow wrote the first T5 models; TensorFlow has no part in reading them.

A bundle is an index, which is a table of LevelDB with a protocol buffer for each tensor, and files of bytes. Names are
translated to T5X's.
"""

import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from clp_jax.interop.arrays import ArraySpec, LazyArray, stored_at
from clp_jax.interop.regions import CheckpointFileError

INDEX_SUFFIX = ".index"
STEP_NAME = "global_step"
_FOOTER_BYTES, _MAGIC = 48, 0xDB4775248B80FB57
_TRAILER_BYTES = 5
_CASTAGNOLI = 0x82F63B78
_DTYPES = {
    1: np.dtype("<f4"),
    2: np.dtype("<f8"),
    3: np.dtype("<i4"),
    4: np.dtype("u1"),
    5: np.dtype("<i2"),
    6: np.dtype("i1"),
    9: np.dtype("<i8"),
    10: np.dtype("?"),
    14: np.dtype(ml_dtypes.bfloat16),
    19: np.dtype("<f2"),
}

_PROJECTIONS = {"q": "query", "k": "key", "v": "value", "o": "out"}
_NORMS = {
    ("encoder", 0): "pre_attention_layer_norm",
    ("encoder", 1): "pre_mlp_layer_norm",
    ("decoder", 0): "pre_self_attention_layer_norm",
    ("decoder", 1): "pre_cross_attention_layer_norm",
    ("decoder", 2): "pre_mlp_layer_norm",
}
_SLOT = re.compile(r"(.+)_slot_(v|vr|vc|m)")
_SLOT_NAMES = {"v": "v", "vr": "v_row", "vc": "v_col", "m": "m"}
_IN_BLOCK = re.compile(r"(encoder|decoder)/block_(\d+)/layer_(\d+)/(.+)")
_ELSEWHERE = {
    "shared/embedding": "token_embedder/embedding",
    "decoder/logits/kernel": "decoder/logits_dense/kernel",
    **{
        f"{stack}/{norm}/scale": f"{stack}/{stack}_norm/scale"
        for stack in ("encoder", "decoder")
        for norm in ("rms_norm", "layer_norm", "final_layer_norm")
    },
}


def translated(name: str) -> tuple[str, str | None]:
    """T5X's name of a variable.

    Args:
        name: of Mesh TensorFlow, as ``"encoder/block_000/layer_000/SelfAttention/q_slot_vr"``.

    Returns:
        The parameter's path, and the slot's name or None for the parameter itself. Names that follow no rule stay.
    """
    slot = _SLOT.fullmatch(name)
    if slot:
        return _parameter(slot[1]), _SLOT_NAMES[slot[2]]
    return _parameter(name), None


def _parameter(name: str) -> str:
    found = _IN_BLOCK.fullmatch(name)
    if not found:
        return _ELSEWHERE.get(name, name)
    stack, block, layer, rest = found[1], int(found[2]), int(found[3]), found[4].split("/")
    match rest:
        case ["SelfAttention", "relative_attention_bias"] if block == 0:
            return f"{stack}/relpos_bias/rel_embedding"
        case ["SelfAttention", kind] if kind in _PROJECTIONS:
            attention = "attention" if stack == "encoder" else "self_attention"
            return f"{stack}/layers_{block}/{attention}/{_PROJECTIONS[kind]}/kernel"
        case ["EncDecAttention", kind] if kind in _PROJECTIONS:
            return f"{stack}/layers_{block}/encoder_decoder_attention/{_PROJECTIONS[kind]}/kernel"
        case ["DenseReluDense", kind, "kernel"]:
            return f"{stack}/layers_{block}/mlp/{kind}/kernel"
        case ["rms_norm" | "layer_norm", "scale"] if (stack, layer) in _NORMS:
            return f"{stack}/layers_{block}/{_NORMS[stack, layer]}/scale"
    return name


def read_bundle(index_path: Path) -> dict[str, LazyArray]:
    """Opens the tensors of a bundle.

    Args:
        index_path: of the file that ends with ``.index``; the data are beside it.

    Returns:
        Tensors by TensorFlow's name.

    Raises:
        FileNotFoundError: a file of data is missing.
        CheckpointFileError: the index is damaged, or a tensor is cut into slices.
    """
    try:
        entries = dict(_table(index_path.read_bytes()))
        shards = _one(_fields(entries.pop(b"")), 1, 1)
        tensors = {}
        for name, value in entries.items():
            tensors[name.decode()] = _tensor(index_path, name.decode(), _grouped(value), shards)
    except (IndexError, KeyError, struct.error, UnicodeDecodeError) as error:
        raise CheckpointFileError(
            f"{index_path} is no index of a TensorFlow checkpoint, or is damaged: {error!r}."
        ) from None
    except _TableError as error:
        raise CheckpointFileError(f"{index_path}: {error}. Copy it again from where it came.") from None
    return tensors


class _TableError(Exception):
    """What is wrong with a table."""


def _tensor(index_path: Path, name: str, fields: dict[int, list], shards: int) -> LazyArray:
    dtype, shard, offset, size = (fields.get(number, [0])[0] for number in (1, 3, 4, 5))
    if 7 in fields:
        raise CheckpointFileError(f"{index_path}: tensor {name!r} is cut into slices: save it whole.")
    if dtype not in _DTYPES:
        raise CheckpointFileError(
            f"{index_path}: tensor {name!r} has TensorFlow's dtype {dtype}: expected {list(_DTYPES)}."
        )
    dims = [d for number, d in _fields(fields.get(2, [b""])[0]) if number == 2]
    spec = ArraySpec(tuple(_one(_fields(d), 1, 0) for d in dims), _DTYPES[dtype])
    path = index_path.with_name(f"{index_path.name.removesuffix(INDEX_SUFFIX)}.data-{shard:05d}-of-{shards:05d}")
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing: {index_path.name} says it holds {name!r}; copy it beside the index."
        )
    if size != spec.nbytes or offset + size > path.stat().st_size:
        raise CheckpointFileError(
            f"{path}: tensor {name!r} of shape {spec.shape} is at bytes {offset}:{offset + size} of {path.stat().st_size}: "
            "the file is truncated; copy it again."
        )

    return stored_at(path, offset, spec)


def _table(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Keys and values of a LevelDB table: its footer leads to a block that leads to the blocks that hold them."""
    if len(data) < _FOOTER_BYTES or struct.unpack("<Q", data[-8:])[0] != _MAGIC:
        raise _TableError("it does not end as a table does")
    at = len(data) - _FOOTER_BYTES
    for _ in range(2):
        _, at = _varint(data, at)
    for _, handle in _block(data, *_handle(data, at)):
        yield from _block(data, *_handle(handle, 0))


def _handle(data: bytes, at: int) -> tuple[int, int]:
    start, at = _varint(data, at)
    return start, _varint(data, at)[0]


def _block(data: bytes, start: int, size: int) -> Iterator[tuple[bytes, bytes]]:
    """Keys and values of a block; each key says how much of the one before it repeats."""
    stored = data[start : start + size + _TRAILER_BYTES]
    if len(stored) != size + _TRAILER_BYTES or size < 4:
        raise _TableError(f"the block of {size} bytes at {start} is not in the file")
    if stored[size]:
        raise _TableError(f"the block at {start} is compressed, which TensorFlow does not do")
    _check_crc(stored, start)
    restarts = struct.unpack("<I", stored[size - 4 : size])[0]
    end, at, key = size - 4 * (restarts + 1), 0, b""
    while at < end:
        shared, at = _varint(stored, at)
        unshared, at = _varint(stored, at)
        length, at = _varint(stored, at)
        key = key[:shared] + stored[at : at + unshared]
        at += unshared
        yield key, stored[at : at + length]
        at += length


def _check_crc(stored: bytes, start: int) -> None:
    masked = (struct.unpack("<I", stored[-4:])[0] - 0xA282EAD8) & 0xFFFFFFFF
    if (masked >> 17 | masked << 15) & 0xFFFFFFFF != crc32c(stored[:-4]):
        raise _TableError(f"the checksum of the block at {start} is wrong: the file is damaged")


def crc32c(data: bytes) -> int:
    """Checksum with Castagnoli's polynomial.

    Args:
        data: a few kilobytes: it goes byte by byte.

    Returns:
        32 bits.
    """
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _CRC_TABLE[(crc ^ byte) & 0xFF] ^ crc >> 8
    return crc ^ 0xFFFFFFFF


def _crc_entry(value: int) -> int:
    for _ in range(8):
        value = value >> 1 ^ _CASTAGNOLI * (value & 1)
    return value


_CRC_TABLE = [_crc_entry(i) for i in range(256)]


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7


def _fields(message: Any) -> Iterator[tuple[int, Any]]:
    """Fields of a protocol buffer by number."""
    if not isinstance(message, bytes):
        raise _TableError("a protocol buffer holds a number where it should hold a message")
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        match tag & 7:
            case 0:
                value, at = _varint(message, at)
                yield tag >> 3, value
            case 2:
                size, at = _varint(message, at)
                yield tag >> 3, message[at : at + size]
                at += size
            case 1 | 5 as wire:
                at += 8 if wire == 1 else 4
            case wire:
                raise _TableError(f"a protocol buffer has a field of wire type {wire}")


def _grouped(message: bytes) -> dict[int, list]:
    found: dict[int, list] = {}
    for number, value in _fields(message):
        found.setdefault(number, []).append(value)
    return found


def _one(fields: Iterator[tuple[int, Any]], number: int, default: int) -> int:
    value = dict(fields).get(number, default)
    if not isinstance(value, int):
        raise _TableError(f"field {number} of a protocol buffer is no number")
    return value
