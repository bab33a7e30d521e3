"""Guards against closed forms: what is skipped, what enters the window, and that a skipped update leaves no trace."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clp_jax.training.guards import LEAST_SPREAD, Guards
from clp_jax.training.learner import Learner
from clp_jax.training.optimizers import Adafactor, AdamW
from clp_jax.training.schedules import Linear


class Expected:
    """The same verdicts with Python's lists."""

    def __init__(self, guards):
        self.guards, self.window = guards, []
        self.skipped = self.non_finite = self.spikes = 0

    def judge(self, loss, grad_norm, weight=1.0):
        guards, values = self.guards, np.asarray([loss, grad_norm], np.float32)
        finite, spike = np.isfinite(values).all(), False
        if finite and guards.sigmas is not None and len(self.window) >= guards.window:
            last = np.asarray(self.window[-guards.window :], np.float64)
            mean, spread = last.mean(axis=0), last.std(axis=0)
            spike = bool((values > mean + guards.sigmas * np.maximum(spread, LEAST_SPREAD * abs(mean))).any())
        lasting = spike and self.spikes + 1 >= guards.patience
        self.spikes = self.spikes + 1 if spike and not lasting else 0
        if lasting:
            self.window = []
        make = bool(finite) and (not spike or lasting)
        self.non_finite = 0 if finite else self.non_finite + 1
        self.skipped += not make
        if make and weight > 0:
            self.window.append(values)
        return make


def verdicts(guards, losses, grad_norms, weights=None):
    judge = jax.jit(guards.judge)
    state, expected, found = guards.init(), Expected(guards), []
    weights = np.ones(len(losses)) if weights is None else weights
    for values in zip(losses, grad_norms, weights, strict=True):
        make, state = judge(state, *(jnp.float32(value) for value in values))
        assert bool(make) == expected.judge(*values)
        counts = (state.skipped, state.non_finite, state.spikes)
        assert [int(n) for n in counts] == [expected.skipped, expected.non_finite, expected.spikes]
        found.append(bool(make))
    return found


def test_a_spike_is_above_the_mean_by_so_many_deviations():
    """The window is 1, 3, 1, 3: mean 2 and deviation 1, so that the limit is 2 + 3."""
    guards = Guards(window=4, sigmas=3.0)
    flat = [1.0] * 5
    assert verdicts(guards, [1, 3, 1, 3, 4.99], flat) == [True] * 5
    assert verdicts(guards, [1, 3, 1, 3, 5.01], flat) == [True] * 4 + [False]
    assert verdicts(guards, flat, [1, 3, 1, 3, 5.01]) == [True] * 4 + [False]
    assert verdicts(guards, [1, 3, 1, 5.01], flat[:4]) == [True] * 4  # The window is not full.
    assert verdicts(guards, [1, 3, 1, 3, -50], flat) == [True] * 5  # Low is no spike.
    assert verdicts(Guards(window=4, sigmas=None), [1, 3, 1, 3, 1e9], flat) == [True] * 5


def test_where_values_are_the_same_a_hundredth_of_them_is_a_deviation():
    guards = Guards(window=4, sigmas=6.0)
    assert verdicts(guards, [2, 2, 2, 2, 2.11], [0] * 5) == [True] * 5
    assert verdicts(guards, [2, 2, 2, 2, 2.13], [0] * 5) == [True] * 4 + [False]


def test_a_spike_does_not_enter_the_window_and_a_level_that_lasts_begins_it_anew():
    guards = Guards(window=4, sigmas=3.0, patience=3)
    losses = [1, 3, 1, 3, 9, 9, 2, 9, 9, 9, 9, 9, 9, 9, 30]
    made = [True] * 4 + [False, False, True, False, False] + [True] * 5 + [False]
    assert verdicts(guards, losses, [1.0] * len(losses)) == made


def test_random_sequences_with_everything_in_them():
    rng = np.random.default_rng(0)
    losses = rng.normal(5, 1, 300) + 20 * (rng.random(300) < 0.1)
    losses[rng.random(300) < 0.05] = np.nan
    norms = rng.lognormal(0, 1, 300)
    norms[rng.random(300) < 0.05] = np.inf
    made = verdicts(Guards(window=8, sigmas=4.0, patience=3), losses, norms, (rng.random(300) > 0.1).astype(np.float32))
    assert 100 < sum(made) < 280


def squares(params, frozen, batch, key):
    error = batch["x"] @ params["w"] - 1 + 0.1 * jax.random.normal(key)
    return (error**2).sum(), jnp.float32(error.size), {}


PARAMS = {"w": jnp.asarray([1.0, -2.0, 0.5])}


def batches(count, bad=()):
    rng = np.random.default_rng(0)
    drawn = [{"x": rng.normal(size=(8, 3)).astype(np.float32)} for _ in range(count)]
    for step, value in bad:
        drawn[step]["x"][3, 1] = value
    return drawn


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("optimizer", [AdamW(Linear(0.1, 9, warmup_steps=2)), Adafactor(0.1)])
def test_a_nan_skips_exactly_that_update(optimizer, accumulation):
    """The state is that before the step to the bit, and so is all that comes of it; the program is the same one."""
    learner = Learner(squares, optimizer, accumulation=accumulation, ema_decay=0.9)
    state = learner.init_state(PARAMS, 0)
    before, skipped = None, []
    for step, batch in enumerate(batches(6, bad=[(2, np.nan), (3, np.inf)])):
        if step == 2:
            before = jax.tree.map(np.asarray, state)
        state, metrics = learner.update(state, {}, batch)
        skipped.append(int(metrics["skipped"]))
        if step in (2, 3):
            for name in ("params", "opt_state", "ema", "rng"):
                jax.tree.map(np.testing.assert_array_equal, getattr(before, name), getattr(state, name))
            np.testing.assert_array_equal(before.guard.recent, state.guard.recent)
            assert int(state.step) == step + 1 and float(metrics["update_norm"]) == 0
    assert skipped == [0, 0, 1, 2, 2, 2] and learner.compile_count == 1
    # The run that never saw these batches, and whose step number went on.
    other = Learner(squares, optimizer, accumulation=accumulation, ema_decay=0.9)
    clean, found = other.init_state(PARAMS, 0), None
    for step, batch in enumerate(batches(6)):
        if step in (2, 3):
            clean = jax.tree.map(lambda x: x, clean)
            clean = type(clean)(clean.step + 1, clean.params, clean.opt_state, clean.ema, clean.rng, clean.guard)
            continue
        clean, found = other.update(clean, {}, batch)
    for name in ("params", "opt_state", "ema"):
        jax.tree.map(np.testing.assert_array_equal, getattr(clean, name), getattr(state, name))
    assert int(found["param_digest"]) == int(metrics["param_digest"])


def test_the_learning_rate_that_is_told_is_the_one_that_is_used():
    learner = Learner(squares, AdamW(lambda step: 0.1 * (step + 1), b1=0.0, b2=0.0, weight_decay=0.0))
    state = learner.init_state(PARAMS, 0)
    rates = []
    for batch in batches(4, bad=[(1, np.nan)]):
        state, metrics = learner.update(state, {}, batch)
        rates.append((float(metrics["learning_rate"]), float(metrics["update_norm"])))
    # Adam without memory: each of three parameters moves by the rate.
    expected = [(0.1, 0.1), (0.2, 0.0), (0.2, 0.2), (0.3, 0.3)]
    np.testing.assert_allclose(rates, [(rate, 3**0.5 * moved) for rate, moved in expected], rtol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"window": 1}, "Guards.window is 1: expected at least 2"),
        ({"patience": 0}, "Guards.patience is 0"),
        ({"sigmas": 0.0}, "Guards.sigmas is 0.0: expected a positive number"),
    ],
)
def test_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        Guards(**settings)
