"""Jobs on this machine: n processes with the start-up of a pod, alive without their launcher."""

import dataclasses
import math
import shlex
import shutil
import socket
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from clp_jax.launch.calls import begin, call
from clp_jax.launch.cargo import Cargo
from clp_jax.launch.errors import LaunchError
from clp_jax.launch.exit_codes import verdict
from clp_jax.launch.job import Job, JobRecord, write
from clp_jax.launch.local_worker import SCRIPT, check_machine, end, exit_code, forbid, note_machine
from clp_jax.launch.log_files import read_logs
from clp_jax.launch.namespaces import Namespaces, check_namespaces
from clp_jax.launch.options import option
from clp_jax.launch.target import Run, Status, Step, Write
from clp_jax.launch.worker_script import LOG, worker_script


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
        if not 0.0 <= self.grace < math.inf:
            raise LaunchError(f"--grace is {self.grace:g}: expected seconds, at least 0.")

    def compile_options(self) -> None:
        """Nothing is rented."""

    def check(self, cargo: Cargo) -> None:
        """Raises `LaunchError` where the command can't be found."""
        command = local_command(cargo.job.command)
        if shutil.which(command[0]) is None:
            raise LaunchError(f"there is no command {command[0]!r} on this machine.")

    def check_access(self, job: Job) -> None:
        """Raises `LaunchError` where network namespaces are asked for and not permitted."""
        if self.namespaces:
            check_namespaces(self.processes)

    def submit(self, record: JobRecord) -> None:
        """Starts the processes, in a session of their own."""
        note_machine(record)
        if record.kept("port") is None:
            record.keep("port", _free_port())
        for step in self.dry_run(record):
            if isinstance(step, Write):
                step.path.parent.mkdir(parents=True, exist_ok=True)
                write(step.path, step.text)
            elif isinstance(step, Run) and step.words[-1].endswith(SCRIPT):
                begin(step.words, Path(step.words[-1] + ".out"))
            elif isinstance(step, Run):
                made = call(step, may_fail=True)
                if made.code and "exists" not in made.error:
                    raise LaunchError(f"{' '.join(step.words)}: {made.error.strip()}")

    def start(self, record: JobRecord) -> None:
        """Does nothing: submitting was all."""

    def status(self, record: JobRecord) -> Status:
        """Looks at exit codes and processes."""
        check_machine(record)
        workers = [self._directory(record, i) for i in range(self.processes)]
        if not any(path.is_dir() for path in workers):
            return Status("gone")
        return verdict([exit_code(path) for path in workers])

    def logs(self, record: JobRecord, lines: int | None = None, follow: bool = False) -> Iterator[str]:
        """The processes' output."""
        files = {str(i): self._directory(record, i) / LOG for i in range(self.processes)}
        return read_logs(files, lines, (lambda: self.status(record).phase != "running") if follow else None)

    def stop(self, record: JobRecord) -> None:
        """Asks the processes to end; after `grace`, ends them."""
        check_machine(record)
        workers = [self._directory(record, i) for i in range(self.processes)]
        end(workers, self.grace)

    def delete(self, record: JobRecord) -> None:
        """Ends what still runs, and takes the claims, so that nothing begins later."""
        self.stop(record)
        for i in range(self.processes):
            forbid(self._directory(record, i))
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
            steps += [Write(here / SCRIPT, text), Run((*enter, "bash", str(here / SCRIPT)))]
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
