#!/usr/bin/env -S python3 -SE
"""A fake of sbatch, squeue, sacct, scancel, srun and scontrol: one job is one process, that begins after some looks.

Troubles: ``sbatch`` (refused, timeout_before, timeout_after), ``pending`` (more looks), ``preempt`` and ``node_fail`` (at the next
look), ``no_accounts``.
"""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

from state import WORLD, fail, flag, hang, log_call, trouble, world


def begin(job):
    environment = {**os.environ, "SLURM_JOB_ID": str(job["id"]), "SLURM_JOB_NODELIST": f"n[1-{job['nodes']}]"}
    environment |= {"SLURM_NTASKS": str(job["nodes"]), "SLURM_NNODES": str(job["nodes"])}
    ended = WORLD / f"slurm-{job['id']}"
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


def look(job):
    job["looks"] -= 1
    if job["state"] == "PENDING" and job["looks"] <= 0:
        job["state"] = "RUNNING"
        begin(job)
    if job["state"] == "RUNNING":
        for problem, state in (("preempt", "PREEMPTED"), ("node_fail", "NODE_FAIL")):
            if trouble(problem):
                kill(job)
                job["state"] = state
                return
        ended = WORLD / f"slurm-{job['id']}"
        if ended.is_file():
            job["code"] = int(ended.read_text())
            job["state"] = "FAILED" if job["code"] else "COMPLETED"


def sbatch(words):
    problem = trouble("sbatch")
    if problem == "refused":
        fail("sbatch: error: Batch job submission failed: Invalid account or account/partition combination specified")
    if problem == "timeout_before":
        hang()
    with world() as state:
        jobs = state.setdefault("slurm", [])
        job = {
            "id": 100 + len(jobs),
            "name": flag(words, "job-name"),
            "nodes": int(flag(words, "nodes")),
            "output": flag(words, "output"),
            "chdir": flag(words, "chdir"),
            "script": words[-1],
            "looks": trouble("pending") or 2,
            "state": "PENDING",
            "code": 0,
        }
        jobs.append(job)
        state["created"] = [*state.get("created", []), job["name"]]
        print(job["id"])
    if problem == "timeout_after":
        hang()


def main():
    tool, words = Path(sys.argv[0]).name, sys.argv[1:]
    log_call(tool)
    if tool == "sbatch":
        sbatch(words)
    elif tool == "scontrol":
        print("127.0.0.1")
    elif tool == "srun":
        command = words[1:]
        tasks = [
            subprocess.Popen(command, env={**os.environ, "SLURM_PROCID": str(i)})
            for i in range(int(os.environ["SLURM_NTASKS"]))
        ]
        sys.exit(max(task.wait() for task in tasks))
    else:
        with world() as state:
            found = [job for job in state.get("slurm", []) if job["name"] == flag(words, "name")]
            for job in found:
                look(job)
            if tool == "squeue":
                print("\n".join(job["state"] for job in found if job["state"] in ("PENDING", "RUNNING")))
            elif tool == "sacct":
                if trouble("no_accounts"):
                    fail("Slurm accounting storage is disabled")
                print("\n".join(f"{job['state']}|{job['code']}:0" for job in found))
            elif tool == "scancel":
                for job in found:
                    if job["state"] in ("PENDING", "RUNNING"):
                        kill(job)
                        job["state"] = "CANCELLED"


main()
