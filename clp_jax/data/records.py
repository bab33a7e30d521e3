"""Records: named rows of token ids as bytes, a msgpack map that needs no schema and runs no code."""

from collections.abc import Mapping

import msgpack
import numpy as np


def encode(features: Mapping[str, np.ndarray]) -> bytes:
    """Named one-dimensional integer arrays as bytes; ids are stored in 4 bytes, little-endian."""
    return msgpack.packb({name: np.asarray(x, "<i4").tobytes() for name, x in features.items()})


def decode(record: bytes) -> dict[str, np.ndarray]:
    """What `encode` was given, as int32 arrays."""
    return {name: np.frombuffer(raw, "<i4").astype(np.int32) for name, raw in msgpack.unpackb(record).items()}
