"""The policy gradient of a tiny T5 against enumeration of every completion, and how batches are put together."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clp_jax.models.conditioning import ParameterConditioning
from clp_jax.models.config import T5Config
from clp_jax.models.policy import Policy
from clp_jax.objectives.masking import completion_mask
from clp_jax.objectives.optimum import policy_value
from clp_jax.preferences import Preference
from clp_jax.sampling.rollouts import Rollout
from clp_jax.sampling.score import score
from clp_jax.training.estimators import LeaveOneOut, ValueBaseline
from clp_jax.training.experience import Experience
from clp_jax.training.learner import Learner
from clp_jax.training.optimizers import Adafactor
from clp_jax.training.policy_loss import PolicyGradientLoss

VOCAB, LENGTH = 3, 3
SIZES = {"embed_dim": 4, "mlp_dim": 6, "num_heads": 1, "head_dim": 4, "num_encoder_layers": 1, "num_decoder_layers": 1}
POLICY = Policy(T5Config.t5_1_1(vocab_size=VOCAB, num_buckets=4, max_distance=8, **SIZES))
INPUTS = jnp.asarray([[2, 2, 1, 0]], jnp.int32)
WEIGHTS, ALPHA = (0.3, 0.7), 0.2


def all_completions():
    """Every completion of at most `LENGTH` tokens: up to the end of sequence (1), then 0; 0 itself is a token too."""
    rows = set()
    for tokens in itertools.product(range(VOCAB), repeat=LENGTH):
        end = tokens.index(1) + 1 if 1 in tokens else LENGTH
        rows.add((*tokens[:end], *[0] * (LENGTH - end), end))
    rows = np.asarray(sorted(rows), np.int32)
    return jnp.asarray(rows[:, :-1]), rows[:, -1]


TOKENS, ENDS = all_completions()
REWARDS = jnp.asarray(np.random.default_rng(0).normal(size=(len(TOKENS), 2)), jnp.float32)


def separate(params, seed):
    """Parameters that all differ and matter, as after training."""
    keys = iter(jax.random.split(jax.random.key(seed), len(jax.tree.leaves(params))))
    return jax.tree.map(lambda p: p + 0.5 * jax.random.normal(next(keys), p.shape), params)


@functools.cache
def setting(subset, alpha_min, estimator):
    """Conditioning, parameters and frozen tree of a policy that is far from its reference."""
    conditioning = ParameterConditioning(subset, 2, alpha_min=alpha_min)
    reference = POLICY.init(jax.random.key(1))
    params = {
        "policy": separate(conditioning.expand(reference), 2),
        "baseline": separate(estimator.init(jax.random.key(3), POLICY.config.embed_dim, 2), 4),
    }
    return conditioning, params, {"reference": reference}


def enumerated(conditioning, policy_params, reference):
    """Log-probabilities of the tokens of every completion, under the policy and under the reference."""
    mixed = conditioning.mix(policy_params, reference, Preference.of(WEIGHTS, ALPHA))
    return tuple(score(POLICY.bind(params), INPUTS, TOKENS) for params in (mixed, reference))


def experience(rows, log_probs, reference_log_probs, inputs=INPUTS, weights=WEIGHTS):
    """What the completions `rows` (indices) of one prompt would have been rolled out as."""
    repeats = len(rows)
    rollout = Rollout(
        inputs=inputs,
        tokens=TOKENS[rows],
        mask=completion_mask(TOKENS[rows]),
        log_probs=log_probs[rows],
        reference_log_probs=reference_log_probs[rows],
        preference=Preference(jnp.tile(jnp.asarray(weights)[None], (repeats, 1)), jnp.full((repeats,), ALPHA)),
    )
    return Experience(rollout=rollout, rewards=REWARDS[rows])


def test_the_completions_are_all_there_are():
    assert len(TOKENS) == 1 + 2 + 4 * VOCAB
    np.testing.assert_array_equal(completion_mask(TOKENS).sum(-1), ENDS)
    conditioning, params, frozen = setting("full", None, LeaveOneOut())
    for log_probs in enumerated(conditioning, params["policy"], frozen["reference"]):
        np.testing.assert_allclose(jnp.exp(log_probs.sum(-1)).sum(), 1, rtol=1e-5)


@pytest.mark.parametrize(
    ("subset", "alpha_min", "estimator"),
    [
        ("full", None, ValueBaseline(hidden_dim=4)),
        ("attention", 0.1, ValueBaseline(hidden_dim=4)),
        ("full", 0.1, LeaveOneOut()),
    ],
)
def test_the_expected_gradient_is_that_of_the_objective(subset, alpha_min, estimator):
    """Over all completions, or all pairs of completions where one is left out, weighted by their probability.

    A baseline that saw a token before that token was sampled, a return that left out a later token's KL or a component
    with another coefficient would all show.
    """
    conditioning, params, frozen = setting(subset, alpha_min, estimator)
    samples = 2 if isinstance(estimator, LeaveOneOut) else 1
    loss = PolicyGradientLoss(POLICY, conditioning, estimator, samples, samples, ("a", "b"))
    draws = jnp.asarray(list(itertools.product(range(len(TOKENS)), repeat=samples)), jnp.int32)

    @jax.jit
    def expected(policy_params):
        log_probs, reference_log_probs = enumerated(conditioning, policy_params, frozen["reference"])

        def gradient(rows):
            def mean_loss(policy_params):
                total, count, _ = loss(
                    params | {"policy": policy_params},
                    frozen,
                    experience(rows, log_probs, reference_log_probs),
                    jax.random.key(0),
                )
                return total / count

            return jax.grad(mean_loss)(policy_params)

        probability = jnp.exp(log_probs.sum(-1)[draws].sum(-1))
        return jax.tree.map(lambda g: jnp.tensordot(probability, g, 1), jax.vmap(gradient)(draws))

    @jax.jit
    @jax.grad
    def exact(policy_params):
        log_probs, reference_log_probs = enumerated(conditioning, policy_params, frozen["reference"])
        return -policy_value(log_probs.sum(-1), reference_log_probs.sum(-1), REWARDS @ jnp.asarray(WEIGHTS), ALPHA)

    found, wanted = expected(params["policy"]), exact(params["policy"])
    scale = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(wanted))
    assert scale > 0.01
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * scale), found, wanted)


def batch(weights=((0.3, 0.7), (0.9, 0.1))):
    """Two prompts of two samples each, the prompts at preferences of their own."""
    conditioning, params, frozen = setting("full", None, LeaveOneOut())
    parts = []
    for prompt, (rows, w) in enumerate(zip(([0, 14], [3, 7]), weights, strict=True)):
        inputs = INPUTS.at[0, prompt].set(0)
        mixed = conditioning.mix(params["policy"], frozen["reference"], Preference.of(w, ALPHA))
        log_probs, reference = (score(POLICY.bind(p), inputs, TOKENS) for p in (mixed, frozen["reference"]))
        parts.append(experience(np.asarray(rows), log_probs, reference, inputs, w))
    return parts, jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)


def loss_of(rows_per_group, estimator=None):
    estimator = estimator or LeaveOneOut()
    conditioning, _, _ = setting("full", None, estimator)
    return PolicyGradientLoss(POLICY, conditioning, estimator, 2, rows_per_group, ("a", "b"))


def test_a_batch_of_groups_is_the_sum_of_its_groups():
    _, params, frozen = setting("full", None, LeaveOneOut())
    parts, whole = batch()
    gradient = jax.jit(jax.value_and_grad(lambda p, e: loss_of(2)(p, frozen, e, jax.random.key(0))[0]))
    alone = [gradient(params, part) for part in parts]
    together = gradient(params, whole)
    jax.tree.map(lambda a, *b: np.testing.assert_allclose(a, sum(b), rtol=1e-4, atol=1e-5), together, *alone)


@pytest.mark.parametrize("same", [True, False])
def test_micro_batches_of_a_group_or_of_whole_groups_are_the_batch(same):
    """One group of two prompts cut into two slices, or two groups into one slice each."""
    _, params, frozen = setting("full", None, LeaveOneOut())
    _, whole = batch(((0.3, 0.7), (0.3, 0.7)) if same else ((0.3, 0.7), (0.9, 0.1)))
    states = []
    for accumulation in (1, 2):
        learner = Learner(loss_of(4 if same else 2), Adafactor(0.1), accumulation=accumulation)
        state = learner.init_state(jax.tree.map(jnp.copy, params), 0)
        states.append(learner.update(state, learner.place_frozen(frozen), whole))
    (one, metrics), (two, sliced) = states
    for name in ("loss", "kl", "objective", "reward/a", "length", "grad_norm"):
        np.testing.assert_allclose(sliced[name], metrics[name], rtol=1e-4, err_msg=name)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-7), two.opt_state[1].v, one.opt_state[1].v
    )


def test_metrics_and_loss_by_hand():
    _, params, frozen = setting("full", None, LeaveOneOut())
    _, whole = batch()
    total, count, metrics = loss_of(2)(params, frozen, whole, jax.random.key(0))
    rollout, rewards = whole.rollout, np.asarray(whole.rewards, np.float64)
    weights = np.asarray(rollout.preference.weights)
    mask, log_probs = np.asarray(rollout.mask), np.asarray(rollout.log_probs)
    kl = (log_probs - rollout.reference_log_probs) * mask
    scalar = (1 - ALPHA) * (rewards * weights).sum(-1)
    returns = (scalar[:, None] - ALPHA * kl[:, ::-1].cumsum(1)[:, ::-1]) * mask
    advantages = (returns - returns[[1, 0, 3, 2], :1]) * mask
    # The policy has not moved since it sampled: its log-probabilities are the rollout's.
    np.testing.assert_allclose(total, -(advantages * log_probs).sum(), rtol=1e-4)
    expected = {
        "reward/a": rewards[:, 0].mean(),
        "reward/b": rewards[:, 1].mean(),
        "reward/weighted": (rewards * weights).sum(-1).mean(),
        "objective": (scalar - ALPHA * kl.sum(-1)).mean(),
        "kl": kl.sum(-1).mean(),
        "length": mask.sum(-1).mean(),
        "finished": (np.asarray(rollout.tokens) == 1).any(-1).mean(),
        "policy_loss": total / 4,
    }
    assert count == 4 and expected["finished"] not in (0, 1)
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-4, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("estimator", [LeaveOneOut(), ValueBaseline(hidden_dim=4)])
def test_nothing_behind_the_end_of_a_completion_counts(estimator):
    _, params, frozen = setting("full", None, estimator)
    _, whole = batch()
    hidden = jnp.where(whole.rollout.mask > 0, 0.0, jnp.asarray(np.nan))
    assert np.isnan(hidden).any()
    fields = {name: getattr(whole.rollout, name) + hidden for name in ("log_probs", "reference_log_probs")}
    poisoned = dataclasses.replace(whole, rollout=dataclasses.replace(whole.rollout, **fields))
    run = jax.jit(
        jax.value_and_grad(lambda p, e: loss_of(2, estimator)(p, frozen, e, jax.random.key(0))[::2], has_aux=True)
    )
    jax.tree.map(np.testing.assert_array_equal, run(params, poisoned), run(params, whole))
