#!/usr/bin/env -S python3 -SE
"""A fake of `kubectl` and the controllers behind it: pods are processes that begin after some looks at them.

Troubles: ``schedule`` (more looks), ``unschedulable`` (messages, one a look), ``evict`` (at the next look), ``apply`` (quota, timeout),
``rights``, ``waiting`` (reason, and since when pods have their nodes: they never begin), ``no_pods`` and
``no_mount`` (messages).
"""

import base64
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from state import WORLD, fail, flag, hang, log_call, machine, trouble, world


def begin(name, found):
    """Starts the pods: what the node's agent does with the pod's specification."""
    spec = found["jobset"]["spec"]["replicatedJobs"][0]
    template = spec["template"]["spec"]
    container = template["template"]["spec"]["containers"][0]
    for job in range(spec["replicas"]):
        for index in range(template["completions"]):
            home = WORLD / "pods" / f"{name}-slice-{job}-{index}"
            (home / "files").mkdir(parents=True)
            config = found["config"]
            for file, text in config["data"].items():
                # The mount of the ConfigMap, in a folder where a container has one of its own.
                (home / "files" / file).write_text(text.replace("/clp/files", str(home / "files")))
            for file, text in config["binaryData"].items():
                (home / "files" / file).write_bytes(base64.b64decode(text))
            environment = {
                "HOME": str(home),
                "PATH": os.environ["PATH"],
                "FAKES": str(WORLD),
                "JOB_COMPLETION_INDEX": str(index),
                **machine(),
            }
            mount(container, template["template"]["spec"]["volumes"])
            for entry in container["env"]:
                source = entry["valueFrom"]
                label = source.get("fieldRef", {}).get("fieldPath") == "metadata.labels['jobset.sigs.k8s.io/job-index']"
                environment[entry["name"]] = str(job) if label else "the-secret-value"
            runner = f"bash {home}/files/run.sh; echo $? > {home}/code.new; mv {home}/code.new {home}/code"
            with open(home / "log", "w") as log:
                process = subprocess.Popen(
                    ["bash", "-c", runner], cwd=home, env=environment, stdout=log, stderr=log, start_new_session=True
                )
            (home / "pid").write_text(str(process.pid))


def mount(container, volumes):
    """Buckets as folders: what GKE's driver does for a pod, which has a file system of its own."""
    buckets = {volume["name"]: volume["csi"]["volumeAttributes"]["bucketName"] for volume in volumes if "csi" in volume}
    for entry in container["volumeMounts"]:
        path = Path(entry["mountPath"])
        if entry["name"] in buckets and not path.is_symlink():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.symlink_to(WORLD / "buckets" / buckets[entry["name"]])


def end(name):
    for home in WORLD.glob(f"pods/{name}-slice-*"):
        for pid in (home / "pid").read_text().split():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(int(pid), signal.SIGKILL)
        shutil.rmtree(home)


def look(name, found):
    """What the controllers would have done since the last look."""
    found["looks"] -= 1
    found["waiting"] = trouble("waiting") or found.get("waiting")
    found["no_pods"] = trouble("no_pods") or found.get("no_pods")
    found["no_mount"] = trouble("no_mount") or found.get("no_mount")
    found["unschedulable"] = trouble("unschedulable")
    if found["waiting"] or found["no_pods"] or found["unschedulable"]:
        return
    if found["phase"] == "Pending" and found["looks"] <= 0:
        found["phase"] = "Running"
        begin(name, found)
    if found["phase"] == "Running" and trouble("evict"):
        found["evicted"] = sorted(home.name for home in WORLD.glob(f"pods/{name}-slice-*"))[0]
        for home in WORLD.glob(f"pods/{name}-slice-*"):
            os.killpg(int((home / "pid").read_text()), signal.SIGKILL)
            (home / "code").write_text("137")
        found["phase"] = "Failed"
    codes = [
        int((home / "code").read_text())
        for home in sorted(WORLD.glob(f"pods/{name}-slice-*"))
        if (home / "code").is_file()
    ]
    spec = found["jobset"]["spec"]["replicatedJobs"][0]
    if found["phase"] == "Running" and any(codes):
        found["phase"] = "Failed"
    if found["phase"] == "Running" and len(codes) == spec["replicas"] * spec["template"]["spec"]["completions"]:
        found["phase"] = "Completed"


def pods(name, found):
    if found["unschedulable"]:
        condition = {"type": "PodScheduled", "status": "False", "message": found["unschedulable"]}
        yield pending(name, [condition], {})
    if found["waiting"]:
        reason, since = found["waiting"]
        condition = {"type": "PodScheduled", "status": "True", "lastTransitionTime": since}
        yield pending(name, [condition], {"waiting": {"reason": reason, "message": "as the node says"}})
    for home in sorted(WORLD.glob(f"pods/{name}-slice-*")):
        state = {"running": {}}
        phase, conditions = "Running", []
        if (home / "code").is_file():
            code = int((home / "code").read_text())
            state, phase = {"terminated": {"exitCode": code}}, "Failed" if code else "Succeeded"
        if found.get("evicted") == home.name:
            conditions = [{"type": "DisruptionTarget", "status": "True", "reason": "DeletionByTaintManager"}]
        yield {
            "metadata": {"name": home.name},
            "status": {
                "phase": phase,
                "conditions": conditions,
                "containerStatuses": [{"name": "main", "state": state}],
            },
        }


def pending(name, conditions, state):
    statuses = [{"name": "main", "state": state}] if state else []
    return {
        "metadata": {"name": f"{name}-slice-0-0"},
        "status": {"phase": "Pending", "conditions": conditions, "containerStatuses": statuses},
    }


def apply(words):
    problem = trouble("apply")
    if problem == "timeout":
        hang()
    if problem == "quota":
        fail(
            'Error from server (Forbidden): error when creating "manifest.json": jobsets.jobset.x-k8s.io "x" is forbidden: '
            "exceeded quota: tpus"
        )
    if flag(words, "filename").startswith("https://"):
        return
    with open(flag(words, "filename")) as file:
        config, jobset = json.load(file)["items"]
    if "--server-side" not in words and len(json.dumps(config)) > 262144:
        # What kubectl applied last is an annotation of it.
        fail(
            f'The ConfigMap "{config["metadata"]["name"]}" is invalid: metadata.annotations: Too long: must have at most 262144 bytes'
        )
    if "--dry-run=server" in words:
        return
    name = jobset["metadata"]["name"]
    with world() as state:
        if name not in state.setdefault("jobsets", {}):
            found = {"looks": trouble("schedule") or 2, "phase": "Pending", "jobset": jobset, "config": config}
            state["jobsets"][name] = found
            state["created"] = [*state.get("created", []), name]


def get(kind, words):
    with world() as state:
        jobsets = state.get("jobsets", {})
        if kind == "jobset":
            found = jobsets.get(words[0])
            if found is None:
                return
            look(words[0], found)
            over = [
                {"type": found["phase"], "status": "True", "message": "jobset failed due to one or more job failures"}
            ]
            print(json.dumps({"status": {"conditions": over if found["phase"] in ("Failed", "Completed") else []}}))
        elif kind == "events":
            kind = {"reason=FailedCreate": "no_pods", "reason=FailedMount": "no_mount"}[flag(words, "field-selector")]
            objects = [
                {"involvedObject": {"kind": "Job", "name": f"{name}-slice-0"}, "message": found[kind]}
                for name, found in jobsets.items()
                if found.get(kind)
            ]
            print(json.dumps({"items": objects}))
        else:
            name = flag(words, "selector").partition("=")[2]
            found = jobsets.get(name)
            print(json.dumps({"items": list(pods(name, found)) if found else []}))


def delete(kind, name, words):
    with world() as state:
        # Otherwise the pods have their grace after the object is gone.
        if kind == "jobset" and state.get("jobsets", {}).pop(name, None) and "--cascade=foreground" in words:
            end(name)


def main():
    log_call("kubectl")
    words = sys.argv[1:]
    action = words[0]
    if action == "auth":
        print("no" if trouble("rights") else "yes")
        sys.exit(0)
    if action == "apply":
        apply(words)
    elif words[:2] == ["create", "serviceaccount"]:
        pass
    elif action == "get":
        get(words[1], words[2:])
    elif action == "delete":
        delete(words[1], words[2], words)
    elif action == "logs":
        name = flag(words, "selector").partition("=")[2]
        for home in sorted(WORLD.glob(f"pods/{name}-slice-*")):
            lines = (home / "log").read_text().splitlines()
            lines = lines if flag(words, "tail") == "-1" else lines[-int(flag(words, "tail")) :]
            print("".join(f"[pod/{home.name}/main] {line}\n" for line in lines), end="")
    else:
        fail(f"error: unknown command {words}")


main()
