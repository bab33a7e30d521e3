"""Disks and clocks as they are: full, slow, read-only, locked by the dead, and running backwards."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from clp_jax.training import checkpoint_manifest
from clp_jax.training.checkpoint_items import CheckpointError
from clp_jax.training.checkpoint_steps import KeepBest, Retention
from clp_jax.training.checkpoints import Checkpoints
from clp_jax.training.guards import Guards
from clp_jax.training.run_directory import open_run_directory
from clp_jax.training.saved_params import find_checkpoint, load_params, save_params
from clp_jax.training.train_state import TrainState


def state_of(step, size=3):
    key = jnp.zeros(2, jnp.uint32)
    params = {"w": jnp.full((size,), step, jnp.float32)}
    return TrainState(jnp.int32(step), params, {"slot": jnp.ones(3)}, None, key, Guards().init())


def save(checkpoints, step, size=3, **metrics):
    checkpoints.save(step, state_of(step, size), {"examples": step}, {"stage": "toy"}, metrics)


FULL = """
import sys
sys.path.insert(0, sys.argv[1])
import json, os
from checkpoint_disks_test import save, Checkpoints, CheckpointError, load_params, large_state
directory = sys.argv[2]
said = []
with Checkpoints(directory) as checkpoints:
    save(checkpoints, 1)
    try:
        checkpoints.save(2, large_state(), {}, {"stage": "toy"}, {})
        checkpoints.wait()
    except CheckpointError as error:
        said.append(str(error))
    save(checkpoints, 3)
print(json.dumps([said, sorted(os.listdir(directory)), load_params(directory)[2]]))
"""


def large_state():
    """Of a megabyte that can't be compressed."""
    large = np.random.default_rng(0).integers(0, 2**32, 1 << 18, np.uint32)
    return dataclasses.replace(state_of(2), params={"w": jnp.asarray(large)})


def run_on_small_disk(code, directory, *, megabytes):
    """Runs Python where `directory` is a disk of its own, in a name space of mounts that ends with the process."""
    mount = 'mount -t tmpfs -o size="$1" none "$2" && shift && shift && exec "$@"'
    words = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mount, "sh", f"{megabytes}m", directory]
    return subprocess.run(
        [*words, sys.executable, "-c", code, str(Path(__file__).parent), directory],
        capture_output=True,
        text=True,
        check=False,
    )


def can_mount(directory):
    return shutil.which("unshare") is not None and run_on_small_disk("", directory, megabytes=1).returncode == 0


def test_a_full_disk_is_said_loses_nothing_and_keeps_no_halves(tmp_path):
    if not can_mount(tmp_path):
        pytest.skip("this machine lets its users mount nothing: no small disk can be made")
    done = run_on_small_disk(FULL, tmp_path, megabytes=1)
    assert done.returncode == 0, done.stderr
    said, names, last = json.loads(done.stdout)
    assert len(said) == 1 and "the checkpoint of step 2 could not be written to" in said[0]
    assert "the disk is full. Step 1 is intact: nothing before it is lost. Free some space" in said[0]
    assert names == ["1", "3"] and last == 3
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []  # It was on the other disk.


FULL_RUN = """
import sys
sys.path.insert(0, sys.argv[1] + "/../fixtures")
from clp_jax import main as cli
cli.COMMANDS = {"fail": "failing_runs.fail"}
sys.exit(cli.main(["fail", "--run_dir=" + sys.argv[2] + "/run", "--how=large"]))
"""


def test_a_run_that_fills_the_disk_ends_with_one_line_and_1(tmp_path):
    if not can_mount(tmp_path):
        pytest.skip("this machine lets its users mount nothing: no small disk can be made")
    done = run_on_small_disk(FULL_RUN, tmp_path, megabytes=9)
    assert done.returncode == 1 and "Traceback" not in done.stderr and "Error" not in done.stderr, done.stderr
    said = done.stderr.splitlines()[-1]
    assert (
        said.startswith("clp fail: error: the checkpoint of step 1 could not be written to")
        and "the disk is full" in said
    )


LATE = """
import sys
sys.path.insert(0, sys.argv[1])
import asyncio, tensorstore
from checkpoint_disks_test import save, Checkpoints
with Checkpoints(sys.argv[2]) as checkpoints:
    save(checkpoints, 1)

async def wait(future):
    await future

class Fails:
    def __del__(self):
        raise RuntimeError("in its end")

promise, future = tensorstore.Promise.new()
loop = asyncio.new_event_loop()
task = loop.create_task(wait(future))
loop.run_until_complete(asyncio.sleep(0))
loop.close()
promise.set_result(None)
assert future.done() and not task.done()
Fails()
"""


def test_arrays_that_a_failed_save_still_wrote_report_in_silence(tmp_path):
    words = [sys.executable, "-c", LATE, str(Path(__file__).parent), tmp_path]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "loop is closed" not in done.stderr and "RuntimeError: in its end" in done.stderr


def test_a_slow_disk_holds_up_nothing_until_the_next_save(tmp_path, monkeypatch):
    plain, may_go_on = checkpoint_manifest.flush_to_disk, threading.Event()

    def slow(file):
        assert may_go_on.wait(60)
        plain(file)

    with Checkpoints(tmp_path) as checkpoints:
        save(checkpoints, 1)
        checkpoints.wait()
        monkeypatch.setattr(checkpoint_manifest, "flush_to_disk", slow)
        save(checkpoints, 2)  # Returns while nothing of it is on the disk.
        for _ in range(10):
            checkpoints.raise_if_failed()
            time.sleep(0.01)
        assert checkpoints.latest_step() == 1 and find_checkpoint(tmp_path).name == "1"
        assert sorted(entry.name for entry in tmp_path.iterdir()) == ["1", "2.unfinished"]
        threading.Timer(0.2, may_go_on.set).start()
        save(checkpoints, 3)
        assert may_go_on.is_set() and checkpoints.latest_step() == 2
    assert checkpoints.latest_step() == 3


def test_a_directory_that_is_gone_when_the_next_step_is_saved(tmp_path):
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        save(checkpoints, 1)
        checkpoints.wait()
        (tmp_path / "checkpoints").rename(tmp_path / "elsewhere")
        (tmp_path / "checkpoints").write_text("")
        with pytest.raises(CheckpointError, match="step 2 could not be written to .*Not a directory"):
            save(checkpoints, 2)
    with pytest.raises(CheckpointError, match=r"parameters could not be written to .*File exists"):
        save_params(tmp_path / "checkpoints" / "reference", {"w": jnp.ones(3)}, {})


READ_ONLY = """
import sys
sys.path.insert(0, sys.argv[1])
import subprocess, os
from checkpoint_disks_test import save, Checkpoints, CheckpointError, load_params
from clp_jax.training.run_directory import open_run_directory, RunDirectoryError
directory = sys.argv[2]
with Checkpoints(directory + "/checkpoints") as checkpoints:
    save(checkpoints, 1)
    checkpoints.wait()
    subprocess.run(["mount", "-o", "remount,ro", directory], check=True)
    print(load_params(directory)[2])
    for call in (lambda: save(checkpoints, 2), lambda: open_run_directory(directory)):
        try:
            call()
        except (CheckpointError, RunDirectoryError) as error:
            print(error)
"""


def test_a_read_only_disk_can_be_read_and_is_said(tmp_path):
    if not can_mount(tmp_path):
        pytest.skip("this machine lets its users mount nothing: no read-only disk can be made")
    done = run_on_small_disk(READ_ONLY, tmp_path, megabytes=4)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "1" and len(lines) == 3
    assert "step 2 could not be written to" in lines[1] and "Read-only file system" in lines[1]
    assert "it is on a read-only file system. Give a run directory elsewhere" in lines[2]


def test_a_lock_of_a_dead_process_holds_nobody(tmp_path):
    directory = open_run_directory(tmp_path)
    code = (
        "import sys, os, signal; from clp_jax.training.run_directory import open_run_directory\n"
        "with open_run_directory(sys.argv[1]).lock(): os.kill(os.getpid(), signal.SIGKILL)"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert killed.returncode == -9 and (tmp_path / ".lock").exists()
    with directory.lock():
        pass


def test_no_decision_depends_on_a_clock(tmp_path, monkeypatch):
    """The clock runs backwards while steps are written, and the files' times say the opposite of the order."""
    now = [2e9]

    def backwards():
        now[0] -= 1000.0
        return now[0]

    monkeypatch.setattr(time, "time", backwards)
    monkeypatch.setattr(time, "time_ns", lambda: int(backwards() * 1e9))
    with Checkpoints(tmp_path, Retention(2, best=KeepBest("loss"))) as checkpoints:
        for step in (9, 10, 11, 100):
            save(checkpoints, step, loss=float(step))
            checkpoints.wait()
            for file in [tmp_path / str(step), *(tmp_path / str(step)).rglob("*")]:
                os.utime(file, (2e9 - 1e5 * step,) * 2)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["100", "11", "9"]
    assert find_checkpoint(tmp_path).name == "100" and load_params(tmp_path)[2] == 100
    with Checkpoints(tmp_path) as checkpoints:
        state, position = checkpoints.restore(state_of(0))
    assert position == {"examples": 100} and state.params["w"].tolist() == [100.0] * 3


def test_two_runs_on_one_directory(tmp_path):
    """The second is refused before it touches anything; what the first is writing stays."""
    directory = open_run_directory(tmp_path, "a = 1\n")
    (directory.checkpoints / "5.unfinished").mkdir(parents=True)
    code = (
        "import sys; from clp_jax.training.run_directory import open_run_directory\n"
        "from clp_jax.training.checkpoints import Checkpoints\n"
        "directory = open_run_directory(sys.argv[1], 'a = 1\\n')\n"
        "with directory.lock(): Checkpoints(directory.checkpoints)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with directory.lock():
        refused = subprocess.run(command, capture_output=True, text=True, check=False)
        assert "another process is training in" in refused.stderr
        assert (directory.checkpoints / "5.unfinished").is_dir()
        # A process of the same host that writes no checkpoints may read meanwhile.
        with pytest.raises(CheckpointError, match="5.unfinished was not finished"):
            find_checkpoint(tmp_path)
    allowed = subprocess.run(command, capture_output=True, text=True, check=False)
    assert allowed.returncode == 0, allowed.stderr
    assert list(directory.checkpoints.iterdir()) == []


def test_the_second_run_to_complete_a_step_overwrites_nothing(tmp_path):
    """Where locks do not reach, on some network disks, the first to complete a step wins."""
    with Checkpoints(tmp_path) as first, Checkpoints(tmp_path) as second:
        save(first, 1)
        first.wait()
        before = (tmp_path / "1" / "manifest.json").read_bytes()
        save(second, 1, size=5)
        with pytest.raises(CheckpointError, match="1 exists: it was not overwritten"):
            second.wait()
    assert (tmp_path / "1" / "manifest.json").read_bytes() == before
    assert load_params(tmp_path)[0]["w"].shape == (3,)
