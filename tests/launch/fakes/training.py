"""Stands for training: says what it was given, saves checkpoints, and ends as the test's troubles say.

A trouble ``training`` is what one process does: ``{"code": 3, "step": 10, "sleep": 60, "until": "file", "among": 4}``: it ends when
the file is there, and so many have begun.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from state import WORLD, trouble

NAMES = ("CLP_COORDINATOR_ADDRESS", "CLP_NUM_PROCESSES", "CLP_PROCESS_ID", "JAX_NUM_CPU_DEVICES", "WANDB_API_KEY")


def end(number, frame):
    print("asked to end", flush=True)
    sys.exit(75)


signal.signal(signal.SIGTERM, end)
told = {"words": sys.argv[1:], "folder": os.getcwd(), "pid": os.getpid(), "files": sorted(os.listdir("."))}
told |= {name: os.environ[name] for name in NAMES if name in os.environ}
plan = trouble("training") or {}  # Before it is seen to run: whoever takes it away then has no trouble left over.
with open(WORLD / "runs.jsonl", "a") as file:
    file.write(json.dumps(told) + "\n")
if "step" in plan:
    (WORLD / "run" / "checkpoints" / str(plan["step"])).mkdir(parents=True, exist_ok=True)
print(f"training {sys.argv[1:]}", flush=True)
time.sleep(plan.get("sleep", 0))
limit = time.monotonic() + 120


def waits():
    begun = len((WORLD / "runs.jsonl").read_text().splitlines())
    return begun < plan.get("among", 1) or ("until" in plan and not (WORLD / plan["until"]).exists())


while waits() and time.monotonic() < limit:
    time.sleep(0.02)
print("the last line", flush=True)
sys.exit(plan.get("code", 0))
