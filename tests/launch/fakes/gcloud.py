#!/usr/bin/env -S python3 -SE
"""A fake of `gcloud compute tpus`, `gcloud storage`, `gcloud auth` and `gcloud secrets`, and of what an account is set up with.

Queued resources become active after some looks at them. A worker is a folder, its home; SSH runs bash there. Troubles:
``create`` (quota, stockout, timeout_before, timeout_after), ``lookups`` (more before it is active), ``ssh`` (timeout, refused),
``preempt`` (at the next describe), ``fail`` (why the next resource does), ``odd`` (no JSON), ``delete`` (timeout).
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from state import WORLD, fail, flag, hang, log_call, machine, trouble, world

HOSTS = {"v5litepod-1": 1, "v5litepod-4": 1, "v5litepod-8": 1, "v5litepod-16": 4, "v6e-16": 4, "v5p-8": 1, "v5p-16": 2}


def homes(node):
    return sorted((WORLD / "nodes" / node).iterdir()) if (WORLD / "nodes" / node).is_dir() else []


def take_away(found):
    """Machines vanish with all that runs on them."""
    for node in found["nodes"]:
        for home in homes(node):
            for pid in home.glob("clp/*/state/pid"):
                with contextlib.suppress(ProcessLookupError, ValueError):
                    os.killpg(int(pid.read_text()), signal.SIGKILL)
        shutil.rmtree(WORLD / "nodes" / node, ignore_errors=True)


def create(name, words):
    problem = trouble("create")
    if problem == "quota":
        fail(
            "ERROR: (gcloud.compute.tpus.queued-resources.create) RESOURCE_EXHAUSTED: Quota limit "
            "'TPUV5sLitepodPerProjectPerZoneForTPUAPI' has been exceeded. Limit: 0 in zone us-west4-a."
        )
    if problem == "stockout":
        fail(
            "ERROR: (gcloud.compute.tpus.queued-resources.create) RESOURCE_EXHAUSTED: There is no more capacity in the zone."
        )
    if problem == "timeout_before":
        hang()
    count = flag(words, "node-count")
    nodes = [f"{flag(words, 'node-prefix')}-{i}" for i in range(int(count))] if count else [flag(words, "node-id")]
    with world() as state:
        if name in state.setdefault("resources", {}):
            fail(
                f"ERROR: (gcloud.compute.tpus.queued-resources.create) ALREADY_EXISTS: Resource '{name}' already exists"
            )
        hosts = HOSTS[flag(words, "accelerator-type")]
        state["resources"][name] = {
            "looks": trouble("lookups") or 1,
            "state": "ACCEPTED",
            "nodes": nodes,
            "hosts": hosts,
            "error": trouble("fail"),
        }
        state["created"] = [*state.get("created", []), name]
    if problem == "timeout_after":
        hang()


def describe(name):
    with world() as state:
        found = state.get("resources", {}).get(name)
        if found is None:
            fail(f"ERROR: (gcloud.compute.tpus.queued-resources.describe) NOT_FOUND: Resource '{name}' was not found")
        found["looks"] -= 1
        if found["state"] == "ACCEPTED" and found["looks"] <= 0:
            found["state"] = "ACTIVE"
            for node in found["nodes"]:
                for i in range(found["hosts"]):
                    (WORLD / "nodes" / node / f"w-{i}").mkdir(parents=True)
        if found["error"]:
            found["state"] = "FAILED"
        if found["state"] == "ACTIVE" and trouble("preempt"):
            found["state"] = "SUSPENDED"
            take_away(found)
        data = {"failedData": {"error": {"code": 8, "message": found["error"]}}} if found["error"] else {}
        print("odd" if trouble("odd") else json.dumps({"name": name, "state": {"state": found["state"], **data}}))


def delete(name):
    problem = trouble("delete")
    if problem == "timeout":
        hang()
    with world() as state:
        found = state.get("resources", {}).pop(name, None)
        if found is None:
            fail(f"ERROR: (gcloud.compute.tpus.queued-resources.delete) NOT_FOUND: Resource '{name}' was not found")
        take_away(found)


def ssh(node, words):
    problem = trouble("ssh")
    if problem == "timeout":
        hang()
    if problem == "refused" or not homes(node):
        fail(f"ERROR: (gcloud.compute.tpus.tpu-vm.ssh) Could not SSH into {node}: connection refused", 255)
    processes = []
    for home in homes(node):
        # `hostname` is a program: the worker's own is in its folder.
        (home / "bin").mkdir(exist_ok=True)
        program = home / "bin" / "hostname"
        program.write_text(f"#!/bin/sh\necho {node}-{home.name}\n")
        program.chmod(0o755)
        environment = {
            "HOME": str(home),
            "PATH": f"{home / 'bin'}:{os.environ['PATH']}",
            "FAKES": str(WORLD),
            "WORKER": home.name,
            **machine(),
        }
        processes.append(subprocess.Popen(["bash", "-c", flag(words, "command")], cwd=home, env=environment))
    sys.exit(max(process.wait() for process in processes))


def scp(words):
    places = [word for word in words if not word.startswith("--")]
    node, _, folder = places[-1].partition(":")
    for home in homes(node):
        for file in places[:-1]:
            shutil.copy(file, home / folder)
    if not homes(node):
        fail("ERROR: (gcloud.compute.tpus.tpu-vm.scp) connection refused")


def node_state(node):
    if not homes(node):
        fail(f"ERROR: NOT_FOUND: node {node} was not found")
    print(json.dumps({"state": "READY"}))


# What sets an account up, and leaves nothing that is looked at here.
SETTING_UP = (
    ("auth", "login"),
    ("auth", "application-default"),
    ("config", "set"),
    ("services", "enable"),
    ("iam", "service-accounts"),
    ("container", "clusters"),
)


def storage(words):
    """`gcloud storage`: a bucket is a folder."""

    def place(word):
        return WORLD / "buckets" / word.removeprefix("gs://") if word.startswith("gs://") else Path(word)

    if words[:2] == ["buckets", "create"]:
        place(words[2]).mkdir(parents=True)
    elif words[0] == "buckets":
        if not place(words[2]).is_dir():
            fail(f"ERROR: (gcloud.storage.buckets.{words[1]}) {words[2]} not found: 404.")
    elif words[:2] == ["cp", "-r"]:
        source, target = place(words[2]), place(words[3])
        if not source.is_dir():
            fail(f"ERROR: (gcloud.storage.cp) The following URLs matched no objects or files: {words[2]}")
        shutil.copytree(source, target / source.name if target.is_dir() else target)
    elif words[0] == "cp":
        source, target = place(words[1]), place(words[2])
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, target)
    elif words[0] == "rm":
        if not place(words[1]).is_file():
            fail(f"ERROR: (gcloud.storage.rm) The following URLs matched no objects or files:\n-  {words[1]}")
        place(words[1]).unlink()
    elif words[0] == "ls":
        if not place(words[1]).is_dir():
            fail("ERROR: (gcloud.storage.ls) One or more URLs matched no objects.")
        print("\n".join(f"{words[1]}{entry.name}/" for entry in place(words[1]).iterdir()))
    else:
        fail(f"ERROR: (gcloud.storage) Invalid choice: {words}", 2)


def main():
    log_call("gcloud")
    words = sys.argv[1:]
    if words[:2] == ["auth", "list"]:
        print("" if trouble("credentials") else "somebody@example.com")
    elif words[:2] == ["secrets", "versions"]:
        print("the-secret-value")
    elif words[0] == "storage":
        storage(words[1:])
    elif tuple(words[:2]) in SETTING_UP:
        pass
    elif words[2] == "queued-resources":
        action, name = words[3:5]
        {"create": lambda: create(name, words), "describe": lambda: describe(name), "delete": lambda: delete(name)}[
            action
        ]()
    elif words[2:4] == ["tpu-vm", "ssh"]:
        ssh(words[4], words)
    elif words[2:4] == ["tpu-vm", "scp"]:
        scp(words[4:])
    elif words[2:4] == ["tpu-vm", "describe"]:
        node_state(words[4])
    else:
        fail(f"ERROR: (gcloud) Invalid choice: {words}", 2)


main()
