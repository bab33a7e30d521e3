"""Reinforcement learning whose result is known: real rollouts, loss, learner and optimizers on policies that are tables.

The tree is that of `tests/objectives/optimum_test.py`: the first token is A, B or C, the second one of two leaves.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tabular import TabularConfig

from clp_jax.models.conditioning import ParameterConditioning, Unconditioned, stack_experts
from clp_jax.models.policy import Policy
from clp_jax.objectives import optimum
from clp_jax.preferences import Dirichlet, Preference, corner_sampler, fixed, simplex_grid
from clp_jax.sampling.generate import SamplingConfig
from clp_jax.sampling.rollouts import RolloutWorker
from clp_jax.sampling.score import score
from clp_jax.sampling.steering import LogitMixture
from clp_jax.training.estimators import LeaveOneOut
from clp_jax.training.experience import Experience
from clp_jax.training.learner import Learner
from clp_jax.training.optimizers import Adafactor, AdamW
from clp_jax.training.policy_loss import PolicyGradientLoss
from clp_jax.training.schedules import Linear

# Tokens 0 and 1 are padding and end of sequence; 2, 3, 4 are A, B, C, and 2, 3 the leaves of each.
CONFIG = TabularConfig(vocab_size=5, length=2, allowed=((2, 3, 4), (2, 3)))
TREE = Policy(CONFIG)
REWARDS = np.zeros((5, 5, 2), np.float32)
REWARDS[2, 2], REWARDS[2, 3], REWARDS[3] = (1, 0), (0, 1), (0.9, 0.9)
COMPLETIONS = jnp.asarray([[first, leaf] for first in (2, 3, 4) for leaf in (2, 3)], jnp.int32)
LEAF_REWARDS = jnp.asarray(REWARDS[np.asarray(COMPLETIONS)[:, 0], np.asarray(COMPLETIONS)[:, 1]])
PROMPT = jnp.asarray([[2, 1]], jnp.int32)
BETA = 0.05
ALPHA = BETA / (1 + BETA)
UNIFORM = tuple(jnp.full(shape, -np.log(shape[-1])) for shape in ((3,), (3, 2)))


def rewards_of(tokens):
    tokens = np.asarray(tokens)
    return jnp.asarray(REWARDS[tokens[:, 0], tokens[:, 1]])


@dataclasses.dataclass(frozen=True)
class Sgd:
    """Plain gradient descent, where a gradient must show as it is."""

    rate: float

    @property
    def schedule(self):
        return lambda step: self.rate

    def build(self, logical_axes):
        return optax.sgd(self.rate)


def reinforce(conditioning, sampler, optimizer, *, steps, prompts, samples, groups=1, rows=slice(None), seed=0):
    """Trains on the tree as the stage does: roll out, reward, update. `rows` takes some of the prompts to learn from."""
    worker = RolloutWorker(TREE, conditioning, SamplingConfig(CONFIG.length), samples, groups)
    kept = len(range(prompts)[rows])
    per_group = kept * samples // (groups if kept == prompts else 1)
    loss = PolicyGradientLoss(TREE, conditioning, LeaveOneOut(), samples, per_group, ("a", "b"))
    axes = conditioning.logical_axes(TREE.logical_axes())
    learner = Learner(loss, optimizer, logical_axes={"policy": axes, "baseline": None})
    reference = CONFIG.zeros()
    state = learner.init_state({"policy": conditioning.expand(reference), "baseline": {}}, seed)
    inputs = jnp.repeat(PROMPT, prompts, axis=0)

    @jax.jit
    def roll_out(params, step):
        preference_key, sample_key = jax.random.split(jax.random.fold_in(jax.random.key(seed), step))
        return worker(params, reference, inputs, sampler(preference_key, groups), sample_key)

    for _ in range(steps):
        rollout = roll_out(state.params["policy"], state.step)
        rewards = rewards_of(rollout.tokens)
        batch = jax.tree.map(lambda x: of_prompts(x, prompts, rows), Experience(rollout, rewards))
        state, _ = learner.update(state, {"reference": reference}, batch)
    return state.params["policy"]


def of_prompts(x, prompts, rows):
    """The rows of some prompts, whatever the number of rows a prompt has."""
    return x.reshape(prompts, -1, *x.shape[1:])[rows].reshape(-1, *x.shape[1:])


def log_probs_at(conditioning, params, weights):
    """``log π`` of the six completions, and of the three first tokens."""
    mixed = conditioning.mix(params, CONFIG.zeros(), Preference.of(weights, ALPHA))
    whole = score(TREE.bind(mixed), PROMPT, COMPLETIONS).sum(-1)
    return whole, jax.nn.logsumexp(whole.reshape(3, 2), axis=-1)


def test_a_conditional_policy_trained_on_the_tree_picks_b():
    """Where mixing the experts picks A (`optimum_test`), training for all weights together finds the compromise."""
    conditioning = ParameterConditioning("full", 2)
    params = reinforce(
        conditioning, Dirichlet(2, alpha=ALPHA), AdamW(Linear(0.1, 300)), steps=300, prompts=16, samples=4, groups=4
    )
    rewards = []
    for weights in simplex_grid(11):
        whole, first = log_probs_at(conditioning, params, weights)
        assert np.argmax(first) == 1, f"at {weights}: {np.exp(first)}"
        rewards.append(float(jnp.exp(whole) @ LEAF_REWARDS @ jnp.asarray(weights)))
    # B gives 0.9 at every weight: at most 0.1 less than the experts at the corners, 0.4 more than their mixture between.
    assert min(rewards) > 0.85 and rewards[5] > 0.585 + 0.25


def descend_exactly(conditioning, weights, steps=400):
    """Gradient descent on the exact objective: the experts without the noise of samples."""

    def loss(params, frozen, batch, key):
        whole, _ = log_probs_at(conditioning, params, weights)
        reference = jnp.full((6,), -np.log(6))
        return -optimum.policy_value(whole, reference, LEAF_REWARDS @ jnp.asarray(weights), ALPHA), jnp.float32(1), {}

    learner = Learner(loss, AdamW(Linear(0.5, steps)))
    state = learner.init_state(CONFIG.zeros(), 0)
    for _ in range(steps):
        state, _ = learner.update(state, {}, {"none": np.zeros(1)})
    return state.params


def test_trained_experts_reach_the_optimum_and_their_mixture_is_the_tables():
    """Table T3 for β = 0.05, from policies that were trained and decoders that sample them."""
    experts = []
    for k in range(2):
        trained = descend_exactly(Unconditioned(), np.eye(2)[k])
        expected = optimum.optimal_token_policy(UNIFORM, LEAF_REWARDS[:, k].reshape(3, 2), ALPHA)
        whole, _ = log_probs_at(Unconditioned(), trained, np.eye(2)[k])
        np.testing.assert_allclose(np.exp(whole), np.exp(optimum.sequence_log_probs(expected)).ravel(), atol=2e-4)
        experts.append(trained)
    mixture = LogitMixture(TREE, stack_experts(experts))
    inputs, config = jnp.repeat(PROMPT, 4000, axis=0), SamplingConfig(2)
    out = mixture.generate(inputs, Preference.of([0.5, 0.5], ALPHA), jax.random.key(0), config)
    tokens = np.asarray(out.tokens)
    # Four standard errors of a share of 4,000 samples.
    np.testing.assert_allclose(np.bincount(tokens[:, 0], minlength=5)[2:] / 4000, (0.787, 0.213, 0.0), atol=0.026)
    np.testing.assert_allclose(rewards_of(tokens).mean(), 0.585, atol=0.013)


@pytest.mark.parametrize(
    ("optimizer", "expert_optimizer"),
    [
        # Half of a batch is a component's own, so its gradient is half its expert's: the same to a scale-free optimizer.
        (Adafactor(0.1, min_dim_to_factor=2, min_scale=1.0),) * 2,
        (Sgd(1.0), Sgd(0.5)),
    ],
    ids=["Adafactor", "gradient descent"],
)
def test_training_at_the_corners_alone_reproduces_the_experts(optimizer, expert_optimizer):
    """Each expert is trained alone on the prompts and random numbers that its component saw.

    Exact where nothing is shared: full conditioning, every corner in every batch, a baseline without parameters, no
    clipping by the global norm. Adafactor must also keep the components apart in its factors, clipping and scales.
    """
    settings = dict(steps=30, prompts=8, samples=3, seed=5)
    together = reinforce(
        ParameterConditioning("full", 2), corner_sampler(2, alpha=ALPHA), optimizer, groups=2, **settings
    )
    for k, rows in enumerate((slice(0, 4), slice(4, 8))):
        alone = reinforce(
            Unconditioned(), fixed(((1.0, 0.0), (0.0, 1.0))[k], alpha=ALPHA), expert_optimizer, rows=rows, **settings
        )
        assert np.abs(alone["table"]).max() > 0.1
        np.testing.assert_allclose(together["table"][k], alone["table"], rtol=1e-4, atol=1e-5)


def test_equal_components_give_every_weight_the_same_policy():
    conditioning = ParameterConditioning("full", 2)
    table = jnp.asarray(np.random.default_rng(0).normal(size=CONFIG.zeros()["table"].shape), jnp.float32)
    params = conditioning.expand({"table": table})
    expected, _ = log_probs_at(conditioning, params, (1.0, 0.0))
    for weights in simplex_grid(11):
        np.testing.assert_allclose(log_probs_at(conditioning, params, weights)[0], expected, rtol=1e-5)
