"""The table: where metrics come from, means and standard errors by hand, orders, fronts, and what is written."""

import csv
import io
import itertools
import json
import math

import pytest
from clp_jax.launch.sweep import Trial
from clp_jax.launch.sweep_table import (
    Row,
    Setting,
    add_trial,
    on_front,
    ordered,
    over_seeds,
    read_metrics,
    read_trials,
    shown_metrics,
    to_csv,
    to_markdown,
    value_of,
    written_metrics,
)

GOALS = {"loss": "minimize", "reward": "maximize"}


def row(a, seed, state="succeeded", **metrics):
    return Row(Trial({"A": a}, seed), state, {name: float(value) for name, value in metrics.items()})


ROWS = [
    row("1", 0, loss=3, reward=1),
    row("1", 1, loss=5, reward=2),
    row("2", 0, loss=1, reward=7),
    row("2", 1, "failed"),
]


def test_the_last_value_of_each_metric(tmp_path):
    lines = [{"step": 1, "loss": 3.0, "evaluation/loss": 9.0}, {"step": 2, "loss": 2.0, "nan": None, "stage": "x"}]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 3, "lo')
    results = {"hypervolume": 4.5, "steerability": {"brevity": {"range": 1}}, "points": [1], "settings": {"seed": 3}}
    (tmp_path / "results.json").write_text(json.dumps(results))
    expected = {"step": 2, "loss": 2, "evaluation/loss": 9, "hypervolume": 4.5, "steerability/brevity/range": 1}
    assert read_metrics(tmp_path) == expected
    assert read_metrics(tmp_path / "none") == {}
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(ValueError, match=r"results.json is no JSON"):
        read_metrics(tmp_path)


def test_a_metric_that_has_diverged_is_none_and_one_that_recovers_is(tmp_path):
    lines = ['{"loss": 3.0, "reward": null}', '{"loss": null, "reward": 1.0}', '{"step": 9}']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    assert read_metrics(tmp_path) == {"reward": 1, "step": 9}
    (tmp_path / "results.json").write_text('{"reward": NaN}')
    assert read_metrics(tmp_path) == {"step": 9}
    assert written_metrics(tmp_path) == {"loss", "reward", "step"}


def test_numbers_beyond_all_floats_are_none(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"seen": 10**400, "lost": -(10**400), "step": 2}))
    assert read_metrics(tmp_path) == {"step": 2}
    given = ["7", "1e-3", str(10**400), "1e999", "True", "@f()", "9" * 5000, None]
    assert [value_of(text) for text in given] == [7.0, 1e-3, str(10**400), "1e999", "True", "@f()", "9" * 5000, ""]


def test_trials_are_kept_once_and_survive_a_line_that_was_cut_off(tmp_path):
    trials = [Trial({"A": "1", "B": "@x()"}, 0), Trial({"A": "2"}), Trial({}, 3)]
    for trial in (trials[0], trials[1], trials[0]):
        add_trial(tmp_path, trial)
    with open(tmp_path / "trials.jsonl", "a") as file:
        file.write('{"name": "ab", "bind')
    add_trial(tmp_path, trials[2])
    assert read_trials(tmp_path) == trials


def test_means_and_standard_errors():
    one, two = over_seeds(ROWS)
    assert (one.seeds, one.means["loss"], one.means["reward"]) == (2, 4.0, 1.5)
    assert one.errors["loss"] == pytest.approx(math.sqrt(2.0) / math.sqrt(2.0))
    # A trial that failed does not count, and one trial has no standard error.
    assert (two.seeds, two.means["loss"], dict(two.errors)) == (1, 1.0, {})


def test_the_best_first():
    settings = [*over_seeds(ROWS), Setting({"A": "3"}, 0, {}, {})]
    names = [s.bindings["A"] for s in ordered(settings, {"loss": "minimize"})]
    assert names == ["2", "1", "3"]
    assert [s.bindings["A"] for s in ordered(settings, {"loss": "maximize"})] == ["1", "2", "3"]
    assert ordered(settings, {"loss": ""}) == settings


def test_fronts_against_the_definition():
    points = [(1, 1), (2, 3), (3, 2), (2, 2), (1, 1), (0, 0)]
    settings = [
        Setting({"A": str(i)}, 1, {"loss": -float(x), "reward": float(y)}, {}) for i, (x, y) in enumerate(points)
    ]

    def dominated(p):
        return any(q != p and q[0] >= p[0] and q[1] >= p[1] for q in points)

    assert on_front(settings, GOALS) == [not dominated(p) for p in points]
    for order in itertools.permutations(range(4)):
        assert on_front([settings[i] for i in order], GOALS) == [not dominated(points[i]) for i in order]
    assert on_front([Setting({}, 0, {"loss": 1.0}, {})], GOALS) == [False]


def test_what_is_shown():
    rows = [
        row("1", 0, loss=1, step=2),
        Row(Trial({}), "succeeded", {"evaluation/x": 1.0, "hypervolume": 2.0, "loss": 1.0}),
    ]
    assert shown_metrics(rows, {}) == {"hypervolume": "", "evaluation/x": ""}
    assert shown_metrics(rows[:1], {}) == {"loss": ""}
    assert shown_metrics([], GOALS) == GOALS
    with pytest.raises(ValueError, match=r"no trial has a metric 'reward': they have loss, step"):
        shown_metrics(rows[:1], {"reward": ""})


def test_csv_has_every_trial_and_metric():
    rows = [*ROWS, Row(Trial({"B": 'text, "quoted"'}), "waiting", {})]
    found = list(csv.DictReader(io.StringIO(to_csv(rows))))
    assert [line["trial"] for line in found] == [r.trial.name for r in rows]
    assert found[0] | {"trial": ""} == {
        "trial": "", "A": "1", "B": "", "seed": "0", "state": "succeeded", "loss": "3.0", "reward": "1.0",
    }  # fmt: skip
    assert (found[4]["B"], found[4]["seed"], found[4]["loss"]) == ('text, "quoted"', "", "")


def test_markdown():
    lines = to_markdown([*ROWS, Row(Trial({"A": "a|b"}, 0), "waiting", {})], GOALS).splitlines()
    assert lines[2:7] == [
        "| A | seeds | loss (lower is better) | reward (higher is better) | front |",
        "|---|---|---|---|---|",
        "| 2 | 1 | 1 | 7 | ● |",
        "| 1 | 2 | 4 ± 1 | 1.5 ± 0.5 |   |",
        r"| a\|b | 0 |  |  |   |",
    ]
    assert lines[10] == "| trial | A | seed | state | loss | reward |"
    assert lines[12] == f"| {ROWS[0].trial.name} | 1 | 0 | succeeded | 3 | 1 |"
    assert lines[15] == f"| {ROWS[3].trial.name} | 2 | 1 | failed |  |  |"
