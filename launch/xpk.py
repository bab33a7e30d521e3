"""The same job for those who use xpk: the commands, by the flags of `xpk workload create` 1.16, and what they can't say."""

import re
import shlex
from collections.abc import Sequence

from clp_jax.launch.jobset import Pods
from clp_jax.launch.slices import Slice

# What `gcloud container clusters get-credentials` calls a context: project, zone or region, cluster.
_CONTEXT = re.compile(r"gke_([^_]+)_([^_]+)_([^_]+)")
_ZONE = re.compile(r"[a-z]+-[a-z]+\d+-[a-z]")


def xpk_commands(
    pods: Pods, part: Slice, command: Sequence[str], context: str | None, cluster: str | None, paid: str
) -> str:
    """Lines of shell: a storage for each mounted bucket, the workload, and what is missing as a remark.

    Args:
        pods: what they share.
        part: the slice.
        command: of each pod, its words.
        context: of `kubectl`, which says where a cluster is where Google Cloud has named it.
        cluster: its name, where that is known otherwise.
        paid: the flag that says how nodes are paid, where the cluster makes them as they are needed.
    """
    match = _CONTEXT.fullmatch(context or "")
    project, place, named = match.groups() if match else (None, "", None)
    where = [f"--cluster={cluster or named or 'CLUSTER'}", f"--zone={place if _ZONE.fullmatch(place) else 'ZONE'}"]
    where += [f"--project={project}"] if project else []
    where += [f"--namespace={pods.namespace}"] if pods.namespace else []
    lines = [
        [
            *("xpk", "storage", "attach", re.sub(r"[^a-z0-9]+", "-", mount.bucket), "--type=gcsfuse", *where),
            *(f"--bucket={mount.bucket}", f"--mount-point={mount.folder}", "--auto-mount=true", "--readonly=false"),
            "--size=1",
        ]
        for mount in pods.mounts
    ]
    workload = [
        *("xpk", "workload", "create", *where, f"--workload={pods.job}"),
        *(f"--tpu-type={part.chip.accelerator}-{part.topology}", f"--num-slices={pods.slices}", paid),
        *(f"--termination-grace-period-seconds={pods.grace}", f"--docker-image={pods.image}"),
        f"--command={shlex.join(command)}",
    ]
    missing = [
        "supervision",
        "the code and your files (the image has to hold them)",
        *([f"--service_account={pods.service_account}"] if pods.service_account else []),
        *([f"--secrets (of {', '.join(pods.secrets)})"] if pods.secrets else []),
        *(["slices of less than 8 chips"] if part.chip.name == "v5e" and part.chips < 8 else []),
        *(["8 chips in one host (it asks for two)"] if part.chips == 8 == part.chips_per_host else []),
        *(["words of several lines"] if any("\n" in word for word in command) else []),
    ]
    return "\n".join([*map(shlex.join, [*lines, workload]), f"xpk has no flags for: {', '.join(missing)}."])
