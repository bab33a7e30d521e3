"""A process that is asked to end more than once."""

import subprocess
import sys
from pathlib import Path

from clp_jax.processes import RESTARTABLE
from clp_jax.training.saved_params import load_params

TWICE = """
import os, signal, sys
sys.path[:0] = [sys.argv[1] + "/fixtures"]
import toy_runs
from clp_jax.training import checkpoint_manifest
plain = checkpoint_manifest.flush_to_disk
def flush(file):
    os.kill(os.getpid(), signal.SIGTERM)
    plain(file)
checkpoint_manifest.flush_to_disk = flush
def ask_to_stop(step, run_dir):
    if step == 1:
        os.kill(os.getpid(), signal.SIGTERM)
toy_runs.run(sys.argv[2], 10, toy_runs.Toy(hook=ask_to_stop))
"""


def test_more_of_sigterm_ends_no_save(tmp_path):
    command = [sys.executable, "-c", TWICE, str(Path(__file__).parents[1]), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == RESTARTABLE, done.stderr
    assert "stopped by SIGTERM after step 2 of 10" in done.stderr and load_params(tmp_path)[2] == 2
