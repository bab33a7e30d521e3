"""Experience: what was sampled, under which preference, and what it earned, from the parameters it will update."""

import threading
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tabular import TabularConfig
from tiny_policies import varied_params
from tiny_runs import make_data

from clp_jax.data.reader import DataSource, prompt_batch
from clp_jax.data.vocabulary import Vocabulary
from clp_jax.models.conditioning import ParameterConditioning
from clp_jax.models.policy import Policy
from clp_jax.preferences import AlphaRange, Dirichlet
from clp_jax.rewards.normalisation import RewardStatistics
from clp_jax.rewards.programmatic import FunctionReward
from clp_jax.rewards.stack import RewardStack
from clp_jax.sampling.generate import SamplingConfig
from clp_jax.sampling.rollouts import RolloutWorker
from clp_jax.sampling.score import score
from clp_jax.training.experience import ExperienceSource, reward_inputs

POLICY = Policy(TabularConfig(vocab_size=8, length=3))
CONDITIONING = ParameterConditioning("full", 2)
REFERENCE = varied_params(POLICY, 1)
PARAMS = jax.tree.map(lambda a, b: jnp.stack([a, b]), varied_params(POLICY, 2), varied_params(POLICY, 3))
BATCH, SAMPLES = 4, 2


@jax.jit
def scored(params, inputs, tokens):
    return score(POLICY.bind(params), inputs, tokens)


MEAN, STD = (3.0, -1.0), (2.0, 0.5)


def letters(prompts, completions, references):
    return [float(len(text)) for text in completions]


def common(prompts, completions, references):
    """Which prompt, reference and completion belong together decides it."""
    return [
        len(set(p) & set(c)) - len(set(r) - set(c)) / 7
        for p, c, r in zip(prompts, completions, references, strict=True)
    ]


REWARDS = (FunctionReward("letters", letters), FunctionReward("common", common))


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("home") / "data")


def source(data_dir, groups=1, chunks=2, seed=7, rewards=REWARDS):
    return ExperienceSource(
        data=DataSource(data_dir, "train", batch_size=BATCH, converter=prompt_batch, seed=1),
        worker=RolloutWorker(POLICY, CONDITIONING, SamplingConfig(3), SAMPLES, max(1, groups // chunks)),
        sampler=Dirichlet(2, alpha=AlphaRange(0.05, 0.5)),
        rewards=RewardStack(rewards, RewardStatistics(("letters", "common"), MEAN, STD, 1)),
        vocabulary=Vocabulary.load(data_dir),
        num_groups=groups,
        num_chunks=chunks,
        seed=seed,
    )


FROZEN = {"reference": REFERENCE}


def state(step=0, params=PARAMS):
    return SimpleNamespace(params={"policy": params}, step=jnp.asarray(step, jnp.int32))


@pytest.fixture(scope="module", params=[(1, 2), (4, 2)], ids=lambda p: f"{p[0]} groups, {p[1]} chunks")
def made(request, data_dir):
    groups, chunks = request.param
    experience, metrics = source(data_dir, groups, chunks).next(state(), FROZEN)
    assert metrics == {}
    return groups, experience


def test_log_probabilities_are_those_of_the_mixed_policy_and_of_the_reference(made):
    groups, experience = made
    rollout = experience.rollout
    rows = BATCH * SAMPLES // groups
    for g in range(groups):
        take = slice(g * rows, (g + 1) * rows)
        mixed = CONDITIONING.mix(PARAMS, REFERENCE, rollout.preference[g * rows])
        inputs = rollout.inputs[take.start // SAMPLES : take.stop // SAMPLES]
        found = scored(mixed, inputs, rollout.tokens[take])
        np.testing.assert_allclose(rollout.log_probs[take], found, rtol=1e-5, atol=1e-5)
    expected = scored(REFERENCE, rollout.inputs, rollout.tokens)
    np.testing.assert_allclose(rollout.reference_log_probs, expected, rtol=1e-5, atol=1e-5)


def test_each_group_has_one_preference_and_groups_differ(made):
    groups, experience = made
    preference = experience.rollout.preference
    assert preference.weights.shape == (BATCH * SAMPLES, 2) and preference.alpha.shape == (BATCH * SAMPLES,)
    np.testing.assert_allclose(preference.weights.sum(-1), 1, rtol=1e-6)
    assert np.all((preference.alpha >= 0.05) & (preference.alpha <= 0.5))
    both = np.column_stack([preference.weights, preference.alpha]).reshape(groups, -1, 3)
    np.testing.assert_array_equal(both, np.broadcast_to(both[:, :1], both.shape))
    assert len(np.unique(both[:, 0], axis=0)) == groups


def test_rewards_are_standardised_and_belong_to_their_rows(made, data_dir):
    _, experience = made
    batch = DataSource(data_dir, "train", batch_size=BATCH, converter=prompt_batch, seed=1).next()
    decode = Vocabulary.load(data_dir).decode
    np.testing.assert_array_equal(experience.rollout.inputs, batch.inputs)
    assert experience.rewards.dtype == jnp.float32
    for row, tokens in enumerate(np.asarray(experience.rollout.tokens)):
        texts = ([decode(t)] for t in (batch.inputs[row // SAMPLES], tokens, batch.targets[row // SAMPLES]))
        raw = [function(*texts_of) for function, texts_of in zip((letters, common), [tuple(texts)] * 2, strict=True)]
        expected = (np.ravel(raw) - MEAN) / STD
        np.testing.assert_allclose(experience.rewards[row], expected, rtol=1e-5, atol=1e-6)


def test_samples_of_a_prompt_differ(made):
    tokens = np.asarray(made[1].rollout.tokens).reshape(BATCH, SAMPLES, -1)
    assert np.any(tokens[:, 0] != tokens[:, 1]) and len(np.unique(tokens.reshape(BATCH * SAMPLES, -1), axis=0)) > BATCH


def assert_equal(a, b):
    # Leaves, because a tree of None is not a valid rollout.
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


def test_step_seed_and_position_decide_everything(data_dir):
    first = source(data_dir)
    one, two = first.next(state(0), FROZEN)[0], first.next(state(1), FROZEN)[0]
    assert first.position() == {"examples": 8}
    second = source(data_dir)
    second.restore({"examples": 4})
    assert_equal(second.next(state(1), FROZEN)[0], two)  # A resumed run goes on as the first one did.
    second.restore({"examples": 0})
    assert_equal(second.next(state(0), FROZEN)[0], one)
    second.restore({"examples": 0})
    later = second.next(state(1), FROZEN)[0]
    assert np.any(later.rollout.tokens != one.rollout.tokens)
    assert np.any(later.rollout.preference.weights != one.rollout.preference.weights)
    other = source(data_dir, seed=8).next(state(0), FROZEN)[0]
    assert np.any(other.rollout.preference.weights != one.rollout.preference.weights)


def test_the_newest_parameters_roll_out_the_whole_batch(data_dir):
    """Components that always say one token: no row of the batch may come from older parameters."""
    made_by = source(data_dir)
    for step, token in enumerate((3, 5)):
        params = jax.tree.map(lambda p, token=token: jnp.zeros_like(p).at[..., token].set(1e3), PARAMS)
        tokens = made_by.next(state(step, params), FROZEN)[0].rollout.tokens
        np.testing.assert_array_equal(tokens, token)


def test_every_chunk_is_dispatched_before_rewards_are_waited_for(data_dir):
    """The host scores on another thread while the device generates; a reward that fails stops the step with its error."""
    events = []

    def recording(prompts, completions, references):
        events.append(threading.current_thread() is threading.main_thread())
        return letters(prompts, completions, references)

    made_by = source(data_dir, rewards=(FunctionReward("letters", recording), REWARDS[1]))
    roll_out = made_by._roll_out
    made_by._roll_out = lambda *args: (events.append("dispatched"), roll_out(*args))[1]
    made_by.next(state(), FROZEN)
    assert events == ["dispatched", "dispatched", False, False]

    def fails(prompts, completions, references):
        return [float("nan")] * len(completions)

    with pytest.raises(ValueError, match=r"reward letters is \[nan\] for the completion .*: not finite"):
        source(data_dir, rewards=(FunctionReward("letters", fails), REWARDS[1])).next(state(), FROZEN)


def test_reward_inputs_repeat_prompts_for_their_samples(data_dir):
    vocabulary = Vocabulary.load(data_dir)
    inputs = np.asarray([[*vocabulary.encode("lazy dog"), 1, 0], [*vocabulary.encode("quick")[:7], 1]][:1], np.int32)
    references = np.asarray([[*vocabulary.encode("dog"), 1, 0]], np.int32)
    tokens = np.asarray([[5, 6, 1, 0], [1, 0, 0, 0], [6, 6, 6, 6]], np.int32)
    found = reward_inputs(vocabulary, inputs, references, tokens)
    assert found.prompts == ["lazy dog"] * 3 and found.references == ["dog"] * 3
    assert list(found.completions) == [vocabulary.decode([5, 6]), "", vocabulary.decode([6, 6, 6, 6])]
    np.testing.assert_array_equal(found.prompt_tokens, np.repeat(inputs, 3, axis=0))
    assert found.completion_tokens is tokens
