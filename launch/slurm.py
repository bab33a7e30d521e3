"""Jobs on a SLURM cluster: an sbatch script with one task for each host, on a file system that all nodes share."""

import dataclasses
import shlex
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from clp_jax.launch.arrays import ArrayTask
from clp_jax.launch.calls import carry_out
from clp_jax.launch.cargo import Cargo
from clp_jax.launch.errors import LaunchError
from clp_jax.launch.exit_codes import KILLED, RESTARTABLE, verdict
from clp_jax.launch.job import STORES, Job, JobRecord, jobs_directory
from clp_jax.launch.local import local_command
from clp_jax.launch.local_worker import read_exit
from clp_jax.launch.log_files import read_logs
from clp_jax.launch.options import option
from clp_jax.launch.slurm_queue import Entry, Look, accounted, cancel, queued
from clp_jax.launch.target import Run, Status, Step, Unreachable, Write
from clp_jax.launch.worker_script import CLAIM, EXIT, LOG, worker_script

_LOOK = 0.2
_PENDING = ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "RESV_DEL_HOLD", "SPECIAL_EXIT")
_TAKEN = ("PREEMPTED", "NODE_FAIL", "BOOT_FAIL", "REVOKED")
# At a limit of time, before which it was asked to save: as good as its own word, if there is a newer checkpoint.
_LATE = ("TIMEOUT", "DEADLINE")


@dataclasses.dataclass(frozen=True)
class Slurm:
    """Tasks on the nodes of a cluster that this machine submits to."""

    nodes: int = option("hosts, with one task each", 1)
    partition: str | None = option("of the cluster", None)
    account: str | None = option("that pays", None)
    qos: str | None = option("quality of service", None)
    time: str | None = option("limit, as in 24:00:00; at the limit the run saves and goes on in a new attempt", None)
    gpus_per_node: str | None = option("as in 8, or a100:8", None)
    cpus_per_task: int | None = option("cores of each task", None)
    mem: str | None = option("memory of each node, as in 200G", None)
    constraint: str | None = option("features that nodes must have", None)
    requeue: bool = option("let SLURM begin the attempt again after preemption and failures of nodes", True)
    grace: int = option("seconds to save in, before the time limit", 120)

    name = "slurm"
    ships_code = None

    def __post_init__(self) -> None:
        for name, value in (("nodes", self.nodes), ("grace", self.grace), ("cpus_per_task", self.cpus_per_task)):
            if value is not None and value < 1:
                raise LaunchError(f"--{name} is {value}: expected at least 1.")

    def compile_options(self) -> None:
        """No TPUs are rented."""

    def check(self, cargo: Cargo) -> None:
        """Raises `LaunchError` for a run directory that the nodes could not share."""
        job = cargo.job
        if job.run_dir is not None and not job.run_dir.startswith(STORES):
            _check_shared("the run directory", Path(job.directory) / job.run_dir)

    def check_access(self, job: Job) -> None:
        """Raises `LaunchError` where the cluster does not answer, a job has the name, or nodes would not find the record."""
        if queued(f"{job.name}-1"):
            raise LaunchError(f"there is a job {job.name}-1 in the queue already: give another --name.")
        _check_shared("CLP_JOBS_DIR", jobs_directory())

    def submit(self, record: JobRecord) -> None:
        """Submits the script, unless a job of its name is there: sbatch would take a second one."""
        if self.status(record).phase == "gone":
            ArrayTask.forget(record)
            carry_out(self.dry_run(record))

    def start(self, record: JobRecord) -> None:
        """Does nothing: submitting was all."""

    def status(self, record: JobRecord) -> Status:
        """Asks the queue; then the exit codes, which are files; then the accounts."""
        return self.judge(record, queued, accounted)

    def judge(self, record: JobRecord, queue: Look, accounts: Look) -> Status:
        """How an attempt stands.

        Args:
            record: of the job.
            queue: tells what is queued under a name.
            accounts: tells what is accounted for.
        """
        waiting = entries_of(record, queue)
        if waiting:
            pending = all(entry.state in _PENDING for entry in waiting)
            first = waiting[0]
            why = f"{first.state}: {first.reason}" if first.reason else first.state
            return Status("queued", detail=why) if pending else Status("running")
        codes = self._exit_codes(record)
        if len(codes) == self.nodes and all(code == 0 for code in codes):
            return Status("succeeded")
        found = entries_of(record, accounts)
        if not found:
            # Without accounts, what began and left no code was killed.
            return verdict([KILLED if code is None else code for code in codes]) if codes else Status("gone")
        if any(entry.state in (*_PENDING, "RUNNING", "COMPLETING") for entry in found):
            return Status("running")  # The accounts are behind the queue.
        # A copy of what runs already ends at once, and well: it tells nothing.
        told = next((entry for entry in reversed(found) if entry.state != "COMPLETED"), found[-1])
        if told.state in _TAKEN:
            return Status("preempted", detail=told.state)
        if any(codes):
            return verdict(codes)
        if told.state == "COMPLETED":
            return Status("succeeded")
        if told.state in _LATE:
            return Status("failed", RESTARTABLE, f"SLURM says {told.state}")
        code = KILLED if told.state == "OUT_OF_MEMORY" else told.code
        return Status("failed", code, f"SLURM says {told.state}, exit code {told.code}")

    def logs(self, record: JobRecord, lines: int | None = None, follow: bool = False) -> Iterator[str]:
        """The tasks' output, and SLURM's own."""
        task = ArrayTask.of(record)
        files = {"slurm": record.attempt_directory / "slurm.log"}
        if task is not None:
            files = {"slurm": array_log(Path(task.directory), task.name, str(task.index))}
        for restart in self._restarts(record):
            suffix = f" restart {restart.name[1:]}" if restart.name != "r0" else ""
            files |= {
                f"{path.parent.name.removeprefix('task-')}{suffix}": path
                for path in sorted(restart.glob(f"task-*/{LOG}"))
            }
        return read_logs(
            files, lines, (lambda: self.status(record).phase not in ("queued", "running")) if follow else None
        )

    def stop(self, record: JobRecord) -> None:
        """Asks the tasks to save and end, for `grace` seconds; SLURM itself would give them its KillWait, often 30."""
        cancel(_running(record), signal="TERM")
        until = time.monotonic() + self.grace
        while _running(record) and time.monotonic() < until:
            time.sleep(_LOOK)
        self.delete(record)

    def delete(self, record: JobRecord) -> None:
        """Cancels what is in the queue; of an array, the attempt's own task."""
        found = entries_of(record, queued)
        if found:
            cancel(found)
            if entries_of(record, queued):
                raise Unreachable(f"{record.resource} is being cancelled.")

    def dry_run(self, record: JobRecord) -> Sequence[Step]:
        """The two scripts, of the job and of its tasks, and how they are submitted."""
        batch, task = record.attempt_directory / "job.sh", self.task_file(record)
        # Should the same attempt ever be submitted twice, the second waits for the first, and finds it done.
        flags = ("--dependency=singleton", f"--comment=clp-job={record.job.name}")
        words = self.sbatch(record.resource, record.attempt_directory / "slurm.log", record.job.directory, flags)
        return [
            Write(task, self.task_script(record)),
            Write(batch, self.batch_script(shlex.quote(str(task)))),
            Run((*words, str(batch)), timeout=120.0),
        ]

    def sbatch(self, name: str, log: Path, directory: str, flags: Sequence[str]) -> tuple[str, ...]:
        """The words that submit a script, but for the script.

        Args:
            name: of the job.
            log: what SLURM writes.
            directory: to run in.
            flags: more words.
        """
        given = {
            "--partition": self.partition,
            "--account": self.account,
            "--qos": self.qos,
            "--time": self.time,
            "--gpus-per-node": self.gpus_per_node,
            "--cpus-per-task": self.cpus_per_task,
            "--mem": self.mem,
            "--constraint": self.constraint,
        }
        return (
            "sbatch",
            "--parsable",
            f"--job-name={name}",
            *flags,
            f"--nodes={self.nodes}",
            "--ntasks-per-node=1",
            f"--signal=TERM@{self.grace}",
            "--requeue" if self.requeue else "--no-requeue",
            "--open-mode=append",
            f"--output={log}",
            f"--chdir={directory}",
            *(f"{flag}={value}" for flag, value in given.items() if value is not None),
        )

    def batch_script(self, task: str, setup: Sequence[str] = ()) -> str:
        """The script that SLURM runs on the first node.

        Args:
            task: the script of each node; a piece of shell, quoted.
            setup: lines of shell before it.
        """
        lines = ["#!/usr/bin/env bash", "set -u", *setup]
        if self.nodes > 1:
            lines += [
                'first="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"',
                'export CLP_COORDINATOR_ADDRESS="$first:$((20000 + SLURM_JOB_ID % 20000))" CLP_NUM_PROCESSES="$SLURM_NTASKS"',
            ]
        # One that fails ends the others: they would wait for it.
        # From version 22.05 on srun does not take it from sbatch.
        cores = "" if self.cpus_per_task is None else f" --cpus-per-task={self.cpus_per_task}"
        lines.append(f"srun --kill-on-bad-exit=1{cores} bash {task}")
        return "\n".join(lines) + "\n"

    def task_file(self, record: JobRecord) -> Path:
        """Where the script of each node is."""
        return record.attempt_directory / "task.sh"

    def task_script(self, record: JobRecord) -> str:
        """The script of each node."""
        here = shlex.quote(str(record.attempt_directory))
        setup = ['export CLP_PROCESS_ID="$SLURM_PROCID"'] if self.nodes > 1 else []
        return worker_script(
            local_command(record.job.command),
            directory=shlex.quote(record.job.directory),
            # SLURM may run the same job again: each time is one of its own.
            here=f'{here}/r"${{SLURM_RESTART_COUNT:-0}}"/task-"$SLURM_PROCID"',
            environment={"PYTHONUNBUFFERED": "1"},
            setup=setup,
        )

    def _restarts(self, record: JobRecord) -> list[Path]:
        return sorted(record.attempt_directory.glob("r[0-9]*"), key=lambda path: int(path.name[1:]))

    def _exit_codes(self, record: JobRecord) -> list[int | None]:
        """Of the tasks that have begun; None of one that left no code."""
        restarts = self._restarts(record)
        files = [path.with_name(EXIT) for path in sorted(restarts[-1].glob(f"task-*/{CLAIM}"))] if restarts else []
        return [read_exit(path) if path.is_file() else None for path in files]


def _running(record: JobRecord) -> list[Entry]:
    return [entry for entry in entries_of(record, queued) if entry.state not in _PENDING]


def _check_shared(what: str, path: Path) -> None:
    if path.resolve().is_relative_to("/tmp"):
        raise LaunchError(f"{what} is {str(path)!r}: each node has a /tmp of its own; give a shared one.")


def array_log(directory: Path, name: str, index: str) -> Path:
    """Where SLURM writes of a task of an array."""
    return directory / f"{name}-{index}.log"


def entries_of(record: JobRecord, look: Look) -> list[Entry]:
    """What belongs to an attempt, of what there is under its name."""
    task = ArrayTask.of(record)
    if task is None:
        return list(look(record.resource))
    return [entry for entry in look(task.name) if entry.index == task.index]
