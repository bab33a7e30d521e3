"""Attempts of many jobs as tasks of SLURM's job arrays: asked for at once, and so many of them at the same time."""

import dataclasses
import hashlib
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

from clp_jax.launch.calls import carry_out, show
from clp_jax.launch.errors import LaunchError
from clp_jax.launch.job import JobRecord
from clp_jax.launch.slurm import ArrayTask, Slurm, entries_of
from clp_jax.launch.slurm_queue import Entry, Look, accounted, queued
from clp_jax.launch.target import Run, Status, Step, Unreachable, Write

# SLURM's own limit, where a cluster does not set another one, is 1001.
_LARGEST = 1000


@dataclasses.dataclass(frozen=True, kw_only=True)
class SlurmArrays(Slurm):
    """SLURM, where what was submitted is asked for by `flush`, as one job array.

    An array is written down before it is asked for, in the record of each of its attempts. One that did not come about is
    asked for again as it was, so that one which came about unseen is found.

    Attributes:
        prefix: that the names of arrays begin with.
        directory: of their scripts and of SLURM's logs.
        most: tasks that run at the same time, of all arrays together.
    """

    prefix: str
    directory: Path
    most: int
    _asked: dict[str, JobRecord] = dataclasses.field(default_factory=dict)
    _refused: dict[str, str] = dataclasses.field(default_factory=dict)
    # What SLURM said since the last `flush`: one question for all tasks of an array.
    _queues: dict[str, Sequence[Entry]] = dataclasses.field(default_factory=dict)
    _accounts: dict[str, Sequence[Entry]] = dataclasses.field(default_factory=dict)
    _limits: dict[str, int] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, slurm: Slurm, prefix: str, directory: Path, most: int) -> "SlurmArrays":
        """Arrays with the options of a target."""
        given = {field.name: getattr(slurm, field.name) for field in dataclasses.fields(Slurm)}
        return cls(**given, prefix=prefix, directory=directory, most=most)

    def submit(self, record: JobRecord) -> None:
        """Notes that an attempt is to be asked for.

        Raises:
            LaunchError: when SLURM has refused it.
        """
        if record.resource in self._refused:
            raise LaunchError(self._refused.pop(record.resource))
        self._asked[record.resource] = record

    def status(self, record: JobRecord) -> Status:
        """How an attempt stands, by what SLURM said since the last `flush`."""
        task = ArrayTask.of(record)
        if task is None and not record.attempt_directory.is_dir():
            return Status("gone")  # Nobody has asked for it.
        name, limit = (record.resource, 1) if task is None else (task.name, task.most)
        self._limits[name] = limit
        return self.judge(record, _remembered(queued, self._queues), _remembered(accounted, self._accounts))

    def delete(self, record: JobRecord) -> None:
        """Cancels what is in the queue of an attempt."""
        if entries_of(record, _remembered(queued, self._queues)):
            super().delete(record)

    def flush(self) -> None:
        """Asks for what was submitted, as far as so many may run at the same time."""
        # Tasks that are still to end run so many at a time as their array may, and never more again.
        busy = sum(min(self._limits.get(name, len(entries)), len(entries)) for name, entries in self._queues.items())
        room = self.most - busy
        waiting, earlier = list(self._asked.values()), [ArrayTask.of(record) for record in self._asked.values()]
        self._asked.clear()
        for memory in (self._queues, self._accounts, self._limits):
            memory.clear()
        if not waiting or room < 1:
            return
        again = next((task for task in earlier if task is not None), None)
        if again is not None:
            same = zip(waiting, earlier, strict=True)
            self._ask(
                {t.index: record for record, t in same if t and t.name == again.name}, again.name, min(room, again.most)
            )
        else:
            chosen = waiting[:_LARGEST]
            self._ask(dict(enumerate(chosen)), self._name(chosen), min(room, len(chosen)))

    def plan(self, records: Sequence[JobRecord]) -> Sequence[Step]:
        """The exact files and commands that ask for attempts."""
        chosen = dict(enumerate(records[:_LARGEST]))
        return self._steps(chosen, self._name(records[:_LARGEST]), min(self.most, len(chosen)))

    def _ask(self, records: dict[int, JobRecord], name: str, most: int) -> None:
        for index, record in records.items():
            ArrayTask(name, index, most, str(self.directory / f"{name}-{index}.log")).keep(record)
        try:
            carry_out(self._steps(records, name, most))
        except Unreachable as error:
            show(f"{error} Asking again.")
        except LaunchError as error:
            self._refused.update({record.resource: str(error) for record in records.values()})

    def _steps(self, records: dict[int, JobRecord], name: str, most: int) -> list[Step]:
        tasks = [f"  [{index}]={shlex.quote(str(self.task_file(record)))}" for index, record in records.items()]
        script = self.directory / f"{name}.sh"
        flags = (f"--array={_ranges(records)}%{most}", f"--comment=clp-sweep={self.prefix}")
        words = self.sbatch(name, self.directory / f"{name}-%a.log", next(iter(records.values())).job.directory, flags)
        return [
            *(Write(self.task_file(record), self.task_script(record)) for record in records.values()),
            # Each task of the array finds its own.
            Write(script, self.batch_script('"${tasks[$SLURM_ARRAY_TASK_ID]}"', ["declare -a tasks=(", *tasks, ")"])),
            Run((*words, str(script)), timeout=120.0),
        ]

    def _name(self, records: Sequence[JobRecord]) -> str:
        members = "\n".join(record.resource for record in records)
        return f"{self.prefix}-{hashlib.sha256(members.encode()).hexdigest()[:8]}"


def _remembered(look: Callable[[str], Sequence[Entry]], memory: dict[str, Sequence[Entry]]) -> Look:
    def answer(name: str) -> Sequence[Entry]:
        if name not in memory:
            memory[name] = look(name)
        return memory[name]

    return answer


def _ranges(indices: dict[int, JobRecord]) -> str:
    """``0-5``, or ``0-2,4``."""
    found: list[list[int]] = []
    for index in sorted(indices):
        if found and found[-1][1] == index - 1:
            found[-1][1] = index
        else:
            found.append([index, index])
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in found)
