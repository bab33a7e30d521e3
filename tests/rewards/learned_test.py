"""A trained scorer as a reward: its score, bounded, on the tokens it was trained for."""

import jax
import numpy as np
import pytest
from tiny_policies import tiny_config, varied_params

from clp_jax.models.heads import ScorerConfig
from clp_jax.models.policy import Policy
from clp_jax.rewards.learned import LearnedReward
from clp_jax.rewards.pairs import join
from clp_jax.rewards.protocol import RewardFunction, RewardInputs

POLICY = Policy(ScorerConfig(tiny_config(num_encoder_layers=1)))
ROWS = 5


@pytest.fixture(scope="module")
def params():
    return varied_params(POLICY)


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(0)
    prompts, completions = (rng.integers(2, 11, (ROWS, n)).astype(np.int32) for n in (6, 4))
    prompts[:, 5], completions[0, 2:] = 1, [1, 0]
    texts = ["x"] * ROWS
    return RewardInputs(texts, texts, texts, prompts, completions)


@pytest.fixture(scope="module")
def reward(params):
    return LearnedReward("preference", POLICY, params, "f", bound=2.0)


@pytest.fixture(scope="module")
def raw(params, inputs):
    """The scores as the model gives them."""
    joined = join(inputs.prompt_tokens, inputs.completion_tokens, 0)
    return np.asarray(jax.jit(lambda p, t, k: POLICY.bind(p).score(t, k))(params, *joined), np.float64)


def test_the_reward_is_the_bounded_score(reward, raw, inputs):
    assert isinstance(reward, RewardFunction) and reward.names == ("preference",)
    values = reward(inputs)
    assert values.shape == (ROWS, 1) and values.dtype == np.float32
    np.testing.assert_allclose(values[:, 0], 2 * np.tanh(raw / 2), rtol=2e-5)
    assert np.all(np.abs(values) < 2) and np.ptp(raw) > 0.1


def test_a_bound_far_away_leaves_the_score(params, raw, inputs):
    np.testing.assert_allclose(LearnedReward("r", POLICY, params, "f", bound=1e4)(inputs)[:, 0], raw, rtol=2e-5)


def replace(inputs, prompts, completions):
    texts = ["x"] * len(prompts)
    return RewardInputs(texts, texts, texts, prompts, completions)


def test_documents_are_cut_to_what_it_was_trained_with(params, reward, inputs):
    cut = LearnedReward("r", POLICY, params, "f", bound=2.0, document_length=3)(inputs)
    whole = reward(replace(inputs, inputs.prompt_tokens[:, :3], inputs.completion_tokens))
    np.testing.assert_array_equal(cut, whole)
    assert not np.allclose(cut, reward(inputs), rtol=1e-3)


def test_rows_do_not_see_each_other_and_padding_does_not_count(reward, inputs):
    order = np.asarray([3, 0, 4, 1, 2])
    padded = np.pad(inputs.completion_tokens, ((0, 0), (0, 2)))
    moved = replace(inputs, inputs.prompt_tokens[order], padded[order])
    np.testing.assert_allclose(reward(moved), reward(inputs)[order], rtol=2e-5)


def test_it_is_compiled_once_for_a_shape(params, inputs):
    reward = LearnedReward("r", POLICY, params, "f", bound=3.0)
    first = reward(inputs)
    np.testing.assert_array_equal(reward(inputs), first)
    other = replace(inputs, inputs.prompt_tokens[::-1].copy(), inputs.completion_tokens)
    assert not np.array_equal(reward(other), first)
    (scorer,) = reward._scorers.values()
    assert scorer.func._cache_size() == 1


@pytest.mark.parametrize("bound", [0.0, -1.0])
def test_a_bound_is_positive(params, bound):
    with pytest.raises(ValueError, match=f"LearnedReward 'r': bound is {bound}, expected a positive number"):
        LearnedReward("r", POLICY, params, "f", bound=bound)
