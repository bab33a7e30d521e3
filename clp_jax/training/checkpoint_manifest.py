"""What makes a step complete: a manifest with a SHA-256 of every file and of every array shard, written last.

========================= ====================================================================================
in the step's directory   what
========================= ====================================================================================
``params/``               the parameters
``ema/``                  their moving average, where the run keeps one
``training/``             optimizer slots, step and random key
``run.json``              step, position in the data, description of the model, metrics of the step
``manifest.json``         bytes and SHA-256 of all of these; shape, type and SHA-256 of each shard of each array
========================= ====================================================================================

A file is checked before it is read, a shard after. No decision depends on a clock: steps are ordered by their numbers.
"""

import concurrent.futures
import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

import jax
import numpy as np
from etils import epath

from clp_jax.array_types import PyTree
from clp_jax.interop.object_store import StorePath, each
from clp_jax.training.places import Place

MANIFEST_FILE = "manifest.json"
RUN_FILE = "run.json"
_FORMAT = 1
_BLOCK = 1 << 22
# Half of the cores, since a step may run meanwhile; more than this, and disks are slower.
_WORKERS = max(1, min(16, (os.cpu_count() or 1) // 2))


# Shape, type, and this process's shards by place.
HostCopy: TypeAlias = tuple[tuple[int, ...], str, dict[str, np.ndarray]]


class DamagedError(RuntimeError):
    """A checkpoint is not what was written; the message says what differs."""


@dataclasses.dataclass(frozen=True)
class FileDigest:
    """What a file was when it was written.

    Attributes:
        size: in bytes.
        sha256: of its contents, in hexadecimal.
    """

    size: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class ArrayDigest:
    """What an array was when it was saved.

    Attributes:
        shape: of the whole array.
        dtype: its name.
        shards: the SHA-256 of the bytes of each shard, by its place, as ``"0:4,2:8"``.
    """

    shape: tuple[int, ...]
    dtype: str
    shards: Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class Manifest:
    """All that a step consists of.

    Attributes:
        step: its number.
        processes: that wrote it.
        files: by their path below the step's directory.
        arrays: by item (``params``, ``ema``, ``training``) and path in its tree.
    """

    step: int
    processes: int
    files: Mapping[str, FileDigest]
    arrays: Mapping[str, Mapping[str, ArrayDigest]]

    @property
    def size(self) -> int:
        """Of all files, in bytes."""
        return sum(file.size for file in self.files.values())

    def write(self, directory: Place) -> None:
        """Writes ``manifest.json``: the last file of a step."""
        body = {"format": _FORMAT, **dataclasses.asdict(self)}
        text = _canonical({"manifest": body, "sha256": _sha256(_canonical(body).encode())})
        place = directory / MANIFEST_FILE
        if isinstance(place, StorePath):
            place.write_text(text)
            return
        with place.open("wb") as file:
            file.write(text.encode())
            flush_to_disk(file)

    @classmethod
    def read(cls, directory: Place) -> "Manifest":
        """Reads ``manifest.json``, and checks it against its own digest.

        Raises:
            DamagedError: when it is missing, or not to the byte what was written.
        """
        try:
            text = (directory / MANIFEST_FILE).read_bytes().decode()
            outer = json.loads(text)
            body = outer["manifest"]
            if _canonical(outer) != text or outer["sha256"] != _sha256(_canonical(body).encode()):
                raise ValueError("it does not match its own SHA-256")
            if body["format"] != _FORMAT:
                raise ValueError(f"its format is {body['format']}, expected {_FORMAT}: a newer version wrote it")
            return cls(
                step=body["step"],
                processes=body["processes"],
                files={name: FileDigest(**file) for name, file in body["files"].items()},
                arrays={item: arrays_from_json(arrays) for item, arrays in body["arrays"].items()},
            )
        except FileNotFoundError:
            raise DamagedError(f"it has no {MANIFEST_FILE}: it was not finished, or that file was deleted") from None
        except (ValueError, KeyError, TypeError) as error:  # No JSON and no UTF-8 are ValueErrors.
            raise DamagedError(f"{MANIFEST_FILE} is damaged ({error})") from error

    def verify_files(self, directory: Place, items: Iterable[str] | None = None, share: slice = slice(None)) -> None:
        """Checks the size and the SHA-256 of files.

        Args:
            directory: of the step.
            items: ``"params"``, ``"run.json"``, ...; all by default.
            share: which of them, in the order of their names: several processes may divide the work.

        Raises:
            DamagedError: naming the first file that is missing or differs.
        """
        wanted = None if items is None else set(items)
        names = sorted(name for name in self.files if wanted is None or name.split("/")[0] in wanted)[share]

        def check(name: str) -> None:
            expected = self.files[name]
            try:
                found = file_digest(directory / name)
            except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
                raise DamagedError(f"{name} is missing") from None
            if found.size != expected.size:
                raise DamagedError(f"{name} has {found.size:,} bytes, {expected.size:,} were written")
            if found.sha256 != expected.sha256:
                raise DamagedError(f"{name} has another SHA-256 than what was written")

        (each if isinstance(directory, StorePath) else in_parallel)(check, names)

    def verify_arrays(self, item: str, tree: PyTree) -> tuple[int, int]:
        """Checks arrays that were read, on whatever mesh, against the shards that were saved.

        Args:
            item: which tree.
            tree: of arrays.

        Returns:
            How many shards were checked, and how many there are: on several hosts, a shard that was saved whole may have been
            read in parts by several of them, and then only its files were checked.

        Raises:
            DamagedError: naming the first array that differs.
        """
        digests, found = self.arrays[item], leaves_by_path(tree)

        def check(name: str) -> int:
            wanted, array = digests[name], found.get(name)
            if array is None or tuple(array.shape) != tuple(wanted.shape) or str(array.dtype) != wanted.dtype:
                return 0  # The caller asked for another type, or for a part of the tree.
            held = shards_of(array, all_replicas=True)
            checked = 0
            for place, digest in wanted.shards.items():
                data = _assemble(parse_place(place), held, array.dtype)
                if data is not None:
                    _check_digest(data, digest, f"{item}/{name} [{place}]")
                checked += data is not None
            return checked

        return sum(in_parallel(check, digests)), sum(len(array.shards) for array in digests.values())

    def verify_part(self, item: str, name: str, part: np.ndarray, region: tuple[slice, ...]) -> None:
        """Checks those shards of an array that lie in a part of it that was read.

        Args:
            item: which tree.
            name: path of the array in it.
            part: of the array.
            region: where it was; slices without step.

        Raises:
            DamagedError: naming the first shard that differs.
        """
        array = self.arrays[item][name]
        bounds = [piece.indices(size)[:2] for piece, size in zip(region, array.shape, strict=True)]

        def check(place: str) -> None:
            shard = parse_place(place)
            if all(low <= start and stop <= high for (start, stop), (low, high) in zip(shard, bounds, strict=True)):
                inside = tuple(
                    slice(start - low, stop - low) for (start, stop), (low, _) in zip(shard, bounds, strict=True)
                )
                _check_digest(np.asarray(part[inside]), array.shards[place], f"{item}/{name} [{place}]")

        in_parallel(check, array.shards)


def arrays_from_json(arrays: Mapping[str, Any]) -> dict[str, ArrayDigest]:
    """Digests by path, as `dataclasses.asdict` and JSON have left them."""
    return {name: ArrayDigest(tuple(a["shape"]), a["dtype"], a["shards"]) for name, a in arrays.items()}


def leaves_by_path(tree: PyTree) -> dict[str, Any]:
    """The leaves of nested dictionaries, by names joined with ``/``."""
    return {
        "/".join(str(getattr(key, "key", getattr(key, "name", key))) for key in path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def shards_of(array: Any, all_replicas: bool = False) -> dict[str, np.ndarray]:
    """The parts of an array that this process holds, on the host, by place; waits for the device.

    Args:
        array: any.
        all_replicas: whether to return what other processes hold too. Without, each part of the array is returned by exactly
            one process.
    """
    if not isinstance(array, jax.Array):
        array = np.asarray(array)
        whole = _place(tuple(slice(None) for _ in array.shape), array.shape)
        return {whole: array} if all_replicas or jax.process_index() == 0 else {}
    held = [shard for shard in array.addressable_shards if all_replicas or shard.replica_id == 0]
    return {_place(shard.index, array.shape): np.asarray(shard.data) for shard in held}


def digest_arrays(tree: Mapping[str, tuple[tuple[int, ...], str, Mapping[str, np.ndarray]]]) -> dict[str, ArrayDigest]:
    """Digests of host copies, by path: shape, type and shards in, the same with digests out."""
    parts = [(name, place, data) for name, (_, _, shards) in tree.items() for place, data in shards.items()]
    digests = in_parallel(lambda part: _sha256(_bytes_of(part[2])), parts)
    shards: dict[str, dict[str, str]] = {name: {} for name in tree}
    for (name, place, _), digest in zip(parts, digests, strict=True):
        shards[name][place] = digest
    return {name: ArrayDigest(tuple(shape), dtype, shards[name]) for name, (shape, dtype, _) in tree.items()}


def digest_of(data: bytes) -> FileDigest:
    """The digest of a file that holds this."""
    return FileDigest(len(data), _sha256(data))


def digest_files(directory: epath.Path, files: list[epath.Path]) -> dict[str, FileDigest]:
    """Digests of files, once they are on the disk, by path below a directory."""
    found = in_parallel(lambda file: file_digest(file, to_disk=True), files)
    return {relative(directory, file): digest for file, digest in zip(files, found, strict=True)}


def files_below(path: Place) -> list[Any]:
    """All files below a directory, in order."""
    if isinstance(path, StorePath):
        return path.files()
    return sorted((epath.Path(top) / name for top, _, names in path.walk() for name in names), key=str)


def relative(directory: Place, file: Place) -> str:
    """The path of a file below a directory."""
    return str(file)[len(str(directory)) :].lstrip("/")


def is_step(name: str) -> bool:
    """Whether a name is that of a step: digits of other scripts and leading zeros are somebody else's."""
    return name.isascii() and name.isdecimal() and str(int(name)) == name


def file_digest(path: Place, to_disk: bool = False) -> FileDigest:
    """Reads a file once.

    Args:
        path: of the file.
        to_disk: whether to have the operating system write out what it still holds of it.
    """
    found = hashlib.sha256()
    size = 0
    with path.open("rb") as file:
        if to_disk:
            flush_to_disk(file)
        while block := file.read(_BLOCK):
            found.update(block)
            size += len(block)
    return FileDigest(size, found.hexdigest())


def flush_to_disk(file: Any) -> None:
    """Waits until a file survives a power failure, where it is a local one."""
    if file.writable():
        file.flush()
    try:
        number = file.fileno()
    except (OSError, AttributeError):  # Object stores have no descriptors: what is closed is stored.
        return
    os.fsync(number)


def in_parallel(function: Any, values: Iterable[Any]) -> list[Any]:
    """Maps a function that hashes, which lets other threads run; raises the first error in the order of the values."""
    values = list(values)
    if len(values) < 2:
        return [function(value) for value in values]
    with concurrent.futures.ThreadPoolExecutor(_WORKERS, thread_name_prefix="checkpoint_digests") as pool:
        return list(pool.map(function, values))


def _place(index: tuple[slice, ...], shape: tuple[int, ...]) -> str:
    bounds = [part.indices(size)[:2] for part, size in zip(index, shape, strict=True)]
    return ",".join(f"{start}:{stop}" for start, stop in bounds)


def parse_place(place: str) -> tuple[tuple[int, int], ...]:
    """Where a shard begins and ends on each axis, from its place."""
    return tuple((int(start), int(stop)) for start, stop in (part.split(":") for part in place.split(",") if part))


def _assemble(wanted: tuple[tuple[int, int], ...], held: Mapping[str, np.ndarray], dtype: Any) -> np.ndarray | None:
    """A part of an array from other parts of it, or None where they do not cover it."""
    whole = held.get(",".join(f"{start}:{stop}" for start, stop in wanted))
    if whole is not None:
        return whole
    result = np.empty([stop - start for start, stop in wanted], dtype)
    covered = 0  # Parts of one array, by place, do not overlap: they are cells of one grid.
    for place, data in held.items():
        have = parse_place(place)
        common = [(max(a, c), min(b, d)) for (a, b), (c, d) in zip(wanted, have, strict=True)]
        if any(start >= stop for start, stop in common):
            continue
        to = tuple(slice(a - w, b - w) for (a, b), (w, _) in zip(common, wanted, strict=True))
        out_of = tuple(slice(a - h, b - h) for (a, b), (h, _) in zip(common, have, strict=True))
        result[to] = data[out_of]
        covered += math.prod(stop - start for start, stop in common)
    return result if covered == result.size else None


def _bytes_of(data: np.ndarray) -> np.ndarray:
    # The shape is part of the manifest, not of the digest; a view as bytes spares a copy, for types of every library.
    return np.ascontiguousarray(data).reshape(-1).view(np.uint8)


def _check_digest(data: np.ndarray, digest: str, where: str) -> None:
    if _sha256(_bytes_of(data)) != digest:
        raise DamagedError(f"array {where} has another SHA-256 than what was saved")


def _sha256(data: Any) -> str:
    return hashlib.sha256(data).hexdigest()


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":")) + "\n"
