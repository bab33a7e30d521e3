"""Adaptive search on a known function: it beats chance, is told means over seeds, and goes on where it was."""

from pathlib import Path

import pytest

optuna = pytest.importorskip("optuna", reason="adaptive search needs the extra `optuna`")

from clp_jax.launch import space
from clp_jax.launch.sweep import Search, Sweep

from .trials import COMMAND, METRICS, run

pytestmark = pytest.mark.usefixtures("empty_directory")


def study():
    (storage,) = [optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend("sweep/search.journal"))]
    (summary,) = optuna.get_all_study_summaries(storage)
    return optuna.load_study(study_name=summary.study_name, storage=storage)


def test_a_search_finds_the_minimum_and_is_told_means_over_seeds():
    search = Search({"A": space.uniform(-20, 20)}, trials=14, seed=1)
    rows = run(Sweep(COMMAND, search=search, seeds=[0, 2], metrics=METRICS), max_concurrent=2)
    assert len(rows) == 28 and all(row.state == "succeeded" for row in rows)
    told = study().trials
    assert [t.value for t in told] == pytest.approx([(space.rounded(t.params["A"]) - 3) ** 2 + 1 for t in told])
    # Of 14 uniform samples, the best is within 1.0 of 3 in half of all cases; what was learned makes the later ones closer.
    early = [abs(t.params["A"] - 3) for t in told[:4]]
    late = [abs(t.params["A"] - 3) for t in told[-4:]]
    assert sum(late) < sum(early)


def test_a_search_goes_on_and_asks_for_no_more_than_it_was_allowed():
    ranges = {"A": space.integers(-9, 9)}
    run(Sweep(COMMAND, search=Search(ranges, 3), metrics=METRICS))
    first = [t.params["A"] for t in study().trials]
    assert len(set(first)) == 3
    run(Sweep(COMMAND, search=Search(ranges, 3), metrics=METRICS))
    assert len(study().trials) == len(first)
    rows = run(Sweep(COMMAND, search=Search(ranges, 6), metrics=METRICS))
    assert len(rows) == 6 == len({t.params["A"] for t in study().trials})
    assert [t.params["A"] for t in study().trials][: len(first)] == first
    with pytest.raises(ValueError, match=r"holds a search of other ranges or metrics"):
        run(Sweep(COMMAND, search=Search({"A": space.integers(-9, 8)}, 6), metrics=METRICS))


def test_small_spaces_and_choices_end():
    rows = run(Sweep(COMMAND, search=Search({"A": space.choice([1, 2])}, 5), metrics=METRICS))
    assert sorted(row.trial.bindings["A"] for row in rows) == ["1", "2"]


def test_a_failed_setting_is_told_and_tried_again():
    Path("broken").write_text("1")
    sweep = Sweep(COMMAND, search=Search({"A": space.choice([1, 2])}, 2), metrics=METRICS)
    assert sorted(row.state for row in run(sweep)) == ["failed", "succeeded"]
    states = optuna.trial.TrialState
    assert [t.state for t in study().trials if t.params["A"] == 0] == [states.FAIL] * len(
        [t for t in study().trials if t.params["A"] == 0]
    )
    Path("broken").unlink()
    assert [row.state for row in run(sweep, retry_failed=True)] == ["succeeded"] * 2
    assert any(t.state == states.COMPLETE and t.value == 4.0 for t in study().trials)


def test_a_trial_that_diverges_is_a_failure_of_its_setting_alone():
    Path("diverging").write_text("1")
    sweep = Sweep(COMMAND, search=Search({"A": space.integers(1, 3)}, 3), metrics=METRICS)
    rows = run(sweep)
    assert len(rows) == 3 and [row.metrics.get("loss") for row in rows if row.trial.bindings["A"] == "1"] == [None]
    states = optuna.trial.TrialState
    assert {t.params["A"]: t.state for t in study().trials} == {1: states.FAIL, 2: states.COMPLETE, 3: states.COMPLETE}


def test_a_metric_that_no_trial_has():
    sweep = Sweep(COMMAND, search=Search({"A": space.integers(1, 9)}, 2), metrics={"reward": "maximize"})
    with pytest.raises(ValueError, match=r"has no metric 'reward': it has step, loss, A"):
        run(sweep)
