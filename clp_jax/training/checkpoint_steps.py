"""The steps of a checkpoints directory: which are complete, which are kept, and how others leave without being lost.

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
import dataclasses
import errno
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from etils import epath

from clp_jax.training.checkpoint_manifest import MANIFEST_FILE, RUN_FILE, DamagedError

UNFINISHED, _REMOVING, _DAMAGED = ".unfinished", ".removing", ".damaged"
# What Orbax called a step that it was writing, before steps had manifests.
_OLD_UNFINISHED = ".orbax-checkpoint-tmp"
_OLD_RUN = "run/metadata"


@dataclasses.dataclass(frozen=True)
class KeepBest:
    """Keeps the best checkpoint beside the last ones.

    Attributes:
        metric: its name, as ``"evaluation/loss"``; only checkpoints of evaluated steps compete.
        lowest: whether low is good.
    """

    metric: str
    lowest: bool = True


@dataclasses.dataclass(frozen=True)
class Retention:
    """Which steps are kept; a step is kept if any of these keeps it.

    Attributes:
        last: so many of the last.
        every: those whose number is a multiple of it; None keeps none for that.
        best: the best one; None keeps none for that. Of equals, the last is kept.
    """

    last: int = 2
    every: int | None = None
    best: KeepBest | None = None

    def __post_init__(self):
        for name, value in (("keep_checkpoints", self.last), ("keep_every", self.every)):
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}: expected at least 1.")

    def kept(self, steps: Mapping[int, Mapping[str, float]]) -> dict[int, str]:
        """The steps to keep, each with why.

        Args:
            steps: all of them, with their metrics.
        """
        kept = dict.fromkeys(sorted(steps)[-self.last :], f"one of the last {self.last}")
        if self.every is not None:
            kept |= {step: f"a multiple of {self.every}" for step in steps if step % self.every == 0}
        if self.best is not None:
            sign = -1 if self.best.lowest else 1
            scores = {step: sign * metrics.get(self.best.metric, math.nan) for step, metrics in steps.items()}
            scores = {step: score for step, score in scores.items() if not math.isnan(score)}
            if scores:
                kept[max(scores, key=lambda step: (scores[step], step))] = f"best by {self.best.metric}"
        return kept


def is_complete(path: epath.Path) -> bool:
    """Whether a directory has all the signs of a complete checkpoint; its contents are not looked at."""
    return (path / MANIFEST_FILE).exists() or is_unverified(path)


def is_unverified(path: epath.Path) -> bool:
    """Whether a directory is a checkpoint from before there were manifests: it can be read, not verified."""
    if (path / MANIFEST_FILE).exists() or (path / RUN_FILE).exists() or _OLD_UNFINISHED in path.name:
        return False
    return (path / "params").is_dir() and (path / _OLD_RUN).exists()


def complete_steps(directory: epath.PathLike) -> list[int]:
    """The complete steps of a directory, in order; none where it does not exist."""
    directory = epath.Path(directory)
    return [step for step in numbered_steps(directory) if is_complete(directory / str(step))]


def numbered_steps(directory: epath.Path) -> list[int]:
    """All directories that are called like a step, in order."""
    if not directory.is_dir():
        return []
    # Leading zeros, and digits of other scripts, are somebody else's names.
    return sorted(int(entry.name) for entry in directory.iterdir() if _is_step(entry.name))


def unfinished_steps(directory: epath.Path) -> list[str]:
    """Names of directories in which a step was begun, or was being removed."""
    marks = (UNFINISHED, _REMOVING, _OLD_UNFINISHED)
    names = sorted(entry.name for entry in directory.iterdir()) if directory.is_dir() else []
    return [name for name in names if any(mark in name and _is_step(name.split(mark)[0]) for mark in marks)]


def damaged_steps(directory: epath.Path) -> dict[str, str]:
    """Names of the steps that were set aside, each with the reason."""
    names = sorted(entry.name for entry in directory.iterdir()) if directory.is_dir() else []
    found = {}
    for name in names:
        if _DAMAGED in name and _is_step(name.split(_DAMAGED)[0]) and not name.endswith(".txt"):
            note = directory / f"{name}.txt"
            found[name] = note.read_text().strip() if note.exists() else "no reason is written beside it"
    return found


def set_aside(path: epath.Path, reason: str) -> epath.Path:
    """Renames a damaged step and writes the reason beside it; returns its new place."""
    taken = {entry.name for entry in path.parent.iterdir()}
    number = 0
    while (name := f"{path.name}{_DAMAGED}{f'.{number}' if number else ''}") in taken or f"{name}.txt" in taken:
        number += 1
    place = path.parent / name
    path.rename(place)
    with contextlib.suppress(OSError):  # On a full disk the name alone must do.
        (path.parent / f"{name}.txt").write_text(reason + "\n")
    return place


def remove(path: epath.Path) -> None:
    """Removes a step: it stops being one at once, and its files go after that."""
    going = path
    if not path.name.endswith(_REMOVING):
        going = path.parent / f"{path.name}{_REMOVING}"
        if going.exists():
            going.rmtree()
        path.rename(going)
    going.rmtree()


def read_run(path: epath.Path) -> dict[str, Any]:
    """Step, position, description and metrics of a checkpoint, as they were saved; nothing is verified.

    Raises:
        DamagedError: when they can't be read.
    """
    file = path / (_OLD_RUN if is_unverified(path) else RUN_FILE)
    try:
        run = json.loads(file.read_text())
        return {"metrics": {}} | run
    except FileNotFoundError:
        raise DamagedError(f"{file.name} is missing") from None
    except (ValueError, TypeError) as error:
        raise DamagedError(f"{file.name} is damaged ({error})") from error


def metrics_of(directory: epath.Path, steps: Sequence[int]) -> dict[int, dict[str, float]]:
    """The metrics of steps, as far as they can be read."""
    found: dict[int, dict[str, float]] = {}
    for step in steps:
        try:
            found[step] = read_run(directory / str(step))["metrics"]
        except DamagedError:
            found[step] = {}
    return found


def files_below(path: epath.Path) -> list[epath.Path]:
    """All files below a directory, in order."""
    return sorted((epath.Path(top) / name for top, _, names in path.walk() for name in names), key=str)


def is_full(error: BaseException) -> bool:
    """Whether an error says that the disk is full, in whatever words."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    text = str(error)
    words = [os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT)]
    return "RESOURCE_EXHAUSTED" in text or any(word.lower() in text.lower() for word in words)


def _is_step(name: str) -> bool:
    return name.isascii() and name.isdecimal() and str(int(name)) == name


def as_path(path: str | os.PathLike) -> epath.Path:
    """An absolute path.

    Raises:
        ValueError: for an object store: it has no atomic rename, no lock and no appending, which a run needs.
    """
    text = os.fspath(path)
    if "://" in text:
        raise ValueError(
            f"{text} is in an object store: expected a directory. Mount the bucket (for gs://, with gcsfuse), and give the "
            "directory where it is mounted."
        )
    return epath.Path(Path(text).expanduser().absolute())
