"""Attempts of many jobs as tasks of SLURM's job arrays: asked for at once, and so many of them at the same time."""

import dataclasses
import shlex
from collections.abc import Callable, Mapping, Sequence

from clp_jax.launch.arrays import Array, ArrayTask, Together
from clp_jax.launch.calls import carry_out
from clp_jax.launch.job import JobRecord
from clp_jax.launch.slurm import Slurm, array_log, entries_of
from clp_jax.launch.slurm_queue import Entry, Look, accounted, queued
from clp_jax.launch.target import Run, Status, Step, Write


@dataclasses.dataclass(frozen=True, kw_only=True)
class SlurmArrays(Together, Slurm):
    """SLURM, where what was submitted is asked for by `flush`, as one job array."""

    # What SLURM said since the last `flush`: one question for all tasks of an array.
    _queues: dict[str, Sequence[Entry]] = dataclasses.field(default_factory=dict)
    _accounts: dict[str, Sequence[Entry]] = dataclasses.field(default_factory=dict)
    _limits: dict[str, int] = dataclasses.field(default_factory=dict)

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
        for memory in (self._queues, self._accounts, self._limits):
            memory.clear()
        self.arrays.flush(busy, lambda array: carry_out(self.steps(array)))

    def steps(self, array: Array) -> list[Step]:
        """The scripts of the tasks, that of the array, and how it is submitted."""
        records, directory = array.records, self.arrays.directory
        tasks = [f"  [{index}]={shlex.quote(str(self.task_file(record)))}" for index, record in records.items()]
        script = directory / f"{array.name}.sh"
        flags = (f"--array={_ranges(records)}%{array.most}", f"--comment=clp-sweep={self.arrays.prefix}")
        log, here = array_log(directory, array.name, "%a"), next(iter(records.values())).job.directory
        words = self.sbatch(array.name, log, here, flags)
        return [
            *(Write(self.task_file(record), self.task_script(record)) for record in records.values()),
            # Each task of the array finds its own.
            Write(script, self.batch_script('"${tasks[$SLURM_ARRAY_TASK_ID]}"', ["declare -a tasks=(", *tasks, ")"])),
            Run((*words, str(script)), timeout=120.0),
        ]


def _remembered(look: Callable[[str], Sequence[Entry]], memory: dict[str, Sequence[Entry]]) -> Look:
    def answer(name: str) -> Sequence[Entry]:
        if name not in memory:
            memory[name] = look(name)
        return memory[name]

    return answer


def _ranges(indices: Mapping[int, JobRecord]) -> str:
    """``0-5``, or ``0-2,4``."""
    found: list[list[int]] = []
    for index in sorted(indices):
        if found and found[-1][1] == index - 1:
            found[-1][1] = index
        else:
            found.append([index, index])
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in found)
