"""Plots: every setting is a line or a point where its numbers say, and axes name what they show."""

import numpy as np
import pytest
from clp_jax.launch.sweep_plots import plot_fronts, plot_parallel
from clp_jax.launch.sweep_table import Setting

GOALS = {"loss": "minimize", "reward": "maximize"}


def setting(rate, kind, loss, reward):
    return Setting({"RATE": rate, "KIND": kind}, 2, {"loss": loss, "reward": reward}, {"loss": 0.1})


SETTINGS = [setting("1e-05", "@a()", 3.0, 1.0), setting("0.001", "@b()", 1.0, 2.0), setting("0.1", "@a()", 2.0, 3.0)]


def texts(figure):
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def test_lines_go_through_the_values():
    figure = plot_parallel(SETTINGS, ["RATE", "KIND"], GOALS)
    lines = [line for line in figure.axes[0].lines if len(line.get_xdata()) > 2]
    assert len(lines) == 3
    at = {line.get_ydata()[0]: line for line in lines}
    # On a logarithmic axis the middle one is in the middle.
    assert sorted(at) == pytest.approx([0.04, 0.5, 0.96])
    low, middle, high = (at[place] for place in sorted(at))
    ends = [[line.get_ydata()[np.argmin(abs(line.get_xdata() - x))] for x in (1, 2, 3)] for line in (low, middle, high)]
    np.testing.assert_allclose(ends, [[0.04, 0.96, 0.04], [0.96, 0.04, 0.5], [0.04, 0.5, 0.96]], atol=1e-9)
    # The best loss stands out.
    assert max(lines, key=lambda line: line.get_linewidth()) is middle
    found = texts(figure)
    assert {"@a()", "@b()", "1e-05", "0.001", "0.1", "RATE\n(log)", "KIND"} <= set(found)
    assert "loss\nlower is better" in found and "reward\nhigher is better" in found


def test_parallel_coordinates_of_one_and_of_none():
    assert plot_parallel(SETTINGS[:1], ["RATE"], {"loss": ""}) is not None
    assert plot_parallel([Setting({"RATE": "1"}, 0, {}, {})], ["RATE"], GOALS) is None
    assert plot_parallel(SETTINGS, ["RATE"], {}) is None


def test_fronts_are_of_pairs_with_goals():
    figures = plot_fronts(SETTINGS, ["RATE", "KIND"], GOALS | {"other": ""})
    (figure,) = figures.values()
    assert list(figures) == ["front_loss_reward"]
    (panel,) = figure.axes
    points = {c.get_label(): sorted(zip(*map(list, c[0].get_data()), strict=True)) for c in panel.containers}
    assert points == {"dominated": [(3.0, 1.0)], "Pareto front": [(1.0, 2.0), (2.0, 3.0)]}
    assert texts(figure) == ["1", "2"]
    legend = panel.get_legend().get_title().get_text()
    assert legend == "1  RATE = 0.001\n    KIND = @b()\n2  RATE = 0.1\n    KIND = @a()"
    assert plot_fronts(SETTINGS, ["RATE"], {"loss": "minimize"}) == {}
    assert plot_fronts([Setting({}, 0, {}, {})], [], GOALS) == {}


def test_what_a_legend_has_no_room_for_is_counted():
    settings = [Setting({"A": str(i)}, 1, {"loss": float(i), "reward": float(i)}, {}) for i in range(10)]
    (figure,) = plot_fronts(settings, ["A"], GOALS).values()
    lines = figure.axes[0].get_legend().get_title().get_text().splitlines()
    assert (lines[0], lines[7:]) == ("1  A = 0", ["8  A = 7", "…  2 more: table.md"])


def test_names_with_dollars_and_long_values_are_drawn(tmp_path):
    long = Setting({"A$B": "x" * 300}, 1, {"a$b$": 1.0, "c": 1.0}, {})
    figure = plot_parallel([long, long], ["A$B"], {"a$b$": "minimize"})
    figure.savefig(tmp_path / "x.png")
    plot_fronts([long], ["A$B"], {"a$b$": "minimize", "c": "maximize"})["front_a_b__c"].savefig(tmp_path / "y.png")
    assert (tmp_path / "y.png").stat().st_size > 5000
