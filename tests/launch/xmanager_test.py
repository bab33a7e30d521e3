"""XManager experiments: what the script gets, and a real run on the package's local executor where it is installed."""

import ast
import importlib.util
import json
import os
import subprocess
from pathlib import Path

import pytest
from clp_jax.launch import xmanager_experiment
from clp_jax.launch.errors import LaunchError
from clp_jax.launch.target import Run, Write
from clp_jax.launch.targets import find_target

from .conftest import AWKWARD, phases

TRIALS = [
    {"name": "rate-0.1", "words": [AWKWARD], "parameters": {"rate": 0.1}},
    {"name": "rate-0.2", "words": ["--rate=0.2"], "parameters": {"rate": 0.2}},
]
installed = pytest.mark.skipif(importlib.util.find_spec("xmanager") is None, reason="needs the extra `xmanager`")


def trials(world, content=None):
    (world.path / "here" / "trials.json").write_text(json.dumps(TRIALS if content is None else content))
    return {"trials": "trials.json"}


def test_the_script_needs_nothing_of_ours_and_reads_what_was_typed():
    source = Path(xmanager_experiment.__file__).read_text()
    found = {
        name.split(".")[0]
        for node in ast.walk(ast.parse(source))
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    assert found == {"asyncio", "json", "signal", "sys", "pathlib", "xmanager", "absl"}


def test_the_experiment_has_all_trials_and_requirements(world):
    options = trials(world) | {"executor": "vertex", "image": "gcr.io/p/clp", "requirements": "A100=8,RAM=600"}
    record, target = world.record("xmanager", options)
    files = {step.path.name: step for step in target.dry_run(record) if isinstance(step, Write)}
    settings = json.loads(files["experiment.json"].text)
    assert settings["trials"] == TRIALS
    assert settings["requirements"] == {"a100": 8, "ram": 600}
    assert settings["image"] == "gcr.io/p/clp" and settings["title"] == "job"
    (run,) = [step for step in target.dry_run(record) if isinstance(step, Run)]
    assert run.words[0] == "bash" and "experiment.py" in files["run.sh"].text
    assert world.calls() == []


def test_a_unit_passes_words_and_exit_codes_on(world):
    record, target = world.record("xmanager", {})
    (unit,) = [step.text for step in target.dry_run(record) if isinstance(step, Write) and step.path.name == "unit.sh"]
    record.attempt_directory.mkdir(parents=True)
    program = record.attempt_directory / "unit.sh"
    program.write_text(unit)
    world.trouble("training", {"code": 5})
    environment = {**os.environ, "CLP_WORK_UNIT": "3"}
    done = subprocess.run(["bash", str(program), *record.job.command, AWKWARD], env=environment, check=False)
    assert done.returncode == 5
    assert world.runs[0]["words"] == ["a", AWKWARD]
    assert (record.attempt_directory / "unit-3.exit").read_text() == "5\n"


@installed
def test_two_trials_on_the_local_executor(world, monkeypatch):
    monkeypatch.setenv("HOME", str(world.path))
    record, target = world.record("xmanager", trials(world))
    world.trouble("training", {"code": 9})
    assert world.run(record, target).phase == "succeeded"
    assert phases(record) == ["queued", "running", "broken", "queued", "running", "succeeded"]
    assert "exit code 9" in record.states[2].detail
    last = sorted(run["words"] for run in world.runs[-2:])
    assert last == sorted([["a", AWKWARD], ["a", "--rate=0.2"]])
    lines = list(target.logs(record))
    assert any("work unit 1 of experiment" in line and '"rate": 0.1' in line for line in lines)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"executor": "vertex"}, "--executor=vertex and --image=IMAGE go together."),
        ({"requirements": "many"}, "--requirements has 'many': expected NAME=NUMBER"),
        (
            {"executor": "vertex", "image": "i", "requirements": "TPU_V5E=4"},
            "XManager's Vertex executor knows TPU v2 and v3 alone",
        ),
    ],
)
def test_options_are_checked_before_anything(options, message):
    with pytest.raises(LaunchError) as error:
        find_target("xmanager", options)
    assert message in str(error.value)


@pytest.mark.parametrize("content", [[], [{"name": "a"}], {"a": 1}, "x"])
def test_trials_that_cannot_be_read(world, content):
    record, target = world.record("xmanager", trials(world, content))
    with pytest.raises(LaunchError, match="--trials is 'trials.json'"):
        target.check(record.job)


def test_vertex_needs_a_run_directory_in_a_bucket(world):
    record, target = world.record("xmanager", {"executor": "vertex", "image": "i"}, run_dir="runs/x")
    with pytest.raises(LaunchError, match="a path below /gcs"):
        target.check(record.job)
