"""Combinators against what `itertools` makes, samples against their ranges, and what is no space."""

import itertools
import math
import re

import numpy as np
import pytest
from clp_jax.launch import space
from clp_jax.launch.sweep import Sweep
from scipy.stats import qmc


def test_a_grid_is_every_combination_in_order():
    found = space.grid({"A": [1, 2], "B": ["x", None]})
    assert found == [{"A": a, "B": b} for a, b in itertools.product([1, 2], ["x", None])]


def test_products_and_zips_nest():
    lines = space.zip(space.grid({"A": [1, 2]}), space.grid({"B": [3, 4]}))
    assert lines == [{"A": 1, "B": 3}, {"A": 2, "B": 4}]
    found = space.product(lines, space.grid({"C": [True, False]}))
    assert found == [{**line, "C": c} for line in lines for c in (True, False)]


def test_the_first_samples_stay_when_there_are_more():
    ranges = {"A": space.uniform(0, 1), "B": space.log_uniform(1e-4, 1e-2), "C": space.integers(1, 100)}
    for sample in (space.random, space.sobol):
        few, many = sample(ranges, 3, seed=5), sample(ranges, 8, seed=5)
        assert many[:3] == few
        assert sample(ranges, 3, seed=6) != few


def test_samples_are_in_their_ranges_and_have_six_digits():
    ranges = {
        "A": space.uniform(-2, 3),
        "B": space.log_uniform(1e-6, 1),
        "C": space.integers(3, 5),
        "D": space.choice(["x", "y"]),
    }
    trials = space.random(ranges, 200)
    assert all(-2 <= t["A"] <= 3 and 1e-6 <= t["B"] <= 1 for t in trials)
    assert {t["C"] for t in trials} == {3, 4, 5}
    assert {t["D"] for t in trials} == {"x", "y"}
    assert all(isinstance(t["C"], int) and float(f"{t['A']:.6g}") == t["A"] for t in trials)


def test_sobol_is_scipys_and_covers_orders_of_magnitude_evenly():
    trials = space.sobol({"A": space.log_uniform(1e-4, 1.0), "B": space.uniform(0, 1)}, 16, seed=3)
    places = qmc.Sobol(2, scramble=True, rng=3).random_base2(4)
    np.testing.assert_allclose([t["B"] for t in trials], places[:, 1], rtol=1e-5)
    np.testing.assert_allclose([math.log10(t["A"]) for t in trials], 4 * places[:, 0] - 4, rtol=1e-4)
    # A (0, 4, 2)-net has a point in every sixteenth.
    assert sorted(int(16 * t["B"]) for t in trials) == list(range(16))


def test_small_ranges_are_sampled_without_repeats():
    ranges = {"A": space.integers(0, 1), "B": space.choice([None, 1, "x"])}
    for sample in (space.random, space.sobol):
        assert len({repr(t) for t in sample(ranges, 6)}) == 6
        with pytest.raises(ValueError, match="there are no 7 different trials in these ranges, only 6"):
            sample(ranges, 7)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: space.grid({}), "grid: it is empty"),
        (lambda: space.grid({"A": []}), "grid: A has no values"),
        (lambda: space.grid({"A": [1], "--gin.B": [1]}), "'--gin.B' is no name of gin"),
        (lambda: space.grid({"A": [math.nan]}), "A: nan: expected a finite number"),
        (lambda: space.grid({"A": [[1, " "]]}), "empty text"),
        (lambda: space.product(), "product: no spaces"),
        (lambda: space.product(space.grid({"A": [1]}), []), "product: a space is empty"),
        (lambda: space.product(space.grid({"A": [1]}), space.grid({"A": [2]})), "two of its spaces set A"),
        (lambda: space.zip(space.grid({"A": [1]}), space.grid({"B": [1, 2]})), "zip: spaces of 1 and 2 trials"),
        (lambda: space.uniform(1, 1), "uniform(1, 1): expected two finite numbers, the lower one first"),
        (lambda: space.log_uniform(0, 1), "expected positive numbers"),
        (lambda: space.integers(0.5, 2), "expected whole numbers"),
        (lambda: space.choice([]), "choice has no values"),
        (lambda: space.random({"A": space.uniform(0, 1)}, 0), "random: count is 0"),
        (lambda: space.random({}, 3), "random: no ranges"),
        (lambda: space.sobol({"A": space.uniform(0, 1)}, 1, seed=True), "sobol: seed is True"),
    ],
)
def test_what_is_no_space(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


def test_a_space_is_checked_when_a_sweep_is_made():
    with pytest.raises(ValueError, match=r"the same trial twice: A=0.001 seed=0"):
        Sweep("train", [{"A": 0.001}, {"A": "1e-3"}], seeds=2)
