"""Steps in a directory: written beside their place, and renamed when they are complete.

=================== ==============================================================================================
name                what
=================== ==============================================================================================
``6/``              step 6; complete if it has a manifest
``6.unfinished/``   is being written, or was when its process died; the next run removes it
``6.removing/``     was no longer to be kept; the next run removes it
``6.damaged/``      a step that is not what was written; ``6.damaged.txt`` says why. Nothing here removes it
=================== ==============================================================================================
"""

import contextlib
import time
from collections.abc import Callable, Mapping

import jax
from etils import epath

from clp_jax.array_types import PyTree
from clp_jax.training import array_store
from clp_jax.training.checkpoint_manifest import (
    MANIFEST_FILE,
    RUN_FILE,
    FileDigest,
    HostCopy,
    Manifest,
    digest_files,
    files_below,
    is_step,
    relative,
)
from clp_jax.training.store_steps import DAMAGED, REMOVING, UNFINISHED

# What Orbax called a step that it was writing, before steps had manifests.
_OLD_UNFINISHED = ".orbax-checkpoint-tmp"
OLD_RUN = "run/metadata"
_ATTEMPTS = 20


class DirectorySteps:
    """The steps of a directory, which need not exist.

    Args:
        directory: of the checkpoints.
    """

    def __init__(self, directory: epath.Path):
        self._directory = directory
        self._names = sorted(entry.name for entry in directory.iterdir()) if directory.is_dir() else []

    def complete(self) -> list[int]:
        """Those with a manifest, in order."""
        return [step for step in self.numbered() if is_complete(self._directory / str(step))]

    def numbered(self) -> list[int]:
        """All directories that are called like a step, in order."""
        return sorted(int(name) for name in self._names if is_step(name))

    def unfinished(self) -> list[str]:
        """Names of directories in which a step was begun, or was being removed."""
        marks = (UNFINISHED, REMOVING, _OLD_UNFINISHED)
        return [name for name in self._names if any(mark in name and is_step(name.split(mark)[0]) for mark in marks)]

    def damaged(self) -> dict[str, str]:
        """Names of the steps that were set aside, each with the reason."""
        found = {}
        for name in self._names:
            if DAMAGED in name and is_step(name.split(DAMAGED)[0]) and not name.endswith(".txt"):
                note = self._directory / f"{name}.txt"
                found[name] = note.read_text().strip() if note.exists() else "no reason is written beside it"
        return found


def is_complete(path: epath.Path) -> bool:
    """Whether a directory has all the signs of a complete checkpoint; its contents are not looked at."""
    return (path / MANIFEST_FILE).exists() or is_unverified(path)


def is_unverified(path: epath.Path) -> bool:
    """Whether a directory is a checkpoint from before there were manifests: it can be read, not verified."""
    if (path / MANIFEST_FILE).exists() or (path / RUN_FILE).exists() or _OLD_UNFINISHED in path.name:
        return False
    return (path / "params").is_dir() and (path / OLD_RUN).exists()


def set_aside(path: epath.Path, reason: str) -> epath.Path:
    """Renames a damaged step and writes the reason beside it; returns its new place."""
    taken = {entry.name for entry in path.parent.iterdir()}
    number = 0
    while (name := f"{path.name}{DAMAGED}{f'.{number}' if number else ''}") in taken or f"{name}.txt" in taken:
        number += 1
    place = path.parent / name
    path.rename(place)
    with contextlib.suppress(OSError):  # On a full disk the name alone must do.
        (path.parent / f"{name}.txt").write_text(reason + "\n")
    return place


def remove(path: epath.Path) -> None:
    """Removes a step: it stops being one at once, and its files go after that."""
    going = path
    if not path.name.endswith(REMOVING):
        going = path.parent / f"{path.name}{REMOVING}"
        if going.exists():
            going.rmtree()
        path.rename(going)
    going.rmtree()


class StepInDirectory:
    """A step as it is written; one object in each process.

    Args:
        path: of the step.
    """

    def __init__(self, path: epath.Path):
        self._path = path
        self.place = path.parent / f"{path.name}{UNFINISHED}"

    def prepare(self, items: Mapping[str, PyTree]) -> None:
        """Makes the directory in which it is written, empty; by process 0."""
        if self.place.exists():
            self.place.rmtree()
        for item in items:
            (self.place / item).mkdir(parents=True)

    def is_prepared(self) -> bool:
        """Whether process 0 has prepared it."""
        return self.place.is_dir()

    def begin(
        self, item: str, tree: PyTree, copies: Mapping[str, HostCopy]
    ) -> Callable[[float], Mapping[str, FileDigest]]:
        """Begins to write this process's part of a tree; returns what waits for that, and gives the digests of its files."""
        wait = array_store.begin_write(self.place / item, tree)

        def end(seconds: float) -> Mapping[str, FileDigest]:
            wait(seconds)
            return {}

        return end

    def own_files(self) -> Mapping[str, FileDigest]:
        """Digests of the files that this process alone has written, when all trees are; those that `begin` gave left out."""
        if jax.process_count() == 1:  # It has nobody to tell; it digests all files when they are joined.
            return {}
        own = [file for file in files_below(self.place) if f"/ocdbt.process_{jax.process_index()}/" in str(file)]
        return digest_files(self.place, own)

    def finish(self, run_text: str, known: Mapping[str, FileDigest]) -> Mapping[str, FileDigest]:
        """Joins what all have written, and adds the run's file; by process 0. Returns the digests of the files not known."""
        for item in [entry for entry in self.place.iterdir() if entry.is_dir()]:
            array_store.finish_write(item)
        (self.place / RUN_FILE).write_text(run_text)
        others = [file for file in files_below(self.place) if relative(self.place, file) not in known]
        return digest_files(self.place, others)

    def publish(self, manifest: Manifest) -> None:
        """Makes the step complete; by process 0."""
        manifest.write(self.place)
        if self._path.exists():
            raise FileExistsError(f"{self._path} exists: it was not overwritten")
        self.place.rename(self._path)

    def is_published(self) -> bool:
        """Whether process 0 has completed it."""
        return self._path.is_dir()

    def discard(self) -> None:
        """Removes what was written."""
        # On a full disk, what is half written takes the room that the user needs. Threads of the store may still be
        # writing; what is left after this, the next run removes.
        for _ in range(_ATTEMPTS):
            try:
                self.place.rmtree()
            except FileNotFoundError:
                return
            except OSError:
                time.sleep(0.1)
