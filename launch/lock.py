"""A lock that ends with its process."""

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path

from clp_jax.launch.job import LaunchError


@contextlib.contextmanager
def hold(path: Path, message: str) -> Iterator[None]:
    """Holds a file that one process at a time may hold.

    Args:
        path: of the file; made if it is missing, with its directory.
        message: of the error.

    Raises:
        LaunchError: when another process holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LaunchError(message) from None
        yield
