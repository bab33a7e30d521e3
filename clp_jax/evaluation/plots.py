"""Plots: the front against its baselines, rewards and KL along the grid, training curves."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from clp_jax.evaluation.sweep import Sweep

matplotlib.use("Agg")  # Figures go to files; no window system is needed.

# Okabe and Ito's colours, told apart by everybody.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def _axes(title: str, xlabel: str, ylabel: str, size: tuple[float, float] = (6.4, 4.6)) -> tuple[Figure, Any]:
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", fontsize=12)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _plain(name: str) -> str:
    """A name as it is: dollars would make a formula of it."""
    return name.replace("$", r"\$")


def plot_fronts(sweeps: Sequence[Sweep]) -> dict[str, Figure]:
    """One figure for each pair of objectives: mean rewards with confidence intervals, one line for each method.

    Args:
        sweeps: of the same objectives; the first is drawn on top.
    """
    names = sweeps[0].objectives
    figures = {}
    for first, second in itertools.combinations(range(len(names)), 2):
        figure, axes = _axes(
            "Rewards at each weight",
            f"{_plain(names[first])} (reference std)",
            f"{_plain(names[second])} (reference std)",
        )
        for number, sweep in enumerate(sweeps):
            means = sweep.means()
            errors = [
                np.asarray(
                    [
                        [p.rewards[names[k]].mean - p.rewards[names[k]].low for p in sweep.points],
                        [p.rewards[names[k]].high - p.rewards[names[k]].mean for p in sweep.points],
                    ]
                )
                for k in (first, second)
            ]
            colour = COLOURS[number % len(COLOURS)]
            axes.errorbar(
                means[:, first],
                means[:, second],
                xerr=errors[0],
                yerr=errors[1],
                color=colour,
                marker=MARKERS[number % len(MARKERS)],
                linestyle="-" if len(names) == 2 else "none",
                linewidth=1.5,
                elinewidth=0.7,
                markersize=5,
                label=_plain(sweep.method),
                zorder=10 - number,
            )
            if number == 0:
                _label_ends(axes, sweep, first, second)
        axes.plot(
            0, 0, marker="*", color="#555555", markersize=12, linestyle="none", label="reference policy", zorder=1
        )
        axes.legend(frameon=False)
        figures[f"front_{names[first]}_{names[second]}"] = figure
    return figures


def _label_ends(axes: Any, sweep: Sweep, first: int, second: int) -> None:
    means = sweep.means()
    for index in {0, len(sweep.points) // 2, len(sweep.points) - 1}:
        weights = ", ".join(f"{w:.2g}" for w in sweep.points[index].weights)
        axes.annotate(
            f"w = {weights}", means[index, [first, second]], textcoords="offset points", xytext=(7, 7), fontsize=8
        )


def plot_grid(sweep: Sweep) -> Figure:
    """Every reward against its own weight, and the KL to the reference, along the grid."""
    figure = Figure(figsize=(9.0, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    for k, name in enumerate(sweep.objectives):
        order = np.argsort([p.weights[k] for p in sweep.points], kind="stable")
        points = [sweep.points[i] for i in order]
        weights = [p.weights[k] for p in points]
        colour = COLOURS[k % len(COLOURS)]
        means = [p.rewards[name].mean for p in points]
        left.plot(weights, means, marker=MARKERS[k % len(MARKERS)], color=colour, label=_plain(name))
        left.fill_between(
            weights,
            [p.rewards[name].low for p in points],
            [p.rewards[name].high for p in points],
            color=colour,
            alpha=0.15,
        )
    left.set_title("Each reward against its own weight", loc="left", fontsize=11)
    left.set_xlabel("weight of the reward")
    left.set_ylabel("mean reward (reference std)")
    left.legend(frameon=False)
    weights = [p.weights[0] for p in sweep.points]
    kl = [p.kl for p in sweep.points]
    right.plot(weights, [i.mean for i in kl], marker="o", color="#555555")
    right.fill_between(weights, [i.low for i in kl], [i.high for i in kl], color="#555555", alpha=0.15)
    right.set_title("KL to the reference", loc="left", fontsize=11)
    right.set_xlabel(f"weight of {_plain(sweep.objectives[0])}")
    right.set_ylabel("nats per completion")
    for axes in (left, right):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def plot_training(metrics: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Figure | None:
    """Curves of a run's metrics over its steps; None when it has none of them.

    Args:
        metrics: the lines of ``metrics.jsonl``.
        names: of the metrics to draw, one panel each.
    """
    found = [name for name in names if any(name in line for line in metrics)]
    if not found:
        return None
    columns = min(3, len(found))
    rows = -(-len(found) // columns)
    figure = Figure(figsize=(3.4 * columns, 2.5 * rows), layout="constrained")
    for axes, name in zip(np.atleast_1d(figure.subplots(rows, columns)).ravel(), found, strict=False):
        lines = [line for line in metrics if name in line]
        axes.plot(
            [line["step"] for line in lines],
            [line[name] for line in lines],
            color=COLOURS[0],
            linewidth=1.2,
            marker=".",
        )
        axes.set_title(_plain(name), loc="left", fontsize=10)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    return figure
