"""GKE, against a `kubectl` whose pods are processes here; and the manifest against the fields that Kubernetes has."""

import base64
import dataclasses
import datetime
import io
import json
import shlex
import tarfile
from pathlib import Path

import numpy as np
import pytest
from clp_jax.launch import calls, cargo
from clp_jax.launch.cargo import Cargo
from clp_jax.launch.errors import LaunchError
from clp_jax.launch.jobset import manifest
from clp_jax.launch.supervisor import advance
from clp_jax.launch.target import Note, Run, Write
from clp_jax.launch.targets import find_target
from kubernetes_fields import broken_limits, unknown_fields

from .conftest import AWKWARD, QUICK, are_gone, clp, one_launcher_each, phases, until

TWO_HOSTS = {"topology": "v5p:2x2x2"}
ONE_HOST = {"topology": "v5e:2x2"}
ALL = {
    "topology": "v6e:4x4",
    "num_slices": "2",
    "provision": "spot",
    "namespace": "research",
    "service_account": "trainer",
    "secrets": "WANDB_API_KEY=wandb/key",
    "context": "c",
    "mounts": "data=/mnt/data,runs=/mnt/runs",
}


def written(record, target):
    (write,) = [step for step in target.dry_run(record) if isinstance(step, Write)]
    return json.loads(write.text)


@pytest.mark.parametrize(
    "options", [ONE_HOST, TWO_HOSTS, ALL, {**ONE_HOST, "provision": "reserved", "reservation": "r"}]
)
def test_the_manifest_has_only_what_kubernetes_knows(world, options):
    record, target = world.record("gke", options, words=(AWKWARD,))
    document = written(record, target)
    assert unknown_fields(document) == [] and broken_limits(document) == []


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        (lambda job: job["spec"].update(replicatedJob=[]), "items[1].spec.replicatedJob: no such field"),
        (
            lambda job: job["spec"]["replicatedJobs"][0].update(replicas="2"),
            "items[1].spec.replicatedJobs[0].replicas: '2' is no int",
        ),
        (lambda job: job["metadata"].pop("name"), "items[1].metadata.name: missing"),
    ],
)
def test_a_wrong_manifest_is_found(world, change, wrong):
    record, target = world.record("gke", ALL)
    document = written(record, target)
    change(document["items"][1])
    assert unknown_fields(document) == [wrong]


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        (lambda job: job["spec"]["network"].update(subdomain="a.b"), "subdomain: 'a.b' is no label of DNS"),
        (lambda job: job["metadata"].update(name="a" * 60), f"pod: '{'a' * 60}-slice-1-3-abcde' is no label of DNS"),
        (lambda job: rule(job)["onExitCodes"].update(values=[2, 1]), "exit codes: [2, 1] are not in rising order"),
        (lambda job: rule(job)["onExitCodes"].update(values=[0, 1]), "exit codes: 0 is no failure"),
        (lambda job: job_of(job).update(parallelism=2**30), "replicas by parallelism: 2147483648 are too many"),
    ],
)
def test_a_broken_limit_is_found(world, change, wrong):
    record, target = world.record("gke", ALL)
    document = written(record, target)
    change(document["items"][1])
    assert broken_limits(document) == [wrong]


def job_of(jobset):
    return jobset["spec"]["replicatedJobs"][0]["template"]["spec"]


def rule(jobset):
    return job_of(jobset)["podFailurePolicy"]["rules"][0]


def test_slices_hosts_and_rights_are_in_the_manifest(world):
    record, target = world.record("gke", ALL)
    config, jobset = written(record, target)["items"]
    assert jobset["metadata"]["annotations"] == {
        "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"
    }
    (group,) = jobset["spec"]["replicatedJobs"]
    job = group["template"]["spec"]
    pod = job["template"]["spec"]
    assert (group["replicas"], job["parallelism"], job["completions"], job["completionMode"]) == (2, 4, 4, "Indexed")
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v6e-slice",
        "cloud.google.com/gke-tpu-topology": "4x4",
        "cloud.google.com/gke-spot": "true",
    }
    assert pod["containers"][0]["resources"]["limits"] == {"google.com/tpu": "4"}
    assert (pod["serviceAccountName"], pod["restartPolicy"], pod["terminationGracePeriodSeconds"]) == (
        "trainer",
        "Never",
        60,
    )
    assert jobset["spec"]["network"]["subdomain"] == jobset["metadata"]["name"] == config["metadata"]["name"] == "job-1"
    with tarfile.open(fileobj=io.BytesIO(base64.b64decode(config["binaryData"]["code.tar.gz"]))) as tar:
        assert {
            "work/my.gin",
            "clp_jax/main.py",
            "clp_jax/launch/gke.py",
            "requirements.txt",
            "constraints.txt",
        } <= set(tar.getnames())


def test_a_job_from_the_manifest_to_the_end(world):
    record, target = world.record(
        "gke", {**TWO_HOSTS, "num_slices": "2", "secrets": "WANDB_API_KEY=wandb/key"}, words=(AWKWARD,)
    )
    assert world.run(record, target).phase == "succeeded"
    assert phases(record) == ["queued", "running", "succeeded"]
    assert world.state["created"] == ["job-1"] and world.state["jobsets"] == {}
    assert [run["words"] for run in world.runs] == [[AWKWARD]] * 4
    assert sorted(run["CLP_PROCESS_ID"] for run in world.runs) == ["0", "1", "2", "3"]
    assert {run["CLP_COORDINATOR_ADDRESS"] for run in world.runs} == {"job-1-slice-0-0.job-1:8476"}
    assert {run["CLP_NUM_PROCESSES"] for run in world.runs} == {"4"}
    assert {run["WANDB_API_KEY"] for run in world.runs} == {"the-secret-value"}
    assert all(b"the-secret-value" not in path.read_bytes() for path in record.path.rglob("*") if path.is_file())


def test_a_pod_is_evicted(world):
    record, target = world.record("gke", ONE_HOST)
    world.trouble("training", {"sleep": 60})
    until(lambda: advance(record, target, QUICK) and world.runs)
    world.trouble("evict")
    assert world.run(record, target).phase == "succeeded"
    (preempted,) = [state for state in record.states if state.phase == "preempted"]
    assert preempted.detail == "job-1-slice-0-0 was evicted"
    assert world.state["created"] == ["job-1", "job-2"] and world.state["jobsets"] == {}


@pytest.mark.parametrize(
    ("reason", "seconds_ago"),
    [("InvalidImageName", 0), ("ImagePullBackOff", 3600), ("CreateContainerConfigError", 3600)],
)
def test_pods_that_never_begin_end_the_job_with_the_reason(world, reason, seconds_ago):
    since = datetime.datetime.now(datetime.UTC) - datetime.timedelta(seconds=seconds_ago)
    world.trouble("waiting", [reason, since.strftime("%Y-%m-%dT%H:%M:%SZ")])
    record, target = world.record("gke", ONE_HOST)
    end = world.run(record, target)
    assert end.phase == "failed" and end.detail == f"job-1-slice-0-0 can't begin: {reason}: as the node says"
    assert world.state["created"] == ["job-1"] and world.state["jobsets"] == {}


@pytest.mark.parametrize("reason", ["ImagePullBackOff", "CreateContainerConfigError"])
def test_what_may_go_away_is_waited_for_and_told(world, reason):
    world.trouble("waiting", [reason, datetime.datetime.now(datetime.UTC).isoformat()])
    record, target = world.record("gke", ONE_HOST)
    for _ in range(5):
        state = advance(record, target, QUICK)
    assert (state.phase, state.detail) == ("queued", f"job-1-slice-0-0: {reason}: as the node says")
    assert [state.phase for state in record.states] == ["queued", "queued"]


@pytest.mark.parametrize("seconds_ago", [0, 3600])
def test_a_bucket_that_can_not_be_mounted_is_told(world, seconds_ago):
    since = datetime.datetime.now(datetime.UTC) - datetime.timedelta(seconds=seconds_ago)
    world.trouble("waiting", ["ContainerCreating", since.isoformat()])
    world.trouble("no_mount", "bucket b does not exist")
    record, target = world.record("gke", ONE_HOST)
    for _ in range(4):
        state = advance(record, target, QUICK)
    if seconds_ago:
        assert state.phase == "failed"
        assert state.detail == "job-1-slice-0-0 can't begin: FailedMount: bucket b does not exist"
    else:
        assert (state.phase, state.detail) == ("queued", "bucket b does not exist")


def test_a_large_image_may_take_its_time(world):
    world.trouble("waiting", ["ContainerCreating", "2026-01-01T00:00:00Z"])
    record, target = world.record("gke", ONE_HOST)
    for _ in range(4):
        state = advance(record, target, QUICK)
    assert state.phase == "queued"


def test_a_job_set_without_pods_says_why(world):
    message = 'pods "job-1-slice-0-0-" is forbidden: error looking up service account default/trainer: not found'
    world.trouble("no_pods", message)
    record, target = world.record("gke", ONE_HOST)
    for _ in range(3):
        state = advance(record, target, QUICK)
    assert (state.phase, state.detail) == ("queued", message)


def test_the_scheduler_is_quoted_once_whatever_its_numbers(world):
    for words in ("0/5 nodes are available", "0/6 nodes are available", "0/6 nodes are available", "no node at all"):
        world.trouble("unschedulable", words)
    record, target = world.record("gke", ONE_HOST)
    assert world.run(record, target).phase == "succeeded"
    told = [state.detail for state in record.states if state.phase == "queued"]
    assert told == ["", "0/5 nodes are available", "no node at all"]


def test_a_users_mistake_ends_the_job_with_the_last_lines(world):
    record, target = world.record("gke", ONE_HOST)
    world.trouble("training", {"code": 2})
    end = world.run(record, target)
    assert end.phase == "failed"
    assert end.detail.splitlines()[0] == "worker 0 ended with exit code 2. The last lines:"
    assert end.detail.endswith("[pod/job-1-slice-0-0/main] the last line")
    assert world.state["jobsets"] == {}


def test_no_pod_is_left_when_the_job_set_is_deleted(world):
    record, target = world.record("gke", ONE_HOST)
    world.trouble("training", {"sleep": 20})
    until(lambda: advance(record, target, QUICK) and world.runs)
    target.delete(record)
    until(lambda: are_gone(run["pid"] for run in world.runs), 5.0)


def test_quota_is_refused_for_good(world):
    record, target = world.record("gke", ONE_HOST)
    world.trouble("apply", "quota")
    end = world.run(record, target)
    assert end.phase == "failed" and "exceeded quota: tpus" in end.detail
    assert world.state.get("created") is None


def test_a_call_that_does_not_answer_is_repeated(world, monkeypatch):
    monkeypatch.setattr(calls, "LONGEST", 3.0)
    record, target = world.record("gke", ONE_HOST)
    world.trouble("apply", "timeout")
    assert world.run(record, target).phase == "succeeded"
    assert world.state["created"] == ["job-1"] and len(world.runs) == 1


def test_a_launcher_dies_at_every_step_and_another_goes_on(world):
    record, _ = world.record("gke", ONE_HOST)
    one_launcher_each(record)
    assert len(world.runs) == 1 and world.state["created"] == ["job-1"]


def xpk(record, target):
    """The commands for xpk, as words, and the line about what it can't say."""
    (note,) = [step.text for step in target.dry_run(record) if isinstance(step, Note)]
    first, *commands, last = note.split("\n")
    assert first == "The same with xpk:"
    return [shlex.split(command) for command in commands], last


def test_xpk_users_get_all_that_its_flags_say(world):
    """Accepted by xpk 1.16: ``xpk workload create ... --dry-run --output-manifest-file=FILE``."""
    context = "gke_my-project_us-west4-a_my-cluster"
    record, target = world.record("gke", {**ALL, "context": context, "mounts": "my.runs=/mnt/b"}, words=("a b",))
    (storage, workload), last = xpk(record, target)
    where = ["--cluster=my-cluster", "--zone=us-west4-a", "--project=my-project", "--namespace=research"]
    assert storage == [
        *("xpk", "storage", "attach", "my-runs", "--type=gcsfuse", *where),
        *("--bucket=my.runs", "--mount-point=/mnt/b", "--auto-mount=true", "--readonly=false", "--size=1"),
    ]
    assert workload == [
        *("xpk", "workload", "create", *where, "--workload=job", "--tpu-type=v6e-4x4"),
        *("--num-slices=2", "--spot", "--termination-grace-period-seconds=60", "--docker-image=python:3.12"),
        f"--command={shlex.join(record.job.command)}",
    ]
    assert last == (
        "xpk has no flags for: supervision, the code and your files (the image has to hold them), "
        "--service_account=trainer, --secrets (of WANDB_API_KEY)."
    )


@pytest.mark.parametrize(
    ("options", "paid", "missing"),
    [
        ({"topology": "v5p:4x4x8", "provision": "reserved", "reservation": "r"}, "--reservation=r", ""),
        ({"topology": "v5e:2x4"}, "--on-demand", ", 8 chips in one host (it asks for two)"),
        ({"topology": "v5e:2x2", "context": "other"}, "--on-demand", ", slices of less than 8 chips"),
    ],
)
def test_what_xpk_can_not_say_is_a_line(world, options, paid, missing):
    record, target = world.record("gke", options)
    (words,), last = xpk(record, target)
    assert paid in words and "--cluster=CLUSTER" in words and "--zone=ZONE" in words
    assert last.endswith(f"(the image has to hold them){missing}.")


def test_a_dry_run_calls_nothing(world):
    record, target = world.record("gke", ONE_HOST, words=("a b",))
    steps = target.dry_run(record)
    assert world.calls() == []
    planned = [list(step.words) for step in steps if isinstance(step, Run)]
    world.run(record, target)
    assert [call for call in world.calls("kubectl") if "apply" in call] == planned


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"topology": "v5p:4x4"}, "--topology is 'v5p:4x4': v5p comes as"),
        ({"provision": "reserved"}, "--provision=reserved and --reservation=NAME go together."),
        ({"secrets": "KEY=name"}, "VARIABLE=SECRET/KEY"),
        ({"grace": "soon"}, "--grace is 'soon': expected a whole number."),
    ],
)
def test_options_are_checked_before_anything(world, options, message):
    with pytest.raises(LaunchError) as error:
        find_target("gke", {**ONE_HOST, **options})
    assert message in str(error.value)


def test_access_is_checked_before_anything_is_created(world):
    record, target = world.record("gke", ONE_HOST, run_dir="runs/x")
    with pytest.raises(LaunchError, match="which the workers do not share"):
        target.check(Cargo(record.job, target.ships_code))
    world.trouble("rights")
    with pytest.raises(LaunchError, match="kubectl may not create JobSets in this cluster: no"):
        target.check_access(record.job)
    _, mounting = world.record("gke", {**ONE_HOST, "mounts": "absent=/mnt/a"}, name="mounting")
    with pytest.raises(LaunchError, match="gs://absent not found: 404"):
        mounting.check_access(record.job)
    record.append("queued", attempt=1)
    target.submit(record)
    with pytest.raises(LaunchError, match="there is a JobSet job-1 already"):
        target.check_access(record.job)


def test_files_too_large_for_a_config_map_are_refused(world):
    record, target = world.record("gke", ONE_HOST)
    with pytest.raises(LaunchError, match="in a ConfigMap, which holds 1000000"):
        manifest(target._pods(record), "", b"\0" * 800_000)
    (world.path / "here" / "noise.bin").write_bytes(np.random.default_rng(0).bytes(700_000))
    job = dataclasses.replace(record.job, command=("cat", "noise.bin"), run_dir="gs://b/r")
    with pytest.raises(LaunchError, match="in a ConfigMap, which holds 1000000"):
        target.check(Cargo(job, target.ships_code))


def test_names_of_pods_are_no_longer_than_a_cluster_takes(world):
    long = {"topology": "v5p:16x16x24", "num_slices": "11"}
    record, target = world.record("gke", long, name="a" * 40)
    with pytest.raises(
        LaunchError, match="of 11 slices with 1536 hosts, would be longer than the 63 letters .* at most 38"
    ):
        target.check(Cargo(record.job, target.ships_code))
    record, target = world.record("gke", long, name="b" * 38)
    for attempt in (1, 9999):
        record.append("queued", attempt=attempt)
        assert broken_limits(written(record, target)) == []


def test_files_are_read_and_packed_once(world, monkeypatch):
    done = []
    for name in ("user_files", "archive"):
        real = getattr(cargo, name)
        monkeypatch.setattr(cargo, name, lambda *given, name=name, real=real: (done.append(name), real(*given))[1])
    monkeypatch.chdir(world.path / "here")
    Path("list.txt").write_text("x")
    world.trouble("apply", "quota")
    assert clp("launch", "gke", "--topology=v5e:2x2", "--name=job", "--look=0.05", "--", "cat", "list.txt") == 1
    assert sorted(done) == ["archive", "user_files"]


def test_hosts_that_are_slices_share_a_pool(world):
    record, target = world.record("gke", ONE_HOST)
    assert "annotations" not in written(record, target)["items"][1]["metadata"]
