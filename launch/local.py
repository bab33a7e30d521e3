"""Jobs on this machine: n processes with the start-up of a pod, alive without their launcher."""

import contextlib
import dataclasses
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from clp_jax.launch.calls import begin, call
from clp_jax.launch.errors import LaunchError
from clp_jax.launch.exit_codes import KILLED, verdict
from clp_jax.launch.job import Job, JobRecord, write
from clp_jax.launch.log_files import read_logs
from clp_jax.launch.namespaces import Namespaces, check_namespaces
from clp_jax.launch.options import option
from clp_jax.launch.target import Run, Status, Step, Write
from clp_jax.launch.worker_script import CLAIM, EXIT, LOG, PID, worker_script

# Seconds that a script may take from its start to its claim.
_STARTUP = 10.0
_SCRIPT = "run.sh"


@dataclasses.dataclass(frozen=True)
class Local:
    """Processes on this machine.

    Attributes:
        processes: how many.
        devices_per_process: virtual CPU devices of each; None leaves devices as they are.
        namespaces: whether each has a network namespace.
        grace: seconds between asking processes to end and ending them.
    """

    processes: int = option("processes that train together", 1)
    devices_per_process: int | None = option("virtual CPU devices of each process", None)
    namespaces: bool = option("Linux: each process in a network namespace, with an address of its own", False)
    grace: float = option("seconds to save in, when the job is stopped", 30.0)

    name = "local"
    ships_code = None

    def __post_init__(self) -> None:
        for name, value in (("processes", self.processes), ("devices_per_process", self.devices_per_process)):
            if value is not None and value < 1:
                raise LaunchError(f"--{name} is {value}: expected at least 1.")

    def compile_options(self) -> None:
        """Nothing is rented."""

    def check(self, job: Job) -> None:
        """Raises `LaunchError` where the command can't be found."""
        command = local_command(job.command)
        if shutil.which(command[0]) is None:
            raise LaunchError(f"there is no command {command[0]!r} on this machine.")

    def check_access(self, job: Job) -> None:
        """Raises `LaunchError` where network namespaces are asked for and not permitted."""
        if self.namespaces:
            check_namespaces(self.processes)

    def submit(self, record: JobRecord) -> None:
        """Starts the processes, in a session of their own."""
        if record.kept("port") is None:
            record.keep("port", _free_port())
        for step in self.dry_run(record):
            if isinstance(step, Write):
                step.path.parent.mkdir(parents=True, exist_ok=True)
                write(step.path, step.text)
            elif isinstance(step, Run) and step.words[-1].endswith(_SCRIPT):
                begin(step.words, Path(step.words[-1] + ".out"))
            elif isinstance(step, Run):
                made = call(step, may_fail=True)
                if made.code and "exists" not in made.error:
                    raise LaunchError(f"{' '.join(step.words)}: {made.error.strip()}")

    def start(self, record: JobRecord) -> None:
        """Does nothing: submitting was all."""

    def status(self, record: JobRecord) -> Status:
        """Looks at exit codes and processes."""
        workers = [self._directory(record, i) for i in range(self.processes)]
        if not any(path.is_dir() for path in workers):
            return Status("gone")
        codes = [_exit_code(path) for path in workers]
        return verdict(codes)

    def logs(self, record: JobRecord, lines: int | None = None, follow: bool = False) -> Iterator[str]:
        """The processes' output."""
        files = {str(i): self._directory(record, i) / LOG for i in range(self.processes)}
        return read_logs(files, lines, (lambda: self.status(record).phase != "running") if follow else None)

    def stop(self, record: JobRecord) -> None:
        """Asks the processes to end; after `grace`, ends them."""
        workers = [self._directory(record, i) for i in range(self.processes)]
        for path in workers:
            _signal(path, signal.SIGTERM)
        until = time.monotonic() + self.grace
        while any(_processes(path)[1] for path in workers) and time.monotonic() < until:
            time.sleep(0.05)
        for path in workers:
            _signal(path, signal.SIGKILL)

    def delete(self, record: JobRecord) -> None:
        """Ends what still runs, and takes the claims, so that nothing begins later."""
        self.stop(record)
        for i in range(self.processes):
            path = self._directory(record, i)
            if path.is_dir():
                (path / CLAIM).mkdir(exist_ok=True)
        if self.namespaces:
            self._networks(record).delete()

    def dry_run(self, record: JobRecord) -> Sequence[Step]:
        """One script and one command for each process."""
        steps: list[Step] = [*self._networks(record).create()] if self.namespaces else []
        for i in range(self.processes):
            here = self._directory(record, i)
            text = worker_script(
                local_command(record.job.command),
                directory=shlex.quote(record.job.directory),
                here=shlex.quote(str(here)),
                environment=self._environment(record, i),
            )
            enter = self._networks(record).enter(i) if self.namespaces else ()
            steps += [Write(here / _SCRIPT, text), Run((*enter, "bash", str(here / _SCRIPT)))]
        return steps

    def _environment(self, record: JobRecord, index: int) -> dict[str, str]:
        found = {"PYTHONUNBUFFERED": "1"}
        if self.processes > 1:
            host = self._networks(record).address(0) if self.namespaces else "127.0.0.1"
            found |= {
                "CLP_COORDINATOR_ADDRESS": f"{host}:{record.kept('port') or 'PORT'}",
                "CLP_NUM_PROCESSES": str(self.processes),
                "CLP_PROCESS_ID": str(index),
            }
        if self.devices_per_process is not None:
            found |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(self.devices_per_process)}
        return found

    def _networks(self, record: JobRecord) -> Namespaces:
        return Namespaces(f"{record.path}/{record.resource}", self.processes)

    def _directory(self, record: JobRecord, index: int) -> Path:
        return record.attempt_directory / f"worker-{index}"


def local_command(command: Sequence[str]) -> tuple[str, ...]:
    """The words that run a command on this machine: ``clp`` is the package that launches."""
    first, *rest = command
    # -P: files of the user that are called as a library's (json.py) stand behind it, not before.
    return (sys.executable, "-P", "-m", "clp_jax.main", *rest) if first == "clp" else tuple(command)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _exit_code(here: Path) -> int | None:
    """A worker's exit code; None while it runs or is about to."""
    if not (here / EXIT).is_file():
        if (here / CLAIM).is_dir():
            is_over = not _is_alive(here) and not _is_young(here / CLAIM)
        else:
            is_over = not _is_young(here / _SCRIPT)
        # It may have ended between the two looks.
        if not is_over:
            return None
    return int((here / EXIT).read_text()) if (here / EXIT).is_file() else KILLED


def _is_young(path: Path) -> bool:
    return path.exists() and time.time() - path.stat().st_mtime < _STARTUP


def _processes(here: Path) -> tuple[bool, bool]:
    """Whether a worker's script lives, and whether anything does that it began: a process group that has its number."""
    number = (here / PID).read_text().strip() if (here / PID).is_file() else ""
    if not number:
        return False, False
    words = ("ps", "-A", "-ww", "-o", "pid=,pgid=,stat=,args=")
    lines = subprocess.run(words, capture_output=True, text=True, check=True).stdout.splitlines()
    rows = [line.split(None, 3) for line in lines]
    group = {row[0]: row[-1] for row in rows if row[1] == number and not row[2].startswith("Z")}
    leader = group.get(number)
    # The number may have gone to another process since; it can't while the group has members.
    is_ours = leader is None or str(here / _SCRIPT) in leader
    return leader is not None and is_ours, bool(group) and is_ours


def _is_alive(here: Path) -> bool:
    return _processes(here)[0]


def _signal(here: Path, number: int) -> None:
    """Sends a signal to a worker: SIGTERM to its script, which passes it on once; SIGKILL to all that it began."""
    script, group = _processes(here)
    with contextlib.suppress(ProcessLookupError):
        if script and number == signal.SIGTERM:
            os.kill(int((here / PID).read_text()), number)
        elif group:
            os.killpg(int((here / PID).read_text()), number)
