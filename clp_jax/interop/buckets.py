"""What `clp_jax.interop.object_store` asks of a bucket: of TensorStore, or of fsspec where TensorStore does not know it.

Both are used in one way: objects are read, written and removed whole, and listed by what their names begin with. Nothing is
locked, and nothing is written only if it is missing.
"""

import contextlib
import os
import threading
from collections.abc import Iterator
from typing import Any

# Stores of objects, where a write puts a whole object in place of another at once, and makes no directories.
_OF_OBJECTS = frozenset({"memory", "az", "abfs", "abfss", "oss", "oci"})
# Elsewhere: what is not whole yet, and what was there before, while it is replaced.
_NEW, _OLD = ".~new", ".~old"


class TensorStoreBucket:
    """A bucket that TensorStore speaks to by itself.

    Args:
        scheme: ``"gs"`` or ``"s3"``.
        bucket: its name.
    """

    errors: tuple[type[Exception], ...] = (ValueError, TimeoutError)

    def __init__(self, scheme: str, bucket: str):
        import tensorstore  # What does not touch a store need not wait for it.

        self._range = tensorstore.KvStore.KeyRange
        self._store = tensorstore.KvStore.open(spec(scheme, bucket)).result()

    def has(self, key: str, seconds: float) -> bool:
        """Whether there is an object of this name."""
        return bool(self._list(key, f"{key}\0", seconds))

    def below(self, key: str, seconds: float) -> list[str]:
        """Names of all objects below one."""
        # "0" comes after "/"; no name goes on after the last code point.
        return self._list(*((f"{key}/", f"{key}0") if key else ("", chr(0x10FFFF))), seconds)

    def read(self, key: str, seconds: float) -> bytes | None:
        """An object, or None."""
        found = self._store.read(key).result(timeout=seconds)
        return found.value if found.state == "value" else None

    def write(self, key: str, data: bytes | None, seconds: float) -> None:
        """Puts an object there; None removes it."""
        self._store.write(key, data).result(timeout=seconds)

    def _list(self, first: str, last: str, seconds: float) -> list[str]:
        keys = [key.decode() for key in self._store.list(self._range(first, last)).result(timeout=seconds)]
        return [key for key in keys if first <= key < last]  # Not all stores take bounds other than prefixes.


def spec(scheme: str, bucket: str) -> dict[str, Any]:
    """What TensorStore calls a bucket."""
    if scheme == "gs":
        return {"driver": "gcs", "bucket": bucket}
    # TensorStore's driver reads neither of these by itself.
    given = {
        "endpoint": os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL"),
        "aws_region": os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION"),
    }
    return {"driver": "s3", "bucket": bucket} | {name: value for name, value in given.items() if value}


class FsspecBucket:
    """A container or a host that fsspec knows: its own limits of time hold.

    Where a write is not of a whole object, as on HDFS or over SFTP, an object is written under another name and renamed.
    Renaming over a file is refused by some, so what is there goes aside first, where it is read meanwhile, and after a process
    that died. One process writes an object at a time; others may read.

    Args:
        scheme: that fsspec has an implementation for.
        bucket: of it; the host, of a file system.

    Raises:
        ImportError: the package that implements it is not installed; names it.
    """

    errors: tuple[type[Exception], ...] = (Exception,)  # Packages raise what they like.

    def __init__(self, scheme: str, bucket: str):
        from fsspec.core import url_to_fs

        self._files, root = url_to_fs(f"{scheme}://{bucket}")
        self._root = root.rstrip("/")
        self._at_once = scheme in _OF_OBJECTS
        # Those that are not asynchronous may have one connection.
        self._busy = threading.Lock() if not self._files.async_impl else None

    def has(self, key: str, seconds: float) -> bool:
        """Whether there is an object of this name."""
        with self._alone():
            return any(self._files.isfile(path) for path in self._places(key))

    def below(self, key: str, seconds: float) -> list[str]:
        """Names of all objects below one."""
        with self._alone():
            try:
                found = self._files.find(self._path(key))
            except FileNotFoundError:
                return []
        start = len(self._root.lstrip("/"))
        names = [path.lstrip("/")[start:].lstrip("/") for path in found]
        if not self._at_once:
            names = [name.removesuffix(_OLD) for name in names if not name.endswith(_NEW)]
        return sorted({name for name in names if name.startswith(f"{key}/" if key else "")})

    def read(self, key: str, seconds: float) -> bytes | None:
        """An object, or None."""
        with self._alone():
            for path in (*self._places(key), self._path(key)):  # It may come back between two looks.
                try:
                    return bytes(self._files.cat_file(path))
                except FileNotFoundError:
                    continue
        return None

    def write(self, key: str, data: bytes | None, seconds: float) -> None:
        """Puts an object there; None removes it."""
        path = self._path(key)
        with self._alone():
            if data is None:
                for place in reversed(self._places(key)):  # The one before must not come back.
                    self._remove(place)
            elif self._at_once:
                self._files.pipe_file(path, data)
            else:
                self._files.makedirs(path.rpartition("/")[0], exist_ok=True)
                self._files.pipe_file(path + _NEW, data)
                if self._files.isfile(path):
                    self._remove(path + _OLD)
                    self._files.mv(path, path + _OLD)
                self._files.mv(path + _NEW, path)
                self._remove(path + _OLD)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        with self._busy or contextlib.nullcontext():
            self._files.invalidate_cache()  # Others write there, too.
            yield

    def _remove(self, path: str) -> None:
        if self._files.isfile(path):
            self._files.rm_file(path)

    def _path(self, key: str) -> str:
        return f"{self._root}/{key}" if key else self._root

    def _places(self, key: str) -> tuple[str, ...]:
        path = self._path(key)
        return (path,) if self._at_once else (path, path + _OLD)
