"""Jobs on a SLURM cluster: an sbatch script with one task for each host, on a file system that all nodes share."""

import dataclasses
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

from clp_jax.launch.calls import call, carry_out
from clp_jax.launch.exit_codes import KILLED, verdict
from clp_jax.launch.job import Job, JobRecord, LaunchError
from clp_jax.launch.local import local_command
from clp_jax.launch.log_files import read_logs
from clp_jax.launch.options import option
from clp_jax.launch.target import Run, Status, Step, Unreachable, Write
from clp_jax.launch.worker_script import EXIT, LOG, worker_script

_PENDING = ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "RESV_DEL_HOLD", "SPECIAL_EXIT")
_TAKEN = ("PREEMPTED", "NODE_FAIL", "BOOT_FAIL", "TIMEOUT", "REVOKED", "DEADLINE")


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

    def check(self, job: Job) -> None:
        """Raises `LaunchError` for a run directory that the nodes could not share."""
        if job.run_dir is not None and (Path(job.directory) / job.run_dir).resolve().is_relative_to("/tmp"):
            raise LaunchError(
                f"the run directory is {job.run_dir!r}: each node has a /tmp of its own; give a shared one."
            )

    def check_access(self, job: Job) -> None:
        """Raises `LaunchError` where the cluster does not answer, or a job has the name."""
        if self._queued(f"{job.name}-1"):
            raise LaunchError(f"there is a job {job.name}-1 in the queue already: give another --name.")

    def submit(self, record: JobRecord) -> None:
        """Submits the script, unless a job of its name is there: sbatch would take a second one."""
        if self.status(record).phase == "gone":
            carry_out(self.dry_run(record))

    def start(self, record: JobRecord) -> None:
        """Does nothing: submitting was all."""

    def status(self, record: JobRecord) -> Status:
        """Asks the queue; then the exit codes, which are files; then the accounts."""
        state = self._queued(record.resource)
        if state:
            return Status("queued", detail=state) if state in _PENDING else Status("running")
        codes = self._exit_codes(record)
        if len(codes) == self.nodes and not any(codes):
            return Status("succeeded")
        told = self._account(record)
        if told is None:
            return verdict(codes) if any(codes) else Status("gone")
        state, code = told
        if state in _TAKEN:
            return Status("preempted", detail=state)
        if state in (*_PENDING, "RUNNING", "COMPLETING"):
            return Status("running")  # The accounts are behind the queue.
        if state == "COMPLETED":
            return Status("succeeded")
        if any(codes):
            return verdict(codes)
        return Status("failed", KILLED if state == "OUT_OF_MEMORY" else code, f"SLURM says {state}, exit code {code}")

    def logs(self, record: JobRecord, lines: int | None = None, follow: bool = False) -> Iterator[str]:
        """The tasks' output, and SLURM's own."""
        files = {"slurm": record.attempt_directory / "slurm.log"}
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
        """Cancels the job: SLURM sends SIGTERM, and SIGKILL after its own KillWait."""
        self.delete(record)

    def delete(self, record: JobRecord) -> None:
        """Cancels what is in the queue."""
        if self._queued(record.resource):
            call(Run(("scancel", f"--name={record.resource}"), attempts=3))
            if self._queued(record.resource):
                raise Unreachable(f"{record.resource} is being cancelled.")

    def dry_run(self, record: JobRecord) -> Sequence[Step]:
        """The two scripts, of the job and of its tasks, and how they are submitted."""
        batch, task = record.attempt_directory / "job.sh", record.attempt_directory / "task.sh"
        return [
            Write(task, self._task(record)),
            Write(batch, _batch(task, self.nodes)),
            Run(("sbatch", *self._flags(record), str(batch)), timeout=120.0),
        ]

    def _flags(self, record: JobRecord) -> tuple[str, ...]:
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
            "--parsable",
            f"--job-name={record.resource}",
            f"--comment=clp-job={record.job.name}",
            f"--nodes={self.nodes}",
            "--ntasks-per-node=1",
            # Should the same attempt ever be submitted twice, the second waits for the first, and finds it done.
            "--dependency=singleton",
            f"--signal=TERM@{self.grace}",
            "--requeue" if self.requeue else "--no-requeue",
            "--open-mode=append",
            f"--output={record.attempt_directory / 'slurm.log'}",
            f"--chdir={record.job.directory}",
            *(f"{flag}={value}" for flag, value in given.items() if value is not None),
        )

    def _task(self, record: JobRecord) -> str:
        here = shlex.quote(str(record.attempt_directory))
        setup = ['export CLP_PROCESS_ID="$SLURM_PROCID" PYTHONUNBUFFERED=1'] if self.nodes > 1 else []
        return worker_script(
            local_command(record.job.command),
            directory=shlex.quote(record.job.directory),
            # SLURM may run the same job again: each time is one of its own.
            here=f'{here}/r"${{SLURM_RESTART_COUNT:-0}}"/task-"$SLURM_PROCID"',
            environment={},
            setup=setup,
        )

    def _queued(self, resource: str) -> str | None:
        """The state of the job of a name in the queue, or None."""
        words = ("squeue", "--me", f"--name={resource}", "--noheader", "--format=%T")
        states = call(Run(words, attempts=3)).output.split()
        return states[0] if states else None

    def _account(self, record: JobRecord) -> tuple[str, int | None] | None:
        """What the accounts say of the job: its state and exit code; None where they know nothing, or there are none."""
        words = ("sacct", f"--name={record.resource}", "--allocations", "--noheader", "--parsable2")
        called = call(Run((*words, "--format=State,ExitCode", "--starttime=now-30days"), attempts=3), may_fail=True)
        lines = called.output.split("\n") if called.code == 0 else []
        found = [line.split("|") for line in lines if "|" in line]
        if not found:
            return None
        state, code = found[-1][0].split()[0], found[-1][1].partition(":")[0]
        return state, int(code) if code.isdecimal() else None

    def _restarts(self, record: JobRecord) -> list[Path]:
        return sorted(record.attempt_directory.glob("r[0-9]*"), key=lambda path: int(path.name[1:]))

    def _exit_codes(self, record: JobRecord) -> list[int]:
        restarts = self._restarts(record)
        return [int(path.read_text()) for path in sorted(restarts[-1].glob(f"task-*/{EXIT}"))] if restarts else []


def _batch(task: Path, nodes: int) -> str:
    lines = ["#!/usr/bin/env bash", "set -u"]
    if nodes > 1:
        lines += [
            'first="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"',
            'export CLP_COORDINATOR_ADDRESS="$first:$((20000 + SLURM_JOB_ID % 20000))" CLP_NUM_PROCESSES="$SLURM_NTASKS"',
        ]
    # One that fails ends the others: they would wait for it.
    lines.append(f"srun --kill-on-bad-exit=1 bash {shlex.quote(str(task))}")
    return "\n".join(lines) + "\n"
