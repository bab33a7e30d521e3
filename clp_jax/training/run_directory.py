"""The directory of one run: created once, entered again only by the same run, never overwritten."""

import contextlib
import dataclasses
import errno
import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from clp_jax.interop.object_store import StoreError, StorePath
from clp_jax.rewards.normalisation import FILE_NAME as STATISTICS_FILE
from clp_jax.training.checkpoint_steps import complete_steps
from clp_jax.training.configurations import brief, changes, first_difference
from clp_jax.training.places import CHECKPOINTS_DIRECTORY, REFERENCE_DIRECTORY, RunView, as_path

CONFIG_FILE = "config.gin"
DESCRIPTION_FILE = "description.json"
METRICS_FILE = "metrics.jsonl"
LEDGER_FILE = "ledger.json"
TENSORBOARD_DIRECTORY = "tensorboard"
_LOCK_FILE = ".lock"


class RunDirectoryError(ValueError):
    """The run directory can't be used as it is; the message says what to do."""


@dataclasses.dataclass(frozen=True)
class RunDirectory:
    """Everything one run writes.

    Attributes:
        path: the directory; of a run in a store, that of its view.
        view: of a run in a store, the view; None for a directory.
    """

    path: Path
    view: RunView | None = None

    def __str__(self) -> str:
        """Where the run is, for people."""
        return str(self.path if self.view is None else self.view.store)

    @property
    def metrics(self) -> Path:
        """One JSON object per logged step."""
        return self.path / METRICS_FILE

    @property
    def ledger(self) -> Path:
        """Where the time went, at each checkpoint."""
        return self.path / LEDGER_FILE

    @property
    def tensorboard(self) -> Path:
        """Event files."""
        return self.path / TENSORBOARD_DIRECTORY

    @property
    def checkpoints(self) -> Path:
        """One directory per saved step."""
        return self.path / CHECKPOINTS_DIRECTORY

    def latest_step(self) -> int | None:
        """The last complete step, from names alone: nothing heavy is imported to find that a run is complete."""
        return max(complete_steps(self.checkpoints), default=None)

    def description(self) -> dict[str, Any] | None:
        """What rebuilds the model, or None before the run has got so far."""
        path = self.path / DESCRIPTION_FILE
        return json.loads(path.read_text()) if path.is_file() else None

    def write_config(self, config_text: str) -> tuple[str, ...]:
        """Stores the resolved configuration; returns what of the layout is another than before."""
        path = self.path / CONFIG_FILE
        before = path.read_text() if path.is_file() else config_text
        if not path.is_file() or before != config_text:
            self._write(CONFIG_FILE, config_text)
        return changes(before, config_text).layout

    def write_description(self, description: dict[str, Any]) -> None:
        """Stores what rebuilds the model.

        Raises:
            RunDirectoryError: when the run described itself otherwise before, and not in its layout alone, naming the first
                difference.
        """
        description = json.loads(json.dumps(description))
        before = self.description()
        if before is None:
            self._write(DESCRIPTION_FILE, json.dumps(description, indent=2) + "\n")
        elif before != description:
            difference = first_difference(before, description)
            if difference is not None:
                where, old, new = difference
                raise RunDirectoryError(
                    f"{self} holds a run with another {where}: it was {_shown(old)}, now it is {_shown(new)}. Train in a "
                    "new run directory, or go back to the old value."
                )
            self._write(DESCRIPTION_FILE, json.dumps(description, indent=2) + "\n")

    def put(self) -> None:
        """Puts what has changed into the store; does nothing for a directory.

        Raises:
            StoreError: when it can't be written to, or another start owns the run.
        """
        if self.view is not None:
            self.view.put()

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Keeps a second process from training in the same directory; in a store, ends what the first one writes.

        Raises:
            RunDirectoryError: when another process does.
        """
        if self.view is not None:
            with self.view.owned():
                yield
            return
        with contextlib.ExitStack() as stack:
            with disk_errors(self.path):  # Not of what happens while it is locked.
                file = stack.enter_context(open(self.path / _LOCK_FILE, "a"))
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise RunDirectoryError(
                        f"another process is training in {self.path}. Wait for it, or train in another run directory."
                    ) from None
            yield

    def _write(self, name: str, text: str) -> None:
        with disk_errors(self.path):
            write_atomically(self.path / name, text)


def open_run_directory(path: str | os.PathLike, config_text: str = "") -> RunDirectory:
    """Creates a run directory, or enters one that the same configuration made.

    Args:
        path: of the directory.
        config_text: the resolved configuration, lines of ``name = value``; once a run has begun it may differ in what is
            free and in the layout only (`clp_jax.training.configurations`), and is stored by `RunDirectory.write_config` when
            it goes on.

    Raises:
        RunDirectoryError: when the path is a file, can't be written, holds other things than a run, or holds a run of
            another configuration.
    """
    directory = find_run_directory(path)
    path = directory.path
    for parent in (path, *path.parents):
        if parent.exists() and not parent.is_dir():
            raise RunDirectoryError(f"run directory {path}: {parent} is a file. Give a directory.")
    make_writable(path)
    config = path / CONFIG_FILE
    if not config.is_file():
        foreign = [n for n in (CHECKPOINTS_DIRECTORY, METRICS_FILE, DESCRIPTION_FILE) if (path / n).exists()]
        if foreign:
            raise RunDirectoryError(
                f"{directory} has {' and '.join(foreign)} but no {CONFIG_FILE}: nothing in it was overwritten. Train in a new "
                "run directory."
            )
        directory.write_config(config_text)
        return directory
    if directory.description() is None and directory.latest_step() is None:
        # It failed before it began: nothing is lost, and the mistake must not be kept.
        with disk_errors(path):
            reference = as_path(path / REFERENCE_DIRECTORY)
            if isinstance(reference, StorePath):
                reference.rmtree()
            else:
                shutil.rmtree(reference, ignore_errors=True)
            (path / STATISTICS_FILE).unlink(missing_ok=True)
        directory.write_config(config_text)
    else:
        _check_same(directory, changes(config.read_text(), config_text).refused)
    return directory


def find_run_directory(path: str | os.PathLike) -> RunDirectory:
    """A run directory as it is; of a run in a store, with a new view of it.

    Args:
        path: of the directory, or an address.

    Raises:
        RunDirectoryError: when it is an address of another kind, or the store can't be read.
    """
    try:
        place = as_path(path)
        view = RunView(place) if isinstance(place, StorePath) else None
    except (ValueError, StoreError) as error:
        raise RunDirectoryError(f"run directory {error}") from error
    return RunDirectory(Path(place)) if view is None else RunDirectory(view.path, view)


def write_atomically(path: Path, text: str) -> None:
    """Writes a file that is there whole or not at all."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp makes files that only their owner can read.
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def make_writable(path: Path) -> None:
    """Makes a directory where it is missing, and finds out whether files can be made in it.

    Raises:
        RunDirectoryError: when they can't.
    """
    with disk_errors(path):
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):  # Permission bits do not tell it: try.
            pass


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turns what a full or read-only disk raises into an error that says what to do."""
    try:
        yield
    except OSError as error:
        advice = {
            errno.ENOSPC: "the disk is full. Free some space and run the same command again: it goes on where it was",
            errno.EDQUOT: "your disk quota is used up. Free some space and run the same command again: it goes on where it was",
            errno.ENOENT: "it can't be made there. Give a run directory elsewhere",
            errno.EROFS: "it is on a read-only file system. Give a run directory elsewhere",
            errno.EACCES: "it is not writable for you. Change its permissions, or give a run directory elsewhere",
            errno.EPERM: "it is not writable for you. Change its permissions, or give a run directory elsewhere",
        }.get(error.errno or 0)
        if advice is None:
            raise
        raise RunDirectoryError(f"run directory {path}: {advice}.") from error


def _check_same(directory: RunDirectory, refused: tuple[str, ...]) -> None:
    if not refused:
        return
    more = [f"  and {len(refused) - 5} more"] if len(refused) > 5 else []
    lines = "\n".join([*(f"  {line}" for line in refused[:5]), *more])
    raise RunDirectoryError(
        f"{directory} holds a run of another configuration (old -> new):\n{lines}\n"
        "Nothing was changed. Train in a new run directory, or go back to the old values."
    )


def _shown(value: Any) -> str:
    return brief(value if value is None or isinstance(value, str) else json.dumps(value))
