#!/usr/bin/env -S python3 -SE
"""A fake of sbatch, squeue, sacct, scancel, srun and scontrol: one job, or one task of an array, is one process, that begins after
some looks.

Troubles: ``sbatch`` (refused, timeout_before, timeout_after), ``pending`` (more looks), ``preempt``, ``node_fail`` and ``requeue``
(at the next look, of a job that runs), ``time_limit`` (the same), ``held`` (a reason to wait), ``completing`` (looks at what is cancelled before it is gone), ``no_accounts``.
"""

import contextlib
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

from state import WORLD, fail, flag, hang, log_call, trouble, world

PENDING, RUNNING, COMPLETING = "PENDING", "RUNNING", "COMPLETING"


def identity(job):
    return str(job["array"]) if job["index"] is None else f"{job['array']}_{job['index']}"


def begin(job):
    environment = {**os.environ, "SLURM_JOB_ID": str(job["id"]), "SLURM_JOB_NODELIST": f"n[1-{job['nodes']}]"}
    environment |= {"SLURM_NTASKS": str(job["nodes"]), "SLURM_NNODES": str(job["nodes"])}
    environment |= {"SLURM_RESTART_COUNT": str(job["restarts"])} if job["restarts"] else {}
    if job["index"] is not None:
        environment |= {"SLURM_ARRAY_JOB_ID": str(job["array"]), "SLURM_ARRAY_TASK_ID": str(job["index"])}
    ended = WORLD / f"slurm-{job['id']}-{job['restarts']}"
    runner = f'bash "$0"; echo $? > {ended}.new; mv {ended}.new {ended}'
    with open(job["output"], "a") as log:
        process = subprocess.Popen(
            ["bash", "-c", runner, job["script"]],
            cwd=job["chdir"],
            env=environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    job["pid"] = process.pid


def kill(job):
    if "pid" in job:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(job["pid"], signal.SIGKILL)


def terminate(job):
    """The scripts of its tasks get SIGTERM: they are beside the job's, which names them where it is an array's."""
    script = Path(job["script"])
    tasks = dict(re.findall(r"^ +\[(\d+)\]=(\S+)$", script.read_text(), flags=re.MULTILINE))
    folder = script.parent if job["index"] is None else Path(tasks[str(job["index"])]).parent
    for pid in folder.rglob("task-*/pid"):
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid.read_text()), signal.SIGTERM)


def look(job, jobs):
    """What the controller would have done since the last look."""
    job["looks"] -= 1
    if job["state"] == COMPLETING:
        job["completing"] -= 1
        job["state"] = COMPLETING if job["completing"] > 0 else "CANCELLED by 1000"
    at_once = len([other for other in jobs if other["array"] == job["array"] and other["state"] == RUNNING])
    if job["state"] == PENDING and job["looks"] <= 0 and at_once < job["most"]:
        job["state"] = RUNNING
        begin(job)
    if job["state"] == RUNNING:
        ended = WORLD / f"slurm-{job['id']}-{job['restarts']}"
        if ended.is_file():
            job["code"] = int(ended.read_text())
            job["state"] = "FAILED" if job["code"] else "COMPLETED"
            return
        for problem, state in (
            ("preempt", "PREEMPTED"),
            ("node_fail", "NODE_FAIL"),
            ("time_limit", "TIMEOUT"),
            ("requeue", PENDING),
        ):
            if trouble(problem):
                kill(job)
                job["state"] = state
                job["restarts"] += state == PENDING
                return


def indices(array):
    """The indices of ``0-2,5%3``, and how many at once."""
    ranges, percent, most = array.partition("%")
    if not re.fullmatch(r"\d+(-\d+)?(,\d+(-\d+)?)*", ranges) or (percent and not most.isdecimal()):
        fail("sbatch: error: Batch job submission failed: Invalid job array specification")
    ends = [[int(end) for end in part.split("-")] for part in ranges.split(",")]
    return [i for end in ends for i in range(end[0], end[-1] + 1)], int(most or 1000)


def sbatch(words):
    problem = trouble("sbatch")
    if problem == "refused":
        fail("sbatch: error: Batch job submission failed: Invalid account or account/partition combination specified")
    if problem == "timeout_before":
        hang()
    array = flag(words, "array")
    tasks, most = ([None], 1) if array is None else indices(array)
    with world() as state:
        jobs = state.setdefault("slurm", [])
        first = 100 + len(jobs)
        for number, index in enumerate(tasks):
            jobs.append(
                {
                    "id": first + number,
                    "array": first,
                    "index": index,
                    "most": most,
                    "name": flag(words, "job-name"),
                    "nodes": int(flag(words, "nodes")),
                    "output": flag(words, "output").replace("%a", str(index)),
                    "chdir": flag(words, "chdir"),
                    "script": words[-1],
                    "looks": trouble("pending") or 2,
                    "state": PENDING,
                    "restarts": 0,
                    "code": 0,
                }
            )
        state["created"] = [*state.get("created", []), flag(words, "job-name")]
        print(first)
    if problem == "timeout_after":
        hang()


def squeue(jobs, words):
    found = [job for job in jobs if job["name"] == flag(words, "name")]
    for job in found:
        look(job, jobs)
    waiting = [job for job in found if job["state"] in (PENDING, RUNNING, COMPLETING)]
    assert flag(words, "format") == "%i|%T|%r"
    why = {PENDING: "launch failed requeued held" if trouble("held") else "Priority"}
    lines = [f"{identity(job)}|{job['state']}|{why.get(job['state'], 'None')}" for job in waiting]
    if "--array" not in words:
        # As the real one: what is pending of an array is one line.
        lines = [
            line for line, job in zip(lines, waiting, strict=True) if job["index"] is None or job["state"] == RUNNING
        ]
        lines += [f"{job['array']}_[...]|{PENDING}|Priority" for job in waiting if job["state"] == PENDING][:1]
    print("\n".join(lines))


def main():
    tool, words = Path(sys.argv[0]).name, sys.argv[1:]
    log_call(tool)
    if tool == "sbatch":
        sbatch(words)
    elif tool == "scontrol":
        print("127.0.0.1")
    elif tool == "srun":
        command = words[[word.startswith("--") for word in words].index(False) :]
        tasks = [
            subprocess.Popen(command, env={**os.environ, "SLURM_PROCID": str(i)})
            for i in range(int(os.environ["SLURM_NTASKS"]))
        ]
        sys.exit(max(task.wait() for task in tasks))
    else:
        with world() as state:
            jobs = state.get("slurm", [])
            if tool == "squeue":
                squeue(jobs, words)
            elif tool == "sacct":
                if trouble("no_accounts"):
                    fail("Slurm accounting storage is disabled")
                found = [job for job in jobs if job["name"] == flag(words, "name")]
                print("\n".join(f"{identity(job)}|{job['state']}|{job['code']}:0" for job in found))
            elif tool == "scancel":
                for job in jobs:
                    if identity(job) in words and flag(words, "signal") == "TERM":
                        terminate(job)
                    elif identity(job) in words and job["state"] in (PENDING, RUNNING):
                        kill(job)
                        job["completing"] = trouble("completing") or 0
                        job["state"] = COMPLETING if job["completing"] else "CANCELLED by 1000"


main()
