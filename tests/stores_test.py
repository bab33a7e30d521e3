"""Runs whose directory is in a store, over HTTP or through fsspec: the same bits as in a directory, whatever ends them."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import jax
import numpy as np
import pytest
from object_stores import SCHEMES, running
from tiny_runs import make_data, make_supervised
from toy_runs import Toy, run

from clp_jax.interop.object_store import StorePath
from clp_jax.training.checkpoint_items import CheckpointError
from clp_jax.training.checkpoint_steps import complete_steps, damaged_steps
from clp_jax.training.metrics import TIMING_METRICS
from clp_jax.training.policies import load_policy
from clp_jax.training.run_directory import RunDirectoryError
from clp_jax.training.saved_params import load_params

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def calm(tmp_path_factory):
    """A run in a directory that nothing disturbs."""
    path = tmp_path_factory.mktemp("calm") / "run"
    run(path, 10)
    return path


@pytest.fixture
def place(request):
    return StorePath.parse(running("gs")) / request.node.originalname / "run"


def lines(text):
    return [{k: v for k, v in json.loads(line).items() if k not in TIMING_METRICS} for line in text.splitlines()]


def assert_same_run(place, calm):
    """Metrics, description of all runs, and every array of the last step: slots and random key, too."""
    assert lines((place / "metrics.jsonl").read_text()) == lines((calm / "metrics.jsonl").read_text())
    assert (place / "description.json").read_text() == (calm / "description.json").read_text()
    steps = complete_steps(place / "checkpoints")
    assert steps == complete_steps(calm / "checkpoints")
    for step in steps:
        told = [json.loads((at / "checkpoints" / str(step) / "manifest.json").read_text()) for at in (place, calm)]
        assert told[0]["manifest"]["arrays"] == told[1]["manifest"]["arrays"]
        runs = [json.loads((at / "checkpoints" / str(step) / "run.json").read_text()) for at in (place, calm)]
        assert runs[0] == runs[1]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_run_that_was_killed_goes_on_to_the_same_bits(calm, scheme):
    place = StorePath.parse(running(scheme)) / "killed" / "run"
    program = (
        "import os, signal, sys\n"
        "import object_stores\n"
        "from toy_runs import Toy, run\n"
        "def hook(step, run_dir):\n"
        "    if step == 8:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "run(sys.argv[1], 10, Toy(hook=hook))\n"
    )
    paths = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests' / 'fixtures'}"}
    done = subprocess.run([sys.executable, "-c", program, str(place)], env=os.environ | paths, capture_output=True)
    assert done.returncode == -9, done.stderr.decode()
    assert complete_steps(place / "checkpoints")[-1] in (3, 6)  # The save of step 6 may not have been over.
    result = run(str(place), 10)
    assert result.step == 10 and result.metrics["step"] == 10
    assert_same_run(place, calm)
    events = [file for file in place.files() if "/tensorboard/" in str(file)]
    assert len(events) == 2 and all(file.read_bytes() for file in events)
    assert run(str(place), 10).metrics == result.metrics  # It is complete.


@pytest.mark.parametrize("scheme", ["gs", "disk"])
def test_a_damaged_object_is_found_and_the_steps_made_again(calm, scheme, capsys):
    place = StorePath.parse(running(scheme)) / "damaged" / "run"
    run(str(place), 7, checkpoint_every=3)
    for item in ("params", "ema"):
        file = place / "checkpoints" / "7" / item / "w" / "0"
        file.write_bytes(bytes([file.read_bytes()[0] ^ 4, *file.read_bytes()[1:]]))
    np.testing.assert_array_equal(load_params(str(place))[2], 6)
    run(str(place), 10)
    said = capsys.readouterr().err
    assert "7 is damaged: ema/w/0 has another SHA-256" in said and "going on from step 6" in said
    assert damaged_steps(place / "checkpoints").keys() == {"7.damaged"}  # No step 7 was to be saved this time.
    assert_same_run(place, calm)


def test_the_last_of_two_starts_owns_the_run(calm, place):
    started = threading.Event()

    def hook(step, run_dir):
        if step == 4 and not started.is_set():
            started.set()
            other = run(str(place), 10)  # As another host would, meanwhile.
            assert other.step == 10

    with pytest.raises(CheckpointError, match="was started again elsewhere: that start owns the run now"):
        run(str(place), 10, Toy(hook=hook))
    assert_same_run(place, calm)


def test_an_error_at_the_end_is_the_one_that_is_raised(place):
    def hook(step, run_dir):
        if step == 4:
            raise KeyError("the first error")

    with pytest.raises(KeyError, match="the first error"):
        run(str(place), 10, Toy(hook=hook))
    assert [line["step"] for line in lines((place / "metrics.jsonl").read_text())] == [1, 2, 3, 4]


def test_a_run_in_a_store_is_not_entered_with_another_configuration(place):
    run(str(place), 3, config_text="rate = 1\n")
    with pytest.raises(RunDirectoryError, match=rf"^{place} holds a run of another configuration(.|\n)*rate: 1 -> 2"):
        run(str(place), 3, config_text="rate = 2\n")


def test_what_can_not_be_used_is_said_before_training():
    running("s3")
    with pytest.raises(RunDirectoryError, match="there is no bucket s3://nobodys. Make it, or correct its name"):
        run("s3://nobodys/run", 3)
    with pytest.raises(RunDirectoryError, match="nobodys://host/run is an address of another kind"):
        run("nobodys://host/run", 3)
    with pytest.raises(RunDirectoryError, match="run directory abfs://host/run: nothing here speaks to abfs://"):
        run("abfs://host/run", 3)


def test_a_directory_may_be_named_by_its_address(calm, tmp_path):
    run(f"file://{tmp_path}/run", 10)
    assert_same_run(tmp_path / "run", calm)


def test_a_policy_that_was_copied_to_a_store_is_loaded_from_it(tmp_path):
    place = StorePath.parse(running("s3")) / "copied" / "run"
    local = make_supervised(tmp_path / "sft", make_data(tmp_path / "data"))
    for path in (path for path in local.rglob("*") if path.is_file()):
        (place / path.relative_to(local)).write_bytes(path.read_bytes())
    found, wanted = load_policy(str(place)), load_policy(local)
    assert found.step == wanted.step and found.vocabulary.fingerprint == wanted.vocabulary.fingerprint
    jax.tree.map(np.testing.assert_array_equal, found.params, wanted.params)
