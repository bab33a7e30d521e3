"""Sweeps of a program without a model, in real processes, and what it noted of them."""

import sys
from pathlib import Path

from clp_jax.launch.supervisor import Patience
from clp_jax.launch.sweep_run import Settings, run_sweep
from clp_jax.launch.targets import find_target

COMMAND = f"{sys.executable} {Path(__file__).parents[1] / 'fixtures' / 'trial_program.py'}"
QUICK = Patience(look=0.02, first_wait=0.02, longest_wait=0.1)
METRICS = {"loss": "minimize"}


def run(sweep, target="local", options=None, **settings):
    """Runs a sweep in ``sweep``; its table."""
    options = options or {}
    there = find_target(target, options)
    return run_sweep(sweep, Path("sweep"), Settings(there, options, ["train"], patience=QUICK, **settings))


def notes():
    """What began and ended, in order."""
    return [tuple(line.split()) for line in Path("notes").read_text().splitlines()] if Path("notes").is_file() else []


def begun():
    """The trials that began, in order."""
    return [name for what, name in notes() if what == "begin"]


def most_at_once():
    """How many ran at the same time."""
    running = most = 0
    for what, _ in notes():
        running += 1 if what == "begin" else -1
        most = max(most, running)
    return most
