"""Figures over seeds: means, Student intervals, paired differences, and the table that shows them."""

import dataclasses

import numpy as np
import pytest
from scipy import stats

from clp_jax.evaluation.aggregate import format_interval, markdown_table, mean_sweep, paired_difference, summarise_seeds
from clp_jax.evaluation.statistics import Interval
from clp_jax.evaluation.sweep import Samples, summarise

WEIGHTS = ((0.0, 1.0), (0.5, 0.5), (1.0, 0.0))


def sweep(seed: int, shift: float = 0.0, method: str = "one"):
    """A sweep whose means are exact: every prompt has the same rewards."""
    samples = [
        Samples(
            weights=w,
            rewards=np.tile(np.asarray([[w[0] + shift + seed, w[1]]]), (4, 1)),
            kl=np.full(4, 0.5 + seed),
            length=np.full(4, 3.0),
            completions=("a",),
        )
        for w in WEIGHTS
    ]
    return summarise(
        method=method,
        objectives=("x", "y"),
        alpha=0.0,
        reference_mean=(0.0, 0.0),
        reference_std=(1.0, 1.0),
        samples=samples,
        prompts=["p"],
        references=["r"],
    )


def test_figures_are_means_over_seeds_with_students_interval():
    summary = summarise_seeds([sweep(0), sweep(1), sweep(2)])
    values = [sweep(seed).mean_value for seed in range(3)]
    half = stats.t.ppf(0.975, 2) * np.std(values, ddof=1) / np.sqrt(3)
    assert summary.mean_value.mean == pytest.approx(np.mean(values))
    assert summary.mean_value.high - summary.mean_value.mean == pytest.approx(half)
    assert summary.kl.mean == pytest.approx(1.5)
    assert summary.num_seeds == 3
    assert summary.rank_correlation["x"] == Interval(1.0, 1.0, 1.0)
    assert summary.range["y"].mean == pytest.approx(1.0)


def test_differences_are_paired():
    first, second = [sweep(s, 0.25) for s in range(3)], [sweep(s) for s in range(3)]
    difference = paired_difference(first, second, "mean_value")
    # The seeds differ among each other by far more: the mean weight of x is a half.
    assert difference.mean == pytest.approx(0.125)
    assert difference.high - difference.low == pytest.approx(0, abs=1e-9)


def test_the_mean_front_is_the_mean_of_the_points():
    mean = mean_sweep([sweep(0), sweep(1)])
    np.testing.assert_allclose(mean.means(), (sweep(0).means() + sweep(1).means()) / 2)
    half = stats.t.ppf(0.975, 1) * np.sqrt(0.5) / np.sqrt(2)
    assert mean.points[0].rewards["x"].high - mean.points[0].rewards["x"].mean == pytest.approx(half)
    assert mean.hypervolume == pytest.approx((sweep(0).hypervolume + sweep(1).hypervolume) / 2)


def test_table():
    summaries = [summarise_seeds([sweep(0), sweep(1)]), summarise_seeds([sweep(0, method="two")])]
    lines = markdown_table(summaries, {"separation": {"two": "1.41"}}).splitlines()
    assert lines[0].startswith(
        "| method | hypervolume | mean value | KL | ρ x | ρ y | range x | range y | model calls per token |"
    )
    assert len({line.count("|") for line in lines}) == 1
    assert lines[2].startswith("| one |")
    assert "±" in lines[2]
    assert "±" not in lines[3]  # One seed has no interval.
    assert lines[3].endswith("| 1.41 |")


def test_methods_of_other_names_stay_apart():
    assert dataclasses.asdict(summarise_seeds([sweep(0, method="two")]))["method"] == "two"
    assert format_interval(Interval(1.0, 0.75, 1.25)) == "1.00 ± 0.25"
