"""TPU VMs, against a `gcloud` that keeps queued resources and runs what SSH asks for in bash."""

import os
import signal
import time
from pathlib import Path

import pytest
from clp_jax.launch import calls
from clp_jax.launch.buckets import seen_from_here
from clp_jax.launch.cargo import Cargo
from clp_jax.launch.command import create
from clp_jax.launch.errors import LaunchError
from clp_jax.launch.job import Job
from clp_jax.launch.supervisor import advance, retry
from clp_jax.launch.target import Run, Unreachable, Write
from clp_jax.launch.targets import find_target

from .conftest import AWKWARD, FAKES, QUICK, are_gone, one_launcher_each, phases, until

SPOT = {"topology": "v5e:4x4", "zone": "us-west4-a", "provision": "spot"}


def actions(world):
    """What was asked of queued resources, but for looking."""
    words = [call[4:6] for call in world.calls("gcloud") if call[1:4] == ["compute", "tpus", "queued-resources"]]
    return [tuple(pair) for pair in words if pair[0] != "describe"]


def test_a_job_from_the_request_to_the_end(world):
    record, target = world.record("tpu-vm", SPOT, words=(AWKWARD, "--steps=3"))
    assert world.run(record, target).phase == "succeeded"
    assert phases(record) == ["queued", "starting", "running", "succeeded"] or phases(record) == [
        "queued",
        "starting",
        "succeeded",
    ]
    assert actions(world) == [("create", "job-1"), ("delete", "job-1")]
    assert world.state["resources"] == {}
    assert len(world.runs) == 4
    for run in world.runs:
        assert run["words"] == [AWKWARD, "--steps=3"]
        assert run["files"] == ["my.gin"]
        assert "CLP_PROCESS_ID" not in run  # The TPUs' own metadata tells.
    (create,) = [call for call in world.calls("gcloud") if "create" in call]
    assert {"--spot", "--accelerator-type=v5litepod-16", "--runtime-version=v2-alpha-tpuv5-lite"} <= set(create)


def test_the_environment_is_made_once_for_the_same_requirements(world):
    record, target = world.record("tpu-vm", {**SPOT, "topology": "v5e:2x2"})
    record.append("queued", attempt=1)
    world.trouble("training", {"code": 75})
    target.submit(record)
    until(lambda: target.status(record).phase == "starting")
    target.start(record)
    until(lambda: target.status(record).phase != "running")
    # The machine is still there: a second attempt on it, under its own name.
    node = world.path / "nodes" / "job-1" / "w-0"
    (log,) = (world.path / "pip.log").read_text().splitlines()
    assert "--constraint code/constraints.txt --requirement code/requirements.txt" in log
    assert len(list((node / "clp" / "environments").iterdir())) == 1
    target.start(record)
    assert len(world.runs) == 1


def test_a_machine_with_an_old_python_gets_another(world):
    (world.path / "old_python").touch()
    record, target = world.record("tpu-vm", {**SPOT, "topology": "v5e:2x2"})
    assert world.run(record, target).phase == "succeeded"
    brought, made, installed = (world.path / "pip.log").read_text().splitlines()
    assert brought == "pip of the machine: -m pip install --quiet --user uv"
    assert made.startswith("uv: -m uv venv --quiet --seed --python 3.11 ") and "requirements.txt" in installed
    assert len(world.runs) == 1


def test_a_command_that_names_no_file_of_the_user(world):
    job = Job("job", ("python3", str(FAKES / "training.py")), "tpu-vm", {**SPOT, "topology": "v5e:2x2"})
    target = find_target(job.target, job.options)
    assert world.run(create(world.jobs, Cargo(job, target.ships_code)), target).phase == "succeeded"
    assert world.runs[0]["files"] == []


def test_a_spot_node_disappears(world):
    record, target = world.record("tpu-vm", {**SPOT, "topology": "v5e:2x2"}, run_dir=None)
    world.trouble("training", {"sleep": 60})
    until(lambda: advance(record, target, QUICK).phase == "running" and world.runs)
    world.trouble("preempt")
    assert world.run(record, target).phase == "succeeded"
    assert phases(record)[-4:] in (
        ["queued", "starting", "running", "succeeded"],
        ["preempted", "queued", "starting", "succeeded"],
    )
    assert "preempted" in phases(record)
    assert actions(world) == [("create", "job-1"), ("delete", "job-1"), ("create", "job-2"), ("delete", "job-2")]
    assert world.state["resources"] == {}


def test_a_worker_fails_and_the_others_are_ended(world):
    record, target = world.record("tpu-vm", SPOT)
    world.trouble("training", {"code": 9, "among": 4})
    world.trouble("training", {"sleep": 60}, times=3)
    assert world.run(record, target).phase == "succeeded"
    broken = next(state for state in record.states if state.phase == "broken")
    assert "exit code 9" in broken.detail
    assert len(world.runs) == 8
    until(lambda: are_gone(run["pid"] for run in world.runs))


def test_a_killed_script_is_no_worker_that_runs(world, unreaped):
    record, target = world.record("tpu-vm", {**SPOT, "topology": "v5e:2x2"})
    world.trouble("training", {"sleep": 60})
    until(lambda: advance(record, target, QUICK) and world.runs)
    script = int((world.path / "nodes/job-1/w-0/clp/job-1/state/pid").read_text())
    os.killpg(script, signal.SIGKILL)
    assert Path(f"/proc/{script}").is_dir()
    until(lambda: target.status(record).phase == "failed")
    assert target.status(record).detail == "worker 0 ended with exit code 137"
    # Nothing to wait for.
    begun = time.monotonic()
    target.stop(record)
    assert time.monotonic() - begun < 30
    assert world.run(record, target).phase == "succeeded"


def test_two_slices_are_one_queued_resource(world):
    record, target = world.record("tpu-vm", {**SPOT, "topology": "v5e:2x2", "num_slices": "2"})
    assert world.run(record, target).phase == "succeeded"
    (create,) = [call for call in world.calls("gcloud") if "create" in call]
    assert {"--node-count=2", "--node-prefix=job-1"} <= set(create)
    assert len(world.runs) == 2
    assert world.state["resources"] == {}


def test_the_output_of_all_slices_is_followed_at_once(world):
    record, target = world.record("tpu-vm", {**SPOT, "topology": "v5e:2x2", "num_slices": "2"}, words=("a b",))
    world.trouble("training", {"until": "go"}, times=2)
    until(lambda: advance(record, target, QUICK) and len(world.runs) == 2)
    lines = target.logs(record, follow=True)
    assert {next(lines), next(lines)} == {f"[job-1-{i}-w-0] training ['a b']" for i in (0, 1)}
    (world.path / "go").touch()
    assert {next(lines), next(lines)} == {f"[job-1-{i}-w-0] the last line" for i in (0, 1)}
    lines.close()
    assert world.run(record, target).phase == "succeeded"


def test_output_is_followed_from_the_setup_to_the_end(world):
    record, target = world.record("tpu-vm", {**SPOT, "topology": "v5e:2x2"})
    world.trouble("training", {"until": "go"})
    until(lambda: advance(record, target, QUICK) and world.runs)
    (state,) = world.path.glob("nodes/job-1/w-0/clp/job-1/state")
    # As while the environment is made.
    (state / "log").rename(state / "later")
    (state / "setup.log").write_text("installing\n")
    lines = target.logs(record, follow=True)
    assert next(lines) == "[job-1-w-0] installing"
    (state / "later").rename(state / "log")
    (world.path / "go").touch()
    assert list(lines) == ["[job-1-w-0] training ['a']", "[job-1-w-0] the last line"]


def test_quota_is_refused_for_good(world):
    record, target = world.record("tpu-vm", SPOT)
    world.trouble("create", "quota")
    end = world.run(record, target)
    assert end.phase == "failed"
    assert "Limit: 0 in zone us-west4-a" in end.detail and "docs/launching.md" in end.detail
    assert world.state.get("created") is None


def test_a_zone_out_of_stock_is_asked_again(world):
    record, target = world.record("tpu-vm", {**SPOT, "topology": "v5e:2x2"})
    world.trouble("create", "stockout", times=2)
    assert world.run(record, target).phase == "succeeded"
    assert phases(record).count("preempted") == 2
    assert world.state["created"] == ["job-3"]


@pytest.mark.parametrize("when", ["timeout_before", "timeout_after"])
def test_a_creation_that_does_not_answer_is_not_repeated_blindly(world, monkeypatch, when):
    monkeypatch.setattr(calls, "LONGEST", 3.0)
    record, target = world.record("tpu-vm", {**SPOT, "topology": "v5e:2x2"})
    world.trouble("create", when)
    assert world.run(record, target).phase == "succeeded"
    assert world.state["created"] == ["job-1"]
    assert len(world.runs) == 1


def test_a_deletion_that_does_not_answer_is_repeated(world, monkeypatch):
    monkeypatch.setattr(calls, "LONGEST", 3.0)
    record, target = world.record("tpu-vm", {**SPOT, "topology": "v5e:2x2"})
    world.trouble("delete", "timeout")
    assert world.run(record, target).phase == "succeeded"
    assert world.state["resources"] == {}


def test_ssh_that_is_refused_for_a_while(world):
    record, target = world.record("tpu-vm", {**SPOT, "topology": "v5e:2x2"})
    world.trouble("ssh", "refused", times=5)
    assert world.run(record, target).phase == "succeeded"
    assert len(world.runs) == 1


def test_a_launcher_dies_at_every_step_and_another_goes_on(world):
    record, _ = world.record("tpu-vm", {**SPOT, "topology": "v5e:2x2"})
    assert one_launcher_each(record) >= 4
    assert len(world.runs) == 1
    assert actions(world) == [("create", "job-1"), ("delete", "job-1")]


def test_stopping_lets_workers_save_and_leaves_nothing(world):
    record, target = world.record("tpu-vm", {**SPOT, "topology": "v5e:2x2"})
    world.trouble("training", {"sleep": 60})
    until(lambda: advance(record, target, QUICK).phase == "running" and world.runs)
    record.stop_request.touch()
    home = world.path / "nodes" / "job-1" / "w-0" / "clp" / "job-1" / "state"
    advance(record, target, QUICK)
    assert record.state.phase == "stopped"
    assert (home / "log").read_text().endswith("asked to end\n")
    assert (home / "exit").read_text() == "75\n"
    world.run(record, target)
    assert world.state["resources"] == {}


def test_a_crash_loop_ends_with_the_last_lines_of_each_worker(world):
    record, target = world.record("tpu-vm", {**SPOT, "topology": "v5e:2x2"}, max_failures=2)
    world.trouble("training", {"code": 134}, times=2)
    end = world.run(record, target)
    assert end.phase == "failed"
    assert end.detail.startswith("2 failures without a new checkpoint, the last: worker 0 ended with exit code 134.")
    assert end.detail.endswith("[job-2-w-0] the last line")
    retry(record)
    assert world.run(record, target).phase == "succeeded"
    assert world.state["resources"] == {}


def test_checkpoints_in_a_bucket_count_as_progress(world):
    record, target = world.record("tpu-vm", {**SPOT, "topology": "v5e:2x2"}, run_dir="gs://b/run", max_failures=2)
    steps = world.path / "buckets" / "b" / "run" / "checkpoints"
    world.trouble("training", {"code": 134}, times=3)

    def saves():
        (steps / str(10 * record.attempt)).mkdir(parents=True, exist_ok=True)
        return advance(record, target, QUICK).phase == "succeeded"

    until(saves)
    assert [state.step for state in record.states if state.phase == "broken"] == [10, 20, 30]


def test_code_comes_through_a_bucket(world):
    (world.path / "buckets" / "b").mkdir(parents=True)
    record, target = world.record("tpu-vm", {**SPOT, "bucket": "gs://b/code"})
    target.check_access(record.job)
    assert world.run(record, target).phase == "succeeded"
    assert len(world.runs) == 4
    uploads = [call for call in world.calls("gcloud") if call[1:3] == ["storage", "cp"] and call[4].startswith("gs://")]
    assert [call[4] for call in uploads] == ["gs://b/code/job-1/code.tar.gz"]
    # Nothing of ours stays there.
    assert [path for path in (world.path / "buckets").rglob("*") if path.is_file()] == []


def test_a_bucket_is_a_folder_of_the_workers(world):
    (world.path / "buckets" / "runs" / "a").mkdir(parents=True)
    folder = str(world.path / "a mount")
    options = {**SPOT, "topology": "v5e:2x2", "mounts": f"runs={folder}"}
    run_dir = seen_from_here(f"{folder}/a/run", options)
    assert run_dir == "gs://runs/a/run" and seen_from_here("/else", options) == "/else"
    step = f"{folder}/a/run/checkpoints/7"
    job = Job("job", ("mkdir", "-p", step), "tpu-vm", options, run_dir)
    target = find_target("tpu-vm", options)
    target.check(Cargo(job, target.ships_code))
    target.check_access(job)
    end = world.run(create(world.jobs, Cargo(job, target.ships_code)), target)
    assert (end.phase, end.step) == ("succeeded", 7)
    assert (world.path / "buckets/runs/a/run/checkpoints/7").is_dir()
    assert (world.path / "mounts.log").read_text() == f"gcsfuse --implicit-dirs runs {folder}\n"


def test_secrets_are_read_by_the_workers_and_written_nowhere(world, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "the-launchers-own")
    record, target = world.record("tpu-vm", {**SPOT, "topology": "v5e:2x2", "secrets": "WANDB_API_KEY=wandb"})
    assert world.run(record, target).phase == "succeeded"
    assert [run["WANDB_API_KEY"] for run in world.runs] == ["the-secret-value"]
    for file in record.path.rglob("*"):
        if file.is_file():
            assert b"the-secret-value" not in file.read_bytes() and b"the-launchers-own" not in file.read_bytes()
    assert "the-secret-value" not in (world.path / "calls.jsonl").read_text()


def test_a_dry_run_is_what_is_done(world):
    record, target = world.record("tpu-vm", SPOT)
    planned = [list(step.words) for step in target.dry_run(record) if isinstance(step, Run)]
    files = {step.path: step.text for step in target.dry_run(record) if isinstance(step, Write)}
    assert world.calls() == []
    world.run(record, target)
    done = [call for call in world.calls("gcloud") if call in planned]
    assert done == planned
    for path, text in files.items():
        assert path.read_text() == text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"topology": "v9:4x4"}, "--topology is 'v9:4x4': expected a chip (v5e, v5p, v6e)"),
        ({"topology": "v5e:3x4"}, "--topology is 'v5e:3x4': v5e comes as 1x1, 2x2"),
        ({"topology": "v5p:4x8x4"}, "multiples of 4 in rising order"),
        (
            {"topology": "v5p:4x4x16", "zone": "us-east5-a"},
            "TPU VMs are asked for by their number of chips, and 256 come in",
        ),
        ({"zone": "us-east9-z"}, "--zone is 'us-east9-z': v5e is known to be in us-central1-a"),
        ({"num_slices": "0"}, "--num_slices is 0: expected at least 1."),
        ({"provision": "free"}, "--provision is 'free': expected on-demand or spot or reserved."),
        ({"bucket": "b"}, "--bucket is 'b': expected gs://BUCKET/FOLDER."),
        ({"mounts": "b"}, "--mounts has 'b': expected BUCKET=/FOLDER"),
        ({"secrets": "abc"}, "--secrets has 'abc': expected the name of a secret"),
        ({"topolgy": "v5e:4x4"}, "clp launch tpu-vm has no option --topolgy (did you mean topology?)."),
    ],
)
def test_options_are_checked_before_anything(world, options, message):
    with pytest.raises(LaunchError) as error:
        find_target("tpu-vm", {**SPOT, **options})
    assert message in str(error.value) and "\n" not in str(error.value)
    assert world.calls() == []


def test_any_zone_takes_an_unknown_one(world):
    assert find_target("tpu-vm", {**SPOT, "zone": "us-east9-z", "any_zone": "true"}).zone == "us-east9-z"


def test_access_is_checked_before_anything_is_created(world):
    record, target = world.record("tpu-vm", SPOT, run_dir="gs://absent/run")
    with pytest.raises(LaunchError, match=r"gs://absent not found"):
        target.check_access(record.job)
    world.trouble("credentials")
    with pytest.raises(LaunchError, match="gcloud has no credentials: run gcloud auth login"):
        target.check_access(record.job)
    record.append("queued", attempt=1)
    target.submit(record)
    with pytest.raises(
        LaunchError, match="there is a queued resource job-1 in us-west4-a already: give another --name"
    ):
        target.check_access(record.job)


def test_a_run_directory_that_ends_with_the_workers_is_refused(world):
    record, target = world.record("tpu-vm", SPOT, run_dir="runs/x")
    with pytest.raises(LaunchError, match="the run directory is 'runs/x', which the workers do not share"):
        target.check(Cargo(record.job, target.ships_code))
    shared = find_target("tpu-vm", {**SPOT, "shared_disk": "runs"})
    shared.check(Cargo(record.job, shared.ships_code))


def test_a_silent_worker_is_no_verdict(world):
    record, target = world.record("tpu-vm", {**SPOT, "topology": "v5e:2x2"})
    record.append("queued", attempt=1)
    target.submit(record)
    target.status(record)
    world.trouble("ssh", "refused")
    with pytest.raises(Unreachable):
        target.status(record)


@pytest.mark.parametrize(
    ("why", "attempts"),
    [("Quota limit 'TPUV5s' has been exceeded. Limit: 0", 1), ("an internal error", 2), ("no more capacity", 3)],
)
def test_a_queued_resource_that_failed_is_asked_for_again_only_where_that_helps(world, why, attempts):
    for _ in range(2):
        world.trouble("fail", why)
    record, target = world.record("tpu-vm", {**SPOT, "topology": "v5e:2x2"}, max_failures=2)
    end = world.run(record, target)
    assert len(world.state["created"]) == attempts and world.state["resources"] == {}
    assert end.phase == ("succeeded" if attempts == 3 else "failed") and (attempts == 3 or why in end.detail)


def test_an_answer_that_is_none_is_asked_for_again(world):
    record, target = world.record("tpu-vm", {**SPOT, "topology": "v5e:2x2"})
    world.trouble("odd")
    assert world.run(record, target).phase == "succeeded" and len(world.state["created"]) == 1


@pytest.mark.parametrize(
    ("trouble", "value", "message"),
    [
        ("key", True, "gcloud has no key for SSH yet: ssh-keygen -t rsa -f ~/.ssh/google_compute_engine"),
        ("agent", "absent", "only with its key in a running ssh-agent"),
        ("agent", "other", "only with its key in a running ssh-agent"),
    ],
)
def test_the_key_is_asked_for_before_anything_is_rented(world, trouble, value, message):
    record, target = world.record("tpu-vm", SPOT)
    world.trouble(trouble, value)
    with pytest.raises(LaunchError, match=message):
        target.check_access(record.job)
    alone, one_host = world.record("tpu-vm", {**SPOT, "topology": "v5e:2x2"}, name="alone")
    one_host.check_access(alone.job)


def test_logs_say_why_there_are_none(world):
    record, target = world.record("tpu-vm", {**SPOT, "topology": "v5e:2x2"})
    world.trouble("training", {"sleep": 30})
    until(lambda: advance(record, target, QUICK) and world.runs)
    world.trouble("ssh", "refused")
    with pytest.raises(LaunchError, match="refused: ERROR: .*connection refused"):
        list(target.logs(record))
    target.delete(record)
