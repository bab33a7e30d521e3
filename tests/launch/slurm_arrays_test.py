"""Sweeps on SLURM, against a queue with job arrays that runs what is submitted."""

import os
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest
from clp_jax.launch import calls, space
from clp_jax.launch.arrays import Arrays
from clp_jax.launch.job import JobRecord, all_records, jobs_directory
from clp_jax.launch.slurm import Slurm
from clp_jax.launch.slurm_arrays import SlurmArrays
from clp_jax.launch.sweep import Sweep

from clp_jax.main import main

from .conftest import phases, until
from .trials import COMMAND, METRICS, begun, most_at_once, run


@pytest.fixture(autouse=True)
def _shared_disk(world, monkeypatch):
    """Where all nodes would find it: not in /tmp."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        monkeypatch.chdir(folder)
        monkeypatch.setenv("CLP_JOBS_DIR", f"{folder}/jobs")
        yield


def sweep(values=(1, 2, 3), seeds=2, words="", **settings):
    return Sweep(f"{COMMAND} {words}", space.grid({"A": list(values)}), seeds=seeds, metrics=METRICS, **settings)


def arrays(world):
    """What arrays were asked for."""
    return [word.partition("=")[2] for call in world.calls("sbatch") for word in call if word.startswith("--array")]


def asked(world):
    """Six attempts that were submitted, two at a time, and not asked for."""
    together = SlurmArrays.of(Slurm(), Arrays("s", Path("arrays").absolute(), 2))
    records = [world.record("slurm", {}, name=name)[0] for name in "abcdef"]
    for record in records:
        record.append("queued", attempt=1)
        together.submit(record)
    return records, together


def record_of(trial):
    (found,) = [
        record for record in all_records(jobs_directory(), pytest.fail) if record.path.name.endswith(trial.name)
    ]
    return found


def test_trials_are_one_array_and_each_task_finds_its_own(world):
    rows = run(sweep(words="--together=2"), "slurm", {"partition": "gpu queue"}, max_concurrent=2)
    assert [(row.state, row.metrics["loss"]) for row in rows] == [
        ("succeeded", (a - 3) ** 2 + seed) for a in (1, 2, 3) for seed in (0, 1)
    ]
    assert arrays(world) == ["0-5%2"] and len(world.calls("sbatch")) == 1
    assert "--partition=gpu queue" in world.calls("sbatch")[0]
    assert len(begun()) == len(set(begun())) == 6 and most_at_once() == 2
    assert phases(record_of(rows[3].trial)) == ["queued", "running", "succeeded"]
    # Nothing is asked for again, and what is new is an array of its own.
    run(sweep(words="--together=2"), "slurm")
    assert len(world.calls("sbatch")) == 1
    assert len(run(sweep((1, 2, 3, 4), words="--together=2"), "slurm")) == 8
    assert arrays(world) == ["0-5%2", "0-1%1"]


def test_the_queue_is_asked_once_for_a_whole_array(world):
    records, together = asked(world)
    assert [together.status(record).phase for record in records] == ["gone"] * 6
    assert world.calls() == []
    together.flush()
    for looks in (1, 2):
        assert {together.status(record).phase for record in records} <= {"queued", "running"}
        assert len(world.calls("squeue")) == looks
        together.flush()


@pytest.mark.parametrize("problem", ["requeue", "preempt", "node_fail"])
def test_one_task_is_taken_away_and_the_others_go_on(world, problem):
    thread = threading.Thread(target=lambda: (until(lambda: len(begun()) == 3), world.trouble(problem)))
    thread.start()
    rows = run(sweep(words="--seconds=2"), "slurm", max_concurrent=3)
    thread.join()
    assert [row.state for row in rows] == ["succeeded"] * 6
    (twice,) = {name for name in begun() if begun().count(name) > 1}
    assert len(begun()) == 7
    record = next(record for record in all_records(jobs_directory(), pytest.fail) if record.path.name.endswith(twice))
    if problem == "requeue":
        # SLURM itself begins the same task again.
        assert arrays(world) == ["0-5%3"] and record.attempt == 1
        assert sorted(path.name for path in record.attempt_directory.glob("r*")) == ["r0", "r1"]
    else:
        assert arrays(world)[0] == "0-5%3" and len(arrays(world)) == 2 and arrays(world)[1].startswith("0%")
        assert record.attempt == 2 and "preempted" in phases(record)
    assert most_at_once() <= 4  # One that was killed notes no end.


def test_a_failed_trial_is_tried_again_alone(world, capsys):
    Path("broken").write_text("2")
    assert [row.state for row in run(sweep(seeds=None), "slurm", max_concurrent=3)].count("failed") == 1
    Path("broken").unlink()
    rows = run(sweep(seeds=None), "slurm", retry_failed=True)
    assert [row.state for row in rows] == ["succeeded"] * 3
    assert arrays(world) == ["0-2%3", "0%1"] and len(begun()) == 4
    record = record_of(rows[1].trial)
    assert phases(record)[-4:] in (
        ["retried", "queued", "running", "succeeded"],
        ["failed", "retried", "queued", "succeeded"],
    )


def test_a_single_trial_is_shown_stopped_and_retried(world, capsys):
    until_go = sweep(seeds=None, words="--until=go")
    first, second, third = (f"{name}" for name in (trial.name for trial in until_go.trials()))
    rows = []
    thread = threading.Thread(target=lambda: rows.extend(run(until_go, "slurm", max_concurrent=2)))
    thread.start()
    until(lambda: len(begun()) == 2)
    waits = next(record for record in all_records(jobs_directory(), pytest.fail) if record.path.name.endswith(third))
    assert main(["jobs", "stop", waits.job.name]) == 0
    Path("go").touch()
    thread.join()
    assert [row.state for row in rows] == ["succeeded", "succeeded", "stopped"]
    assert sorted(begun()) == sorted([first, second])
    (array,) = {job["array"] for job in world.state["slurm"]}
    assert world.calls("scancel") == [["scancel", f"{array}_2"]]
    assert main(["jobs", "retry", "--look=0.05", waits.job.name]) == 0
    assert main(["jobs", "logs", waits.job.name]) == 0
    # One of its own now, as any job.
    assert len(world.calls("sbatch")) == 2 and len(arrays(world)) == 1
    assert begun()[-1] == third
    assert [row.state for row in run(until_go, "slurm")] == ["succeeded"] * 3


def test_logs_have_what_slurm_says_of_the_task(world, capsys):
    rows = run(sweep((1, 2), seeds=None), "slurm")
    for log in Path("sweep/arrays").glob("*.log"):
        log.write_text(f"slurm: of {log.stem.rpartition('-')[2]}\n")
    for index, row in enumerate(rows):
        assert main(["jobs", "logs", record_of(row.trial).job.name]) == 0
        assert capsys.readouterr().out == f"[slurm] slurm: of {index}\n"


def test_commands_after_the_first_keep_the_cap(world):
    then = [f"{COMMAND} --seconds=0.3 --run_dir={{run_dir}}"]
    rows = run(sweep(words="--seconds=0.3", then=then), "slurm", max_concurrent=2)
    assert [(row.state, row.metrics["hypervolume"]) for row in rows] == [("succeeded", 1.5)] * 6
    assert len(begun()) == 12 and most_at_once() == 2


@pytest.mark.parametrize("when", ["timeout_before", "timeout_after"])
def test_a_submission_that_does_not_answer_is_not_repeated_blindly(world, monkeypatch, when):
    monkeypatch.setattr(calls, "LONGEST", 3.0)
    world.trouble("sbatch", when)
    rows = run(sweep(), "slurm", max_concurrent=2)
    assert [row.state for row in rows] == ["succeeded"] * 6
    assert len(begun()) == len(set(begun())) == 6
    assert len(world.state["created"]) == 1


@pytest.mark.parametrize("when", ["timeout_before", "timeout_after"])
def test_a_launcher_that_dies_while_it_asks_starts_nothing_twice(world, when):
    text = f"command: {COMMAND}\nspace: {{grid: {{A: [1, 2, 3]}}}}\nseeds: 2\nmetrics: {{loss: minimize}}\n"
    Path("sweep.yaml").write_text(text)
    words = ["sweep", "--file=sweep.yaml", "slurm", "--dir=sweep", "--max_concurrent=3", "--look=0.1"]
    world.trouble("sbatch", when)
    program = "import sys\nfrom clp_jax.main import main\nmain(sys.argv[1:])"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    launcher = subprocess.Popen([sys.executable, "-c", program, *words], env=environment, stderr=subprocess.DEVNULL)
    until(lambda: world.calls("sbatch") and (when == "timeout_before" or world.state.get("created")))
    launcher.send_signal(signal.SIGKILL)
    launcher.wait()
    assert main(words) == 0
    assert len(world.state["created"]) == 1
    assert len(begun()) == len(set(begun())) == 6
    assert all(record.attempt == 1 for record in all_records(jobs_directory(), pytest.fail))


def test_an_array_that_comes_about_after_all_runs_nothing_twice(world, monkeypatch):
    """The call was given up, asked for again, and then both are there."""
    monkeypatch.setattr(calls, "LONGEST", 3.0)
    world.trouble("sbatch", "timeout_before")
    both = []

    def late():
        (first,) = world.calls("sbatch")
        until(lambda: len(world.calls("sbatch")) == 2)
        both.append(first == world.calls("sbatch")[1])
        subprocess.run(first, check=True, stdout=subprocess.DEVNULL)

    thread = threading.Thread(target=lambda: (until(lambda: world.calls("sbatch")), late()))
    thread.start()
    rows = run(sweep(words="--seconds=0.5"), "slurm", max_concurrent=2)
    thread.join()
    assert both == [True]
    assert [row.state for row in rows] == ["succeeded"] * 6
    assert len(begun()) == len(set(begun())) == 6


def test_a_refusal_is_told_of_every_trial_and_not_repeated(world):
    world.trouble("sbatch", "refused")
    rows = run(sweep(), "slurm", {"account": "nobody"})
    assert [row.state for row in rows] == ["failed"] * 6
    assert len(world.calls("sbatch")) == 1
    assert "Invalid account" in record_of(rows[0].trial).state.detail


def test_a_dry_run_prints_the_array_that_is_asked_for(world, capsys):
    text = f"command: {COMMAND}\nspace: {{grid: {{A: [1, 2, 3]}}}}\nseeds: 2\nmetrics: {{loss: minimize}}\n"
    Path("sweep.yaml").write_text(text)
    words = ["sweep", "--file=sweep.yaml", "slurm", "--max_concurrent=3"]
    assert main([*words, "--dry_run"]) == 0
    out = capsys.readouterr().out
    (asked,) = [line for line in out.splitlines() if line.startswith("$ ")]
    assert " --array=0-5%3 " in asked and out.count("# writes ") == 7
    assert 'srun --kill-on-bad-exit=1 bash "${tasks[$SLURM_ARRAY_TASK_ID]}"' in out and "  [5]=" in out
    assert world.calls() == [] and not Path("runs").exists() and not jobs_directory().exists()


def test_what_is_left_of_an_array_is_asked_for_under_its_own_numbers(world):
    records, together = asked(world)
    world.trouble("sbatch", "timeout_before")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calls, "LONGEST", 1.0)
        together.flush()
    for index in (0, 1, 2, 4):
        assert together.status(JobRecord.load(records[index].path)).phase == "gone"
        together.submit(records[index])
    together.flush()
    assert arrays(world) == ["0-5%2", "0-2,4%2"] and len(set(map(tuple, world.state["created"]))) == 1
