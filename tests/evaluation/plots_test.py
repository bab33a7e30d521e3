"""Plots hold the numbers of the sweep; files are written by the report."""

import dataclasses

import numpy as np
import pytest
from sweeps import make_sweep

from clp_jax.evaluation.plots import plot_fronts, plot_grid, plot_training


def test_fronts_show_every_method_at_its_means():
    sweeps = [make_sweep(method="full"), make_sweep(method="soups", seed=1)]
    figures = plot_fronts(sweeps)
    assert list(figures) == ["front_faithful_brief"]
    axes = figures["front_faithful_brief"].axes[0]
    drawn = {c.get_label(): c.lines[0].get_xydata() for c in axes.containers}
    for sweep in sweeps:
        np.testing.assert_allclose(drawn[sweep.method], sweep.means())
    assert [t.get_text() for t in axes.get_legend().get_texts()] == ["reference policy", "full", "soups"]
    assert "faithful" in axes.get_xlabel() and "brief" in axes.get_ylabel()


def test_error_bars_are_the_intervals():
    sweep = make_sweep()
    axes = plot_fronts([sweep])["front_faithful_brief"].axes[0]
    horizontal, vertical = (bars.get_segments() for bars in axes.containers[0].lines[2])
    for point, h, v in zip(sweep.points, horizontal, vertical, strict=True):
        faithful, brief = point.rewards["faithful"], point.rewards["brief"]
        np.testing.assert_allclose(h[:, 0], [faithful.low, faithful.high])
        np.testing.assert_allclose(v[:, 1], [brief.low, brief.high])


@pytest.mark.parametrize(("objectives", "pairs"), [(1, 0), (2, 1), (3, 3), (9, 36)])
def test_any_number_of_objectives(objectives, pairs):
    names = tuple(f"r{k}" for k in range(objectives))
    sweep = make_sweep(names=names)
    assert len(plot_fronts([sweep])) == pairs
    left, right = plot_grid(sweep).axes
    assert len(left.lines) == objectives and len(right.lines) == 1


def test_the_grid_orders_each_reward_by_its_own_weight():
    sweep = make_sweep()
    left, right = plot_grid(sweep).axes
    for k, line in enumerate(left.lines):
        order = np.argsort([p.weights[k] for p in sweep.points], kind="stable")
        np.testing.assert_allclose(line.get_xdata(), np.asarray([p.weights[k] for p in sweep.points])[order])
        np.testing.assert_allclose(line.get_ydata(), sweep.means()[order, k])
    np.testing.assert_allclose(right.lines[0].get_ydata(), [p.kl.mean for p in sweep.points])


def test_many_methods_reuse_colours():
    sweeps = [dataclasses.replace(make_sweep(), method=f"m{i}") for i in range(9)]
    assert len(plot_fronts(sweeps)["front_faithful_brief"].axes[0].containers) == 9


def test_training_curves_are_of_the_metrics_there_are():
    metrics = [{"step": 1, "kl": 0.5}, {"step": 2, "kl": 0.7, "objective": -1.0}, {"step": 3, "objective": 0.0}]
    figure = plot_training(metrics, ["objective", "kl", "length"])
    curves = {axes.get_title("left"): axes.lines[0].get_xydata() for axes in figure.axes if axes.lines}
    assert set(curves) == {"objective", "kl"}
    np.testing.assert_allclose(curves["kl"], [[1, 0.5], [2, 0.7]])
    np.testing.assert_allclose(curves["objective"], [[2, -1.0], [3, 0.0]])
    assert plot_training(metrics, ["length"]) is None and plot_training([], ["kl"]) is None
