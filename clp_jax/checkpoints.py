"""`clp checkpoints`: looks after checkpoints that are on the disk."""

import contextlib
import datetime
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.console import Console
from rich.table import Table

from clp_jax.interop.object_store import StorePath
from clp_jax.training import array_store
from clp_jax.training.checkpoint_items import CheckpointError
from clp_jax.training.checkpoint_manifest import RUN_FILE, DamagedError, Manifest, files_below, leaves_by_path
from clp_jax.training.checkpoint_steps import (
    KeepBest,
    Retention,
    complete_steps,
    damaged_steps,
    is_complete,
    is_unverified,
    metrics_of,
    numbered_steps,
    read_run,
    remove,
    unfinished_steps,
)
from clp_jax.training.places import CHECKPOINTS_DIRECTORY, Place, as_path
from clp_jax.training.run_directory import CONFIG_FILE, RunDirectory
from clp_jax.training.saved_params import find_checkpoint
from clp_jax.training.store_steps import objects_of

_PIPE_WIDTH = 160


def checkpoints(
    action: Literal["verify", "list", "gc", "diff"],
    directory: str,
    other: str | None = None,
    *,
    keep_checkpoints: int = 2,
    keep_every: int | None = None,
    keep_best: str | None = None,
    highest: bool = False,
    damaged: bool = False,
    dry_run: bool = False,
) -> None:
    """Verifies, lists, thins out or compares checkpoints.

    ``verify`` reads every file and array, and fails if any is not what was written. ``list`` prints a table. ``gc`` removes the
    steps that are not to be kept, once those that are have been verified, and what was left half written. ``diff`` compares two
    checkpoints, leaf by leaf.

    Args:
        action: ``verify``, ``list``, ``gc`` or ``diff``.
        directory: a run directory, or one checkpoint ``RUN/checkpoints/STEP``.
        other: for ``diff``, the checkpoint to compare with.
        keep_checkpoints: for ``gc``: the last so many are kept.
        keep_every: for ``gc``: those whose step is a multiple of it are kept too.
        keep_best: for ``gc``: the best by this metric is kept too, as ``evaluation/loss``.
        highest: for ``gc``: the best is the highest; the lowest otherwise.
        damaged: for ``gc``: whether damaged steps that were set aside are removed too; nothing else removes them.
        dry_run: for ``gc``: says what it would remove, and removes nothing.

    Raises:
        CheckpointError: when there are no checkpoints, one is damaged, or none has the metric of `keep_best`.
        RunDirectoryError: for ``gc``, while the run goes on.
    """
    place = as_path(directory)
    if (action == "diff") != (other is not None):
        raise ValueError("diff takes two checkpoints, the other actions one directory.")
    if not place.is_dir():
        raise CheckpointError(f"{place} does not exist. Give a run directory, or RUN/checkpoints/STEP.")
    # Rich takes a pipe for a terminal of 80 columns.
    width = None if sys.stdout.isatty() else _PIPE_WIDTH
    console = Console(emoji=False, markup=False, highlight=False, soft_wrap=True, width=width)
    if action == "list":
        _list(console, _folder(place))
    elif action == "verify":
        _verify(console, place)
    elif action == "diff":
        assert other is not None
        _diff(console, find_checkpoint(place), find_checkpoint(other))
    else:
        best = None if keep_best is None else KeepBest(keep_best, lowest=not highest)
        with contextlib.nullcontext() if dry_run else _not_training(place):
            _collect(console, _folder(place), Retention(keep_checkpoints, keep_every, best), damaged, dry_run)


def _list(console: Console, folder: Place) -> None:
    steps, complete = numbered_steps(folder), set(complete_steps(folder))
    metrics = metrics_of(folder, steps)
    names = sorted({name for values in metrics.values() for name in values if _is_worth_a_column(name)})
    table = Table("step", "size", "written", *names, "state")
    for step in steps:
        path = folder / str(step)
        state = "complete" if step in complete else "no manifest: damaged, or being written"
        if is_unverified(path):
            state = "unverified: from before there were manifests"
        values = [f"{metrics[step][name]:.4g}" if name in metrics[step] else "" for name in names]
        table.add_row(str(step), _size(path), _time(path), *values, state)
    others = dict.fromkeys(unfinished_steps(folder), "unfinished") | damaged_steps(folder)
    for name, state in others.items():
        path = folder / name
        table.add_row(name, _size(path), _time(path), *[""] * len(names), state)
    if not table.rows:
        raise CheckpointError(f"there are no checkpoints in {folder}.")
    console.print(table)


def _verify(console: Console, place: Place) -> None:
    found = [place] if is_complete(place) else []
    if not found:
        folder = _folder(place)
        found = [folder / str(step) for step in numbered_steps(folder)]
        if folder != place:  # The reference of reinforcement learning, the optimizer of a converted policy.
            found += [path for path in sorted(place.iterdir(), key=str) if path.is_dir() and is_complete(path)]
    if not found:
        raise CheckpointError(f"there are no checkpoints in {place}.")
    wrong = []
    for path in found:
        try:
            said = verify_checkpoint(path)
        except DamagedError as damage:
            wrong.append(path)
            said = f"DAMAGED: {damage}"
        console.print(f"{path}: {said}")
    if wrong:
        listed = ", ".join(path.name for path in wrong)
        raise CheckpointError(
            f"{len(wrong)} of {len(found)} checkpoints are damaged: {listed}. Training goes on from the newest intact one, "
            "and sets these aside; nothing removes them."
        )


def verify_checkpoint(path: Place) -> str:
    """Checks every file of a checkpoint, and every array after reading it.

    Returns:
        What was checked, for people.

    Raises:
        DamagedError: naming the first difference.
    """
    if is_unverified(path):
        return "unverified: it was written before checkpoints had manifests. Train a step on, and the next one has one."
    manifest = Manifest.read(path)
    manifest.verify_files(path)
    shards = 0
    for item in manifest.arrays:
        checked, there = manifest.verify_arrays(item, array_store.read_to_host(path / item))
        if checked != there:
            raise DamagedError(
                f"{there - checked} of {there} shards of {item} have other shapes or types than were saved"
            )
        shards += checked
    return f"intact: {len(manifest.files)} files, {shards} shards, {_bytes(manifest.size)}"


def _collect(console: Console, folder: Place, retention: Retention, damaged: bool, dry_run: bool) -> None:
    """Removes what is not kept; of steps that are to be kept, only intact ones count."""
    steps = metrics_of(folder, complete_steps(folder))
    bad: dict[int, str] = {}
    while True:
        intact = {step: metrics for step, metrics in steps.items() if step not in bad}
        if missing := retention.without_best(intact):
            raise CheckpointError(f"{folder}: {missing}. Nothing was removed.")
        kept = retention.kept(intact)
        found = {step: _damage_of(folder / str(step)) for step in kept}
        if not any(found.values()):
            break
        bad |= {step: why for step, why in found.items() if why}
    verb = "would remove" if dry_run else "removed"
    for step in steps:
        if step in bad:
            console.print(f"kept {step}: damaged, and not a checkpoint to rely on: {bad[step]}")
        elif step in kept:
            console.print(f"kept {step}: {kept[step]}")
    others = [name for name in damaged_steps(folder) if damaged]
    begun = unfinished_steps(folder)
    if isinstance(folder, StorePath):  # Nothing tells whether a run goes on there.
        for name in begun:
            console.print(f"left {name}: it may be being written; training removes what is not.")
        begun = []
    going = [*(str(step) for step in steps if step not in kept and step not in bad), *begun, *others]
    total = 0
    for name in going:
        size = _size_of(folder / name)
        if not dry_run:
            remove(folder / name)
            (folder / f"{name}.txt").unlink(missing_ok=True)
        console.print(f"{verb} {name}: {_bytes(size)}")
        total += size
    console.print(f"{verb} {_bytes(total)} in all." if going else "nothing to remove.")


def _diff(console: Console, left: Place, right: Place) -> None:
    for path in (left, right):
        if damage := _damage_of(path):
            raise CheckpointError(f"{path} is damaged: {damage}. Nothing was compared.")
    items = {
        path: {e.name for e in path.iterdir() if e.is_dir() and (e / "_METADATA").exists()} for path in (left, right)
    }
    table = Table("array", "difference", "max |a - b|", "relative")
    same = 0
    for item in sorted(items[left] | items[right]):
        sides: list[Mapping[str, Any]] = [
            leaves_by_path(array_store.read_to_host(path / item)) if item in items[path] else {}
            for path in (left, right)
        ]
        for name in sorted({*sides[0], *sides[1]}):
            row = _difference(*(side.get(name) for side in sides))
            same += row is None
            if row is not None:
                table.add_row(f"{item}/{name}", *row)
    runs = [read_run(path) for path in (left, right)]
    for name in sorted({*runs[0], *runs[1]} - {"metrics"}):
        if runs[0].get(name) != runs[1].get(name):
            table.add_row(f"{RUN_FILE}: {name}", "differs", "", "")
    if table.rows:
        console.print(table)
    console.print(f"{left} and {right}: {same} arrays are the same to the bit, {len(table.rows)} differences.")


def _difference(left: np.ndarray | None, right: np.ndarray | None) -> tuple[str, str, str] | None:
    """How two arrays differ, or None where they are the same to the bit."""
    if left is None or right is None:
        return "only in the second" if left is None else "only in the first", "", ""
    if left.shape != right.shape:
        return f"shape {left.shape} and {right.shape}", "", ""
    if left.dtype != right.dtype:
        return f"type {left.dtype} and {right.dtype}", "", ""
    if left.tobytes() == right.tobytes():
        return None
    a, b = (np.asarray(x, np.float64) for x in (left, right))
    apart = np.abs(a - b)
    largest = float(apart.max())
    return "values", f"{largest:.3g}", f"{largest / max(float(np.abs(b).max()), 1e-300):.3g}"


def _damage_of(path: Place) -> str:
    try:
        if not is_unverified(path):
            Manifest.read(path).verify_files(path)
    except DamagedError as damage:
        return str(damage)
    return ""


@contextlib.contextmanager
def _not_training(place: Place) -> Iterator[None]:
    """Keeps the run from going on meanwhile, where the checkpoints are those of a run in a directory."""
    if isinstance(place, StorePath):
        yield
        return
    for parent in (place, place.parent):
        if (parent / CONFIG_FILE).exists():
            with RunDirectory(Path(parent)).lock():
                yield
            return
    yield


def _folder(place: Place) -> Place:
    inside = place / CHECKPOINTS_DIRECTORY
    return inside if inside.is_dir() else place


def _is_worth_a_column(name: str) -> bool:
    return name == "loss" or name.startswith("evaluation/")


def _time(path: Place) -> str:
    if isinstance(path, StorePath):
        return ""  # Objects are asked for by their names alone.
    return datetime.datetime.fromtimestamp(path.stat().mtime).isoformat(" ", "seconds")


def _size_of(path: Place) -> int:
    """Bytes; in a store, as the manifest says, which a step that is not complete does not have."""
    if isinstance(path, StorePath):
        try:
            return Manifest.read(objects_of(path)).size
        except DamagedError:
            return 0
    return sum(file.stat().length for file in files_below(path))


def _size(path: Place) -> str:
    return _bytes(_size_of(path))


def _bytes(count: int) -> str:
    value, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:.3g} {unit}"
