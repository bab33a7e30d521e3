"""The manifest of a job on Kubernetes: a JobSet with one pod for each host of its slices, and the files of the job.

Fields as in jobset.x-k8s.io/v1alpha2, batch/v1 and core/v1.
"""

import base64
import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from clp_jax.launch.buckets import Mount
from clp_jax.launch.errors import LaunchError
from clp_jax.launch.exit_codes import FINAL

JOB = "slice"
CONTAINER = "main"
_COORDINATOR_PORT = 8476
# JobSet refuses names of pods, with the five letters that Kubernetes adds, that are no label of DNS.
_LONGEST_NAME, _LAST_ATTEMPT = 63, 9999
# The API server refuses larger objects.
_LARGEST_BYTES = 1_000_000


@dataclasses.dataclass(frozen=True)
class Pods:
    """What all pods of a job share.

    Attributes:
        resource: name of all that is created.
        job: name of the job, as a label.
        namespace: that it is created in; None for the one of the context.
        image: of the container.
        slices: how many.
        hosts: of each slice.
        node_selector: labels that nodes must have.
        limits: what each container gets, ``google.com/tpu`` for one.
        service_account: of Kubernetes, that the pods act as.
        secrets: variable to the name and the key of a Secret.
        grace: seconds between SIGTERM and the end.
        is_spot: whether pods may be on spot nodes.
        mounts: buckets that pods have as folders.
    """

    resource: str
    job: str
    namespace: str | None
    image: str
    slices: int
    hosts: int
    node_selector: Mapping[str, str]
    limits: Mapping[str, str]
    service_account: str | None
    secrets: Mapping[str, tuple[str, str]]
    grace: int
    is_spot: bool
    mounts: Sequence[Mount] = ()


def manifest(pods: Pods, script: str, code: bytes) -> str:
    """The JobSet and its files as one list, in JSON, which is YAML too and quotes everything.

    Args:
        pods: what is asked for.
        script: that every pod runs.
        code: the archive.

    Raises:
        LaunchError: when the files are larger than a ConfigMap may be.
    """
    files = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": _metadata(pods),
        "immutable": True,
        "data": {"run.sh": script},
        "binaryData": {"code.tar.gz": base64.b64encode(code).decode()},
    }
    check_size(code, len(script))
    items = {"apiVersion": "v1", "kind": "List", "items": [files, jobset(pods)]}
    return json.dumps(items, indent=1) + "\n"


def check_size(code: bytes, script: int = 0) -> None:
    """Raises `LaunchError` for code that a ConfigMap does not hold.

    Args:
        code: the archive, a third longer in the ConfigMap.
        script: bytes of what stands beside it.
    """
    size = (len(code) + 2) // 3 * 4 + script
    if size > _LARGEST_BYTES:
        raise LaunchError(
            f"the code and your files are {size} bytes in a ConfigMap, which holds {_LARGEST_BYTES}: give large files by a "
            "path in a bucket (--mounts), or put them into the image."
        )


def check_name(job: str, slices: int, hosts: int) -> None:
    """Raises `LaunchError` for the name of a job whose pods would have longer names than JobSet takes.

    Args:
        job: the name.
        slices: how many.
        hosts: of each slice.
    """
    excess = len(f"{job}-{_LAST_ATTEMPT}-{JOB}-{slices - 1}-{hosts - 1}-abcde") - _LONGEST_NAME
    if excess > 0:
        raise LaunchError(
            f"the name of the job is {job!r}: names of its pods, of {slices} slices with {hosts} hosts, would be longer than "
            f"the {_LONGEST_NAME} letters that a cluster takes: give one of at most {len(job) - excess}: --name=NAME."
        )


def coordinator(resource: str) -> str:
    """Where the first pod is: JobSet names pods, and a headless service their hosts."""
    return f"{resource}-{JOB}-0-0.{resource}:{_COORDINATOR_PORT}"


def jobset(pods: Pods) -> dict[str, Any]:
    """The JobSet alone."""
    # A slice of several hosts is a node pool: its pods share one, and no other job's. Hosts that are slices share a pool.
    pool = {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}
    exclusive: dict[str, Any] = {"annotations": pool} if pods.hosts > 1 else {}
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": _metadata(pods) | exclusive,
        "spec": {
            "network": {"enableDNSHostnames": True, "subdomain": pods.resource, "publishNotReadyAddresses": True},
            # Who looks after the job begins it again, and knows whether it gets on.
            "failurePolicy": {"maxRestarts": 0},
            "replicatedJobs": [{"name": JOB, "replicas": pods.slices, "template": {"spec": _job(pods)}}],
        },
    }


def _job(pods: Pods) -> dict[str, Any]:
    # GKE's driver for buckets puts a container of its own beside ours.
    annotations = {"annotations": {"gke-gcsfuse/volumes": "true"}} if pods.mounts else {}
    return {
        "parallelism": pods.hosts,
        "completions": pods.hosts,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "podFailurePolicy": {
            "rules": [
                {
                    "action": "FailJob",
                    "onExitCodes": {"containerName": CONTAINER, "operator": "In", "values": list(FINAL)},
                }
            ]
        },
        "template": {"metadata": {"labels": {"clp-job": pods.job}, **annotations}, "spec": _pod(pods)},
    }


def _pod(pods: Pods) -> dict[str, Any]:
    index = "metadata.labels['jobset.sigs.k8s.io/job-index']"
    container = {
        "name": CONTAINER,
        "image": pods.image,
        "command": ["bash", "/clp/files/run.sh"],
        "env": [
            {"name": "CLP_SLICE", "valueFrom": {"fieldRef": {"fieldPath": index}}},
            *(
                {"name": variable, "valueFrom": {"secretKeyRef": {"name": name, "key": key}}}
                for variable, (name, key) in pods.secrets.items()
            ),
        ],
        # Of the coordinator, of the TPU driver's own exchange, and of slices among themselves.
        "ports": [{"containerPort": port} for port in (_COORDINATOR_PORT, 8471, 8080)],
        "resources": {"requests": dict(pods.limits), "limits": dict(pods.limits)},
        "volumeMounts": [
            {"name": "files", "mountPath": "/clp/files", "readOnly": True},
            *({"name": f"bucket-{i}", "mountPath": mount.folder} for i, mount in enumerate(pods.mounts)),
        ],
    }
    spec = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": pods.grace,
        "nodeSelector": dict(pods.node_selector),
        "containers": [container],
        "volumes": [
            {"name": "files", "configMap": {"name": pods.resource}},
            *({"name": f"bucket-{i}", "csi": _bucket(mount.bucket)} for i, mount in enumerate(pods.mounts)),
        ],
    }
    if pods.service_account is not None:
        spec["serviceAccountName"] = pods.service_account
    if pods.is_spot:
        toleration = {"key": "cloud.google.com/gke-spot", "operator": "Equal", "value": "true", "effect": "NoSchedule"}
        spec["tolerations"] = [toleration]
    return spec


def _bucket(name: str) -> dict[str, Any]:
    attributes = {"bucketName": name, "mountOptions": "implicit-dirs"}
    return {"driver": "gcsfuse.csi.storage.gke.io", "volumeAttributes": attributes}


def _metadata(pods: Pods) -> dict[str, Any]:
    namespace = {} if pods.namespace is None else {"namespace": pods.namespace}
    return {"name": pods.resource, **namespace, "labels": {"clp-job": pods.job}}
