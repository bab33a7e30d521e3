"""Intervals against theory and by coverage on known data; Spearman's ρ with ties and constants."""

import inspect

import numpy as np
import pytest
from scipy import stats

from clp_jax.evaluation.statistics import bootstrap, rank_correlation, t_interval


def test_the_bootstrap_interval_is_the_quantiles_of_resampled_means():
    values = np.random.default_rng(0).gamma(2, size=40)
    found = bootstrap(values, confidence=0.9, resamples=500, seed=3)
    draws = np.random.default_rng(3).integers(0, 40, (500, 40))
    means = np.sort([values[row].mean() for row in draws])
    np.testing.assert_allclose([found.low, found.high], np.quantile(means, [0.05, 0.95]), rtol=1e-12)
    assert found.mean == values.mean()
    assert bootstrap(values, seed=3) == bootstrap(values, seed=3) != bootstrap(values, seed=4)


def test_the_bootstrap_interval_of_many_values_is_the_normal_one():
    values = np.random.default_rng(1).normal(5, 2, 4000)
    found = bootstrap(values, resamples=4000)
    error = values.std() / np.sqrt(len(values))
    # 4000 resamples know a 2.5 % quantile to about 4 % of the standard error.
    np.testing.assert_allclose(
        [found.low, found.high], values.mean() + np.asarray([-1.96, 1.96]) * error, atol=0.15 * error
    )


@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_the_bootstrap_interval_covers_the_mean_as_often_as_it_says(confidence):
    rng = np.random.default_rng(2)
    trials, size = 400, 60
    data = rng.exponential(3.0, (trials, size))
    found = [bootstrap(row, confidence=confidence, resamples=300, seed=i) for i, row in enumerate(data)]
    covered = sum(i.low <= 3.0 <= i.high for i in found)
    # Four standard deviations of a binomial count, and 3 % because a percentile interval of 60 skewed values is short.
    slack = 4 * np.sqrt(trials * confidence * (1 - confidence))
    assert trials * (confidence - 0.03) - slack <= covered <= trials * confidence + slack


def test_the_bootstrap_of_constant_and_single_values():
    assert bootstrap(np.full(5, 2.0)).low == bootstrap(np.full(5, 2.0)).high == 2.0
    assert bootstrap(np.asarray([3.0])).high == 3.0


@pytest.mark.parametrize("values", [np.empty(0), np.zeros((2, 2))])
def test_the_bootstrap_needs_one_value_for_each_prompt(values):
    with pytest.raises(ValueError, match="expected one for each prompt"):
        inspect.unwrap(bootstrap)(values)  # As users run it, without checked annotations.


def test_students_interval():
    values = [1.0, 2.0, 4.0, 3.5, 2.5]
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    found = t_interval(values)
    np.testing.assert_allclose([found.mean, found.low, found.high], [2.6, expected.low, expected.high], rtol=1e-12)
    # n = 2, by hand: mean ± 12.706 * s/√2 with s = √2.
    two = t_interval([1.0, 3.0])
    np.testing.assert_allclose([two.low, two.high], [2 - 12.7062, 2 + 12.7062], rtol=1e-5)
    assert t_interval([1.0, 1.0, 1.0]).high == 1.0


def test_one_run_says_nothing_about_its_spread():
    one = t_interval([1.5])
    assert (one.mean, one.low, one.high) == (1.5, -np.inf, np.inf)


def ranks(x):
    """Ranks by definition, ties averaged."""
    return np.asarray([sum(y < v for y in x) + (sum(y == v for y in x) + 1) / 2 for v in x])


@pytest.mark.parametrize("seed", range(5))
def test_spearman_is_the_correlation_of_ranks_with_ties(seed):
    rng = np.random.default_rng(seed)
    x, y = rng.integers(0, 4, 15).astype(float), rng.integers(0, 6, 15).astype(float)
    np.testing.assert_allclose(rank_correlation(x, y), np.corrcoef(ranks(x), ranks(y))[0, 1], rtol=1e-12)


def test_spearman_sees_order_alone():
    x = np.linspace(0, 1, 11)
    assert rank_correlation(x, np.exp(9 * x)) == pytest.approx(1, abs=1e-12)
    assert rank_correlation(x, -(x**3)) == pytest.approx(-1, abs=1e-12)


def test_what_does_not_vary_does_not_correlate():
    x = np.arange(4.0)
    assert rank_correlation(x, np.ones(4)) == rank_correlation(np.ones(4), x) == rank_correlation(x[:1], x[:1]) == 0
