"""A lock that ends with its process."""

import contextlib
import fcntl
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from clp_jax.launch.errors import Held

_PAUSE = 0.05


@contextlib.contextmanager
def hold(path: Path, message: str, patience: float = 0.0) -> Iterator[None]:
    """Holds a file that one process at a time may hold.

    Args:
        path: of the file; made if it is missing, with its directory.
        message: of the error.
        patience: seconds to wait for another process.

    Raises:
        Held: when another process holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        until = time.monotonic() + patience
        while not _take(file):
            if time.monotonic() >= until:
                raise Held(message)
            time.sleep(_PAUSE)
        yield


def is_held(path: Path) -> bool:
    """Whether a process holds a file now."""
    with open(path, "a") as file:
        return not _take(file)


def _take(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
