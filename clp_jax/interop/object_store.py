"""Places in object stores (``gs://``, ``s3://``, and what fsspec knows): whole objects by name.

A store has no directories, no renaming and no appending; what is written is there at once, whole, for everyone. TensorStore
speaks to ``gs://`` and ``s3://`` by itself, with the credentials that their own tools use: Google's application default ones;
for S3 those of the environment (``AWS_...``), of a profile, or of the machine. Nothing else is installed for it, and where
TensorFlow is installed, that changes nothing. All others (``az://``, ``hdfs://``, ``sftp://``, ...) are fsspec's, each with a
package of its own.
"""

import concurrent.futures
import dataclasses
import functools
import io
import os
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeAlias, TypeVar

from clp_jax.interop.buckets import FsspecBucket, TensorStoreBucket, spec

Bucket: TypeAlias = TensorStoreBucket | FsspecBucket

_ADDRESS = re.compile(r"([a-z][a-z0-9+.-]+):/{1,2}([^/].*)")
_TENSORSTORES = ("gs", "s3")
_ALIASES = {"gcs": "gs", "s3a": "s3"}
# Not stores: a directory, and addresses that have no names below them.
_NO_STORES = frozenset({"file", "local", "data", "http", "https"})
_SECONDS = 900.0
# Requests at once: each holds its object.
_AT_ONCE = 8

_T = TypeVar("_T")


class StoreError(OSError):
    """A store can't be used; the message names the place and says what to do.

    Args:
        message: for the user.
        restartable: whether it may well answer the next time.
    """

    def __init__(self, message: str, restartable: bool = False):
        super().__init__(message)
        self.restartable = restartable


def is_address(path: str | os.PathLike) -> bool:
    """Whether a path is one of a store; `pathlib` may have taken one of its slashes."""
    match = _ADDRESS.fullmatch(os.fspath(path))
    return match is not None and _is_known(match[1])


def _is_known(scheme: str) -> bool:
    if scheme in _TENSORSTORES or scheme in _ALIASES:
        return True
    from fsspec.registry import available_protocols, registry  # A directory need not wait for it.

    return scheme not in _NO_STORES and (scheme in registry or scheme in available_protocols())


@dataclasses.dataclass(frozen=True, order=True)
class StorePath:
    """A name in a bucket, used like a path: of an object, or of all objects below it.

    Attributes:
        scheme: ``"gs"``, ``"s3"``, or one that fsspec knows.
        bucket: its name; of a file system, its host.
        key: in the bucket, without slashes at its ends; empty for the bucket.
    """

    scheme: str
    bucket: str
    key: str = ""

    @classmethod
    def parse(cls, address: str | os.PathLike) -> "StorePath":
        """Reads an address.

        Raises:
            StoreError: when it is not one.
        """
        match = _ADDRESS.fullmatch(os.fspath(address))
        if match is None or not _is_known(match[1]):
            raise StoreError(
                f"{os.fspath(address)!r} is no place in a store: expected gs://BUCKET/NAME, s3://BUCKET/NAME, or one of a kind "
                "that fsspec knows."
            )
        bucket, _, key = match[2].partition("/")
        return cls(_ALIASES.get(match[1], match[1]), bucket, "/".join(part for part in key.split("/") if part))

    def __str__(self) -> str:
        return f"{self.scheme}://{self.bucket}" + (f"/{self.key}" if self.key else "")

    def __fspath__(self) -> str:
        return str(self)

    def __truediv__(self, name: str | os.PathLike) -> "StorePath":
        below = "/".join(part for part in f"{self.key}/{os.fspath(name)}".split("/") if part)
        return dataclasses.replace(self, key=below)

    @property
    def name(self) -> str:
        """The last part."""
        return self.key.rpartition("/")[2] or self.bucket

    @property
    def parent(self) -> "StorePath":
        """Without the last part."""
        return dataclasses.replace(self, key=self.key.rpartition("/")[0])

    @property
    def has_kvstore(self) -> bool:
        """Whether TensorStore knows it."""
        return self.scheme in _TENSORSTORES

    @property
    def kvstore(self) -> dict[str, Any]:
        """What TensorStore calls all that is below.

        Raises:
            StoreError: when it does not know it.
        """
        if not self.has_kvstore:
            raise StoreError(
                f"{self} is in a format that TensorStore alone reads, and it does not know {self.scheme}://. Copy it to a "
                "directory."
            )
        return spec(self.scheme, self.bucket) | {"path": f"{self.key}/" if self.key else ""}

    def is_file(self) -> bool:
        """Whether there is an object of this name."""
        return self._call("list", lambda store: store.has(self.key, _SECONDS))

    def is_dir(self) -> bool:
        """Whether there are objects below this name."""
        return bool(self._below(_SECONDS))

    def exists(self) -> bool:
        """Whether there is an object of this name, or below it."""
        return self.is_file() or self.is_dir()

    def files(self, seconds: float = _SECONDS) -> list["StorePath"]:
        """All objects below this name, in order.

        Args:
            seconds: that the store may take.

        Raises:
            StoreError: when it can't be asked.
        """
        return [dataclasses.replace(self, key=key) for key in sorted(self._below(seconds))]

    def relative(self, below: "StorePath") -> str:
        """The rest of a name that begins with this one."""
        return below.key[len(self.key) + 1 :] if self.key else below.key

    def iterdir(self) -> Iterator["StorePath"]:
        """What is directly below: objects, and names that others begin with."""
        return (self / name for name in dict.fromkeys(self.relative(file).split("/")[0] for file in self.files()))

    def read_bytes(self) -> bytes:
        """The object.

        Raises:
            FileNotFoundError: when there is none.
            StoreError: when it can't be read.
        """
        found = self._call("read", lambda store: store.read(self.key, _SECONDS))
        if found is None:
            raise FileNotFoundError(f"{self} does not exist")
        return found

    def read_text(self) -> str:
        """The object, as UTF-8."""
        return self.read_bytes().decode()

    def open(self, mode: str = "rb") -> io.BytesIO:
        """The object, which is held in memory."""
        if mode != "rb":
            raise ValueError(f"mode is {mode!r}: objects are written whole.")
        return _Object(self.read_bytes(), str(self))

    def write_bytes(self, data: bytes) -> None:
        """Puts an object there, in place of any other.

        Raises:
            StoreError: when it can't be written.
        """
        self._call("write", lambda store: store.write(self.key, data, _SECONDS))

    def write_text(self, text: str) -> None:
        """The same, as UTF-8."""
        self.write_bytes(text.encode())

    def unlink(self, missing_ok: bool = True) -> None:
        """Removes the object.

        Raises:
            FileNotFoundError: when there is none, and it may not be missing.
        """
        if not missing_ok and not self.is_file():
            raise FileNotFoundError(f"{self} does not exist")
        self._call("remove", lambda store: store.write(self.key, None, _SECONDS))

    def rmtree(self) -> None:
        """Removes all objects below this name."""
        each(StorePath.unlink, self.files())

    def _below(self, seconds: float) -> list[str]:
        return self._call("list", lambda store: store.below(self.key, seconds))

    def _call(self, verb: str, ask: Callable[[Bucket], _T]) -> _T:
        kind = TensorStoreBucket if self.has_kvstore else FsspecBucket
        try:
            return ask(_bucket(kind, self.scheme, self.bucket))
        except kind.errors as error:
            raise _failure(self, verb, error) from error


class _Object(io.BytesIO):
    """An object that was read, under its name."""

    def __init__(self, data: bytes, name: str):
        super().__init__(data)
        self.name = name


def each(function: Callable[[Any], _T], values: Iterable[Any]) -> list[_T]:
    """Maps a function that waits for a store; raises the first error in the order of the values."""
    with concurrent.futures.ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="object_store") as pool:
        return list(pool.map(function, values))


def _failure(place: StorePath, verb: str, error: Exception) -> StoreError:
    text = str(error) or type(error).__name__
    if isinstance(error, ImportError):
        return StoreError(f"{place}: nothing here speaks to {place.scheme}:// ({_first_line(text)}).")
    missing = "NoSuchBucket" in text or "bucket does not exist" in text.lower() or isinstance(error, FileNotFoundError)
    if missing or ("NOT_FOUND" in text and verb in ("write", "list")):
        return StoreError(f"{place}: there is no bucket {place.scheme}://{place.bucket}. Make it, or correct its name.")
    words = ("PERMISSION_DENIED", "UNAUTHENTICATED", "'401'", "'403'", "redentials")
    if isinstance(error, PermissionError) or any(word in text for word in words):
        login = {"gs": "gcloud auth application-default login", "s3": "aws configure"}.get(place.scheme)
        return StoreError(
            f"{place}: the store does not let these credentials {verb} there, or found none. Log in"
            f"{f' ({login})' if login else ''}, or give the machine's account the right to the bucket. ({_first_line(text)})"
        )
    if isinstance(error, NotImplementedError):
        return StoreError(f"{place}: {place.scheme}:// can't {verb} objects. Give another place.")
    return StoreError(
        f"{place}: could not {verb} it ({_first_line(text)}). Try again, or look whether the store can be reached.",
        restartable=True,
    )


def _first_line(text: str) -> str:
    return (text.strip() or "no answer in time").splitlines()[0][:300]


@functools.cache
def _bucket(kind: Callable[[str, str], Bucket], scheme: str, bucket: str) -> Bucket:
    return kind(scheme, bucket)
