"""Rollouts: several preferences in a batch are as one at a time, and every log-probability is its policy's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_policies import PROMPTS, stacked_params, tiny_config, varied_params

from clp_jax.models.conditioning import ParameterConditioning, PromptConditioning
from clp_jax.models.policy import Policy
from clp_jax.preferences import Preference
from clp_jax.sampling.generate import SamplingConfig
from clp_jax.sampling.rollouts import RolloutWorker, over_groups
from clp_jax.sampling.score import score
from clp_jax.sampling.steering import ConditionedPolicy

POLICY = Policy(tiny_config(num_encoder_layers=1, num_decoder_layers=1))
REFERENCE = varied_params(POLICY, seed=9)
EXPERTS = stacked_params(POLICY, range(2))
CONFIG = SamplingConfig(max_length=5)
KEY = jax.random.key(0)
FULL = ParameterConditioning("full", 2, alpha_min=0.05)
PREFERENCES = Preference(weights=jnp.asarray([[0.9, 0.1], [0.2, 0.8]]), alpha=jnp.asarray([0.05, 0.3]))


@pytest.fixture(scope="module")
def rollout():
    """Four prompts, two preferences, two samples of each prompt."""
    worker = RolloutWorker(POLICY, FULL, CONFIG, num_samples=2, num_groups=2)
    return jax.jit(worker)(EXPERTS, REFERENCE, PROMPTS, PREFERENCES, KEY)


def test_groups_are_as_each_preference_alone(rollout):
    steerable = ConditionedPolicy(POLICY, FULL, EXPERTS, REFERENCE)
    for group in range(2):
        rows = slice(4 * group, 4 * group + 4)
        alone = steerable.generate(PROMPTS, PREFERENCES[group], KEY, CONFIG, 2)
        np.testing.assert_array_equal(rollout.tokens[rows], alone.tokens[rows])
        np.testing.assert_array_equal(rollout.mask[rows], alone.mask[rows])
        np.testing.assert_allclose(rollout.log_probs[rows], alone.log_probs[rows], rtol=1e-5, atol=1e-5)


def test_preferences_are_those_of_the_rows(rollout):
    np.testing.assert_array_equal(rollout.preference.weights, np.repeat(PREFERENCES.weights, 4, axis=0))
    np.testing.assert_array_equal(rollout.preference.alpha, np.repeat(PREFERENCES.alpha, 4))


def test_reference_log_probs_are_the_references(rollout):
    np.testing.assert_array_equal(rollout.inputs, PROMPTS)
    scored = jax.jit(lambda p, x, y: score(POLICY.bind(p), x, y))(REFERENCE, rollout.inputs, rollout.tokens)
    np.testing.assert_allclose(rollout.reference_log_probs, scored, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(np.asarray(rollout.reference_log_probs) != 0, np.asarray(rollout.mask) == 1)


def test_the_reference_does_not_read_the_written_preference():
    """Prompt conditioning changes what the policy reads; at equal parameters the two still differ, by the text alone."""
    tables = tuple(tuple((token, value) for value in (3, 4, 5)) for token in (8, 9))
    worker = RolloutWorker(POLICY, PromptConditioning(tables, 2), CONFIG)
    preference = Preference(weights=jnp.asarray([[0.0, 1.0]]), alpha=jnp.asarray([0.1]))
    out = jax.jit(worker)(REFERENCE, REFERENCE, PROMPTS, preference, KEY)
    np.testing.assert_array_equal(out.inputs, PROMPTS)

    scored = jax.jit(lambda p, x, y: score(POLICY.bind(p), x, y))
    written = np.concatenate([np.broadcast_to([8, 3, 9, 5], (4, 4)), PROMPTS], axis=1).astype(np.int32)
    np.testing.assert_allclose(out.log_probs, scored(REFERENCE, written, out.tokens), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(out.reference_log_probs, scored(REFERENCE, PROMPTS, out.tokens), rtol=1e-5, atol=1e-5)
    assert np.all(np.any(out.log_probs != out.reference_log_probs, axis=-1))


def test_over_groups_gives_rows_back_in_order():
    rows, shared = jnp.arange(12.0).reshape(6, 2), jnp.asarray(10.0)

    def centred(rows, shared):
        return {"centred": rows - rows.mean() + shared, "sum": rows.sum(-1)}

    for groups in (1, 2, 3, 6):
        out = over_groups(centred, groups, (rows,), shared)
        parts = np.asarray(rows).reshape(groups, -1, 2)
        expected = parts - parts.mean((1, 2), keepdims=True) + 10
        np.testing.assert_allclose(out["centred"], expected.reshape(6, 2), rtol=1e-6)
        np.testing.assert_array_equal(out["sum"], rows.sum(-1))


def test_a_batch_that_does_not_divide_is_refused():
    worker = RolloutWorker(POLICY, FULL, CONFIG, num_groups=2)
    with pytest.raises(ValueError, match="a batch of 3 prompts does not divide into 2 preference groups"):
        worker(EXPERTS, REFERENCE, jnp.asarray(PROMPTS[:3]), PREFERENCES, KEY)


@pytest.mark.parametrize("name", ["num_samples", "num_groups"])
def test_counts_are_positive(name):
    with pytest.raises(ValueError, match=f"{name}=0.*expected at least 1"):
        RolloutWorker(POLICY, FULL, CONFIG, **{name: 0})
