"""A process that stands still shows where, and ends."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from clp_jax.processes import RESTARTABLE
from clp_jax.training.watchdog import Watchdog

ROOT = Path(__file__).parents[2]
SCRIPT = """
import sys, threading, time
sys.path.insert(0, sys.argv[1])
from clp_jax.training.watchdog import Watchdog
def working_hard():
    time.sleep(60)
def standing_still():
    time.sleep(60)
with Watchdog(0.5) as watchdog:
    for _ in range(15):
        time.sleep(0.1)
        watchdog.progress()
    print("went on", flush=True)
    threading.Thread(target=working_hard, daemon=True).start()
    standing_still()
"""


def test_a_process_without_progress_shows_its_stacks_and_ends():
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(ROOT)], capture_output=True, text=True, timeout=50)
    assert done.returncode == RESTARTABLE and done.stdout == "went on\n"
    assert "no progress for 0.5 s (watchdog_seconds). What every thread is doing:" in done.stderr
    assert "in standing_still" in done.stderr and "in working_hard" in done.stderr
    assert done.stderr.rstrip().endswith("the same command goes on from the last checkpoint.")


HOLDING_ON = """
import ctypes, sys, time
sys.path.insert(0, sys.argv[1])
from clp_jax.training.watchdog import Watchdog
Watchdog.GRACE = 1.0
def holding_on():
    ctypes.PyDLL(None).sleep(60)  # Lets no other thread run.
with Watchdog(0.6):
    time.sleep(0.3)
    holding_on()
"""


def test_a_thread_that_lets_no_other_one_run_is_shown_and_ended_too():
    done = subprocess.run([sys.executable, "-c", HOLDING_ON, str(ROOT)], capture_output=True, text=True, timeout=50)
    assert done.returncode == -signal.SIGABRT
    assert "in holding_on" in done.stderr


ENTERING = """
import sys
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/tests/fixtures"]
import toy_runs
toy_runs.run(sys.argv[2], 2, watchdog_seconds=2.0)
"""


def test_a_run_that_stands_still_before_it_begins_ends(tmp_path):
    """A file system that does not answer: here, opening the lock waits for a reader for ever."""
    os.mkfifo(tmp_path / ".lock")
    command = [sys.executable, "-c", ENTERING, str(ROOT), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == RESTARTABLE and "no progress for 2 s" in done.stderr and "in lock" in done.stderr


def test_none_never_ends_anything_and_nothing_is_left_running():
    with Watchdog(None) as watchdog:
        watchdog.progress()
        assert not watchdog._thread.is_alive()
    with Watchdog(100.0) as watchdog:
        assert watchdog._thread.is_alive()
    assert not watchdog._thread.is_alive()


@pytest.mark.parametrize("seconds", [0, -1.0])
def test_a_limit_is_positive(seconds):
    with pytest.raises(ValueError, match="watchdog_seconds is .*: expected a positive number, or None"):
        Watchdog(seconds)
