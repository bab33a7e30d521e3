"""`clp launch local`: real processes train, one is killed, and what comes out is what an undisturbed run gives, bit for bit."""

import os
import signal
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from clp_jax.launch.job import Job, JobRecord
from clp_jax.launch.supervisor import Patience, supervise
from clp_jax.launch.targets import find_target
from groups import compiled_programs

from clp_jax.training.metrics import TIMING_METRICS, read_metrics
from clp_jax.training.saved_params import load_params

STEPS = 12
SIZES = ("embed_dim=8", "mlp_dim=12", "num_heads=2", "head_dim=4")


def command(home, run_dir):
    macros = {
        "DATA_DIR": repr(str(home / "prompts")),
        "RUN_DIR": repr(str(run_dir)),
        "VOCAB_SIZE": 32,
        "BATCH_SIZE": 8,
        "NUM_STEPS": STEPS,
        "WARMUP_STEPS": 2,
        "LOG_EVERY": 1,
        "CHECKPOINT_EVERY": 4,
    }
    words = [f"--gin.{name}={value}" for name, value in macros.items()]
    words += [f"--gin.T5Config.t5_1_1.{size}" for size in SIZES]
    return ("clp", "train", "--gin_file=examples/pydoc_sft.gin", *words)


def launch(home, directory, processes):
    """The record and target of a job that trains, with nobody looking after it yet."""
    options = {"processes": str(processes), "devices_per_process": "2", "grace": "2"}
    run_dir = str(directory / "run")
    job = Job("job", command(home, run_dir), "local", options, run_dir, directory=str(directory))
    return JobRecord.create(directory / "jobs", job), find_target("local", options)


def kill_one(record, seconds=240):
    """Kills the command of the last worker, with no time to save, when there is a checkpoint."""
    checkpoints = record.path.parents[1] / "run" / "checkpoints"
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        steps = [int(p.name) for p in checkpoints.iterdir() if p.name.isdecimal()] if checkpoints.is_dir() else []
        if steps and max(steps) >= 4:
            here = sorted(record.attempt_directory.glob("worker-*"))[-1]
            script = (here / "pid").read_text().strip()
            (child,) = Path(f"/proc/{script}/task/{script}/children").read_text().split()
            os.kill(int(child), signal.SIGKILL)
            return
        time.sleep(0.02)


@pytest.mark.parametrize("processes", [2, 4])
def test_a_killed_process_changes_nothing_in_the_end(home, tmp_path, monkeypatch, processes):
    for name, value in compiled_programs(home).items():
        monkeypatch.setenv(name, value)
    patience = Patience(look=0.1, first_wait=0.1)
    calm, calm_target = launch(home, tmp_path / "calm", processes)
    supervise([calm], [calm_target], patience)
    rough, rough_target = launch(home, tmp_path / "rough", processes)
    killer = threading.Thread(target=kill_one, args=(rough,))
    killer.start()
    supervise([rough], [rough_target], patience)
    killer.join()

    told = "\n".join(rough_target.logs(rough, lines=30))
    assert [state.phase for state in calm.states] == ["queued", "running", "succeeded"]
    phases = [state.phase for state in rough.states]
    assert phases == ["queued", "running", "broken", "queued", "running", "succeeded"], told
    broken = rough.states[2]
    assert f"worker {processes - 1} ended with exit code 137" in broken.detail and 4 <= broken.step < STEPS

    (params, _, step), (wanted, _, wanted_step) = (load_params(tmp_path / name / "run") for name in ("rough", "calm"))
    assert step == wanted_step == STEPS
    for now, then in zip(jax.tree.leaves(params), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_array_equal(np.asarray(now), np.asarray(then))
    found, expected = (
        [
            {k: v for k, v in r.items() if k not in TIMING_METRICS}
            for r in read_metrics(tmp_path / name / "run/metrics.jsonl")
        ]
        for name in ("rough", "calm")
    )
    assert found == expected
