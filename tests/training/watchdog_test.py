"""A process that stands still shows where, and ends."""

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
