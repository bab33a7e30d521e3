"""What a SLURM cluster says of jobs by their name: the queue, and the accounts of what is over."""

import dataclasses
import shutil
from collections.abc import Callable, Sequence

from clp_jax.launch.calls import call
from clp_jax.launch.target import Run


@dataclasses.dataclass(frozen=True)
class Entry:
    """A job, or a task of a job array.

    Attributes:
        identity: as `scancel` takes it: ``123``, or ``123_4`` of an array.
        state: in SLURM's word.
        code: its exit code, where it is over and that is known.
        reason: why it waits, in SLURM's words; empty where it does not.
    """

    identity: str
    state: str
    code: int | None = None
    reason: str = ""

    @property
    def index(self) -> int | None:
        """Of a task in its array."""
        index = self.identity.partition("_")[2]
        return int(index) if index.isdecimal() else None


Look = Callable[[str], Sequence[Entry]]


def queued(name: str) -> list[Entry]:
    """What is in the queue under a name."""
    words = ("squeue", "--me", "--array", f"--name={name}", "--noheader", "--format=%i|%T|%r")
    lines = [line.strip().split("|", 2) for line in call(Run(words, attempts=3)).output.splitlines() if "|" in line]
    return [Entry(name, state, reason="" if why == "None" else why) for name, state, why in lines]


def accounted(name: str) -> list[Entry]:
    """What the accounts have under a name, the newest last; nothing where there are no accounts."""
    if shutil.which("sacct") is None:
        return []
    words = ("sacct", f"--name={name}", "--allocations", "--noheader", "--parsable2")
    called = call(Run((*words, "--format=JobID,State,ExitCode", "--starttime=now-30days"), attempts=3), may_fail=True)
    lines = called.output.split("\n") if called.code == 0 else []
    found = []
    for identity, state, code in (line.split("|") for line in lines if "|" in line):
        number = code.partition(":")[0]
        # As in "CANCELLED by 1000".
        found.append(Entry(identity, state.split()[0], int(number) if number.isdecimal() else None))
    return found


def cancel(entries: Sequence[Entry], signal: str | None = None) -> None:
    """Asks SLURM to end them: SIGTERM, and SIGKILL after its own KillWait.

    Args:
        entries: jobs and tasks.
        signal: is all that their tasks get, where it is given.
    """
    words = () if signal is None else (f"--signal={signal}",)
    if entries:
        call(Run(("scancel", *words, *(entry.identity for entry in entries)), attempts=3))
