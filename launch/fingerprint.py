"""Fingerprints of files and directories: by content, where that is small, and by samples of the content where it is not."""

import hashlib
import os
import re
from collections.abc import Collection, Iterator
from pathlib import Path

# Beyond this, three pieces of a file stand for all of it.
WHOLE_BYTES = 64 * 2**20
_PIECE_BYTES = 2**20
_REMOTE = re.compile(r"[a-z][a-z0-9+.-]*://")


def is_remote(path: str) -> bool:
    """Whether a path is in a bucket, which is not looked into."""
    return _REMOTE.match(path) is not None


def fingerprint(path: Path, without: Collection[Path] = ()) -> str | None:
    """The fingerprint of a file, or of a directory and all in it; None where there is nothing.

    Times do not count, nor do hidden files (locks, files half written).

    Args:
        path: of the file or directory.
        without: paths below it that do not count.
    """
    if path.is_file():
        return _of_file(path).hex()
    if not path.is_dir():
        return None
    whole = hashlib.sha256()
    skipped = {Path(os.path.abspath(other)) for other in without}
    for file in _files(path, skipped):
        name = file.relative_to(path).as_posix().encode("utf-8", "surrogateescape")
        whole.update(len(name).to_bytes(4, "little") + name + _of_file(file))
    return whole.hexdigest()


def _files(directory: Path, skipped: Collection[Path]) -> Iterator[Path]:
    for entry in sorted(directory.iterdir()):
        if entry.name.startswith(".") or Path(os.path.abspath(entry)) in skipped:
            continue
        if entry.is_dir():
            yield from _files(entry, skipped)
        elif entry.is_file():
            yield entry


def _of_file(path: Path) -> bytes:
    size = path.stat().st_size
    digest = hashlib.sha256(size.to_bytes(8, "little"))
    with open(path, "rb") as file:
        if size <= WHOLE_BYTES:
            while piece := file.read(_PIECE_BYTES):
                digest.update(piece)
        else:
            for start in (0, (size - _PIECE_BYTES) // 2, size - _PIECE_BYTES):
                file.seek(start)
                digest.update(file.read(_PIECE_BYTES))
    return digest.digest()
