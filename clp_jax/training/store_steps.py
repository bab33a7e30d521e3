"""Steps in an object store, where nothing can be renamed: written under their own name, with objects beside them as marks.

======================= =============================================================================================
object                  what
======================= =============================================================================================
``6/manifest.json``     step 6 is complete; written last, removed first
``6.unfinished``        it is being written, or was when its process died; the next run removes what there is of it
``6.removing``          it was no longer to be kept; the next run removes it
``6.damaged.txt``       it is not what was written, and why; it stays until the step is made again
======================= =============================================================================================
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from clp_jax.array_types import PyTree
from clp_jax.interop import orbax_item, zarr_files
from clp_jax.interop.arrays import ArraySpec
from clp_jax.interop.object_store import StorePath, each
from clp_jax.training.checkpoint_manifest import (
    MANIFEST_FILE,
    RUN_FILE,
    FileDigest,
    HostCopy,
    Manifest,
    digest_of,
    is_step,
    leaves_by_path,
    parse_place,
)

UNFINISHED, REMOVING, DAMAGED = ".unfinished", ".removing", ".damaged"
NOTE = f"{DAMAGED}.txt"
_MARKS = (UNFINISHED, REMOVING, NOTE)
# A chunk is an object, which is written and read whole.
_CHUNK_BYTES = 64 * 2**20


class StoreSteps:
    """The steps below a name, as they were when this was made.

    Args:
        directory: of the checkpoints.
    """

    def __init__(self, directory: StorePath):
        self._directory = directory
        found = [directory.relative(file).split("/", 1) for file in directory.files()]
        self._marks = {parts[0] for parts in found if len(parts) == 1}
        self._steps = {parts[0] for parts in found if len(parts) == 2 and is_step(parts[0])}
        self._manifests = {parts[0] for parts in found if parts[1:] == [MANIFEST_FILE]}

    def complete(self) -> list[int]:
        """Those with a manifest, in order."""
        names = (name for name in self._steps & self._manifests if not {name + REMOVING, name + NOTE} & self._marks)
        return sorted(map(int, names))

    def numbered(self) -> list[int]:
        """Those that were complete once, and neither removed nor set aside, in order."""
        begun = {name for name in self._steps if name + UNFINISHED in self._marks} - self._manifests
        names = (name for name in self._steps - begun if not {name + REMOVING, name + NOTE} & self._marks)
        return sorted(map(int, names))

    def unfinished(self) -> list[str]:
        """Names of the marks of steps that were begun, or were being removed."""
        marked = sorted(mark for mark in self._marks if mark.endswith((UNFINISHED, REMOVING)))
        steps = {mark: mark.removesuffix(UNFINISHED).removesuffix(REMOVING) for mark in marked}
        done = {name for name in self._manifests if name + REMOVING not in self._marks}
        return [mark for mark, name in steps.items() if is_step(name) and name not in done]

    def damaged(self) -> dict[str, str]:
        """Names of the steps that were set aside, each with the reason."""
        notes = sorted(mark for mark in self._marks if mark.endswith(NOTE) and is_step(mark.removesuffix(NOTE)))
        return {note.removesuffix(".txt"): (self._directory / note).read_text().strip() for note in notes}


def is_complete(path: StorePath) -> bool:
    """Whether there is a manifest, and no mark that says otherwise."""
    marked = any(mark.is_file() for mark in (_mark(path, REMOVING), _mark(path, NOTE)))
    return not marked and (path / MANIFEST_FILE).is_file()


def is_begun(path: StorePath) -> bool:
    """Whether something was begun there and not completed."""
    return _mark(path, UNFINISHED).is_file() and not (path / MANIFEST_FILE).is_file()


def set_aside(path: StorePath, reason: str) -> StorePath:
    """Writes down that a step is damaged; returns its place, which is the same."""
    _mark(path, NOTE).write_text(reason + "\n")
    return path


def remove(path: StorePath) -> None:
    """Removes a step, or what a mark is about: it stops being a step at once, and its objects go after that."""
    step = objects_of(path)
    _mark(step, REMOVING).write_text("removing\n")
    (step / MANIFEST_FILE).unlink()
    step.rmtree()
    for mark in (UNFINISHED, NOTE, REMOVING):
        _mark(step, mark).unlink()


def discard(path: StorePath) -> None:
    """Removes what a mark is about; that of a step that was begun stays, since another start may still be writing it."""
    if path.name.endswith(UNFINISHED):
        objects_of(path).rmtree()
    else:
        remove(path)


def objects_of(path: StorePath) -> StorePath:
    """Where the objects of a step are, given its name or that of a mark."""
    name = path.name
    for mark in (*_MARKS, DAMAGED):
        name = name.removesuffix(mark)
    return path.parent / name


class StepInStore:
    """A step as it is written: see `clp_jax.training.directory_steps.StepInDirectory`, which has the same methods.

    Arrays are stored in chunks, each an object without compression: what an object is to be is known before it is written, and
    is not read back.

    Args:
        path: of the step.
        check: is called before anything is removed or completed; what it raises prevents that.
    """

    def __init__(self, path: StorePath, check: Callable[[], None]):
        self.place = path
        self._check = check
        self._items: dict[str, dict[str, tuple[ArraySpec, tuple[int, ...]]]] = {}

    def prepare(self, items: Mapping[str, PyTree]) -> None:
        """Marks the step, and removes what is left of an earlier one; by process 0."""
        self._check()
        if is_complete(self.place):
            raise FileExistsError(f"{self.place} exists: it was not overwritten")
        _mark(self.place, UNFINISHED).write_text("unfinished\n")
        self.place.rmtree()

    def is_prepared(self) -> bool:
        """Whether process 0 has prepared it."""
        return _mark(self.place, UNFINISHED).is_file()

    def begin(
        self, item: str, tree: PyTree, copies: Mapping[str, HostCopy]
    ) -> Callable[[float], Mapping[str, FileDigest]]:
        """Returns what writes this process's part of a tree, and gives the digests of its files."""
        leaves = leaves_by_path(tree)
        layout = {
            name: (ArraySpec(shape, np.dtype(leaves[name].dtype)), _chunk_shape(leaves[name]))
            for name, (shape, _, _) in copies.items()
        }
        self._items[item] = layout
        parts = [
            (f"{item}/{_folder(name)}", layout[name][1], place, data)
            for name, (_, _, shards) in copies.items()
            for place, data in shards.items()
        ]

        def write(seconds: float) -> Mapping[str, FileDigest]:
            chunks = [(folder, *chunk) for folder, shape, place, data in parts for chunk in _cut(place, data, shape)]
            return dict(each(self._write_chunk, chunks))

        return write

    def own_files(self) -> Mapping[str, FileDigest]:
        """None but those of `begin`."""
        return {}

    def finish(self, run_text: str, known: Mapping[str, FileDigest]) -> Mapping[str, FileDigest]:
        """Writes what describes the arrays, and the run's file; by process 0, when all have written their part."""
        texts = {RUN_FILE: run_text}
        for item, layout in self._items.items():
            described = orbax_item.description(
                {name: spec for name, (spec, _) in layout.items()}, {name: chunk for name, (_, chunk) in layout.items()}
            )
            texts |= {f"{item}/{name}": text for name, text in described.items()}
            for name, (spec, chunk) in layout.items():
                text = zarr_files.metadata_text(spec.shape, spec.dtype, chunk, compressor=None)
                texts[f"{item}/{_folder(name)}/{zarr_files.METADATA_FILE}"] = text
        return dict(each(lambda entry: self._write(entry[0], entry[1].encode()), texts.items()))

    def publish(self, manifest: Manifest) -> None:
        """Makes the step complete; by process 0."""
        self._check()
        _mark(self.place, NOTE).unlink()
        manifest.write(self.place)
        _mark(self.place, UNFINISHED).unlink()

    def is_published(self) -> bool:
        """Whether process 0 has completed it."""
        return (self.place / MANIFEST_FILE).is_file()

    def discard(self) -> None:
        """Removes what was written; not what another start of the run may be writing there."""
        self._check()
        remove(self.place)

    def _write_chunk(self, chunk: tuple[str, str, np.ndarray]) -> tuple[str, FileDigest]:
        folder, key, data = chunk
        return self._write(f"{folder}/{key}", data.tobytes())

    def _write(self, name: str, data: bytes) -> tuple[str, FileDigest]:
        (self.place / name).write_bytes(data)
        return name, digest_of(data)


def _mark(path: StorePath, mark: str) -> StorePath:
    return path.parent / f"{path.name}{mark}"


def _folder(name: str) -> str:
    return name.replace("/", ".")


def _chunk_shape(leaf: Any) -> tuple[int, ...]:
    """Of equal parts of a shard: what a process writes and what another does never share an object."""
    shape = tuple(leaf.sharding.shard_shape(leaf.shape) if isinstance(leaf, jax.Array) else leaf.shape)
    chunk = [max(size, 1) for size in shape]
    while math.prod(chunk) * np.dtype(leaf.dtype).itemsize > _CHUNK_BYTES:
        axis = chunk.index(max(chunk))
        chunk[axis] = next(size for size in range(chunk[axis] - 1, 0, -1) if shape[axis] % size == 0)
    return tuple(chunk)


def _cut(place: str, data: np.ndarray, chunk: tuple[int, ...]) -> list[tuple[str, np.ndarray]]:
    """The chunks of a shard, by name."""
    starts = [start for start, _ in parse_place(place)]
    cut = []
    for number in np.ndindex(*(size // step for size, step in zip(data.shape, chunk, strict=True))):
        inside = tuple(slice(i * step, (i + 1) * step) for i, step in zip(number, chunk, strict=True))
        key = [start // step + i for start, step, i in zip(starts, chunk, number, strict=True)]
        cut.append((".".join(map(str, key)) or "0", np.asarray(data[inside])))
    return cut
