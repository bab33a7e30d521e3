"""What the fake tools share: a state on disk, a log of calls, and troubles that a test asks for.

A fake is a program of its own, as the real one is. Its world is the directory in ``FAKES``: ``calls.jsonl`` has all that was
called, ``troubles.json`` what goes wrong next, ``state.json`` what exists.
"""

import fcntl
import json
import os
import sys
import time
from pathlib import Path

from kept_json import kept, taken

WORLD = Path(os.environ["FAKES"])


def world():
    """The state, read and written by one process at a time."""
    return kept(WORLD / "state.json", {})


def log_call(tool):
    """Writes down what was called."""
    with open(WORLD / "calls.jsonl", "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(json.dumps([tool, *sys.argv[1:]]) + "\n")


def trouble(name):
    """What a test wants to go wrong here: taken once for each time it was asked for."""
    return taken(WORLD, name)


def machine():
    """Variables that a machine has of its own: here, which devices there are and where compiled programs are."""
    return {name: value for name, value in os.environ.items() if name.startswith(("JAX_", "XLA_", "TF_", "CUDA_"))}


def hang():
    """Never answers, like a call that times out."""
    time.sleep(120)


def flag(words, name, default=None):
    """The value of ``--name=value`` or ``--name value``."""
    for i, word in enumerate(words):
        if word == f"--{name}":
            return words[i + 1] if i + 1 < len(words) and not words[i + 1].startswith("--") else ""
        if word.startswith(f"--{name}="):
            return word.partition("=")[2]
    return default


def fail(text, code=1):
    """Ends as a tool that refuses."""
    print(text, file=sys.stderr)
    sys.exit(code)
