"""How processes find each other: flags, variables, SLURM, GKE; and what is said where they can't."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from clp_jax import processes
from clp_jax.main import main
from clp_jax.processes import RESTARTABLE, ProcessError, Processes, find_processes

FLAGS = {"coordinator_address": "10.0.0.1:8476", "num_processes": "4", "process_id": "3"}
SLURM = {
    "SLURM_JOB_ID": "5000",
    "SLURM_STEP_NODELIST": "node[007,009-012],gpu1",
    "SLURM_STEP_NUM_TASKS": "6",
    "SLURM_STEP_TASKS_PER_NODE": "1(x6)",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "0",
}
GKE = {"TPU_WORKER_HOSTNAMES": "a-0.sub,a-1.sub", "TPU_WORKER_ID": "1"}


def test_a_command_of_one_process_finds_none():
    assert find_processes({}, {}) is None
    assert find_processes({"num_processes": "1"}, {}) is None
    assert find_processes({"num_processes": "1"}, SLURM) is None  # What is said outright counts.
    assert find_processes({}, SLURM | {"SLURM_STEP_NUM_TASKS": "1"}) is None
    assert find_processes({}, {"SLURM_JOB_ID": "1", "SLURM_PROCID": "0", "SLURM_NTASKS": "4"}) is None  # No `srun`.
    assert find_processes({}, {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}) is None


def test_flags_and_variables_complete_each_other():
    variables = {f"CLP_{name.upper()}": value for name, value in FLAGS.items()}
    expected = Processes("10.0.0.1:8476", 4, 3, source="coordinator_address")
    assert find_processes(FLAGS, {}) == find_processes({}, variables) == expected
    assert find_processes({"process_id": "0"}, variables | SLURM).process_id == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"process_id": None}, r"num_processes=4 without process_id: give all of --coordinator_address"),
        ({"coordinator_address": None}, "without coordinator_address"),
        ({"coordinator_address": "10.0.0.1"}, "coordinator_address is '10.0.0.1': expected HOST:PORT"),
        ({"coordinator_address": "host:port"}, "expected HOST:PORT"),
        ({"coordinator_address": "host:70000"}, "expected HOST:PORT"),
        ({"num_processes": "0"}, "num_processes is '0': expected a whole number, at least 1"),
        ({"num_processes": "four"}, "num_processes is 'four'"),
        ({"process_id": "4"}, "process_id is '4': expected a whole number from 0 to 3"),
        ({"process_id": "-1"}, "process_id is '-1'"),
    ],
)
def test_what_is_incomplete_or_cannot_be_is_said(changes, message):
    given = {name: value for name, value in (FLAGS | changes).items() if value is not None}
    with pytest.raises(ProcessError, match=message):
        find_processes(given, {})


def test_the_command_line_says_it_in_one_line(capsys):
    assert main(["train", "--gin_file=examples/pydoc_sft.gin", "--num_processes=4"]) == 2
    assert capsys.readouterr().err.startswith(
        "clp train: error: num_processes=4 without coordinator_address and process_id"
    )
    assert main(["evaluate", "--num_processes=4"]) == 2
    assert "there is no flag --num_processes" in capsys.readouterr().err
    assert main(["train", "--help"]) == 0
    assert "--coordinator_address  HOST:PORT of process 0" in capsys.readouterr().out


def test_a_slurm_step_names_its_first_host():
    found = find_processes({}, SLURM)
    assert found == Processes(f"node007:{61440 + 5000 % 4096}", 6, 5, None, "SLURM step")
    for nodes, host in (("node1", "node1"), ("a1,b2", "a1"), ("n-[3,5]", "n-3"), ("gpu[01-04]", "gpu01")):
        assert find_processes({}, SLURM | {"SLURM_STEP_NODELIST": nodes}).coordinator_address.startswith(f"{host}:")
    # Eight tasks on a node have one device each; one task on a node has all.
    eight = find_processes({}, SLURM | {"SLURM_STEP_TASKS_PER_NODE": "8(x2)", "SLURM_LOCALID": "3"})
    assert eight.local_device == 3


def test_a_tpu_slice_on_gke_counts_hosts_and_slices():
    assert find_processes({}, GKE) == Processes("a-0.sub:8482", 2, 1, source="TPU_WORKER_HOSTNAMES")
    two = {"MEGASCALE_NUM_SLICES": "2", "MEGASCALE_SLICE_ID": "1", "MEGASCALE_COORDINATOR_ADDRESS": "first-0:8080"}
    assert find_processes({}, GKE | two) == Processes("first-0:8482", 4, 3, source="TPU_WORKER_HOSTNAMES")


def test_a_coordinator_that_is_not_there_is_said_in_one_line(monkeypatch):
    monkeypatch.setenv("CLP_STARTUP_SECONDS", "1")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # Bound, and not listening: nobody else takes it, nobody answers.
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(
            ProcessError, match=rf"process 1: no coordinator at {address} within 1 s .*start process 0"
        ) as e:
            processes.start(Processes(address, 2, 1))
        assert e.value.restartable
        taken.listen()
        with pytest.raises(ProcessError, match=r"process 0 can't listen at port \d+ \(Address already in use\)"):
            processes.start(Processes(address, 2, 0))
    monkeypatch.setenv("CLP_HEARTBEAT_SECONDS", "soon")
    with pytest.raises(ProcessError, match="CLP_HEARTBEAT_SECONDS is 'soon': expected a whole number of seconds"):
        processes.start(Processes("127.0.0.1:1", 2, 0))


ALONE = """
import sys
sys.path.insert(0, sys.argv[1])
from clp_jax import processes
processes.start(processes.Processes(f"127.0.0.1:{sys.argv[2]}", 2, 0))
"""


def test_who_waits_in_vain_for_the_others_says_so_and_may_be_started_again():
    """Whether they never started, or died before they joined: nobody can tell."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [sys.executable, "-c", ALONE, str(Path(__file__).parents[1]), port]
    environment = os.environ | {"CLP_STARTUP_SECONDS": "3", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment, check=False)
    assert done.returncode == RESTARTABLE, done.stderr
    assert "process 0: not all 2 processes of this run came together within 3 s. Start every one of them" in done.stderr


def test_one_process_decides_and_leaves_by_itself():
    assert (processes.count(), processes.index(), processes.is_main()) == (1, 0, True)
    assert processes.decide("anything", lambda: {1, 2}) == {1, 2}  # Nothing goes through JSON.
    processes.wait_for_all("nothing")
    assert [processes.leave(code) for code in (0, 2, 75)] == [0, 2, 75]


@pytest.mark.parametrize(
    ("given", "variable", "value", "expected"),
    [
        (SLURM, "SLURM_STEP_NUM_TASKS", "six", "at least 1"),
        (SLURM, "SLURM_JOB_ID", "5000_1", "at least 0"),
        (SLURM, "SLURM_PROCID", "6", "from 0 to 5"),
        (SLURM, "SLURM_LOCALID", "-1", "at least 0"),
        (GKE, "TPU_WORKER_ID", "two", "from 0 to 1"),
        (GKE, "TPU_WORKER_ID", "2", "from 0 to 1"),
        (GKE, "MEGASCALE_NUM_SLICES", "2.0", "at least 0"),
        (GKE | {"MEGASCALE_NUM_SLICES": "2"}, "MEGASCALE_SLICE_ID", "2", "from 0 to 1"),
    ],
)
def test_variables_that_are_no_numbers_are_named(given, variable, value, expected):
    message = f"{variable} is {value!r}: expected a whole number, {expected}. It is set by what starts the processes"
    with pytest.raises(ProcessError, match=re.escape(message)):
        find_processes({}, given | {variable: value})
