"""Schedules against their formulas, on python and traced steps."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clp_jax.training.schedules import Constant, Cosine, InverseSquareRoot, Linear, as_schedule

CASES = [
    (Constant(0.5), lambda t: 0.5),
    (Constant(0.5, warmup_steps=4), lambda t: 0.5 * min(1, t / 4)),
    (InverseSquareRoot(1.0, offset=9), lambda t: 1 / math.sqrt(max(t, 9))),
    (InverseSquareRoot(2.0, offset=9, warmup_steps=4), lambda t: 2 * min(1, t / 4) / math.sqrt(max(t, 9))),
    (Linear(0.5, 12, 2, 0.1), lambda t: 0.5 * min(1, t / 2) * (1 - 0.9 * min(max(t - 2, 0), 10) / 10)),
    (
        Cosine(0.5, 12, 2, 0.1),
        lambda t: 0.5 * min(1, t / 2) * (0.1 + 0.9 * (1 + math.cos(math.pi * min(max(t - 2, 0), 10) / 10)) / 2),
    ),
]


@pytest.mark.parametrize(("schedule", "formula"), CASES)
def test_schedule_follows_its_formula(schedule, formula):
    expected = [formula(t) for t in range(20)]
    np.testing.assert_allclose([float(schedule(t)) for t in range(20)], expected, rtol=1e-6, atol=1e-8)
    traced = jax.jit(lambda steps: jax.lax.map(lambda t: jnp.asarray(schedule(t), jnp.float32), steps))(jnp.arange(20))
    np.testing.assert_allclose(traced, expected, rtol=1e-6, atol=1e-7)


def test_t5_finetuning_and_pretraining_rates():
    assert float(InverseSquareRoot()(0)) == pytest.approx(0.01)
    assert as_schedule(1e-3)(123) == 1e-3
