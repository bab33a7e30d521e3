"""Output of several workers as one stream, each line with its worker's name."""

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

_PAUSE = 0.2


def read_logs(files: Mapping[str, Path], lines: int | None, is_over: Callable[[], bool] | None) -> Iterator[str]:
    """The lines of several files.

    Args:
        files: by the worker's name.
        lines: the last ones of each; None for all.
        is_over: where it is given, goes on with what is written until it is true.

    Returns:
        ``[name] line``.
    """
    places = dict.fromkeys(files, 0)
    for name, path in files.items():
        found, places[name] = _read(path, 0)
        yield from (f"[{name}] {line}" for line in (found if lines is None else deque(found, lines)))
    while is_over is not None:
        last = is_over()
        for name, path in files.items():
            found, places[name] = _read(path, places[name])
            yield from (f"[{name}] {line}" for line in found)
        if last:
            return
        time.sleep(_PAUSE)


def _read(path: Path, start: int) -> tuple[list[str], int]:
    """The lines from a place on, and where the last whole one ends."""
    if not path.is_file():
        return [], start
    with open(path, "rb") as file:
        file.seek(start)
        whole, newline, rest = file.read().rpartition(b"\n")
    if not newline:
        return ([rest.decode(errors="replace")] if rest and start == 0 else []), start
    return whole.decode(errors="replace").split("\n"), start + len(whole) + 1
