"""Attempts of many jobs as the work units of XManager experiments: one for all that is asked for together."""

import dataclasses

from clp_jax.launch.arrays import Array, ArrayTask, Together
from clp_jax.launch.job import JobRecord
from clp_jax.launch.target import Status, Step
from clp_jax.launch.xmanager import XManager


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiments(Together, XManager):
    """XManager, where what was submitted is asked for by `flush`, as one experiment."""

    # Of each experiment, what was seen since the last `flush` to be still to end, and how many of it run at once.
    _unfinished: dict[str, set[str]] = dataclasses.field(default_factory=dict)
    _limits: dict[str, int] = dataclasses.field(default_factory=dict)

    def status(self, record: JobRecord) -> Status:
        """How an attempt stands; it is remembered until the next `flush` where it is still to end."""
        found = super().status(record)
        if found.phase in ("queued", "running"):
            task = ArrayTask.of(record) or ArrayTask(record.resource, 0, 1, "")
            self._unfinished.setdefault(task.name, set()).add(record.resource)
            self._limits[task.name] = task.most
        return found

    def flush(self) -> None:
        """Asks for what was submitted, as far as so many may run at the same time."""
        busy = sum(min(self._limits[name], len(names)) for name, names in self._unfinished.items())
        self._unfinished.clear()
        self._limits.clear()
        self.arrays.flush(busy, lambda array: self.start_experiment(self.steps(array)))

    def steps(self, array: Array) -> list[Step]:
        """The files of the experiment, and how its script is started."""
        return self.experiment(array, self.arrays.directory, self.arrays.prefix)
