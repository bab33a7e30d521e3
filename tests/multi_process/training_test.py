"""Real processes, two and four: the numbers of one process on the same mesh, stopping, going on, being killed."""

import json

import jax
import numpy as np
import pytest
from groups import start

from clp_jax.data.reader import DataSource, sequence_batch
from clp_jax.training.checkpoints import load_params
from clp_jax.training.metrics import TIMING_METRICS, read_metrics

STEPS = 4
ALL = ("packed", "experts", "policy", "rewards")


def jobs(directory, *names, num_steps=STEPS, **settings):
    return [
        {"name": name, "run_dir": str(directory / name), "num_steps": num_steps, "checkpoint_every": 2} | settings
        for name in names
    ]


def lines(run_dir):
    return [{k: v for k, v in r.items() if k not in TIMING_METRICS} for r in read_metrics(run_dir / "metrics.jsonl")]


def assert_same_metrics(run_dir, expected, rtol):
    found, wanted = lines(run_dir), lines(expected)
    assert [r["step"] for r in found] == [r["step"] for r in wanted]
    for now, then in zip(found, wanted, strict=True):
        assert now.keys() == then.keys()
        for name in now.keys() - {"stage"}:
            np.testing.assert_allclose(now[name], then[name], rtol=rtol, atol=1e-7, err_msg=f"{name} {now['step']}")


def assert_same_params(run_dir, expected, rtol):
    (params, _, step), (wanted, _, wanted_step) = load_params(run_dir), load_params(expected)
    assert step == wanted_step
    for (path, now), then in zip(jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(wanted), strict=True):
        scale = np.abs(then).max()
        np.testing.assert_allclose(now / scale, then / scale, rtol=0, atol=rtol, err_msg=jax.tree_util.keystr(path))


def consumed(run_dir, num_processes):
    """Example ids by position in the data, put together from what each process was given."""
    found = {}
    for number in range(num_processes):
        path = run_dir.parent / f"{run_dir.name}.ids.{num_processes}.{number}"
        for line in path.read_text().splitlines():
            position, shards = json.loads(line)
            for first, ids in shards:
                for place, example in enumerate(ids):
                    assert found.setdefault(position + first + place, example) == example
    return found


def expected_ids(home, count):
    data = DataSource(home / "packed", "train", batch_size=8, converter=sequence_batch, seed=3)
    return dict(enumerate(data.example_ids(0, count).tolist()))


@pytest.fixture(scope="module")
def alone(home, tmp_path_factory):
    """All jobs in one process of four devices."""
    directory = tmp_path_factory.mktemp("alone")
    made = [*jobs(directory, *ALL), *jobs(directory / "long", "packed", num_steps=12)]
    start(directory, home, made, num_processes=1, devices=4).succeed()
    return directory


@pytest.fixture(scope="module")
def two(home, tmp_path_factory, alone):
    """The same in two processes of two devices; one with its tensor axis across them."""
    directory = tmp_path_factory.mktemp("two")
    made = [*jobs(directory, *ALL), *jobs(directory / "crossed", "packed", crossed=True)]
    group = start(directory, home, made, num_processes=2, devices=2)
    group.succeed()
    return directory


@pytest.mark.parametrize("name", ALL)
def test_two_processes_train_as_one_does(alone, two, name):
    assert_same_metrics(two / name, alone / name, rtol=1e-6)
    assert_same_params(two / name, alone / name, rtol=1e-6)
