"""Reward statistics: fitted in closed form, frozen, and stored to the bit."""

import dataclasses
import re

import numpy as np
import pytest

from clp_jax.rewards.normalisation import FILE_NAME, RewardStatistics

NAMES = ("a", "b", "c")


def rewards(rows=500, seed=0):
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(rows, 3)) * [1e-3, 1, 100] + [5, 0, -300]).astype(np.float32)


def test_fit_is_the_mean_and_the_deviation_of_the_population():
    statistics = RewardStatistics.fit(["x", "y"], np.asarray([[0, 1], [2, 1], [4, 7]], np.float32))
    assert statistics.mean == (2.0, 3.0)
    np.testing.assert_allclose(statistics.std, [np.sqrt(8 / 3), np.sqrt(8)], rtol=1e-15)
    assert (statistics.names, statistics.count) == (("x", "y"), 3)


def test_what_it_was_fitted_on_gets_mean_0_and_deviation_1():
    raw = rewards()
    applied = RewardStatistics.fit(NAMES, raw).apply(raw)
    assert applied.dtype == np.float32
    np.testing.assert_allclose(applied.mean(0), 0, atol=1e-6)
    np.testing.assert_allclose(applied.std(0), 1, rtol=1e-6)
    np.testing.assert_array_equal(np.argsort(applied, axis=0), np.argsort(raw, axis=0))


def test_applying_changes_nothing_about_it():
    statistics = RewardStatistics.fit(NAMES, rewards())
    before = dataclasses.astuple(statistics)
    other = rewards(seed=1) + np.float32(10)
    np.testing.assert_array_equal(statistics.apply(other), statistics.apply(other))
    np.testing.assert_array_equal(statistics.apply(other[:7]), statistics.apply(other)[:7])
    assert dataclasses.astuple(statistics) == before
    for field in dataclasses.fields(statistics):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(statistics, field.name, None)


def test_it_comes_back_to_the_bit(tmp_path):
    statistics = RewardStatistics.fit(NAMES, rewards())
    statistics.save(tmp_path)
    loaded = RewardStatistics.load(str(tmp_path))
    assert loaded == statistics
    np.testing.assert_array_equal(loaded.apply(rewards(seed=1)), statistics.apply(rewards(seed=1)))


@pytest.mark.parametrize("column", [[2.0, 2.0], [np.nan, 1.0], [np.inf, 0.0]], ids=["constant", "nan", "inf"])
def test_a_reward_that_cannot_be_standardised_is_named(column):
    values = np.stack([np.asarray([0.0, 1.0]), np.asarray(column)], axis=1).astype(np.float32)
    with (
        np.errstate(invalid="ignore"),
        pytest.raises(ValueError, match="reward 'dull' has mean .* Remove it, or fit on more"),
    ):
        RewardStatistics.fit(["lively", "dull"], values)


def test_columns_and_names_go_together():
    with pytest.raises(ValueError, match="3 names, 2 means, 2 deviations"):
        RewardStatistics.fit(NAMES, rewards()[:, :2])


def test_missing_and_damaged_files_are_named(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"no .*rewards.json: expected the run directory of a multi-objective run"
    ):
        RewardStatistics.load(tmp_path)
    path = tmp_path / FILE_NAME
    RewardStatistics.fit(NAMES, rewards()).save(tmp_path)
    whole = path.read_text()
    for damaged in (
        "",
        whole[:40],
        whole.replace('"std"', '"sdt"'),
        "[]",
        whole.replace('"count": 500', '"count": null'),
    ):
        path.write_text(damaged)
        with pytest.raises(ValueError, match=re.escape(f"{path} can't be read: ")):
            RewardStatistics.load(tmp_path)
