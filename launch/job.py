"""The record of a job: plain files in one directory, written so that a launcher may die at any moment.

NAME/job.json      what is asked: written once
NAME/states.jsonl  what happened: one line for each change of state
NAME/lock          held by the one launcher that looks after the job
NAME/files/        the user's files that the command names, as they were: gin files, what they import
NAME/attempts/N/   what the target keeps of the Nth attempt: scripts, exit codes, logs
"""

import contextlib
import dataclasses
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from clp_jax.launch.errors import Damaged, LaunchError
from clp_jax.launch.lock import hold, is_held
from clp_jax.launch.secret_values import redact

# Of an attempt that goes on: asked for; there, its command not begun; running.
Under = Literal["queued", "starting", "running"]
# Of one that is over, while the job goes on with another: taken away; failed; asked for again by a person.
Between = Literal["preempted", "broken", "retried"]
# Of a job that is over; `clp jobs retry` begins it again.
Final = Literal["succeeded", "failed", "stopped"]
Phase = Under | Between | Final
UNDER, BETWEEN, FINAL = get_args(Under), get_args(Between), get_args(Final)

CODE = "code.tar.gz"
_NAME = re.compile(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?")
_DIRECTORY_VARIABLE, _DIRECTORY = "CLP_JOBS_DIR", "~/.clp/jobs"

# Where runs write without a directory that workers share.
STORES = ("gs://", "s3://")


@dataclasses.dataclass(frozen=True)
class Job:
    """What is asked of a launcher.

    Attributes:
        name: of the job and of all that is created for it; lower-case letters, digits and dashes, at most 40.
        command: the words of the command line; ``clp`` stands for this package's command on the worker.
        target: where it runs.
        options: of the target, as they were typed.
        run_dir: where the run writes, where that is known: it tells whether a failed attempt got on.
        code_version: of the code that runs.
        directory: that the command was typed in, and that its relative paths are of.
        max_restarts: attempts after the first; preemptions count apart and have no limit of their own.
        max_failures: attempts that may fail in a row without a new checkpoint, before the job is a crash loop.
        parameters: of a trial: what it tries, as typed, by name.
        inputs: files that it needs besides those that the command names.
    """

    name: str
    command: tuple[str, ...]
    target: str
    options: Mapping[str, str] = dataclasses.field(default_factory=dict)
    run_dir: str | None = None
    code_version: str = "unknown"
    directory: str = "."
    max_restarts: int = 20
    max_failures: int = 3
    parameters: Mapping[str, str] = dataclasses.field(default_factory=dict)
    inputs: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise LaunchError(
                f"the name of the job is {self.name!r}: expected up to 40 lower-case letters, digits and dashes, the "
                "first a letter: --name=NAME."
            )
        if not self.command:
            raise LaunchError(
                "there is no command: write it after --, as in: clp launch local -- train --gin_file=FILE."
            )
        for name, value, least in (("max_failures", self.max_failures, 1), ("max_restarts", self.max_restarts, 0)):
            if value < least:
                raise LaunchError(f"--{name} is {value}: expected at least {least}.")


@dataclasses.dataclass(frozen=True)
class State:
    """One change of a job's state.

    Attributes:
        phase: the new one.
        attempt: the number of the attempt, from 1.
        time: seconds since 1970.
        detail: what a person may want to know: an exit code, a reason.
        step: the newest checkpoint then; None where there is none or nobody knows.
        is_seen: whether the run directory could be looked at: otherwise no step does not mean no checkpoint.
        is_asked: whether the command asked to be started again.
    """

    phase: Phase
    attempt: int
    time: float
    detail: str = ""
    step: int | None = None
    is_seen: bool = True
    is_asked: bool = False


@dataclasses.dataclass(frozen=True)
class JobRecord:
    """The directory of one job.

    Attributes:
        path: the directory.
        job: what is asked.
    """

    path: Path
    job: Job

    @classmethod
    def create(
        cls, jobs: Path, job: Job, files: Mapping[str, bytes] | None = None, code: bytes | None = None
    ) -> "JobRecord":
        """Writes the record of a new job, whole or not at all.

        Args:
            jobs: the directory of all jobs.
            job: what is asked.
            files: contents by name, relative or absolute.
            code: the archive that workers get, where the target brings it to them.

        Raises:
            LaunchError: when there is a job of this name.
        """
        jobs.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{job.name}-", dir=jobs))
        try:
            (partial / "job.json").write_text(json.dumps(dataclasses.asdict(job), indent=1) + "\n")
            for name, content in (files or {}).items():
                file = partial / "files" / name.lstrip("/")
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(content)
            if code is not None:
                (partial / CODE).write_bytes(code)
            partial.chmod(0o755)
            # Fails where the name is taken: a directory is only renamed onto an empty one.
            os.rename(partial, jobs / job.name)
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            if not (jobs / job.name).is_dir():
                raise
            raise LaunchError(
                f"there is a job {job.name!r} in {jobs}: give another --name, or go on with it: clp jobs retry {job.name}."
            ) from error
        return cls(jobs / job.name, job)

    @classmethod
    def load(cls, path: Path) -> "JobRecord":
        """Reads a record.

        Raises:
            LaunchError: when there is none.
            Damaged: when it is not whole.
        """
        try:
            stored = json.loads((path / "job.json").read_text())
            inputs = tuple(dict(stored).get("inputs", ()))
            return cls(path, Job(**{**stored, "command": tuple(stored["command"]), "inputs": inputs}))
        except FileNotFoundError as error:
            if path.is_dir():
                raise Damaged(f"{path} is not the record of a job: it has no job.json.") from error
            raise LaunchError(f"there is no job {path.name!r} in {path.parent}: see clp jobs list.") from error
        except (ValueError, TypeError, KeyError) as error:
            raise Damaged(f"{path / 'job.json'} is not the record of a job: {error}") from error

    @property
    def states(self) -> tuple[State, ...]:
        """All states so far, in order; a last line that a dying launcher left unfinished counts as not written."""
        path = self.path / "states.jsonl"
        lines = path.read_text().split("\n")[:-1] if path.is_file() else []
        try:
            return tuple(State(**json.loads(line)) for line in lines)
        except (ValueError, TypeError) as error:
            raise Damaged(f"{path} is damaged: {error}") from error

    @property
    def state(self) -> State | None:
        """The last one; None before the first attempt."""
        states = self.states
        return states[-1] if states else None

    @property
    def attempt(self) -> int:
        """The number of the attempt that counts now."""
        state = self.state
        return 1 if state is None else state.attempt

    @property
    def is_over(self) -> bool:
        """Whether nothing more happens by itself."""
        state = self.state
        return state is not None and state.phase in FINAL

    @property
    def stop_request(self) -> Path:
        """The file that asks whoever looks after the job to stop it."""
        return self.path / "stop"

    @property
    def attempt_directory(self) -> Path:
        """What the target keeps of this attempt."""
        return self.path / "attempts" / str(self.attempt)

    @property
    def code(self) -> bytes:
        """The archive that the workers get; empty where there is none."""
        path = self.path / CODE
        return path.read_bytes() if path.is_file() else b""

    @property
    def resource(self) -> str:
        """The name of what is created for this attempt: the same whoever asks, so that nothing is created twice."""
        return f"{self.job.name}-{self.attempt}"

    def append(
        self,
        phase: Phase,
        attempt: int | None = None,
        detail: str = "",
        step: int | None = None,
        is_seen: bool = True,
        is_asked: bool = False,
    ) -> State:
        """Adds a state, on disk before this returns."""
        detail = redact(detail, os.environ, self.job.options)
        state = State(phase, self.attempt if attempt is None else attempt, time.time(), detail, step, is_seen, is_asked)
        path = self.path / "states.jsonl"
        whole = path.read_bytes() if path.is_file() else b""
        with open(path, "ab") as file:
            if not whole.endswith(b"\n"):
                file.truncate(whole.rfind(b"\n") + 1)
            file.write(json.dumps(dataclasses.asdict(state)).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        return state

    def keep(self, name: str, value: Any) -> None:
        """Stores what a target must remember of this attempt (a job's number, say), whole or not at all."""
        self.attempt_directory.mkdir(parents=True, exist_ok=True)
        write(self.attempt_directory / f"{name}.json", json.dumps(value))

    def kept(self, name: str) -> Any:
        """What `keep` stored in this attempt, or None."""
        path = self.attempt_directory / f"{name}.json"
        try:
            return json.loads(path.read_text()) if path.is_file() else None
        except ValueError as error:
            raise Damaged(f"{path} is damaged: {error}. Remove it, or put back what it held.") from error

    def lock(self) -> contextlib.AbstractContextManager[None]:
        """Holds the job: one launcher at a time looks after it; the lock ends with the process.

        Raises:
            Held: when another launcher holds it.
        """
        # Whoever only asks whether it is held holds it for a moment.
        return hold(self.path / "lock", f"another launcher looks after {self.job.name}: see clp jobs list.", 1.0)

    @property
    def is_held(self) -> bool:
        """Whether a launcher looks after the job now."""
        return is_held(self.path / "lock")


def write(path: Path, text: str) -> None:
    """Writes a file, whole or not at all."""
    descriptor, partial = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.chmod(partial, 0o644)
    os.replace(partial, path)


def jobs_directory() -> Path:
    """Where records are: ``CLP_JOBS_DIR``, or ``~/.clp/jobs``.

    Raises:
        LaunchError: when that is a file.
    """
    path = Path(os.environ.get(_DIRECTORY_VARIABLE) or _DIRECTORY).expanduser()
    if path.exists() and not path.is_dir():
        raise LaunchError(f"{path} is a file: expected the directory of records: ${_DIRECTORY_VARIABLE} says which.")
    return path


def all_records(jobs: Path, tell: Callable[[str], None]) -> list[JobRecord]:
    """The records in a directory, by name.

    Args:
        jobs: the directory.
        tell: is told of each that is damaged, which hides no other.
    """
    found = []
    for path in sorted(jobs.glob("[!.]*/job.json")):
        try:
            record = JobRecord.load(path.parent)
            _ = record.states
        except LaunchError as error:
            tell(str(error))
        else:
            found.append(record)
    return found
