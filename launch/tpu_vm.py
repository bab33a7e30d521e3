"""Jobs on TPU VMs: queued resources, and SSH to all workers, through the `gcloud` command line."""

import contextlib
import dataclasses
import itertools
import json
import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from clp_jax.launch.buckets import check_buckets, mount_lines, read_mounts
from clp_jax.launch.calls import at_once, call, carry_out, stream
from clp_jax.launch.cargo import Cargo
from clp_jax.launch.errors import LaunchError
from clp_jax.launch.exit_codes import KILLED, NOT_BEGUN, verdict
from clp_jax.launch.job import Job, JobRecord
from clp_jax.launch.options import option
from clp_jax.launch.remote_code import (
    check_files,
    check_run_directory,
    check_secrets,
    environment,
    read_secrets,
    remote_command,
    unpack,
)
from clp_jax.launch.slices import Slice
from clp_jax.launch.target import Run, Status, Step, Unavailable, Unreachable, Write
from clp_jax.launch.worker_script import CLAIM, EXIT, LOG, PID, worker_script

_NO_ROOM = re.compile(r"RESOURCE_EXHAUSTED|no more capacity|stockout|out of stock|not enough resources", re.IGNORECASE)
_QUOTA = re.compile(r"quota", re.IGNORECASE)
_REFUSED = re.compile(r"quota|permission|denied|invalid|not ?found|does not exist|unsupported", re.IGNORECASE)
_NOT_THERE = re.compile(r"NOT_FOUND|was not found|notFound", re.IGNORECASE)
_IS_THERE = re.compile(r"ALREADY_EXISTS|already exists", re.IGNORECASE)
_WAITING = ("CREATING", "ACCEPTED", "PROVISIONING", "WAITING_FOR_RESOURCES", "STATE_UNSPECIFIED")
_TAKEN = ("SUSPENDING", "SUSPENDED", "DELETING")
_SCRIPT = "run.sh"
_KEY = "~/.ssh/google_compute_engine"
_SSH_SECONDS, _COPY_SECONDS, _STOP_SECONDS = 300.0, 900.0, 120


@dataclasses.dataclass(frozen=True)
class TpuVm:
    """TPU VMs that are asked for, used and given back."""

    topology: str = option("the slice, as in v5e:4x4 or v5p:4x4x4")
    zone: str = option("where")
    project: str | None = option("of Google Cloud; by default gcloud's own", None)
    num_slices: int = option("slices that train together", 1)
    provision: Literal["on-demand", "spot", "reserved"] = option(
        "how it is paid: on-demand, spot or reserved", "on-demand"
    )
    any_zone: bool = option("take a zone that is not known to have the chip", False)
    runtime_version: str | None = option("software of the TPU VMs; by default the chip's", None)
    service_account: str | None = option("that the workers act as", None)
    network: str | None = option("of the VMs", None)
    subnetwork: str | None = option("of the VMs", None)
    internal_ips: bool = option("no external addresses; SSH goes through the internal ones", False)
    bucket: str | None = option(
        "gs://BUCKET/FOLDER that brings the code to the workers, instead of a copy to each", None
    )
    mounts: tuple[str, ...] = option("BUCKET=/FOLDER,...: buckets that workers have as folders, for runs and data", ())
    secrets: tuple[str, ...] = option("VARIABLE=SECRET,...: variables from Secret Manager, read by the workers", ())
    shared_disk: str | None = option(
        "a folder that all workers have (a mounted file store), for run directories in it", None
    )

    name = "tpu-vm"
    ships_code = "tpu"

    def __post_init__(self) -> None:
        part = self.slice
        if not self.any_zone:
            part.check_zone(self.zone)
        if not part.is_default:
            raise LaunchError(
                f"--topology is {self.topology!r}: TPU VMs are asked for by their number of chips, and {part.chips} come in "
                "another shape; give that one, or use the target gke."
            )
        if self.num_slices < 1:
            raise LaunchError(f"--num_slices is {self.num_slices}: expected at least 1.")
        if self.bucket is not None and not self.bucket.startswith("gs://"):
            raise LaunchError(f"--bucket is {self.bucket!r}: expected gs://BUCKET/FOLDER.")
        read_mounts(self.mounts)
        check_secrets(self.secrets, r"[\w/-]+", "VARIABLE=NAME, as Secret Manager has it")

    @property
    def slice(self) -> Slice:
        """What is asked for."""
        return Slice.parse(self.topology)

    def compile_options(self) -> tuple[str, ...]:
        """The slices, for `clp compile`."""
        return (f"--topology={self.slice.name}", f"--num_slices={self.num_slices}")

    def check(self, cargo: Cargo) -> None:
        """Raises `LaunchError` for files that can't be brought, and a run directory that workers do not share."""
        check_files(cargo)
        check_run_directory(
            cargo.job, [self.shared_disk] if self.shared_disk else [], "--shared_disk=FOLDER, if it is on such a disk"
        )

    def check_access(self, job: Job) -> None:
        """Raises `LaunchError` for missing credentials and names or buckets that can't be used."""
        accounts = call(
            Run(("gcloud", "auth", "list", "--filter=status:ACTIVE", "--format=value(account)"), attempts=2)
        )
        if not accounts.output.strip():
            raise LaunchError("gcloud has no credentials: run gcloud auth login.")
        if self._describe(f"{job.name}-1") is not None:
            raise LaunchError(f"there is a queued resource {job.name}-1 in {self.zone} already: give another --name.")
        check_buckets(read_mounts(self.mounts), [self.bucket, job.run_dir])
        if self.slice.hosts > 1:
            _check_agent()

    def submit(self, record: JobRecord) -> None:
        """Asks for the queued resource."""
        called = call(self._create(record), may_fail=True)
        if called.code == 0 or _IS_THERE.search(called.error):
            return
        reason = " ".join(called.error.split()) or f"exit code {called.code}"
        if _NO_ROOM.search(called.error) and not _QUOTA.search(called.error):
            raise Unavailable(f"{self.zone} has no room now: {reason}")
        advice = " Ask for more quota, or another zone: docs/launching.md." if _QUOTA.search(called.error) else ""
        raise LaunchError(f"gcloud refused the queued resource: {reason}{advice}")

    def start(self, record: JobRecord) -> None:
        """Brings the code to the workers and begins the command."""
        files, *nodes = self._start_steps(record)
        carry_out(files)
        at_once(carry_out, nodes)

    def status(self, record: JobRecord) -> Status:
        """Asks for the queued resource and then its workers."""
        found = self._describe(record.resource)
        if found is None:
            return Status("gone")
        state = found.get("state", {}).get("state", "STATE_UNSPECIFIED")
        if state in _TAKEN:
            return Status("preempted", detail=f"the queued resource is {state}")
        if state == "FAILED":
            why = _why(found)
            if _NO_ROOM.search(why) and not _QUOTA.search(why):
                return Status("preempted", detail=f"the queued resource FAILED{why}")
            # A quota, a right, an argument: the same request fails again. Of other reasons some do.
            return Status("failed", NOT_BEGUN if _REFUSED.search(why) else None, f"the queued resource FAILED{why}")
        if state in _WAITING:
            return Status("queued", detail=state)
        return self._workers(record)

    def logs(self, record: JobRecord, lines: int | None = None, follow: bool = False) -> Iterator[str]:
        """The workers' output, over SSH; none where they are gone."""
        here, how = self._here(record), f"-n {'+1' if lines is None else lines}"
        if follow:
            ends = f"[ -f {here}/{EXIT} ] || {{ [ -s {here}/{PID} ] && ! {_lives(here)}; }}"
            # Ends with the command, and with the reader.
            wait = f"(until {ends} || ! kill -0 $$; do sleep 0.5; done) > /dev/null 2>&1 & "
            show = f'{wait}tail -q {how} -F --pid=$! "$@" 2> /dev/null'
            files = f"set -- {here}/setup.log {here}/{LOG}; [ ! -f {here}/{LOG} ] || shift"
        else:
            show, files = f'tail {how} "$1"', f"set -- {here}/{LOG}; [ -f {here}/{LOG} ] || set -- {here}/setup.log"
        command = f'{files}; {show} | sed -u "s/^/[$(hostname)] /"'
        return stream(*(self._ssh(node, command) for node in self._nodes(record)))

    def stop(self, record: JobRecord) -> None:
        """Asks the workers to end, and waits for them to save."""
        here = self._here(record)
        command = (
            f'if {_lives(here)}; then kill -TERM "$(cat {here}/{PID})"; '
            f"for _ in $(seq {_STOP_SECONDS}); do {_lives(here)} || break; sleep 1; done; fi"
        )
        found = self._describe(record.resource)
        if found is not None and found.get("state", {}).get("state") == "ACTIVE":
            at_once(lambda node: self._stop_node(node, command), self._nodes(record))

    def delete(self, record: JobRecord) -> None:
        """Gives the queued resource back, with its nodes."""
        words = self._gcloud("queued-resources", "delete", record.resource, "--force", "--quiet")
        called = call(Run(words, timeout=900.0), may_fail=True)
        if called.code and not _NOT_THERE.search(called.error):
            raise Unreachable(f"{record.resource} is not deleted: {' '.join(called.error.split())}")
        if self._describe(record.resource) is not None:
            raise Unreachable(f"{record.resource} is being deleted.")
        if self.bucket is not None:
            # The next attempt brings it again. It may never have been brought.
            call(Run(("gcloud", "storage", "rm", self._archive(record)), attempts=2), may_fail=True)

    def dry_run(self, record: JobRecord) -> Sequence[Step]:
        """The queued resource, and what follows when it is there."""
        return [self._create(record), *itertools.chain.from_iterable(self._start_steps(record))]

    def _create(self, record: JobRecord) -> Run:
        names: tuple[str, ...] = (f"--node-id={record.resource}",)
        if self.num_slices > 1:
            names = (f"--node-count={self.num_slices}", f"--node-prefix={record.resource}")
        optional = {
            "--service-account": self.service_account,
            "--network": self.network,
            "--subnetwork": self.subnetwork,
        }
        words = self._gcloud(
            "queued-resources",
            "create",
            record.resource,
            *names,
            f"--accelerator-type={self.slice.accelerator_type}",
            f"--runtime-version={self.runtime_version or self.slice.chip.runtime}",
            *{"on-demand": (), "spot": ("--spot",), "reserved": ("--reserved",)}[self.provision],
            *(f"{flag}={value}" for flag, value in optional.items() if value is not None),
            *(("--internal-ips",) if self.internal_ips else ()),
            f"--labels=clp-job={record.job.name}",
            "--async",
            "--quiet",
        )
        return Run(words, timeout=300.0)

    def _start_steps(self, record: JobRecord) -> list[list[Step]]:
        """What is done once, and then of each node."""
        script, code = record.attempt_directory / _SCRIPT, record.path / "code.tar.gz"
        steps: list[Step] = [Write(script, self._script(record))]
        folder = f"clp/{record.resource}"
        if self.bucket is not None:
            words = ("gcloud", "storage", "cp", str(code), self._archive(record))
            steps.append(Run(words, timeout=_COPY_SECONDS, attempts=3))
        groups = [steps]
        for node in self._nodes(record):
            files = [str(script)] if self.bucket is not None else [str(code), str(script)]
            copy = self._gcloud(
                "tpu-vm", "scp", *files, f"{node}:{folder}/", "--worker=all", "--quiet", *self._addresses()
            )
            begin = f"cd {folder} && (setsid nohup bash {_SCRIPT} > setup.log 2>&1 < /dev/null &)"
            groups.append(
                [
                    dataclasses.replace(self._ssh(node, f"mkdir -p {folder}"), attempts=3),
                    Run(copy, timeout=_COPY_SECONDS, attempts=3),
                    dataclasses.replace(self._ssh(node, begin), attempts=3),
                ]
            )
        return groups

    def _script(self, record: JobRecord) -> str:
        folder = f'"$HOME/clp/{record.resource}"'
        fetch = []
        if self.bucket is not None:
            fetch = [f"gcloud storage cp {shlex.quote(self._archive(record))} {folder}/code.tar.gz || finish 75"]
        return worker_script(
            remote_command(record.job.command),
            directory=f'"$HOME/clp/{record.resource}/code/work"',
            here=f'"$HOME/{self._here(record)}"',
            environment={},
            setup=[
                'exec >> "$here/setup.log" 2>&1',
                *fetch,
                *unpack("code.tar.gz", folder),
                *environment('"$HOME"/clp/environments'),
                *read_secrets(self.secrets),
                *mount_lines(read_mounts(self.mounts)),
            ],
        )

    def _workers(self, record: JobRecord) -> Status:
        here = self._here(record)
        command = (
            f'if [ -f {here}/{EXIT} ]; then echo "CLP exit $(cat {here}/{EXIT})"; '
            f"elif [ ! -d {here}/{CLAIM} ]; then echo CLP waits; "
            f"elif [ ! -s {here}/{PID} ] || {_lives(here)}; then echo CLP runs; "
            # It may have ended between the two looks.
            f'elif [ -f {here}/{EXIT} ]; then echo "CLP exit $(cat {here}/{EXIT})"; else echo CLP exit {KILLED}; fi'
        )
        found = at_once(lambda node: self._states(node, command), self._nodes(record))
        lost = next((state for state in found if isinstance(state, str)), None)
        if lost is not None:
            return Status("preempted", detail=lost)
        states = list(itertools.chain.from_iterable(found))
        if "waits" in states:
            return Status("starting")
        return verdict([int(state.split()[1]) if state.startswith("exit") else None for state in states])

    def _states(self, node: str, command: str) -> list[str] | str:
        """What each worker of a node says, or why the node is lost."""
        try:
            called = call(self._ssh(node, command))
        except LaunchError:
            lost = self._lost(node)
            if lost is None:
                raise
            return lost
        found = re.findall(r"^CLP (runs|waits|exit \d+)\s*$", called.output, flags=re.MULTILINE)
        if len(found) != self.slice.hosts:
            raise Unreachable(f"{len(found)} of the {self.slice.hosts} workers of {node} answered.")
        return found

    def _stop_node(self, node: str, command: str) -> None:
        run = dataclasses.replace(self._ssh(node, command), timeout=_SSH_SECONDS + _STOP_SECONDS)
        # One that does not answer is deleted next.
        with contextlib.suppress(Unreachable):
            call(run, may_fail=True)

    def _lost(self, node: str) -> str | None:
        """Why a node does not answer, if it was taken away."""
        words = self._gcloud("tpu-vm", "describe", node, "--format=json")
        called = call(Run(words, attempts=2), may_fail=True)
        if called.code:
            return f"{node} is gone" if _NOT_THERE.search(called.error) else None
        state = _parsed(called.output).get("state", "")
        return f"{node} is {state}" if state in ("PREEMPTED", "TERMINATED", "STOPPED", "DELETING") else None

    def _describe(self, resource: str) -> dict[str, Any] | None:
        called = call(
            Run(self._gcloud("queued-resources", "describe", resource, "--format=json"), attempts=2), may_fail=True
        )
        if called.code == 0:
            return _parsed(called.output)
        if _NOT_THERE.search(called.error):
            return None
        raise LaunchError(f"gcloud can't describe {resource}: {' '.join(called.error.split())}")

    def _nodes(self, record: JobRecord) -> list[str]:
        if self.num_slices == 1:
            return [record.resource]
        return [f"{record.resource}-{i}" for i in range(self.num_slices)]

    def _ssh(self, node: str, command: str) -> Run:
        words = self._gcloud(
            "tpu-vm", "ssh", node, "--worker=all", f"--command={command}", "--quiet", *self._addresses()
        )
        return Run(words, timeout=_SSH_SECONDS)

    def _addresses(self) -> tuple[str, ...]:
        return ("--internal-ip",) if self.internal_ips else ()

    def _gcloud(self, group: str, *words: str) -> tuple[str, ...]:
        project = () if self.project is None else (f"--project={self.project}",)
        return ("gcloud", "compute", "tpus", group, *words, f"--zone={self.zone}", *project)

    def _archive(self, record: JobRecord) -> str:
        assert self.bucket is not None
        return f"{self.bucket.rstrip('/')}/{record.resource}/code.tar.gz"

    def _here(self, record: JobRecord) -> str:
        return f"clp/{record.resource}/state"


def _lives(here: str) -> str:
    """A piece of shell that is true while a worker's script runs.

    A killed process keeps its number until its parent takes notice, without its words; another may get the number later.
    """
    return f'ps -ww -o args= -p "$(cat {here}/{PID} 2>/dev/null)" 2>/dev/null | grep -qF {_SCRIPT}'


def _parsed(output: str) -> dict[str, Any]:
    try:
        found = json.loads(output)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise Unreachable(f"gcloud describe gave no JSON: {output.strip()[:200]}")
    return found


def _check_agent() -> None:
    """Raises `LaunchError` where `gcloud` would not copy to several workers: it asks for its key in an agent."""
    key = str(Path(_KEY).expanduser())
    made = call(Run(("ssh-keygen", "-lf", key)), may_fail=True)
    if made.code:
        raise LaunchError(f"gcloud has no key for SSH yet: ssh-keygen -t rsa -f {_KEY}, and then ssh-add {_KEY}.")
    held = call(Run(("ssh-add", "-l")), may_fail=True)
    if made.output.split()[1] not in held.output:
        raise LaunchError(
            f"gcloud copies to several workers only with its key in a running ssh-agent: eval $(ssh-agent), ssh-add {_KEY}."
        )


def _why(found: dict[str, Any]) -> str:
    error = found.get("state", {}).get("failedData", {}).get("error", {})
    return f": {error['message']}" if error.get("message") else ""
