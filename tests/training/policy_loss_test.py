"""The policy gradient of a tiny T5 against enumeration of every completion, and how batches are put together."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tabular import TabularConfig
from tiny_policies import tiny_config, varied_params

from clp_jax.models.conditioning import ParameterConditioning
from clp_jax.models.config import MoEConfig
from clp_jax.models.policy import Policy
from clp_jax.nn.routing import TokenChoice
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
T5 = Policy(tiny_config(vocab_size=VOCAB, embed_dim=4, mlp_dim=6, num_encoder_layers=1, num_decoder_layers=1))
TABLE = Policy(TabularConfig(VOCAB, LENGTH))
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


def random_like(tree, seed):
    """Parameters that all differ and matter, as after training."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), tree)


def setting(policy, conditioning, estimator):
    """Parameters and frozen tree of a policy that is far from its reference."""
    reference = varied_params(policy, seed=1)
    params = {
        "policy": jax.tree.map(jnp.add, conditioning.expand(reference), random_like(conditioning.expand(reference), 2)),
        "baseline": random_like(estimator.init(jax.random.key(3), policy.config.embed_dim, 2), 4),
    }
    return params, {"reference": reference}


def enumerated(policy, conditioning, params, frozen, weights=WEIGHTS, inputs=INPUTS):
    """Log-probabilities of the tokens of every completion, under the policy and under the reference."""
    mixed = conditioning.mix(params["policy"], frozen["reference"], Preference.of(weights, ALPHA))
    return tuple(score(policy.bind(tree), inputs, TOKENS) for tree in (mixed, frozen["reference"]))


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
    conditioning = ParameterConditioning("full", 2)
    for log_probs in enumerated(TABLE, conditioning, *setting(TABLE, conditioning, LeaveOneOut())):
        np.testing.assert_allclose(jnp.exp(log_probs.sum(-1)).sum(), 1, rtol=1e-5)


@pytest.mark.parametrize(
    ("policy", "subset", "alpha_min", "estimator"),
    [
        (T5, "attention", 0.1, ValueBaseline(hidden_dim=4, centred=False)),
        (TABLE, "full", None, ValueBaseline(hidden_dim=4, centred=False)),
        (TABLE, "full", 0.1, LeaveOneOut()),
    ],
    ids=["T5, value", "table, value", "table, leave one out"],
)
def test_the_expected_gradient_is_that_of_the_objective(policy, subset, alpha_min, estimator):
    """Over all completions, or all pairs of completions where one is left out, weighted by their probability.

    A baseline that saw a token before that token was sampled, a return that left out a later token's KL or a component
    with another coefficient would all show.
    """
    conditioning = ParameterConditioning(subset, 2, alpha_min=alpha_min)
    params, frozen = setting(policy, conditioning, estimator)
    samples = 2 if isinstance(estimator, LeaveOneOut) else 1
    loss = PolicyGradientLoss(policy, conditioning, estimator, samples, samples, ("a", "b"))
    draws = jnp.asarray(list(itertools.product(range(len(TOKENS)), repeat=samples)), jnp.int32)

    @jax.jit
    def expected_and_exact(policy_params):
        def value(policy_params):
            log_probs = enumerated(policy, conditioning, params | {"policy": policy_params}, frozen)
            whole, reference = (x.sum(-1) for x in log_probs)
            return -policy_value(whole, reference, REWARDS @ jnp.asarray(WEIGHTS), ALPHA), log_probs

        def mean_loss(policy_params, rows):
            drawn = experience(rows, *log_probs)
            total, count, _ = loss(params | {"policy": policy_params}, frozen, drawn, jax.random.key(0))
            return total / count

        exact, log_probs = jax.grad(value, has_aux=True)(policy_params)
        probability = jnp.exp(log_probs[0].sum(-1)[draws].sum(-1))
        gradients = jax.vmap(jax.grad(mean_loss), in_axes=(None, 0))(policy_params, draws)
        return jax.tree.map(lambda g: jnp.tensordot(probability, g, 1), gradients), exact

    expected, exact = expected_and_exact(params["policy"])
    scale = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(exact))
    assert scale > 0.01
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * scale), expected, exact)


FULL = ParameterConditioning("full", 2)


def batch(weights=((0.3, 0.7), (0.9, 0.1))):
    """Two prompts of two samples each, the prompts at preferences of their own."""
    params, frozen = setting(TABLE, FULL, LeaveOneOut())
    parts = []
    for rows, w in zip(([0, 14], [3, 7]), weights, strict=True):
        parts.append(experience(np.asarray(rows), *enumerated(TABLE, FULL, params, frozen, w), weights=w))
    return parts, jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)


def loss_of(rows_per_group, estimator=LeaveOneOut()):
    return PolicyGradientLoss(TABLE, FULL, estimator, 2, rows_per_group, ("a", "b"))


def test_a_batch_of_groups_is_the_sum_of_its_groups():
    params, frozen = setting(TABLE, FULL, LeaveOneOut())
    parts, whole = batch()
    gradient = jax.jit(jax.value_and_grad(lambda p, e: loss_of(2)(p, frozen, e, jax.random.key(0))[0]))
    alone = [gradient(params, part) for part in parts]
    together = gradient(params, whole)
    jax.tree.map(lambda a, *b: np.testing.assert_allclose(a, sum(b), rtol=1e-5, atol=1e-6), together, *alone)


@pytest.mark.parametrize("weights", [((0.3, 0.7), (0.3, 0.7)), ((0.3, 0.7), (0.9, 0.1))], ids=["one group", "two"])
def test_micro_batches_of_a_group_or_of_whole_groups_are_the_batch(weights):
    """One group of two prompts cut into two slices, or two groups into one slice each."""
    params, frozen = setting(TABLE, FULL, LeaveOneOut())
    _, whole = batch(weights)
    loss = loss_of(4 if weights[0] == weights[1] else 2)
    steps = []
    for accumulation in (1, 2):
        learner = Learner(loss, Adafactor(0.1), accumulation=accumulation)
        steps.append(learner.update(learner.init_state(params, 0), learner.place_frozen(frozen), whole))
    (one, metrics), (two, sliced) = steps
    for name in ("loss", "kl", "objective", "reward/a", "length", "grad_norm"):
        np.testing.assert_allclose(sliced[name], metrics[name], rtol=1e-5, err_msg=name)
    # The second moments are the squared gradients.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-9), two.opt_state[1].v, one.opt_state[1].v
    )


def test_slices_that_cut_groups_are_refused():
    params, frozen = setting(TABLE, FULL, LeaveOneOut())
    with pytest.raises(ValueError, match="a slice of 4 rows cuts groups of 3 rows"):
        loss_of(3)(params, frozen, batch()[1], jax.random.key(0))


def test_metrics_and_loss_by_hand():
    params, frozen = setting(TABLE, FULL, LeaveOneOut())
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


@pytest.mark.parametrize("estimator", [LeaveOneOut(), ValueBaseline(hidden_dim=4, centred=False)])
def test_nothing_behind_the_end_of_a_completion_counts(estimator):
    params, frozen = setting(TABLE, FULL, estimator)
    _, whole = batch()
    hidden = jnp.where(whole.rollout.mask > 0, 0.0, jnp.asarray(np.nan))
    assert np.isnan(hidden).any()
    fields = {name: getattr(whole.rollout, name) + hidden for name in ("log_probs", "reference_log_probs")}
    poisoned = dataclasses.replace(whole, rollout=dataclasses.replace(whole.rollout, **fields))
    run = jax.jit(
        jax.value_and_grad(lambda p, e: loss_of(2, estimator)(p, frozen, e, jax.random.key(0))[::2], has_aux=True)
    )
    jax.tree.map(np.testing.assert_array_equal, run(params, poisoned), run(params, whole))


@pytest.mark.parametrize("by", ["layer", "stack", "model"])
def test_routers_of_groups_are_those_of_one_group_of_all_their_rows(by):
    """Two prompts at one preference, each a group of its own or both in one: experts see the same rows."""
    router = TokenChoice(k=1, eval_capacity=1.0)
    moe = MoEConfig(num_experts=2, router=router, balance_by=by, balance_weight=0.5, z_weight=0.25)
    policy = Policy(dataclasses.replace(T5.config, num_encoder_layers=3, num_decoder_layers=2, moe=moe))
    params, frozen = setting(policy, FULL, LeaveOneOut())
    prompts, rows = ([[2, 2, 1, 0]], [[2, 0, 2, 1]]), ([0, 14], [3, 7])
    zeros = jnp.zeros(TOKENS.shape)
    parts = [
        experience(np.asarray(r), zeros, zeros, jnp.asarray(p, jnp.int32)) for r, p in zip(rows, prompts, strict=True)
    ]
    drawn = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)

    def run(rows_per_group):
        loss = PolicyGradientLoss(policy, FULL, LeaveOneOut(), 2, rows_per_group, ("a", "b"))
        return jax.jit(loss)(params, frozen, drawn, jax.random.key(0))

    (apart, _, metrics), (together, _, expected) = run(2), run(4)
    np.testing.assert_allclose(apart, together, rtol=1e-5)
    routers = {name: value for name, value in expected.items() if name.startswith("router/")}
    assert {"router/balance_loss", "router/z_loss", "router/load_00"} < set(routers) and routers["router/dropped"] > 0
    for name, value in routers.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, err_msg=name)
