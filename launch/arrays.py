"""Attempts of many jobs that are asked for together: as the tasks of an array, so many of which run at the same time."""

import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from clp_jax.launch.calls import show
from clp_jax.launch.errors import LaunchError
from clp_jax.launch.job import JobRecord
from clp_jax.launch.target import Step, Unreachable

# SLURM's own limit, where a cluster does not set another one, is 1001.
_LARGEST = 1000
_KEPT = "array"
_T = TypeVar("_T")


@dataclasses.dataclass(frozen=True)
class ArrayTask:
    """An attempt's place in an array.

    Attributes:
        name: of the array.
        index: of the task in it.
        most: tasks of the array that run at the same time.
        directory: of what is written for arrays.
    """

    name: str
    index: int
    most: int
    directory: str

    @classmethod
    def of(cls, record: JobRecord) -> "ArrayTask | None":
        """The place of a record's attempt; None where it is asked for by itself."""
        kept = record.kept(_KEPT)
        return None if kept is None else cls(**kept)

    @staticmethod
    def forget(record: JobRecord) -> None:
        """Lets an attempt be asked for by itself: its array has not come about."""
        if record.kept(_KEPT) is not None:
            record.keep(_KEPT, None)


@dataclasses.dataclass(frozen=True)
class Array:
    """What is asked for together.

    Attributes:
        name: of the array.
        records: of the jobs, by the index of the task.
        most: tasks that run at the same time.
    """

    name: str
    records: Mapping[int, JobRecord]
    most: int


@dataclasses.dataclass(frozen=True)
class Arrays:
    """The attempts of one sweep that are to be asked for.

    An array is written down before it is asked for, in the record of each of its attempts. One that did not come about is
    asked for again as it was, so that one which came about unseen is found.

    Attributes:
        prefix: that the names of arrays begin with.
        directory: of what is written for them.
        most: tasks that run at the same time, of all arrays together.
    """

    prefix: str
    directory: Path
    most: int
    _noted: dict[str, JobRecord] = dataclasses.field(default_factory=dict)
    _refused: dict[str, str] = dataclasses.field(default_factory=dict)

    def note(self, record: JobRecord) -> None:
        """Notes that an attempt is to be asked for.

        Raises:
            LaunchError: when it was refused.
        """
        if record.resource in self._refused:
            raise LaunchError(self._refused.pop(record.resource))
        self._noted[record.resource] = record

    def flush(self, busy: int, ask: Callable[[Array], None]) -> None:
        """Asks for what was noted, as far as so many may run at the same time.

        Args:
            busy: tasks that run, or may begin to.
            ask: for an array; its refusal is that of every attempt.
        """
        waiting = list(self._noted.values())
        self._noted.clear()
        if not waiting or busy >= self.most:
            return
        array = self._next(waiting, self.most - busy)
        for index, record in array.records.items():
            task = ArrayTask(array.name, index, array.most, str(self.directory))
            record.keep(_KEPT, dataclasses.asdict(task))
        try:
            ask(array)
        except Unreachable as error:
            show(f"{error} Asking again.")
        except LaunchError as error:
            self._refused.update({record.resource: str(error) for record in array.records.values()})

    def new(self, records: Sequence[JobRecord], most: int | None = None) -> Array:
        """An array of attempts that were in none, as many as there may be in one."""
        chosen = dict(enumerate(records[:_LARGEST]))
        members = "\n".join(record.resource for record in chosen.values())
        name = f"{self.prefix}-{hashlib.sha256(members.encode()).hexdigest()[:8]}"
        return Array(name, chosen, min(self.most if most is None else most, len(chosen)))

    def _next(self, waiting: Sequence[JobRecord], room: int) -> Array:
        tasks = [(task, record) for record in waiting if (task := ArrayTask.of(record)) is not None]
        if not tasks:
            return self.new(waiting, room)
        again = tasks[0][0]
        records = {task.index: record for task, record in tasks if task.name == again.name}
        return Array(again.name, records, min(room, again.most))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Together:
    """What targets have in common that ask for attempts of several jobs at once: `submit` only notes them.

    Attributes:
        arrays: what was submitted, and what asks for it.
    """

    arrays: Arrays

    @classmethod
    def of(cls: type[_T], target: Any, arrays: Arrays) -> _T:
        """The same with the options of a target that asks for each by itself."""
        return cls(**{field.name: getattr(target, field.name) for field in dataclasses.fields(target)}, arrays=arrays)

    def submit(self, record: JobRecord) -> None:
        """Notes that an attempt is to be asked for.

        Raises:
            LaunchError: when it was refused.
        """
        self.arrays.note(record)

    def plan(self, records: Sequence[JobRecord]) -> Sequence[Step]:
        """The exact files and commands that ask for attempts."""
        return self.steps(self.arrays.new(records))

    def steps(self, array: Array) -> Sequence[Step]:
        """The files and commands that ask for an array."""
        raise NotImplementedError
