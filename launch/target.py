"""What a launcher needs of the places that jobs run on."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

from clp_jax.launch.cargo import Cargo
from clp_jax.launch.errors import LaunchError
from clp_jax.launch.job import Job, JobRecord, Under


class Unreachable(LaunchError):
    """A call did not answer: nobody knows whether it did anything; the same may be asked again."""


class Unavailable(LaunchError):
    """There is no room at the moment (a zone out of stock): the same may be had later."""


@dataclasses.dataclass(frozen=True)
class Status:
    """What a target says of an attempt.

    Attributes:
        phase: ``queued`` (asked for, not there), ``starting`` (there, the command not begun: `Target.start` begins it),
            ``running``, ``preempted`` (taken away), ``succeeded``, ``failed``, or ``gone`` (nothing there).
        code: the command's exit code, where it failed and that is known.
        detail: more, in words.
    """

    phase: Under | Literal["preempted", "succeeded", "failed", "gone"]
    code: int | None = None
    detail: str = ""


@dataclasses.dataclass(frozen=True)
class Write:
    """A file that a launch writes.

    Attributes:
        path: on this machine.
        text: all of it.
    """

    path: Path
    text: str


@dataclasses.dataclass(frozen=True)
class Run:
    """A command that a launch runs.

    Attributes:
        words: of the command, never seen by a shell on this machine.
        timeout: in seconds.
        attempts: how often it may be tried, for a call that may time out and can be repeated.
    """

    words: tuple[str, ...]
    timeout: float = 120.0
    attempts: int = 1


@dataclasses.dataclass(frozen=True)
class Note:
    """Something that a dry run tells, and a launch does not do.

    Attributes:
        text: lines.
    """

    text: str


Step = Write | Run | Note


@runtime_checkable
class Target(Protocol):
    """A place where jobs run.

    Every method speaks of the record's present attempt and can be repeated safely. Each may raise `Unreachable`.
    """

    name: str

    @property
    def ships_code(self) -> str | None:
        """The extra of the package that workers get with the code; empty for none; None where they have the code."""

    def compile_options(self) -> Sequence[str] | None:
        """What `clp compile` is asked, to know whether a run fits what would be rented; None where nothing is."""

    def check(self, cargo: Cargo) -> None:
        """Raises `LaunchError` for what can be known to be wrong of a job to come; creates nothing, asks nobody."""

    def check_access(self, job: Job) -> None:
        """Raises `LaunchError` for what the other side would refuse: credentials, a name that is taken; creates nothing."""

    def submit(self, record: JobRecord) -> None:
        """Asks for what the attempt needs, unless it is there already; does not wait for it.

        Raises:
            Unavailable: when there is no room now.
            LaunchError: when it is refused for good: a quota, a permission.
        """

    def start(self, record: JobRecord) -> None:
        """Begins the command where `status` says ``starting``; nothing where submitting was all."""

    def status(self, record: JobRecord) -> Status:
        """How the attempt stands."""

    def logs(self, record: JobRecord, lines: int | None = None, follow: bool = False) -> Iterator[str]:
        """The workers' output, each line with its worker's name; the last `lines` of each, or all."""

    def stop(self, record: JobRecord) -> None:
        """Ends the command, with time to save; what it ran on may remain."""

    def delete(self, record: JobRecord) -> None:
        """Removes all that was created for the attempt, but for what the record holds."""

    def dry_run(self, record: JobRecord) -> Sequence[Step]:
        """The exact files and commands of `submit` and `start`, in order."""


class Batch(Target, Protocol):
    """A target that asks for attempts of several jobs at once: `Target.submit` only notes them."""

    def flush(self) -> None:
        """Asks for what was submitted since, and has new answers of the other side for `Target.status`."""

    def plan(self, records: Sequence[JobRecord]) -> Sequence[Step]:
        """The exact files and commands that ask for attempts of several jobs, in order."""
