"""Jobs on GKE: a JobSet for the slices, through the `kubectl` command line."""

import dataclasses
import json
import shutil
import time
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from clp_jax.launch.buckets import check_buckets, read_mounts
from clp_jax.launch.calls import call, carry_out, stream
from clp_jax.launch.cargo import Cargo
from clp_jax.launch.errors import LaunchError
from clp_jax.launch.exit_codes import NOT_BEGUN
from clp_jax.launch.job import Job, JobRecord
from clp_jax.launch.jobset import CONTAINER, Pods, check_name, check_size, coordinator, manifest
from clp_jax.launch.options import option
from clp_jax.launch.pods import failure, hopeless, refusal, waiting
from clp_jax.launch.remote_code import (
    check_files,
    check_run_directory,
    check_secrets,
    environment,
    remote_command,
    unpack,
)
from clp_jax.launch.slices import Slice
from clp_jax.launch.target import Note, Run, Status, Step, Unreachable, Write
from clp_jax.launch.worker_script import worker_script
from clp_jax.launch.xpk import xpk_commands


@dataclasses.dataclass(frozen=True)
class Gke:
    """Pods on the TPU nodes of a cluster."""

    topology: str = option("the slice, as in v5e:4x4 or v5p:4x4x4")
    num_slices: int = option("slices that train together", 1)
    image: str = option("of the container; bash and Python 3.11 or newer are all it needs", "python:3.12")
    install: bool = option("install the requirements when a pod begins; false where the image has them", True)
    provision: Literal["on-demand", "spot", "reserved"] = option(
        "nodes to take: on-demand, spot or reserved", "on-demand"
    )
    reservation: str | None = option("name of the reservation, for reserved nodes", None)
    context: str | None = option("of kubectl; by default the present one", None)
    namespace: str | None = option("of the cluster; by default the context's", None)
    service_account: str | None = option("of Kubernetes, bound to one of Google Cloud (workload identity)", None)
    mounts: tuple[str, ...] = option("BUCKET=/FOLDER,...: buckets that pods have as folders, for runs and data", ())
    secrets: tuple[str, ...] = option("VARIABLE=SECRET/KEY,...: variables from Secrets of the cluster", ())
    grace: int = option("seconds to save in, when a pod is ended", 60)
    shared_disk: str | None = option("a folder that the image mounts everywhere, for run directories in it", None)
    cluster: str | None = option("name of the cluster, for the xpk command that is printed", None)

    name = "gke"
    ships_code = "tpu"

    def __post_init__(self) -> None:
        Slice.parse(self.topology)
        for name, value in (("num_slices", self.num_slices), ("grace", self.grace)):
            if value < 1:
                raise LaunchError(f"--{name} is {value}: expected at least 1.")
        if (self.provision == "reserved") != (self.reservation is not None):
            raise LaunchError("--provision=reserved and --reservation=NAME go together.")
        read_mounts(self.mounts)
        check_secrets(self.secrets, r"[\w.-]+/[\w.-]+", "VARIABLE=SECRET/KEY, as the cluster has it")

    def compile_options(self) -> tuple[str, ...]:
        """The slices, for `clp compile`."""
        return (f"--topology={Slice.parse(self.topology).name}", f"--num_slices={self.num_slices}")

    def check(self, cargo: Cargo) -> None:
        """Raises `LaunchError` for files that can't be brought, names too long, and a run directory that pods do not share."""
        check_name(cargo.job.name, self.num_slices, Slice.parse(self.topology).hosts)
        check_files(cargo)
        check_size(cargo.archive or b"")
        check_run_directory(
            cargo.job, [self.shared_disk] if self.shared_disk else [], "--shared_disk=FOLDER, if it is on such a disk"
        )

    def check_access(self, job: Job) -> None:
        """Raises `LaunchError` for missing rights, a cluster without JobSet, or a name that is taken."""
        may = call(self._kubectl("auth", "can-i", "create", "jobsets.jobset.x-k8s.io"), may_fail=True)
        if may.code or may.output.strip() != "yes":
            reason = " ".join((may.error or may.output).split())
            raise LaunchError(f"kubectl may not create JobSets in this cluster: {reason}. See docs/launching.md.")
        if self._get("jobset", f"{job.name}-1") is not None:
            raise LaunchError(f"there is a JobSet {job.name}-1 already: give another --name.")
        if shutil.which("gcloud") is not None:  # Who has kubectl alone finds out from the pods.
            check_buckets(read_mounts(self.mounts), [job.run_dir])

    def submit(self, record: JobRecord) -> None:
        """Applies the manifest; the same one twice changes nothing."""
        carry_out(self._steps(record))

    def start(self, record: JobRecord) -> None:
        """Does nothing: submitting was all."""

    def status(self, record: JobRecord) -> Status:
        """Asks for the JobSet and its pods."""
        found = self._get("jobset", record.resource)
        if found is None:
            return Status("gone")
        conditions = {c["type"]: c for c in found.get("status", {}).get("conditions", []) if c.get("status") == "True"}
        if "Completed" in conditions:
            return Status("succeeded")
        pods = self._items("pods", "--selector", _selector(record))
        if "Failed" in conditions:
            return failure(pods, conditions["Failed"].get("message", ""))
        phases = [pod.get("status", {}).get("phase") for pod in pods]
        if len(pods) < Slice.parse(self.topology).hosts * self.num_slices:
            return Status("queued", detail=refusal(self._events("FailedCreate"), record.resource))
        if "Pending" in phases:
            unmounted = refusal(self._events("FailedMount"), record.resource)
            reason = hopeless(pods, time.time(), unmounted)
            if reason is not None:
                return Status("failed", NOT_BEGUN, reason)
            return Status("queued", detail=waiting(pods) or unmounted)
        return Status("running")

    def logs(self, record: JobRecord, lines: int | None = None, follow: bool = False) -> Iterator[str]:
        """The pods' output."""
        how = [f"--tail={-1 if lines is None else lines}", *(["--follow"] if follow else [])]
        most = f"--max-log-requests={Slice.parse(self.topology).hosts * self.num_slices}"
        words = ("logs", "--selector", _selector(record), "--container", CONTAINER, "--prefix", most, *how)
        return stream(self._kubectl(*words))

    def stop(self, record: JobRecord) -> None:
        """Ends the pods, with their grace."""
        self.delete(record)

    def delete(self, record: JobRecord) -> None:
        """Deletes the JobSet and its files."""
        for kind in ("jobset", "configmap"):
            # In the foreground: the pods, which may be saving, are gone before it is.
            words = ("delete", kind, record.resource, "--ignore-not-found", "--wait=true", "--cascade=foreground")
            call(dataclasses.replace(self._kubectl(*words), timeout=self.grace + 300.0))

    def dry_run(self, record: JobRecord) -> Sequence[Step]:
        """The manifest, and how it is applied; and the same for who uses xpk."""
        command = remote_command(record.job.command)
        paid = f"--reservation={self.reservation}" if self.reservation is not None else f"--{self.provision}"
        commands = xpk_commands(
            self._pods(record), Slice.parse(self.topology), command, self.context, self.cluster, paid
        )
        return [*self._steps(record), Note(f"The same with xpk:\n{commands}")]

    def _steps(self, record: JobRecord) -> list[Step]:
        path = record.attempt_directory / "manifest.json"
        # By the server: what `kubectl` would keep of the files beside them is limited to 256 KiB.
        apply = ("apply", "--server-side", "--filename", str(path))
        return [
            Write(path, manifest(self._pods(record), self._script(record), record.code)),
            # The cluster's own schemas: nothing is created.
            self._kubectl(*apply, "--dry-run=server"),
            self._kubectl(*apply),
        ]

    def _pods(self, record: JobRecord) -> Pods:
        part = Slice.parse(self.topology)
        selector = {
            "cloud.google.com/gke-tpu-accelerator": part.chip.node_label,
            "cloud.google.com/gke-tpu-topology": part.topology,
        }
        if self.provision == "spot":
            selector["cloud.google.com/gke-spot"] = "true"
        if self.reservation is not None:
            selector["cloud.google.com/reservation-name"] = self.reservation
        return Pods(
            resource=record.resource,
            job=record.job.name,
            namespace=self.namespace,
            image=self.image,
            slices=self.num_slices,
            hosts=part.hosts,
            node_selector=selector,
            limits={"google.com/tpu": str(part.chips_per_host)},
            service_account=self.service_account,
            secrets={w.partition("=")[0]: _secret(w.partition("=")[2]) for w in self.secrets},
            grace=self.grace,
            is_spot=self.provision == "spot",
            mounts=read_mounts(self.mounts),
        )

    def _script(self, record: JobRecord) -> str:
        hosts = Slice.parse(self.topology).hosts
        lines = unpack("/clp/files/code.tar.gz", '"$HOME/clp"')
        if self.install:
            lines += environment('"$HOME"/clp/environments')
        if hosts * self.num_slices > 1:
            lines += [
                f"export CLP_COORDINATOR_ADDRESS={coordinator(record.resource)} CLP_NUM_PROCESSES={hosts * self.num_slices}",
                f'export CLP_PROCESS_ID="$((CLP_SLICE * {hosts} + JOB_COMPLETION_INDEX))"',
            ]
        return worker_script(
            remote_command(record.job.command),
            directory='"$HOME/clp/code/work"',
            here='"$HOME/clp/state"',
            environment={},
            setup=lines,
            keeps_log=False,
        )

    def _events(self, reason: str) -> list[dict[str, Any]]:
        return self._items("events", f"--field-selector=reason={reason}")

    def _items(self, kind: str, *words: str) -> list[dict[str, Any]]:
        return (self._get(kind, *words) or {"items": []})["items"]

    def _get(self, kind: str, *words: str) -> Any:
        called = call(self._kubectl("get", kind, *words, "--ignore-not-found", "--output=json"))
        try:
            return json.loads(called.output) if called.output.strip() else None
        except ValueError:
            raise Unreachable(f"kubectl get {kind} gave no JSON: {called.output.strip()[:200]}") from None

    def _kubectl(self, *words: str) -> Run:
        context = () if self.context is None else (f"--context={self.context}",)
        namespace = () if self.namespace is None else (f"--namespace={self.namespace}",)
        return Run(("kubectl", *context, *namespace, *words), timeout=120.0, attempts=3)


def _selector(record: JobRecord) -> str:
    return f"jobset.sigs.k8s.io/jobset-name={record.resource}"


def _secret(word: str) -> tuple[str, str]:
    name, _, key = word.partition("/")
    return name, key
