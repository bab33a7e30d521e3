"""Steerable things: exact at the ends, compiled once for all preferences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_policies import PROMPTS, stacked_params, tiny_config, varied_params

from clp_jax.models.conditioning import ParameterConditioning, PromptConditioning, Unconditioned
from clp_jax.models.policy import Policy
from clp_jax.preferences import Preference, kl_mixing_weight
from clp_jax.sampling.generate import SamplingConfig
from clp_jax.sampling.steering import ConditionedPolicy, LogitMixture, PerWeight

POLICY = Policy(tiny_config(num_encoder_layers=1, num_decoder_layers=1))
REFERENCE = varied_params(POLICY, seed=9)
EXPERTS = stacked_params(POLICY, range(2))
CONFIG = SamplingConfig(max_length=6)
KEY = jax.random.key(0)
ALPHA_MIN = 0.05


def expert(number: int):
    return jax.tree.map(lambda x: x[number], EXPERTS)


@pytest.fixture(scope="module")
def plain():
    """Completions of ordinary parameters."""
    table = ((1.0, 0.0), expert(0)), ((0.0, 1.0), expert(1)), ((0.5, 0.5), REFERENCE)
    oracle = PerWeight(POLICY, table)
    return oracle, {
        weights: oracle.generate(PROMPTS, Preference.of(weights, 0.1), KEY, CONFIG, 2) for weights, _ in table
    }


def assert_same(ours, theirs):
    np.testing.assert_array_equal(ours.tokens, theirs.tokens)
    np.testing.assert_array_equal(ours.mask, theirs.mask)
    np.testing.assert_allclose(ours.log_probs, theirs.log_probs, rtol=1e-5, atol=1e-5)


def test_a_conditioned_policy_at_its_ends_and_compiled_once(plain):
    _, expected = plain
    steerable = ConditionedPolicy(POLICY, ParameterConditioning("full", 2, ALPHA_MIN), EXPERTS, REFERENCE)
    assert_same(steerable.generate(PROMPTS, Preference.of([0.3, 0.7], 1.0), KEY, CONFIG, 2), expected[0.5, 0.5])
    for corner in ((1.0, 0.0), (0.0, 1.0)):
        assert_same(steerable.generate(PROMPTS, Preference.of(corner, ALPHA_MIN), KEY, CONFIG, 2), expected[corner])
    between = steerable.generate(PROMPTS[::-1].copy(), Preference.of([0.3, 0.7], 0.2), jax.random.key(4), CONFIG, 2)
    assert between.tokens.shape == (8, 6)
    # Preferences, prompts and keys are inputs of one program; a shape or a setting makes another.
    assert steerable._run._cache_size() == 1
    steerable.generate(PROMPTS, Preference.of([0.3, 0.7], 0.2), KEY, SamplingConfig(max_length=2), 2)
    assert steerable._run._cache_size() == 2
    assert steerable.decode_calls_per_token == 1


def test_mod_at_the_corners_is_the_experts(plain):
    _, expected = plain
    mixture = LogitMixture(POLICY, EXPERTS)
    assert mixture.decode_calls_per_token == 2
    for corner in ((1.0, 0.0), (0.0, 1.0)):
        assert_same(mixture.generate(PROMPTS, Preference.of(corner, 0.1), KEY, CONFIG, 2), expected[corner])
    mixture.generate(PROMPTS, Preference.of([0.3, 0.7], 0.2), KEY, CONFIG, 2)
    assert mixture._run._cache_size() == 1


def test_realignment_from_the_tuned_policy_to_the_reference(plain):
    _, expected = plain
    both = jax.tree.map(lambda a, b: jnp.stack([a, b]), expert(1), REFERENCE)
    mixture = LogitMixture(POLICY, both, alpha_min=ALPHA_MIN)
    ends = {1.0: (0.5, 0.5), ALPHA_MIN: (0.0, 1.0)}
    for alpha, weights in ends.items():
        assert_same(mixture.generate(PROMPTS, Preference.of([0.3, 0.7], alpha), KEY, CONFIG, 2), expected[weights])
    assert mixture.decode_calls_per_token == 2


@pytest.mark.parametrize("alpha", [ALPHA_MIN, 0.1, 0.5, 1.0, 0.01])
def test_coefficients_are_the_ratio_of_kl_weights(alpha):
    """``λ = β_min/β``; below `alpha_min` it exceeds 1, and the mixture extrapolates away from the reference."""
    weights = np.asarray([0.3, 0.7])
    three = jax.tree.map(lambda x: jnp.concatenate([x, x[:1]]), EXPERTS)
    coefficients = LogitMixture(POLICY, three, ALPHA_MIN).coefficients(Preference.of(weights, alpha))
    ratio = (ALPHA_MIN / (1 - ALPHA_MIN)) * (1 - alpha) / alpha
    np.testing.assert_allclose(coefficients, [*(ratio * weights), 1 - ratio], rtol=1e-5, atol=1e-6)
    assert (0 <= coefficients[2] <= 1) == (alpha >= ALPHA_MIN)
    np.testing.assert_allclose(kl_mixing_weight(alpha, ALPHA_MIN), ratio, rtol=1e-6)
    one_for_all = LogitMixture(POLICY, EXPERTS, ALPHA_MIN).coefficients(Preference.of([0.2, 0.3, 0.5], alpha))
    np.testing.assert_allclose(one_for_all, [ratio, 1 - ratio], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        LogitMixture(POLICY, EXPERTS).coefficients(Preference.of(weights, alpha)), weights, rtol=1e-6
    )


def test_a_mixture_needs_one_expert_for_each_objective_or_one_for_all():
    with pytest.raises(ValueError, match="2 experts for 3 objectives: expected one for each, or one for all"):
        LogitMixture(POLICY, EXPERTS).coefficients(Preference.of([0.2, 0.3, 0.5], 0.1))


def test_an_oracle_knows_its_weights_only(plain):
    oracle, expected = plain
    assert np.any(expected[1.0, 0.0].tokens != expected[0.0, 1.0].tokens)
    assert oracle._run._cache_size() == 1
    with pytest.raises(
        ValueError, match=r"no policy was trained at weights 0\.3,0\.7\. There are policies at: 1,0; 0,1; 0\.5,0\.5"
    ):
        oracle.generate(PROMPTS, Preference.of([0.3, 0.7], 0.1), KEY, CONFIG, 2)


def test_a_prompt_conditioned_policy_reads_the_preference_before_the_prompt(plain):
    oracle, _ = plain
    tables = tuple(tuple((token, value) for value in (3, 4, 5)) for token in (8, 9))
    conditioning = PromptConditioning(tables=tables, num_objectives=2)
    steerable = ConditionedPolicy(POLICY, conditioning, REFERENCE, REFERENCE)
    out = steerable.generate(PROMPTS, Preference.of([0.0, 1.0], 0.1), KEY, CONFIG, 2)
    written = np.concatenate([np.broadcast_to([8, 3, 9, 5], (4, 4)), PROMPTS], axis=1).astype(np.int32)
    by_hand = ConditionedPolicy(POLICY, Unconditioned(), REFERENCE, REFERENCE)
    assert_same(out, by_hand.generate(written, Preference.of([0.5, 0.5], 0.1), KEY, CONFIG, 2))
    assert_same(out, oracle.generate(written, Preference.of([0.5, 0.5], 0.1), KEY, CONFIG, 2))
