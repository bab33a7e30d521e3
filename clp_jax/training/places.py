"""Where runs are: in directories, or in object stores, with a view of their small files in a directory of this process."""

import atexit
import contextlib
import json
import os
import shutil
import tempfile
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TypeAlias

from etils import epath

from clp_jax.interop.object_store import StoreError, StorePath, each, is_address

CHECKPOINTS_DIRECTORY = "checkpoints"
REFERENCE_DIRECTORY = "reference"
SLOTS_DIRECTORY = "adafactor"

Place: TypeAlias = epath.Path | StorePath

# What a run adds and nobody needs to begin with is not fetched; arrays are read where they are.
_ARRAYS = (CHECKPOINTS_DIRECTORY, REFERENCE_DIRECTORY, SLOTS_DIRECTORY)
_NOT_FETCHED = (*_ARRAYS, "tensorboard", "profile")
_ADDRESS_FILE, _OWNER_FILE = ".address", "owner.json"
_EVERY_SECONDS = 60.0
# What is not there, or not to be reached, must be said before anything is computed.
_FIRST_SECONDS = 60.0


def as_path(path: str | os.PathLike) -> Place:
    """An absolute path, or a name in a store; below a view, the name in the store that it is a view of.

    Raises:
        ValueError: for an address that is of no kind of store.
    """
    text = os.fspath(path).removeprefix("file://")
    if is_address(text):
        return StorePath.parse(text)
    if "://" in text:
        raise ValueError(
            f"{text} is an address of another kind: expected a directory, gs://BUCKET/NAME, s3://BUCKET/NAME, or one of a "
            "store or file system that fsspec knows by one name."
        )
    place = Path(text).expanduser().absolute()
    for folder in (place, *place.parents):
        note = folder / _ADDRESS_FILE
        if note.is_file():
            return StorePath.parse(note.read_text()) / place.relative_to(folder)
    return epath.Path(place)


def local_files(place: Place) -> Path:
    """Where the small files of a run can be read: its directory, or a new view of what is in the store now."""
    return RunView(place).path if isinstance(place, StorePath) else Path(place)


def put_back(file: Path) -> None:
    """Puts a file that was written in a view into the store; does nothing elsewhere."""
    place = as_path(file)
    if isinstance(place, StorePath):
        place.write_bytes(file.read_bytes())


class RunView:
    """The small files of a run in a store, in a directory that ends with this process.

    Files are appended to and replaced here, and put into the store as a whole, now and then. What the store does not have yet
    when a process is killed is lost: of metrics, lines after the last checkpoint, whose steps are made again.

    Args:
        store: where the run is.

    Raises:
        StoreError: when it can't be read.
    """

    def __init__(self, store: StorePath):
        self.store = store
        self.path = Path(tempfile.mkdtemp(prefix="clp_run_"))
        atexit.register(shutil.rmtree, self.path, ignore_errors=True)
        (self.path / _ADDRESS_FILE).write_text(str(store))
        self._put: dict[Path, tuple[int, int]] = {}
        self._busy = threading.Lock()
        self._owner: str | None = None
        files = [file for file in store.files(_FIRST_SECONDS) if store.relative(file).split("/")[0] not in _NOT_FETCHED]
        for file, data in zip(files, each(StorePath.read_bytes, files), strict=True):
            path = self.path / store.relative(file)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
            self._put[path] = _version(path)

    @contextlib.contextmanager
    def owned(self) -> Iterator[None]:
        """Writes to the store from now on, a minute apart at most; another start of the run, anywhere, ends that.

        Stores have no locks that end with their processes. The last start of a run owns it: the others find that out before
        they complete a step or put a file there, and stop.

        Raises:
            StoreError: when the store can't be written to, or another start owns the run.
        """
        self._owner = uuid.uuid4().hex
        (self.store / _OWNER_FILE).write_text(json.dumps({"owner": self._owner}) + "\n")
        ended = threading.Event()
        thread = threading.Thread(target=self._keep_putting, args=(ended,), name="run_view", daemon=True)
        thread.start()
        try:
            yield
        except BaseException as error:
            ended.set()
            try:
                self.put()
            except OSError as failure:
                if failure.args != error.args:
                    error.add_note(str(failure))  # The first error is the one to look at.
            raise
        finally:
            ended.set()
            thread.join()
        self.put()

    def put(self) -> None:
        """Puts into the store what has changed here.

        Raises:
            StoreError: when it can't be written to, or another start owns the run.
        """
        with self._busy:
            self._check_owner()
            changed = {path: _version(path) for path in sorted(self.path.rglob("*")) if path.is_file()}
            changed = {
                path: version
                for path, version in changed.items()
                if self._put.get(path) != version and not path.name.startswith(".")
            }
            each(self._put_one, changed)
            self._put |= changed

    def _put_one(self, path: Path) -> None:
        (self.store / path.relative_to(self.path)).write_bytes(path.read_bytes())

    def _check_owner(self) -> None:
        if self._owner is None:  # One that only helps: process 0 owns the run for all.
            return
        try:
            found = json.loads((self.store / _OWNER_FILE).read_text())["owner"]
        except (FileNotFoundError, ValueError, KeyError):
            found = None
        if found != self._owner:
            raise StoreError(
                f"{self.store} was started again elsewhere: that start owns the run now, and this one stops. Nothing of it is "
                "lost but the steps since its last checkpoint. If that was a mistake, end the other and run this again."
            )

    def _keep_putting(self, ended: threading.Event) -> None:
        while not ended.wait(_EVERY_SECONDS):
            with contextlib.suppress(OSError):  # The next checkpoint says it.
                self.put()


def _version(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_mtime_ns, status.st_size
