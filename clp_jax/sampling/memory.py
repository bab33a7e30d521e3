"""Memory that decoding needs, told before it is taken; where it is too much, in one line."""

import contextlib
import math
import os
from collections.abc import Iterator
from typing import Any

import jax


def size_of(arrays: Any) -> int:
    """Bytes of a tree of arrays or of their shapes."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(arrays))


def available() -> int:
    """Bytes of memory of the device that decodes, whatever is taken of it already."""
    device = jax.local_devices()[0]
    limit = (device.memory_stats() or {}).get("bytes_limit") if device.platform != "cpu" else None
    return int(limit or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


@contextlib.contextmanager
def explained(needed: int, why: str) -> Iterator[None]:
    """Runs what takes memory.

    Args:
        needed: bytes of keys and values.
        why: the settings that make them so many, and what to do.

    Raises:
        ValueError: where that is more than there is, before anything runs; or where there was not enough.
    """
    message = f"keys and values would take {_gib(needed)} GiB of the {_gib(available())} GiB of memory: {why}"
    if needed > available():
        raise ValueError(message)
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error) and "Out of memory" not in str(error):
            raise
        raise ValueError(f"memory ran out; {message}") from None


def _gib(number: int) -> str:
    return f"{number / 2**30:,.2f}"
