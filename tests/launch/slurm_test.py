"""SLURM, against a queue that runs what is submitted."""

import os
import subprocess

import pytest
from clp_jax.launch import calls
from clp_jax.launch.cargo import Cargo
from clp_jax.launch.errors import LaunchError
from clp_jax.launch.jobs import jobs
from clp_jax.launch.supervisor import advance
from clp_jax.launch.target import Run, Write
from clp_jax.launch.targets import find_target

from .conftest import AWKWARD, QUICK, one_launcher_each, phases, until

TWO = {"nodes": "2", "partition": "gpu queue", "time": "1:00:00", "gpus_per_node": "8"}


def left(world):
    """Jobs that are still in the queue."""
    return [job["name"] for job in world.state.get("slurm", []) if job["state"] in ("PENDING", "RUNNING")]


def test_a_job_from_the_queue_to_the_end(world):
    record, target = world.record("slurm", TWO, words=(AWKWARD, "b"))
    assert world.run(record, target).phase == "succeeded"
    assert phases(record) == ["queued", "running", "succeeded"]
    assert world.state["created"] == ["job-1"]
    assert [run["words"] for run in world.runs] == [[AWKWARD, "b"]] * 2
    assert sorted(run["CLP_PROCESS_ID"] for run in world.runs) == ["0", "1"]
    assert {(run["CLP_COORDINATOR_ADDRESS"], run["CLP_NUM_PROCESSES"]) for run in world.runs} == {
        ("127.0.0.1:20100", "2")
    }
    assert {run["folder"] for run in world.runs} == {record.job.directory}
    (sbatch,) = world.calls("sbatch")
    assert {"--partition=gpu queue", "--time=1:00:00", "--gpus-per-node=8", "--dependency=singleton"} <= set(sbatch)
    lines = sorted(target.logs(record))
    assert [line for line in lines if line.endswith("the last line")] == ["[0] the last line", "[1] the last line"]


@pytest.mark.parametrize("problem", ["preempt", "node_fail"])
def test_nodes_are_taken_away(world, problem):
    record, target = world.record("slurm", {})
    world.trouble("training", {"sleep": 60})
    until(lambda: advance(record, target, QUICK) and world.runs)
    world.trouble(problem)
    assert world.run(record, target).phase == "succeeded"
    assert "preempted" in phases(record)
    assert world.state["created"] == ["job-1", "job-2"] and left(world) == []


@pytest.fixture(params=["accounts", "switched off", "not installed"])
def accounts(request, world):
    """Clusters that account for jobs, and those that do not."""
    if request.param == "switched off":
        world.trouble("no_accounts", times=99)
    elif request.param == "not installed":
        (world.path.parent / "tools" / "sacct").unlink()


def test_a_failure_is_tried_again(world, accounts):
    record, target = world.record("slurm", {})
    world.trouble("training", {"code": 4})
    assert world.run(record, target).phase == "succeeded"
    assert "worker 0 ended with exit code 4" in [state.detail for state in record.states]
    assert left(world) == [] and len(world.runs) == 2


def test_a_mistake_is_not_tried_again(world, accounts):
    record, target = world.record("slurm", {})
    world.trouble("training", {"code": 2})
    end = world.run(record, target)
    assert end.phase == "failed" and end.detail.endswith("[0] the last line")
    assert len(world.runs) == 1


def test_what_is_killed_goes_on_in_another_attempt(world, accounts):
    record, target = world.record("slurm", {})
    world.trouble("training", {"sleep": 60})
    until(lambda: advance(record, target, QUICK) and world.runs)
    world.trouble("preempt")
    assert world.run(record, target).phase == "succeeded"
    # Without accounts nobody knows that it was taken away.
    (between,) = [state for state in record.states if state.phase in ("preempted", "broken")]
    assert between.detail in ("PREEMPTED", "worker 0 ended with exit code 137")
    assert world.state["created"] == ["job-1", "job-2"] and left(world) == []


def test_a_refused_job_is_not_tried_again(world):
    record, target = world.record("slurm", {"account": "nobody"})
    world.trouble("sbatch", "refused")
    end = world.run(record, target)
    assert end.phase == "failed" and "Invalid account" in end.detail
    assert len(world.calls("sbatch")) == 1


@pytest.mark.parametrize("when", ["timeout_before", "timeout_after"])
def test_a_submission_that_does_not_answer_is_not_repeated_blindly(world, monkeypatch, when):
    monkeypatch.setattr(calls, "LONGEST", 3.0)
    record, target = world.record("slurm", {})
    world.trouble("sbatch", when)
    assert world.run(record, target).phase == "succeeded"
    assert world.state["created"] == ["job-1"]
    assert len(world.runs) == 1


def test_a_launcher_dies_at_every_step_and_another_goes_on(world):
    record, _ = world.record("slurm", {})
    one_launcher_each(record)
    assert len(world.runs) == 1 and len(world.calls("sbatch")) == 1


def test_slurm_requeues_the_same_attempt(world):
    record, target = world.record("slurm", {})
    record.append("queued", attempt=1)
    target.submit(record)
    task = record.attempt_directory / "task.sh"
    environment = {**os.environ, "SLURM_PROCID": "0"}
    for count in ("0", "0", "1"):
        subprocess.run(["bash", str(task)], env=environment | {"SLURM_RESTART_COUNT": count}, check=True)
    # Twice the same: once. Requeued: again.
    assert len(world.runs) == 2


def test_stopping_cancels(world):
    record, target = world.record("slurm", {})
    world.trouble("training", {"sleep": 60})
    until(lambda: advance(record, target, QUICK) and world.runs)
    record.stop_request.touch()
    assert world.run(record, target).phase == "stopped"
    assert left(world) == []


def test_stopping_waits_for_what_is_completing(world, capsys):
    record, target = world.record("slurm", {})
    world.trouble("training", {"sleep": 60})
    until(lambda: advance(record, target, QUICK) and world.runs)
    world.trouble("completing", 4)
    assert jobs(["stop", "job"]) == 0
    assert capsys.readouterr().out == "job: stopped: as asked\n"
    assert left(world) == []


def test_a_dry_run_calls_nothing(world):
    record, target = world.record("slurm", TWO)
    (sbatch,) = [step for step in target.dry_run(record) if isinstance(step, Run)]
    assert world.calls() == []
    world.run(record, target)
    assert world.calls("sbatch") == [list(sbatch.words)]


def test_bad_input(world):
    record, target = world.record("slurm", {}, run_dir="/tmp/run")
    with pytest.raises(LaunchError, match="each node has a /tmp of its own"):
        target.check(Cargo(record.job, target.ships_code))
    with pytest.raises(LaunchError, match="--nodes is 0: expected at least 1"):
        find_target("slurm", {"nodes": "0"})
    record.append("queued", attempt=1)
    target.submit(record)
    with pytest.raises(LaunchError, match="there is a job job-1 in the queue already"):
        target.check_access(record.job)


def test_a_time_limit_without_a_checkpoint_is_a_crash_loop(world):
    record, target = world.record("slurm", {}, run_dir="runs/b", max_failures=2)
    world.trouble("training", {"sleep": 60}, times=2)
    world.trouble("time_limit", times=2)
    end = world.run(record, target)
    assert end.phase == "failed" and "2 failures without a new checkpoint, the last: SLURM says TIMEOUT" in end.detail
    assert [state.is_asked for state in record.states if state.phase == "broken"] == [True]


def test_why_a_job_waits(world):
    record, target = world.record("slurm", {})
    world.trouble("pending", 4)
    world.trouble("held", times=9)
    for _ in range(2):
        state = advance(record, target, QUICK)
    assert state.detail == "PENDING: launch failed requeued held"
    target.delete(record)


def test_tasks_have_their_cores(world):
    record, target = world.record("slurm", {"cpus_per_task": "16"})
    scripts = [step.text for step in target.dry_run(record) if isinstance(step, Write)]
    assert "srun --kill-on-bad-exit=1 --cpus-per-task=16 bash " in scripts[1]
    assert world.run(record, target).phase == "succeeded"
