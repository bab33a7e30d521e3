"""XManager experiments: what the script gets, and real runs on the package's local executor where it is installed."""

import ast
import dataclasses
import importlib.util
import json
import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from clp_jax.launch import space, xmanager_experiment
from clp_jax.launch.cargo import Cargo
from clp_jax.launch.errors import LaunchError
from clp_jax.launch.job import all_records, jobs_directory
from clp_jax.launch.supervisor import advance
from clp_jax.launch.sweep import Sweep
from clp_jax.launch.target import Run, Write
from clp_jax.launch.targets import find_batch, find_target
from clp_jax.launch.xmanager import overrides

from clp_jax.main import main

from .conftest import AWKWARD, QUICK, are_gone, phases, until
from .trials import COMMAND, METRICS, begun, most_at_once, run

installed = pytest.mark.skipif(importlib.util.find_spec("xmanager") is None, reason="needs the extra `xmanager`")


@pytest.fixture(autouse=True)
def _home(world, tmp_path, monkeypatch):
    """XManager keeps its tables at home."""
    monkeypatch.setenv("HOME", str(world.path))
    monkeypatch.chdir(tmp_path)


def rows(world):
    """What XManager has: titles of experiments, and of each job its work unit, its name and its data."""
    with sqlite3.connect(world.path / ".xmanager" / "experiments.sqlite3") as tables:
        titles = dict(tables.execute("SELECT experiment_id, experiment_title FROM experiment ORDER BY experiment_id"))
        units = tables.execute("SELECT experiment_id, work_unit_id FROM work_unit ORDER BY 1, 2").fetchall()
        jobs = tables.execute(
            "SELECT experiment_id, work_unit_id, job_name, job_data FROM job ORDER BY 1, 2"
        ).fetchall()
    assert list(dict.fromkeys(row[:2] for row in jobs)) == units
    return list(titles.values()), [(list(titles).index(row[0]), *row[1:]) for row in jobs]


def sweep(values=(1, 2, 3), words="", **settings):
    return Sweep(f"{COMMAND} {words}", space.grid({"A": list(values)}), metrics=METRICS, **settings)


def files_of(steps):
    return {step.path.name: step.text for step in steps if isinstance(step, Write)}


def test_the_script_needs_nothing_of_ours_and_reads_what_was_typed():
    source = Path(xmanager_experiment.__file__).read_text()
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module.split(".")[0])
    standard = {"asyncio", "json", "re", "shutil", "time", "pathlib"}
    assert found == standard | {"xmanager", "absl", "sqlalchemy", "google"}


def test_the_experiment_has_words_parameters_and_requirements(world):
    options = {"executor": "vertex", "image": "gcr.io/p/clp", "requirements": "A100=8,RAM=600"}
    record, target = world.record("xmanager", options, words=(AWKWARD, "--seed=1"))
    steps = target.dry_run(record)
    settings = json.loads(files_of(steps)["experiment.json"])
    (trial,) = settings.pop("trials")
    assert settings == {
        "title": "job",
        "executor": "vertex",
        "image": "gcr.io/p/clp",
        "requirements": {"a100": 8, "ram": 600},
        "most": 1,
    }
    assert trial["words"] == list(record.job.command)
    assert trial["parameters"] == {"NAME": AWKWARD.partition("=")[2], "seed": "1"} == overrides(record.job.command)
    (start,) = [step for step in steps if isinstance(step, Run)]
    assert start.words == ("bash", str(record.attempt_directory / "experiment" / "run.sh"))
    assert world.calls() == []


def test_the_trials_of_a_sweep_are_one_experiment(world, tmp_path):
    records = []
    for name in ("first", "second"):
        record, target = world.record("xmanager", {}, name=name)
        job = dataclasses.replace(record.job, parameters={"A": name})
        records.append(dataclasses.replace(record, job=job))
    steps = find_batch(target, "sweep", tmp_path / "arrays", 1).plan(records)
    settings = json.loads(files_of(steps)["experiment.json"])
    assert (settings["title"], settings["most"]) == ("sweep", 1)
    assert [trial["parameters"] for trial in settings["trials"]] == [{"A": "first"}, {"A": "second"}]
    assert len([step for step in steps if isinstance(step, Run)]) == 1


def test_a_work_unit_passes_words_and_exit_codes_on_and_runs_once(world):
    record, target = world.record("xmanager", {})
    for step in target.dry_run(record):
        if isinstance(step, Write):
            step.path.parent.mkdir(parents=True, exist_ok=True)
            step.path.write_text(step.text)
    world.trouble("training", {"code": 5})
    here, unit = record.attempt_directory / "experiment", record.attempt_directory / "work-unit"
    words = ["bash", str(here / "unit.sh"), str(unit / "run.sh"), *record.job.command, AWKWARD]
    assert [subprocess.run(words, check=False).returncode for _ in range(2)] == [5, 0]
    assert [run["words"] for run in world.runs] == [["a", AWKWARD]]
    assert (unit / "exit").read_text() == "5\n"


@installed
def test_an_experiment_of_one(world, tmp_path):
    record, target = world.record("xmanager", {}, words=(AWKWARD, "--seed=3"))
    world.trouble("training", {"code": 9})
    assert world.run(record, target).phase == "succeeded"
    assert phases(record)[-2:] == ["running", "succeeded"] or phases(record)[-2:] == ["queued", "succeeded"]
    (broken,) = [state for state in record.states if state.phase == "broken"]
    assert broken.detail.startswith("work unit 1 of experiment ") and broken.detail.endswith(" ended with exit code 9")
    assert [run["words"] for run in world.runs] == [[AWKWARD, "--seed=3"]] * 2
    titles, jobs = rows(world)
    assert titles == ["job", "job"]
    parameters = f"NAME={AWKWARD.partition('=')[2]} seed=3"
    assert [row[:3] for row in jobs] == [(0, 1, parameters), (1, 1, parameters)]
    assert all(row[3].startswith('local {\n  cmd: "job"\n  timestamp: ') for row in jobs)
    lines = list(target.logs(record))
    assert "[0] the last line" in lines and any("work unit 1 of experiment" in line for line in lines)
    assert not list(tmp_path.rglob("hacked"))


@installed
def test_a_sweep_is_one_experiment_with_a_work_unit_for_each_trial(world, capsys):
    table = run(sweep((1, 2), words="--together=2", seeds=2), "xmanager", max_concurrent=2)
    assert [(row.state, row.metrics["loss"]) for row in table] == [
        ("succeeded", (a - 3) ** 2 + seed) for a in (1, 2) for seed in (0, 1)
    ]
    assert len(begun()) == len(set(begun())) == 4 and most_at_once() == 2
    titles, jobs = rows(world)
    assert len(titles) == 1 and titles[0].startswith("sweep-")
    assert [row[:3] for row in jobs] == [
        (0, number, f"A={a} seed={seed}") for number, (a, seed) in enumerate([(1, 0), (1, 1), (2, 0), (2, 1)], start=1)
    ]
    # The tables name the job, and the job its place in the tables.
    record = next(
        record
        for record in all_records(jobs_directory(), pytest.fail)
        if record.job.parameters == {"A": "2", "seed": "0"}
    )
    assert f'cmd: "{record.job.name}"' in jobs[2][3]
    assert main(["jobs", "status", record.job.name]) == 0
    out = capsys.readouterr().out
    assert "  tries: A=2 seed=0\n" in out
    assert json.loads((record.attempt_directory / "work-unit" / "work_unit.json").read_text())["work_unit"] == 3
    # Nothing is begun again, and what is new is an experiment of its own.
    run(sweep((1, 2, 4), words="--together=2", seeds=2), "xmanager", max_concurrent=2)
    assert [row[:3] for row in rows(world)[1][4:]] == [(1, 1, "A=4 seed=0"), (1, 2, "A=4 seed=1")]
    assert len(begun()) == 6


@installed
def test_a_failed_trial_is_tried_again_alone(world):
    Path("broken").write_text("2")
    assert [row.state for row in run(sweep(), "xmanager", max_concurrent=3)] == ["succeeded", "failed", "succeeded"]
    Path("broken").unlink()
    assert [row.state for row in run(sweep(), "xmanager", retry_failed=True)] == ["succeeded"] * 3
    assert [row[:3] for row in rows(world)[1]][3:] == [(1, 1, "A=2")] and len(begun()) == 4


@installed
def test_stopping_one_work_unit_and_killing_the_launcher(world):
    text = f"command: {COMMAND} --seconds=3\nspace: {{grid: {{A: [1, 2, 3]}}}}\nmetrics: {{loss: minimize}}\n"
    Path("sweep.yaml").write_text(text)
    words = ["sweep", "--file=sweep.yaml", "xmanager", "--dir=sweep", "--max_concurrent=1", "--look=0.1"]
    program = "import sys\nfrom clp_jax.main import main\nmain(sys.argv[1:])"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    launcher = subprocess.Popen([sys.executable, "-c", program, *words], env=environment, stderr=subprocess.DEVNULL)
    until(begun)
    launcher.send_signal(signal.SIGKILL)
    launcher.wait()
    by_value = {record.job.parameters["A"]: record for record in all_records(jobs_directory(), pytest.fail)}
    assert main(["jobs", "stop", by_value["2"].job.name]) == 0
    assert main(words) == 1
    assert [by_value[value].state.phase for value in "123"] == ["succeeded", "stopped", "succeeded"]
    assert begun() == [by_value[value].job.name.split("-")[-1] for value in "13"]
    assert len(rows(world)[0]) == 1 and [row[2] for row in rows(world)[1]] == ["A=1", "A=3"]


@installed
def test_a_dead_script_leaves_nothing_that_runs_twice(world):
    record, target = world.record("xmanager", {})
    world.trouble("training", {"sleep": 60})
    until(lambda: advance(record, target, QUICK) and world.runs)
    script = int((record.attempt_directory / "experiment" / "pid").read_text())
    os.killpg(script, signal.SIGKILL)
    # What it began runs on.
    assert advance(record, target, QUICK).phase == "running"
    record.stop_request.touch()
    assert world.run(record, target).phase == "stopped"
    until(lambda: are_gone([world.runs[0]["pid"]]))
    assert len(world.runs) == 1 and (record.attempt_directory / "work-unit" / "exit").read_text() == "75\n"


VERTEX = """
import json, sys, threading, time
from pathlib import Path
from absl import app
from xmanager.cloud import vertex
from xmanager.xm_local.packaging import cloud as packaging
from xmanager.xm_local import executables
import xmanager_experiment as experiment

CALLS = Path("vertex.jsonl")

class Client:
    # What stands for Google's side: a job is a line, and ends as its words say.
    def launch(self, name, jobs):
        (job,) = jobs
        words = experiment_words(job)
        with open(CALLS, "a") as file:
            file.write(json.dumps([name, job.executable.image_path, words, vertex.get_machine_spec(job)["accelerator_count"]]) + "\\n")
        return "jobs/" + next(word for word in words if word.startswith("--gin.A=")).partition("=")[2]

    async def wait_for_job(self, name):
        import asyncio
        while name == "jobs/stopped" and not Path("cancelled").exists():
            await asyncio.sleep(0.05)
        if name != "jobs/good":
            raise RuntimeError("Job failed: The replica workerpool0-0 exited with a non-zero status of 75." if name == "jobs/bad" else "cancelled")

    def cancel(self, name):
        Path("cancelled").write_text(name)

def experiment_words(job):
    from xmanager import xm
    from xmanager.xm import utils
    return xm.merge_args(job.executable.args, job.args).to_list(utils.ARGV_ESCAPER)

packaging.package_cloud_executable = lambda outputs, packageable, spec: executables.GoogleContainerRegistryImage(
    name="clp", image_path=spec.image_path, args=packageable.args, env_vars=packageable.env_vars)
vertex.set_default_client(Client())
app.run(experiment.main)
"""


@installed
def test_vertex_gets_each_trial_and_is_told_to_stop_one(world, tmp_path):
    """The real package, with a client that stands for Google's side."""
    options = {"executor": "vertex", "image": "gcr.io/p/clp", "requirements": "A100=8"}
    records = []
    for name, value in (("first", "good"), ("second", "bad"), ("third", "stopped"), ("fourth", "never")):
        record, target = world.record("xmanager", options, name=name)
        job = dataclasses.replace(record.job, command=("clp", "train", f"--gin.A={value}"), parameters={"A": value})
        records.append(dataclasses.replace(record, job=job))
    batch = find_batch(target, "sweep", tmp_path / "arrays", 4)
    *files, start = batch.plan(records)
    for step in files:
        step.path.parent.mkdir(parents=True, exist_ok=True)
        step.path.write_text(step.text)
    here = Path(start.words[-1]).parent
    units = [record.attempt_directory / "work-unit" for record in records]
    (units[3] / "claimed").mkdir()
    (here / "fake.py").write_text(VERTEX)
    environment = os.environ | {"PYTHONPATH": str(here)}
    program = subprocess.Popen([sys.executable, str(here / "fake.py")], env=environment, stdout=subprocess.DEVNULL)
    until(lambda: (units[2] / "work_unit.json").is_file() and (units[1] / "exit").is_file(), seconds=180)
    subprocess.run([sys.executable, str(here / "fake.py"), "stop", str(units[2])], env=environment, check=True)
    assert program.wait(60) == 0 and Path("cancelled").read_text() == "jobs/stopped"
    assert [(unit / "exit").read_text() for unit in units[:3]] == ["0\n", "75\n", "137\n"]
    calls = [json.loads(line) for line in Path("vertex.jsonl").read_text().splitlines()]
    (title,), jobs = rows(world)
    assert title == "sweep" and [call[0].rpartition("_")[2] for call in calls] == ["1", "2", "3"]
    assert [call[1:] for call in calls] == [
        ["gcr.io/p/clp", ["train", f"--gin.A={value}"], 8] for value in ("good", "bad", "stopped")
    ]
    assert [row[1:3] for row in jobs if not row[3]] == [(1, "A=good"), (2, "A=bad"), (3, "A=stopped")]
    assert [row[2:] for row in jobs if row[3]] == [
        (name, f'caip {{\n  resource_name: "{name}"\n}}\n') for name in ("jobs/good", "jobs/bad", "jobs/stopped")
    ]


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


@installed
def test_access_is_checked_before_anything(world, monkeypatch):
    record, target = world.record("xmanager", {"requirements": "GOLD=8"})
    with pytest.raises(LaunchError, match="--requirements has 'GOLD=8': XManager knows A100, "):
        target.check_access(record.job)
    monkeypatch.delenv("GOOGLE_APPLICATION_CREDENTIALS", raising=False)
    monkeypatch.setenv("NO_GCE_CHECK", "true")
    with pytest.raises(LaunchError, match="no credentials for Vertex: run gcloud auth application-default login"):
        find_target("xmanager", {"executor": "vertex", "image": "i"}).check_access(record.job)


def test_vertex_has_no_files_of_this_machine(world):
    record, target = world.record("xmanager", {"executor": "vertex", "image": "i"}, run_dir="/gcs/b/x")
    (world.path / "here" / "my.gin").write_text("A = 1\n")
    named = dataclasses.replace(record.job, command=("clp", "train", "--gin_file=my.gin"))
    with pytest.raises(LaunchError, match=r"Vertex has no my.gin of this directory"):
        target.check(Cargo(named, target.ships_code))
    find_target("xmanager", {}).check(Cargo(named, target.ships_code))
    target.check(
        Cargo(dataclasses.replace(named, command=("clp", "train", "--gin_file=/configs/my.gin")), target.ships_code)
    )
    target.check(
        Cargo(
            dataclasses.replace(named, command=("clp", "train", "--gin_file=examples/pydoc_sft.gin")), target.ships_code
        )
    )


def test_vertex_needs_a_run_directory_in_a_bucket(world):
    record, target = world.record("xmanager", {"executor": "vertex", "image": "i"}, run_dir="runs/x")
    with pytest.raises(LaunchError, match="a path below /gcs"):
        target.check(Cargo(record.job, target.ships_code))
