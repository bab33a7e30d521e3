"""A reward model on eight virtual devices: spread over them, and the rewards of one device."""

import contextvars

import jax
import numpy as np
import pytest
from rounding import assert_same_to_rounding
from tiny_policies import tiny_config, varied_params

from clp_jax.host_rows import HostRows
from clp_jax.interop.arrays import LazyArray
from clp_jax.models.heads import ScorerConfig
from clp_jax.models.policy import Policy
from clp_jax.partitioning import Rules, active_mesh, make_mesh, use_mesh
from clp_jax.rewards.learned import LearnedReward
from clp_jax.rewards.protocol import RewardInputs
from clp_jax.rewards.stack import RewardStack
from clp_jax.sampling.devices import Devices

SCORER = Policy(ScorerConfig(tiny_config(num_encoder_layers=1)))
RULES = Rules((("batch", ("data", "fsdp")), ("embed", "fsdp"), ("mlp", "tensor"), ("heads", "tensor")))
PROMPTS, SAMPLES = 8, 2


def lazily(array):
    """An array as a checkpoint has it."""

    def fill(out, region):
        out[...] = np.asarray(array)[region]

    return LazyArray(array.shape, np.dtype(array.dtype), fill)


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(0)
    rows = PROMPTS * SAMPLES
    prompts, completions = (rng.integers(2, 11, (rows, n)).astype(np.int32) for n in (6, 4))
    return [["x"] * rows] * 3 + [prompts, completions]


@pytest.mark.parametrize("kind", [np.asarray, lazily], ids=["arrays", "read in parts"])
def test_it_lies_on_all_devices_and_gives_the_same_rewards(inputs, kind):
    params = varied_params(SCORER)
    alone = LearnedReward("r", SCORER, params, "f")
    spread = LearnedReward("r", SCORER, jax.tree.map(kind, params), "f")
    assert spread.fingerprint == alone.fingerprint
    with use_mesh(make_mesh(data=2, fsdp=2, tensor=2), RULES):
        rows = HostRows.of(PROMPTS)
        # In the background, as training asks for them.
        found = RewardStack([spread]).submit(RewardInputs(*inputs, rows)).result()
    assert_same_to_rounding(found, alone(RewardInputs(*inputs)))
    ((score),) = spread._scorers.values()
    (held,) = score.args
    sharded = [leaf for leaf in jax.tree.leaves(held) if not leaf.sharding.is_fully_replicated]
    assert len(sharded) >= 4 and all(len(leaf.sharding.device_set) == 8 for leaf in jax.tree.leaves(held))


def test_rows_that_are_on_no_mesh_are_scored_by_one_device(inputs):
    """As `clp evaluate` and `clp sample` ask, whose completions all devices write."""
    params = varied_params(SCORER)
    expected = LearnedReward("r", SCORER, params, "f")(RewardInputs(*inputs))
    with Devices(tensor=2).use(rows=PROMPTS):
        found = LearnedReward("r", SCORER, params, "f")(RewardInputs(*inputs))
        assert active_mesh().size == 8
    np.testing.assert_array_equal(found, expected)


def test_another_mesh_is_another_program(inputs):
    reward = LearnedReward("r", SCORER, varied_params(SCORER), "f")
    values = []
    for sizes in (dict(data=8), dict(fsdp=8)):
        with use_mesh(make_mesh(**sizes), RULES):
            values.append(contextvars.copy_context().run(reward, RewardInputs(*inputs, HostRows.of(PROMPTS))))
    assert_same_to_rounding(*values)
    assert len(reward._scorers) == 2
