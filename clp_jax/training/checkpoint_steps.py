"""The steps of a run: which are complete, which are kept, and how others leave without being lost.

In a directory and in an object store the same things happen by other means: `directory_steps`, `store_steps`.
"""

import dataclasses
import difflib
import errno
import json
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

from clp_jax.interop.object_store import StorePath
from clp_jax.training import directory_steps, store_steps
from clp_jax.training.checkpoint_manifest import RUN_FILE, DamagedError
from clp_jax.training.directory_steps import DirectorySteps
from clp_jax.training.places import Place, as_path
from clp_jax.training.store_steps import StoreSteps


@dataclasses.dataclass(frozen=True)
class KeepBest:
    """Keeps the best checkpoint beside the last ones.

    Attributes:
        metric: its name, as ``"evaluation/loss"``; only checkpoints that have it compete, here those of evaluated steps.
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

    def without_best(self, steps: Mapping[int, Mapping[str, float]]) -> str | None:
        """Why none of some steps is the best one, where that is asked for; None where one is.

        Args:
            steps: with their metrics.
        """
        if self.best is None or not steps or any(self.best.metric in metrics for metrics in steps.values()):
            return None
        names = sorted({name for metrics in steps.values() for name in metrics})
        close = difflib.get_close_matches(self.best.metric, names, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        return (
            f"keep_best asks for the metric {self.best.metric!r}{hint}, which no checkpoint has: "
            f"{', '.join(map(str, sorted(steps)))} have {', '.join(names) or 'none'}"
        )


def is_complete(path: Place) -> bool:
    """Whether a place has all the signs of a complete checkpoint; its contents are not looked at."""
    return store_steps.is_complete(path) if isinstance(path, StorePath) else directory_steps.is_complete(path)


def is_begun(path: Place) -> bool:
    """Whether something was begun under this very name, and not completed: never in a directory."""
    return isinstance(path, StorePath) and store_steps.is_begun(path)


def is_unverified(path: Place) -> bool:
    """Whether a place holds a checkpoint from before there were manifests: it can be read, not verified."""
    return not isinstance(path, StorePath) and directory_steps.is_unverified(path)


def complete_steps(directory: str | os.PathLike) -> list[int]:
    """The complete steps of a directory, in order; none where it does not exist."""
    return _steps(directory).complete()


def numbered_steps(directory: str | os.PathLike) -> list[int]:
    """All that are called like a step and were one, in order."""
    return _steps(directory).numbered()


def unfinished_steps(directory: str | os.PathLike) -> list[str]:
    """Names of steps that were begun, or were being removed."""
    return _steps(directory).unfinished()


def damaged_steps(directory: str | os.PathLike) -> dict[str, str]:
    """Names of the steps that were set aside, each with the reason."""
    return _steps(directory).damaged()


def set_aside(path: Place, reason: str) -> Place:
    """Writes down that a step is damaged, and why; returns its new place."""
    if isinstance(path, StorePath):
        return store_steps.set_aside(path, reason)
    return directory_steps.set_aside(path, reason)


def remove(path: Place) -> None:
    """Removes a step: it stops being one at once, and its files go after that."""
    if isinstance(path, StorePath):
        store_steps.remove(path)
    else:
        directory_steps.remove(path)


def discard(path: Place) -> None:
    """Removes what `unfinished_steps` has named."""
    if isinstance(path, StorePath):
        store_steps.discard(path)
    else:
        path.rmtree()


def read_run(path: Place) -> dict[str, Any]:
    """Step, position, description and metrics of a checkpoint, as they were saved; nothing is verified.

    Raises:
        DamagedError: when they can't be read.
    """
    file = path / (directory_steps.OLD_RUN if is_unverified(path) else RUN_FILE)
    try:
        run = json.loads(file.read_text())
        return {"metrics": {}} | run
    except FileNotFoundError:
        raise DamagedError(f"{file.name} is missing") from None
    except (ValueError, TypeError) as error:
        raise DamagedError(f"{file.name} is damaged ({error})") from error


def owed_by(path: Place) -> dict[str, float] | None:
    """What the line of metrics of a step is to say, where a request to stop came before it was evaluated."""
    try:
        return read_run(path).get("owed")
    except DamagedError:  # Restoring it says so.
        return None


def metrics_of(directory: Place, steps: Sequence[int]) -> dict[int, dict[str, float]]:
    """The metrics of steps, as far as they can be read."""
    found: dict[int, dict[str, float]] = {}
    for step in steps:
        try:
            found[step] = read_run(directory / str(step))["metrics"]
        except DamagedError:
            found[step] = {}
    return found


def is_full(error: BaseException) -> bool:
    """Whether an error says that the disk is full, in whatever words."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    text = str(error)
    words = [os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT)]
    return "RESOURCE_EXHAUSTED" in text or any(word.lower() in text.lower() for word in words)


def _steps(directory: str | os.PathLike) -> DirectorySteps | StoreSteps:
    place = as_path(directory)
    return StoreSteps(place) if isinstance(place, StorePath) else DirectorySteps(place)
