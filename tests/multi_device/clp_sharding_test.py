"""A CLP step on eight virtual devices, rollouts and update: the numbers of one device, with components, groups and samples."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from rounding import assert_same_metrics, assert_same_to_rounding
from tiny_policies import PROMPTS, tiny_config, varied_params

from clp_jax.models.conditioning import ParameterConditioning
from clp_jax.models.policy import Policy
from clp_jax.partitioning import Rules, make_mesh
from clp_jax.preferences import AlphaRange, Dirichlet
from clp_jax.sampling.generate import SamplingConfig
from clp_jax.sampling.rollouts import RolloutWorker
from clp_jax.training.estimators import ValueBaseline
from clp_jax.training.experience import Experience
from clp_jax.training.learner import Learner
from clp_jax.training.optimizers import Adafactor
from clp_jax.training.policy_loss import PolicyGradientLoss

DATA = ("batch", ("slice", "data", "fsdp"))
TENSOR = (("embed", "fsdp"), ("mlp", "tensor"), ("heads", "tensor"), ("act_mlp", "tensor"))
LAYOUTS = {
    "one": ({"devices": jax.devices()[:1]}, Rules((DATA,))),
    "all": (dict(data=2, fsdp=2, tensor=2), Rules((DATA, *TENSOR))),
}

POLICY = Policy(tiny_config(num_encoder_layers=1, num_decoder_layers=1))
CONDITIONING = ParameterConditioning("full", 2, alpha_min=0.1)
ESTIMATOR = ValueBaseline(hidden_dim=8)
NUM_SAMPLES, NUM_GROUPS = 2, 4
INPUTS = jnp.asarray(np.concatenate([PROMPTS, PROMPTS[::-1]]))
STEPS = 3


def separate(params):
    """Components that differ, as after training."""
    rng = np.random.default_rng(7)
    return jax.tree.map(lambda x: x + jnp.asarray(0.1 * rng.normal(size=x.shape), x.dtype), params)


def rewards(tokens):
    """Two rewards at odds: the share of one token, and the length."""
    return np.stack([(tokens == 3).mean(-1), (tokens > 0).mean(-1) * -2], axis=-1).astype(np.float32)


@functools.cache
def train(layout):
    """Rolls out and updates for some steps; returns the rollouts, the metrics and the last state."""
    sizes, rules = LAYOUTS[layout]
    rows_per_group = len(INPUTS) * NUM_SAMPLES // NUM_GROUPS
    reference = varied_params(POLICY)
    axes = POLICY.logical_axes()
    learner = Learner(
        PolicyGradientLoss(POLICY, CONDITIONING, ESTIMATOR, NUM_SAMPLES, rows_per_group, ("threes", "brevity")),
        Adafactor(0.02),
        logical_axes={"policy": CONDITIONING.logical_axes(axes), "baseline": None},
        frozen_logical_axes={"reference": axes},
        mesh=make_mesh(**sizes),
        rules=rules,
    )
    baseline = ESTIMATOR.init(jax.random.key(1), POLICY.config.embed_dim, 2)
    state = learner.init_state({"policy": separate(CONDITIONING.expand(reference)), "baseline": baseline}, seed=0)
    frozen = learner.place_frozen({"reference": reference})
    worker = RolloutWorker(POLICY, CONDITIONING, SamplingConfig(5), NUM_SAMPLES, NUM_GROUPS)
    sampler = Dirichlet(2, alpha=AlphaRange(0.1, 0.6))
    roll_out = jax.jit(lambda params, frozen, key: worker(params, frozen, INPUTS, sampler(key, NUM_GROUPS), key))
    rollouts, history = [], []
    for step in range(STEPS):
        with learner.activate():
            rollout = roll_out(state.params["policy"], frozen["reference"], jax.random.key(100 + step))
        rollouts.append(rollout)
        experience = Experience(rollout, jnp.asarray(rewards(np.asarray(rollout.tokens))))
        state, metrics = learner.update(state, frozen, experience)
        history.append({name: float(value) for name, value in metrics.items()})
    assert learner.compile_count == 1
    return rollouts, history, state


def roots(state):
    """What Adafactor divides by: a second moment is a square, and of twice its rounding."""
    return jax.tree.map(
        lambda leaf: np.sqrt(leaf) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf, state.opt_state
    )


def test_eight_devices_make_the_clp_steps_of_one():
    """The same tokens are sampled, and all numbers are the same to 1e-6: of the largest of their array, after three steps."""
    assert jax.device_count() == 8
    rollouts, history, state = train("all")
    expected_rollouts, expected_history, expected_state = train("one")
    for now, then in zip(rollouts, expected_rollouts, strict=True):
        np.testing.assert_array_equal(np.asarray(now.tokens), np.asarray(then.tokens))
    assert_same_to_rounding(rollouts, expected_rollouts)
    for now, then in zip(history, expected_history, strict=True):
        assert_same_metrics(now, then)
    assert_same_to_rounding(state.params, expected_state.params)
    assert_same_to_rounding(roots(state), roots(expected_state))


def test_the_steps_are_worth_comparing():
    rollouts, history, state = train("one")
    assert len({np.asarray(rollout.tokens).tobytes() for rollout in rollouts}) == STEPS
    assert all(metrics["grad_norm"] > 1e-3 and metrics["update_norm"] > 1e-3 for metrics in history)
    assert all(np.ptp(np.asarray(rollout.preference.alpha)) > 0.01 for rollout in rollouts)
    kernel = np.asarray(state.params["policy"]["decoder"]["layers"]["self_attention"]["query"]["kernel"])
    assert kernel.shape[0] == 2 and not np.allclose(kernel[0], kernel[1], atol=1e-3)


def test_components_are_sharded_like_the_parameters_they_copy():
    _, _, state = train("all")
    kernel = state.params["policy"]["decoder"]["layers"]["mlp"]["wo"]["kernel"]
    assert kernel.sharding.spec == PartitionSpec(None, None, "tensor", "fsdp")
    assert kernel.shape[0] == 2 and len(kernel.addressable_shards) == 8
