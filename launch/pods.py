"""What a cluster says of the pods of a JobSet: why they wait, that they never will begin, how they failed."""

import datetime
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from clp_jax.launch.exit_codes import verdict
from clp_jax.launch.jobset import CONTAINER
from clp_jax.launch.target import Status

# Reasons for which a container does not begin, of Kubernetes' node agent. These do not go away:
_FOR_GOOD = ("InvalidImageName", "ErrImageNeverPull")
# These may, with a registry that answers again or a Secret that somebody makes; hosts are paid for meanwhile.
_FOR_A_WHILE = (
    "ImagePullBackOff",
    "ErrImagePull",
    "RegistryUnavailable",
    "CreateContainerConfigError",
    "CreateContainerError",
    "RunContainerError",
    "FailedMount",
)
# What is said of everything before a container begins, also of a large image that comes.
_CREATING = "ContainerCreating"
_LONGEST_SECONDS = 600.0


def failure(pods: Sequence[Mapping[str, Any]], message: str) -> Status:
    """Why a JobSet failed: its pods' exit codes, or that they were taken away.

    Args:
        pods: as ``kubectl get --output=json`` has them.
        message: of the JobSet.
    """
    codes: list[int | None] = []
    for pod in pods:
        if any(c.get("type") == "DisruptionTarget" and c.get("status") == "True" for c in _conditions(pod)):
            return Status("preempted", detail=f"{pod['metadata']['name']} was evicted")
        # GKE puts containers of its own beside ours, to mount buckets for one.
        own = [c for c in pod.get("status", {}).get("containerStatuses", []) if c.get("name") == CONTAINER]
        codes += [container.get("state", {}).get("terminated", {}).get("exitCode") for container in own]
    if not any(codes):
        # Nobody ended badly by himself: a node went away with what ran on it.
        return Status("preempted", detail=message or "its pods are gone")
    return verdict(codes)


def hopeless(pods: Sequence[Mapping[str, Any]], now: float, unmounted: str = "") -> str | None:
    """Why pods have nodes and will not begin on them; None where they may.

    Args:
        pods: as ``kubectl get --output=json`` has them.
        now: seconds since 1970.
        unmounted: why a volume of theirs could not be had, a bucket's for one; empty where all could.
    """
    for pod in pods:
        for reason, message in _held_back(pod):
            placed = [c.get("lastTransitionTime") for c in _conditions(pod) if _is(c, "PodScheduled", "True")]
            waited = now - _seconds(placed[0]) if placed and placed[0] else 0.0
            if reason == _CREATING and unmounted:
                reason, message = "FailedMount", unmounted
            if reason in _FOR_GOOD or (reason in _FOR_A_WHILE and waited > _LONGEST_SECONDS):
                return f"{pod['metadata']['name']} can't begin: {reason}: {message}"
    return None


def waiting(pods: Sequence[Mapping[str, Any]]) -> str:
    """Why pods do not run yet, in the words of the scheduler or of a node."""
    for pod in pods:
        for condition in _conditions(pod):
            if _is(condition, "PodScheduled", "False"):
                return condition.get("message", "")
    for pod in pods:
        for reason, message in _held_back(pod):
            if reason in (*_FOR_GOOD, *_FOR_A_WHILE):
                return f"{pod['metadata']['name']}: {reason}: {message}"
    return ""


def refusal(events: Sequence[Mapping[str, Any]], resource: str) -> str:
    """Why a JobSet has no pods (no such service account, a quota of the namespace), or pods no volumes, as the cluster says.

    Args:
        events: of what failed.
        resource: name of the JobSet, that those of its jobs and pods begin with.
    """
    own = [event for event in events if event.get("involvedObject", {}).get("name", "").startswith(f"{resource}-")]
    return own[-1].get("message", "") if own else ""


def _held_back(pod: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Reason and message of each container that waits."""
    status = pod.get("status", {})
    for container in (*status.get("initContainerStatuses", []), *status.get("containerStatuses", [])):
        found = container.get("state", {}).get("waiting")
        if found:
            yield found.get("reason", ""), found.get("message", "")


def _conditions(pod: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    return pod.get("status", {}).get("conditions", [])


def _is(condition: Mapping[str, Any], kind: str, status: str) -> bool:
    return condition.get("type") == kind and condition.get("status") == status


def _seconds(text: str) -> float:
    return datetime.datetime.fromisoformat(text).timestamp()
