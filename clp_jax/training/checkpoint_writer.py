"""Writes one step in the background: copies, writes, digests, and last the manifest and the name.

Several processes write one step together. Each writes its shards and digests what it wrote; process 0 joins the parts when all
are done. A process that fails says so and goes on to the barriers: no other waits for it longer than it takes to be told.
"""

import contextlib
import dataclasses
import itertools
import json
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax

from clp_jax.array_types import PyTree
from clp_jax.interop.object_store import StorePath
from clp_jax.training import array_store
from clp_jax.training.checkpoint_manifest import (
    ArrayDigest,
    FileDigest,
    HostCopy,
    Manifest,
    arrays_from_json,
    digest_arrays,
    leaves_by_path,
    shards_of,
)
from clp_jax.training.directory_steps import StepInDirectory
from clp_jax.training.places import Place
from clp_jax.training.store_steps import StepInStore

# A barrier's name is used once; all processes count alike, since all save the same steps.
_numbers = itertools.count()
_PART = ".part_{}.json"


class StepWriter:
    """A save that runs in the background.

    Args:
        path: of the step; a directory appears when it is complete.
        items: trees of arrays by name; they may be donated as soon as the constructor returns.
        run: what ``run.json`` says.
        seconds: a save that takes longer has failed.
        on_complete: called in the background by process 0 when the step is complete.
        check: called by process 0 before anything in a store is removed or completed; what it raises prevents that.

    Raises:
        OSError: when the directory can't be made.
    """

    def __init__(
        self,
        path: Place,
        items: Mapping[str, PyTree],
        run: Mapping[str, Any],
        *,
        seconds: float = 3600.0,
        on_complete: Callable[[], None] = lambda: None,
        check: Callable[[], None] = lambda: None,
    ):
        self._files = StepInStore(path, check) if isinstance(path, StorePath) else StepInDirectory(path)
        self._run_text = json.dumps(run)
        self._step = int(run["step"])
        self._deadline = time.monotonic() + seconds
        self._on_complete = on_complete
        self._barrier = array_store.barrier()
        self._name = f"checkpoint/{next(_numbers)}/{path.name}"
        self._process, self._processes = jax.process_index(), jax.process_count()
        self._error: BaseException | None = None
        self._prepare(items)
        self._copies: dict[str, dict[str, HostCopy]] = {}
        self._waits: list[Callable[[float], Mapping[str, FileDigest]]] = []
        try:
            for item, tree in items.items():
                self._copies[item] = _host_copies(tree)
                self._waits.append(self._files.begin(item, tree, self._copies[item]))
        except Exception as error:  # The other processes wait in their background: so must this one.
            self._error = error
        self._thread = threading.Thread(target=self._work, name=f"checkpoint_{path.name}")
        self._thread.start()

    @property
    def is_running(self) -> bool:
        """Whether the step is still being written."""
        return self._thread.is_alive()

    def wait(self) -> None:
        """Waits until the step is complete.

        Raises:
            BaseException: whatever went wrong.
        """
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _prepare(self, items: Mapping[str, PyTree]) -> None:
        failure = None
        if self._process == 0:
            try:
                self._files.prepare(items)
            except OSError as error:
                failure = error
        self._meet("prepared")
        if failure is not None:
            raise failure
        if not self._files.is_prepared():
            raise FileNotFoundError(f"{self._files.place}: process 0 could not make it, or it is on a disk of its own")

    def _work(self) -> None:
        try:
            if self._error is None:
                self._write_part()
        except BaseException as error:  # Whatever it is, the others must be told, and the loop.
            self._error = error
        try:
            self._meet("written")
            if self._process == 0:
                self._complete()
        except BaseException as error:
            self._error = self._error or error
        try:
            self._meet("complete")
            if self._error is None and not self._files.is_published():
                raise RuntimeError("process 0 did not complete it; its own message says why")
        except BaseException as error:
            self._error = self._error or error
        if self._process == 0:
            self._after()

    def _write_part(self) -> None:
        errors = []
        written: dict[str, FileDigest] = {}
        for wait in self._waits:  # All of them, so that nothing is written any more when this is over.
            try:
                written |= wait(self._seconds_left())
            except Exception as error:
                errors.append(error)
        if errors:
            raise errors[0]
        arrays = {item: digest_arrays(copies) for item, copies in self._copies.items()}
        self._copies, self._waits = {}, []
        part = _Part(arrays, {**written, **self._files.own_files()})
        (self._files.place / _PART.format(self._process)).write_text(json.dumps(dataclasses.asdict(part)))

    def _complete(self) -> None:
        if self._error is not None:
            return
        arrays: dict[str, dict[str, ArrayDigest]] = {}
        files: dict[str, FileDigest] = {}
        for process in range(self._processes):
            note = self._files.place / _PART.format(process)
            if not note.exists():
                raise RuntimeError(f"process {process} could not write its part; its own message says why")
            part = _Part.from_json(json.loads(note.read_text()))
            files |= part.files
            for item, found in part.arrays.items():
                known = arrays.setdefault(item, {})
                for name, array in found.items():
                    shards = {**known[name].shards, **array.shards} if name in known else array.shards
                    known[name] = dataclasses.replace(array, shards=shards)
            note.unlink()
        files |= self._files.finish(self._run_text, files)
        self._files.publish(Manifest(self._step, self._processes, files, arrays))

    def _after(self) -> None:
        if self._error is None:
            try:
                self._on_complete()
            except BaseException as error:
                self._error = error
        else:
            with contextlib.suppress(OSError):  # What went wrong first is the error to look at.
                self._files.discard()

    def _meet(self, what: str) -> None:
        if self._processes > 1:
            self._barrier(f"{self._name}/{what}", self._seconds_left())

    def _seconds_left(self) -> float:
        return max(1.0, self._deadline - time.monotonic())


@dataclasses.dataclass(frozen=True)
class _Part:
    """What one process knows of a step: digests of its shards and of its files."""

    arrays: Mapping[str, Mapping[str, ArrayDigest]]
    files: Mapping[str, FileDigest]

    @classmethod
    def from_json(cls, part: Mapping[str, Any]) -> "_Part":
        arrays = {item: arrays_from_json(found) for item, found in part["arrays"].items()}
        return cls(arrays, {name: FileDigest(**file) for name, file in part["files"].items()})


def _host_copies(tree: PyTree) -> dict[str, HostCopy]:
    """Shape, type and this process's shards of each array."""
    leaves = leaves_by_path(tree)
    for leaf in leaves.values():
        if isinstance(leaf, jax.Array):
            leaf.copy_to_host_async()
    return {name: (tuple(leaf.shape), str(leaf.dtype), shards_of(leaf)) for name, leaf in leaves.items()}
