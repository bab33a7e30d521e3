"""Traces of some steps: recorded from the first to the last, by the real profiler."""

import json
import subprocess
import sys

import pytest
from toy_runs import run

from clp_jax.training.profiling import Profile

# In a process of its own: the profiler ends one in which the compiler for TPUs was used (libtpu 0.0.52).
SCRIPT = """
import json, sys
from pathlib import Path
import jax.numpy as jnp
from clp_jax.training.profiling import Profile

recorded = {}
for name, (steps, first, last) in json.loads(sys.argv[2]).items():
    with Profile(Path(sys.argv[1]) / name, steps) as profile:
        recorded[name] = []
        for step in range(first, last + 1):
            profile.before(step, jnp.ones(3))
            if profile._recording:
                recorded[name].append(step)
            profile.after(step, jnp.ones(3) * step)
    assert not profile._recording
print(json.dumps(recorded))
"""
RUNS = {
    "asked": ((3, 4), 1, 6),
    "ended": ((3, 9), 1, 4),
    "later": ((3, 9), 8, 10),
    "unasked": (None, 1, 4),
    "over": ((1, 2), 3, 5),
}
RECORDED = {"asked": [3, 4], "ended": [3, 4], "later": [8, 9], "unasked": [], "over": []}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    directory = tmp_path_factory.mktemp("runs")
    command = [sys.executable, "-P", "-c", SCRIPT, str(directory), json.dumps(RUNS)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return directory, json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", RUNS)
def test_a_trace_of_the_steps_that_were_asked_for(runs, name):
    directory, recorded = runs
    assert recorded[name] == RECORDED[name]
    assert len(list((directory / name).rglob("*.xplane.pb"))) == bool(RECORDED[name])


@pytest.mark.parametrize("steps", [None, (50, 60)])
def test_a_trace_of_steps_that_never_came_is_said(tmp_path, steps, capsys):
    run(tmp_path / "run", 3, profile_steps=steps)
    said = "profile_steps: nothing was recorded: no step from 50 to 60 was made here." in capsys.readouterr().err
    assert said == (steps is not None) and not (tmp_path / "run" / "profile").exists()


@pytest.mark.parametrize("steps", [(0, 3), (4, 3)])
def test_settings(tmp_path, steps):
    with pytest.raises(ValueError, match="profile_steps is .*: expected a first and a last step"):
        Profile(tmp_path, steps)
