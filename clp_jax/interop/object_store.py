"""Places in object stores (``gs://``, ``s3://``): whole objects by name, through TensorStore.

A store has no directories, no renaming and no appending; what is written is there at once, whole, for everyone. TensorStore
speaks to both kinds by itself, with the credentials that their own tools use: Google's application default ones; for S3 those
of the environment (``AWS_...``), of a profile, or of the machine. Nothing else is installed for it, and TensorFlow, where it is
installed, changes nothing.
"""

import concurrent.futures
import dataclasses
import functools
import io
import os
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

_ADDRESS = re.compile(r"(gs|s3):/{1,2}([^/].*)")
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
    return _ADDRESS.fullmatch(os.fspath(path)) is not None


@dataclasses.dataclass(frozen=True, order=True)
class StorePath:
    """A name in a bucket, used like a path: of an object, or of all objects below it.

    Attributes:
        scheme: ``"gs"`` or ``"s3"``.
        bucket: its name.
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
        if match is None:
            raise StoreError(
                f"{os.fspath(address)!r} is no place in a store: expected gs://BUCKET/NAME or s3://BUCKET/NAME."
            )
        bucket, _, key = match[2].partition("/")
        return cls(match[1], bucket, "/".join(part for part in key.split("/") if part))

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
    def kvstore(self) -> dict[str, Any]:
        """What TensorStore calls all that is below."""
        return _bucket_spec(self.scheme, self.bucket) | {"path": f"{self.key}/" if self.key else ""}

    def is_file(self) -> bool:
        """Whether there is an object of this name."""
        return bool(self._list(self.key, f"{self.key}\0"))

    def is_dir(self) -> bool:
        """Whether there are objects below this name."""
        return bool(self._list(*_below(self.key)))

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
        return [dataclasses.replace(self, key=key) for key in sorted(self._list(*_below(self.key), seconds))]

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
        found = self._call("read", lambda store: store.read(self.key))
        if found.state != "value":
            raise FileNotFoundError(f"{self} does not exist")
        return found.value

    def read_text(self) -> str:
        """The object, as UTF-8."""
        return self.read_bytes().decode()

    def open(self, mode: str = "rb") -> io.BytesIO:
        """The object, which is held in memory."""
        if mode != "rb":
            raise ValueError(f"mode is {mode!r}: objects are written whole.")
        return io.BytesIO(self.read_bytes())

    def write_bytes(self, data: bytes) -> None:
        """Puts an object there, in place of any other.

        Raises:
            StoreError: when it can't be written.
        """
        self._call("write", lambda store: store.write(self.key, data))

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
        self._call("remove", lambda store: store.write(self.key, None))

    def rmtree(self) -> None:
        """Removes all objects below this name."""
        each(StorePath.unlink, self.files())

    def _list(self, first: str, last: str, seconds: float = _SECONDS) -> list[str]:
        key_range = functools.partial(_tensorstore().KvStore.KeyRange, first, last)
        keys = [key.decode() for key in self._call("list", lambda store: store.list(key_range()), seconds)]
        return [key for key in keys if first <= key < last]  # Not all stores take bounds other than prefixes.

    def _call(self, verb: str, ask: Callable[[Any], Any], seconds: float = _SECONDS) -> Any:
        try:
            return ask(_bucket(self.scheme, self.bucket)).result(timeout=seconds)
        except (ValueError, TimeoutError) as error:
            raise _failure(self, verb, str(error)) from error


def each(function: Callable[[Any], _T], values: Iterable[Any]) -> list[_T]:
    """Maps a function that waits for a store; raises the first error in the order of the values."""
    with concurrent.futures.ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="object_store") as pool:
        return list(pool.map(function, values))


def _below(key: str) -> tuple[str, str]:
    # "0" comes after "/"; no name goes on after the last code point.
    return (f"{key}/", f"{key}0") if key else ("", chr(0x10FFFF))


def _failure(place: StorePath, verb: str, text: str) -> StoreError:
    own = {"gs": "gcloud auth application-default login", "s3": "aws configure"}[place.scheme]
    missing = "NoSuchBucket" in text or "bucket does not exist" in text.lower()
    if missing or ("NOT_FOUND" in text and verb in ("write", "list")):
        return StoreError(f"{place}: there is no bucket {place.scheme}://{place.bucket}. Make it, or correct its name.")
    if any(word in text for word in ("PERMISSION_DENIED", "UNAUTHENTICATED", "'401'", "'403'", "redentials")):
        return StoreError(
            f"{place}: the store does not let these credentials {verb} there, or found none. Log in ({own}), or give the "
            f"machine's account the right to the bucket. ({_first_line(text)})"
        )
    return StoreError(
        f"{place}: could not {verb} it ({_first_line(text)}). Try again, or look whether the store can be reached.",
        restartable=True,
    )


def _first_line(text: str) -> str:
    return (text.strip() or "no answer in time").splitlines()[0][:300]


def _bucket_spec(scheme: str, bucket: str) -> dict[str, Any]:
    if scheme == "gs":
        return {"driver": "gcs", "bucket": bucket}
    # TensorStore's driver reads neither of these by itself.
    given = {
        "endpoint": os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL"),
        "aws_region": os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION"),
    }
    return {"driver": "s3", "bucket": bucket} | {name: value for name, value in given.items() if value}


@functools.cache
def _bucket(scheme: str, bucket: str) -> Any:
    return _tensorstore().KvStore.open(_bucket_spec(scheme, bucket)).result()


def _tensorstore() -> Any:
    import tensorstore  # What does not touch a store need not wait for it.

    return tensorstore
