"""Processes on this machine, for real: exit codes, kills, launchers that die, and words that shells would change."""

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from clp_jax.launch.cargo import Cargo
from clp_jax.launch.errors import LaunchError
from clp_jax.launch.job import Job, JobRecord
from clp_jax.launch.namespaces import check_namespaces
from clp_jax.launch.supervisor import advance, describe
from clp_jax.launch.target import Unreachable
from clp_jax.launch.targets import find_target

from .conftest import AWKWARD, QUICK, are_gone, phases, until


def begin(world, options, **settings):
    """A job whose processes run."""
    record, target = world.record("local", options, **settings)
    processes = int(options.get("processes", 1))
    until(lambda: advance(record, target, QUICK) and len(world.runs) >= processes)
    return record, target


def test_processes_find_each_other_and_get_their_words_unchanged(world):
    record, target = world.record("local", {"processes": "3", "devices_per_process": "2"}, words=(AWKWARD, "", "*"))
    assert world.run(record, target).phase == "succeeded"
    assert phases(record) == ["queued", "running", "succeeded"]
    assert [run["words"] for run in world.runs] == [[AWKWARD, "", "*"]] * 3
    assert sorted(run["CLP_PROCESS_ID"] for run in world.runs) == ["0", "1", "2"]
    assert {run["CLP_NUM_PROCESSES"] for run in world.runs} == {"3"}
    (address,) = {run["CLP_COORDINATOR_ADDRESS"] for run in world.runs}
    assert address == f"127.0.0.1:{record.kept('port')}"
    assert {run["JAX_NUM_CPU_DEVICES"] for run in world.runs} == {"2"}
    assert {run["folder"] for run in world.runs} == {record.job.directory}


def test_one_process_has_nobody_to_find(world):
    record, target = world.record("local", {})
    world.run(record, target)
    assert "CLP_PROCESS_ID" not in world.runs[0] and "JAX_NUM_CPU_DEVICES" not in world.runs[0]


def test_a_killed_process_ends_the_others_and_all_begin_again(world):
    world.trouble("training", {"sleep": 60}, times=2)
    record, target = begin(world, {"processes": "2"})
    os.kill(world.runs[0]["pid"], signal.SIGKILL)
    assert world.run(record, target).phase == "succeeded"
    assert phases(record) == ["queued", "running", "broken", "queued", "running", "succeeded"]
    assert "exit code 137" in record.states[2].detail
    until(lambda: are_gone(run["pid"] for run in world.runs))
    assert len(world.runs) == 4


def test_a_killed_script_is_no_success_and_leaves_no_command(world, unreaped):
    world.trouble("training", {"sleep": 60})
    record, target = begin(world, {})
    here = record.attempt_directory / "worker-0"
    os.utime(here / "claimed", (0, 0))
    os.kill(int((here / "pid").read_text()), signal.SIGKILL)
    assert world.run(record, target).phase == "succeeded"
    assert phases(record)[2] == "broken"
    until(lambda: are_gone(run["pid"] for run in world.runs))


def test_a_job_outlives_its_launcher_and_is_found_again(world, tmp_path):
    world.trouble("training", {"until": "go"})
    record, _ = world.record("local", {})
    program = (
        "import sys; from pathlib import Path; from clp_jax.launch.job import JobRecord; from clp_jax.launch.local import Local; "
        "from clp_jax.launch.supervisor import *; "
        f"record = JobRecord.load(Path({str(record.path)!r})); supervise([record], [Local()], Patience(look=0.05))"
    )
    launcher = subprocess.Popen(
        [sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    )
    until(lambda: world.runs)
    launcher.kill()
    launcher.wait()
    (world.path / "go").touch()
    again = JobRecord.load(record.path)
    assert world.run(again, find_target("local", {})).phase == "succeeded"
    assert len(world.runs) == 1 and again.attempt == 1


def test_asked_twice_it_runs_once(world):
    record, target = world.record("local", {"processes": "2"})
    record.append("queued", attempt=1)
    for _ in range(3):
        target.submit(record)
    until(lambda: target.status(record).phase == "succeeded")
    assert len(world.runs) == 2


def test_what_is_deleted_before_it_began_never_begins(world):
    record, target = world.record("local", {})
    record.append("queued", attempt=1)
    target.submit(record)
    target.delete(record)
    before = len(world.runs)
    subprocess.run(["bash", str(record.attempt_directory / "worker-0" / "run.sh")], check=True)
    assert len(world.runs) == before <= 1


def test_stopping_gives_time_to_save(world):
    world.trouble("training", {"sleep": 60})
    record, target = begin(world, {})
    record.stop_request.touch()
    assert world.run(record, target).phase == "stopped"
    assert list(target.logs(record))[-1] == "[0] asked to end"
    assert are_gone([world.runs[0]["pid"]])
    assert (record.attempt_directory / "worker-0" / "exit").read_text() == "75\n"


def test_logs_are_followed_to_the_end(world):
    world.trouble("training", {"sleep": 1}, times=2)
    record, target = begin(world, {"processes": "2"})
    lines = list(target.logs(record, follow=True))
    assert sorted(lines) == ["[0] the last line", "[0] training ['a']", "[1] the last line", "[1] training ['a']"]
    assert sorted(target.logs(record, lines=1)) == ["[0] the last line", "[1] the last line"]


def test_a_crash_loop_shows_the_last_lines(world):
    record, target = world.record("local", {}, max_failures=2)
    world.trouble("training", {"code": 7}, times=2)
    assert world.run(record, target).phase == "failed"
    assert describe(record).endswith(
        "worker 0 ended with exit code 7. The last lines:\n[0] training ['a']\n[0] the last line"
    )


def test_checkpoints_are_progress(world):
    record, target = world.record("local", {}, max_failures=2, run_dir=str(world.path / "run"))
    for step in (5, 9, 9):
        world.trouble("training", {"code": 7, "step": step})
    assert world.run(record, target).phase == "succeeded"
    assert [state.step for state in record.states if state.phase == "broken"] == [5, 9, 9]


def test_a_command_that_is_not_there(world, tmp_path):
    record, target = world.record("local", {})
    absent = dataclasses.replace(record.job, command=("no-such-program",))
    with pytest.raises(LaunchError, match="there is no command 'no-such-program' on this machine"):
        target.check(Cargo(absent, target.ships_code))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"processes": "0"}, "--processes is 0: expected at least 1."),
        ({"processes": "two"}, "--processes is 'two': expected a whole number."),
        ({"devices_per_process": "0"}, "--devices_per_process is 0: expected at least 1."),
        ({"grace": "-1"}, "--grace is -1: expected seconds, at least 0."),
        ({"proceses": "2"}, "clp launch local has no option --proceses (did you mean processes?)."),
    ],
)
def test_options_are_checked_before_anything(options, message):
    with pytest.raises(LaunchError) as error:
        find_target("local", options)
    assert str(error.value) == message


TALK = """
import os, socket, sys
host, _, port = os.environ["CLP_COORDINATOR_ADDRESS"].partition(":")
if os.environ["CLP_PROCESS_ID"] == "0":
    with socket.create_server((host, int(port))) as server:
        print("came from", server.accept()[1][0], flush=True)
else:
    for _ in range(200):
        try:
            socket.create_connection((host, int(port)), 5).close()
            break
        except ConnectionRefusedError:
            __import__("time").sleep(0.05)
"""

SUM = """
import jax, jax.numpy as jnp, os
jax.distributed.initialize(
    os.environ["CLP_COORDINATOR_ADDRESS"], int(os.environ["CLP_NUM_PROCESSES"]), int(os.environ["CLP_PROCESS_ID"])
)
from jax.experimental import multihost_utils
found = multihost_utils.process_allgather(jnp.array(10 + jax.process_index()))
print("gathered", found.tolist(), flush=True)
"""


def permitted():
    try:
        check_namespaces(1)
    except LaunchError:
        return False
    return True


@pytest.mark.skipif(not permitted(), reason="needs the rights of root for networks")
def test_processes_in_namespaces_have_addresses_of_their_own(world):
    job = Job("job", (sys.executable, "-c", TALK), "local", {"processes": "2", "namespaces": "true"}, directory="/")
    record, target = JobRecord.create(world.jobs, job), find_target("local", {"processes": "2", "namespaces": "true"})
    target.check_access(job)
    record.append("queued", attempt=1)
    networks = target._networks(record)
    target.submit(record)
    target.submit(record)
    until(lambda: target.status(record).phase == "succeeded")
    assert list(target.logs(record)) == [f"[0] came from {networks.address(1)}"]
    assert networks.address(1) != networks.address(0)
    target.delete(record)
    target.delete(record)
    there = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    links = subprocess.run(["ip", "link"], capture_output=True, text=True, check=True).stdout
    assert networks._digest not in there and networks._digest not in links


@pytest.mark.skipif(not permitted(), reason="needs the rights of root for networks")
def test_processes_in_namespaces_compute_together(world):
    options = {"processes": "2", "namespaces": "true", "devices_per_process": "1"}
    job = Job("job", (sys.executable, "-c", SUM), "local", options, directory="/")
    record, target = JobRecord.create(world.jobs, job), find_target("local", options)
    assert world.run(record, target).phase == "succeeded"
    lines = [line for line in target.logs(record) if "gathered" in line]
    assert lines == ["[0] gathered [10, 11]", "[1] gathered [10, 11]"]
    assert not list(Path("/etc/netns").glob(f"clp-{target._networks(record)._digest}-*"))


def test_namespaces_that_are_not_permitted(world, tmp_path):
    program = tmp_path / "tools" / "ip"
    program.write_text("#!/bin/sh\necho 'RTNETLINK answers: Operation not permitted' >&2\nexit 2\n")
    program.chmod(0o755)
    record, target = world.record("local", {"namespaces": "true"})
    with pytest.raises(LaunchError, match="--namespaces needs the rights of root for networks: .*not permitted"):
        target.check_access(record.job)


def test_what_runs_on_another_machine_is_not_begun_here(world, monkeypatch):
    record, target = world.record("local", {})
    world.trouble("training", {"sleep": 30})
    until(lambda: advance(record, target, QUICK) and world.runs)
    noted = record.kept("machine")
    record.keep("machine", {"name": "elsewhere", "boot": "another"})
    for ask in (target.status, target.stop, target.delete):
        with pytest.raises(Unreachable, match="job-1 was begun on elsewhere: look after it there."):
            ask(record)
    # It got another name, or began anew.
    for change in ({"name": "elsewhere"}, {"boot": "another"}):
        record.keep("machine", noted | change)
        assert target.status(record).phase == "running"
    target.delete(record)
    assert len(world.runs) == 1


def test_an_exit_code_that_is_none_is_told(world):
    record, target = world.record("local", {})
    advance(record, target, QUICK)
    advance(record, target, QUICK)
    until(lambda: target.status(record).phase == "succeeded")
    (code,) = record.attempt_directory.glob("worker-0/exit")
    code.write_text("abc")
    with pytest.raises(LaunchError, match="holds 'abc': expected an exit code"):
        target.status(record)


def test_a_worker_that_claimed_in_the_future_is_dead_when_it_is(world):
    record, target = world.record("local", {})
    world.trouble("training", {"sleep": 30})
    until(lambda: advance(record, target, QUICK) and world.runs)
    here = record.attempt_directory / "worker-0"
    os.killpg(int((here / "pid").read_text()), signal.SIGKILL)
    ahead = time.time() + 7200
    os.utime(here / "claimed", (ahead, ahead))
    until(lambda: target.status(record).phase == "failed", 5.0)
