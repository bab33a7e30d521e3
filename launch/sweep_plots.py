"""Plots of a sweep: each setting as a line through its values, and the trade-off between two metrics."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from clp_jax.launch.sweep_table import Setting, on_front, value_of
from matplotlib.figure import Figure

matplotlib.use("Agg")  # Figures go to files; no window system is needed.

_COLOURS = "viridis_r"
_FRONT, _OTHERS = "#D55E00", "#8A8A8A"
# Beyond this ratio, an axis of positive numbers is logarithmic.
_LOGARITHMIC = 20.0
_MOST_TICKS = 8
_INSET = 0.04
_BETTER = {"minimize": "lower is better", "maximize": "higher is better"}


class _Axis:
    """A vertical line of parallel coordinates: where values stand on it, in [0, 1], and which are named."""

    def __init__(self, name: str, values: Sequence[float | str]):
        self.name = name
        numbers = [value for value in values if isinstance(value, float)]
        self.is_number = len(numbers) == len(values)
        if not self.is_number:
            self.names = list(dict.fromkeys(str(value) for value in values))
            self.low, self.high, self.log = 0.0, float(len(self.names) - 1), False
        else:
            self.low, self.high = min(numbers), max(numbers)
            self.log = self.low > 0 and self.high / self.low >= _LOGARITHMIC
        self.distinct = sorted(set(numbers)) if self.is_number else []

    def at(self, value: float | str) -> float:
        """The place of a value."""
        if not self.is_number:
            value = float(self.names.index(str(value)))
        assert isinstance(value, float)
        low, high = self.low, self.high
        if self.log:
            value, low, high = math.log(value), math.log(low), math.log(high)
        share = 0.5 if high == low else (value - low) / (high - low)
        return _INSET + (1 - 2 * _INSET) * share

    def ticks(self) -> list[tuple[float, str]]:
        """Places and their names: the values themselves where they are few."""
        if not self.is_number:
            return [(self.at(name), _plain(_short(name))) for name in self.names]
        if len(self.distinct) <= _MOST_TICKS:
            return [(self.at(value), f"{value:.4g}") for value in _apart(self.distinct, self.at)]
        shares = np.linspace(0, 1, 5)
        if self.log:
            values = [float(self.low * (self.high / self.low) ** share) for share in shares]
        else:
            values = [float(self.low + (self.high - self.low) * share) for share in shares]
        return [(self.at(value), f"{value:.3g}") for value in values]


def plot_parallel(settings: Sequence[Setting], names: Sequence[str], metrics: Mapping[str, str]) -> Figure | None:
    """Parallel coordinates: one line for each setting through its bindings and its mean metrics.

    Lines are coloured by the first metric, and the best one is drawn on top.

    Args:
        settings: over their seeds.
        names: of the bindings.
        metrics: names and ``minimize``, ``maximize`` or nothing.

    Returns:
        The figure, or None where no setting has all metrics.
    """
    done = [s for s in settings if metrics and all(name in s.means for name in metrics)]
    if not done:
        return None
    axes = [_Axis(name, [value_of(s.bindings.get(name)) for s in done]) for name in names]
    axes += [_Axis(name, [s.means[name] for s in done]) for name in metrics]
    colour_by = next((name for name, goal in metrics.items() if goal), next(iter(metrics)))
    goal = metrics[colour_by]
    values = [s.means[colour_by] for s in done]
    best = done[int(np.argmax(values) if goal == "maximize" else np.argmin(values))] if goal else None
    figure = Figure(figsize=(max(5.2, 1.9 * len(axes) + 1.2), 4.4), layout="constrained")
    panel = figure.add_subplot()
    low, high = min(values), max(values)
    is_log = next(axis.log for axis in axes if axis.name == colour_by)
    scale_type = matplotlib.colors.LogNorm if is_log else matplotlib.colors.Normalize
    norm = scale_type(low, high if high > low else low + 1)
    # The good end is dark, whichever it is.
    colours = matplotlib.colormaps[_COLOURS if goal == "maximize" else _COLOURS.removesuffix("_r")]
    for setting in sorted(done, key=lambda s: s is best):
        row = [*(value_of(setting.bindings.get(name)) for name in names), *(setting.means[name] for name in metrics)]
        heights = [axis.at(value) for axis, value in zip(axes, row, strict=True)]
        x, y = _curve(heights)
        is_best = setting is best
        panel.plot(
            x,
            y,
            color=colours(norm(setting.means[colour_by])),
            linewidth=3.0 if is_best else 1.4,
            alpha=1.0 if is_best or len(done) <= 40 else 0.6,
            zorder=5 if is_best else 3,
        )
    _draw_axes(panel, axes, metrics)
    title = f"{len(done)} settings" + (f"; the thick line has the best {_plain(colour_by)}" if goal else "")
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    scale = matplotlib.cm.ScalarMappable(norm, colours)
    figure.colorbar(scale, ax=panel, label=_plain(colour_by), fraction=0.04, pad=0.06)
    return figure


def plot_fronts(settings: Sequence[Setting], names: Sequence[str], metrics: Mapping[str, str]) -> dict[str, Figure]:
    """The trade-off of each pair of metrics with a goal: means with standard errors, and the Pareto front of the pair.

    Args:
        settings: over their seeds.
        names: of the bindings, which stand beside the plot for the front's points.
        metrics: names and ``minimize``, ``maximize`` or nothing.
    """
    figures = {}
    for first, second in itertools.combinations([name for name, goal in metrics.items() if goal], 2):
        done = sorted((s for s in settings if first in s.means and second in s.means), key=lambda s: s.means[first])
        if not done:
            continue
        members = on_front(done, {first: metrics[first], second: metrics[second]})
        front = [setting for setting, is_member in zip(done, members, strict=True) if is_member]
        others = [setting for setting, is_member in zip(done, members, strict=True) if not is_member]
        figure = Figure(figsize=(9.2, 4.6), layout="constrained")
        panel = figure.add_subplot()
        _points(panel, others, first, second, _OTHERS, "dominated")
        _points(panel, front, first, second, _FRONT, "Pareto front")
        panel.set_xlabel(f"{_plain(first)} ({_BETTER[metrics[first]]})")
        panel.set_ylabel(f"{_plain(second)} ({_BETTER[metrics[second]]})")
        panel.set_title("Means over seeds ± standard errors", loc="left", fontsize=11)
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
        lines = []
        for number, setting in enumerate(front, 1):
            place = (setting.means[first], setting.means[second])
            panel.annotate(str(number), place, textcoords="offset points", xytext=(6, 6), fontsize=9, weight="bold")
            bound = [f"{_short(name)} = {_short(setting.bindings[name])}" for name in names if name in setting.bindings]
            lines.append(f"{number}  " + "\n    ".join(bound))
        if len(lines) > _MOST_TICKS:
            lines[_MOST_TICKS:] = [f"…  {len(lines) - _MOST_TICKS} more: table.md"]
        panel.legend(
            loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False, fontsize=8,
            title=_plain("\n".join(lines)), title_fontsize=8, alignment="left",
        )  # fmt: skip
        figures[f"front_{_file_name(first)}_{_file_name(second)}"] = figure
    return figures


def _points(panel: Any, chosen: Sequence[Setting], first: str, second: str, colour: str, label: str) -> None:
    if not chosen:
        return
    is_front = colour == _FRONT
    panel.errorbar(
        [s.means[first] for s in chosen],
        [s.means[second] for s in chosen],
        xerr=[s.errors.get(first, 0.0) for s in chosen],
        yerr=[s.errors.get(second, 0.0) for s in chosen],
        color=colour,
        marker="o",
        markersize=6,
        linestyle="-" if is_front else "none",
        linewidth=1.5,
        elinewidth=0.8,
        label=label,
        zorder=4 if is_front else 3,
    )


def _draw_axes(panel: Any, axes: Sequence[_Axis], metrics: Mapping[str, str]) -> None:
    for x, axis in enumerate(axes):
        panel.axvline(x, color="#333333", linewidth=1.0, zorder=2)
        for y, text in axis.ticks():
            # The last axis has room on its right, the others only between lines.
            side = 1 if x == len(axes) - 1 else -1
            panel.plot([x, x + 0.02 * side], [y, y], color="#333333", linewidth=1.0, zorder=2)
            panel.text(
                x + 0.035 * side, y, text, ha="left" if side > 0 else "right", va="center", fontsize=8, zorder=6,
                bbox={"boxstyle": "round,pad=0.1", "facecolor": "white", "edgecolor": "none", "alpha": 0.75},
            )  # fmt: skip
        goal = f"\n{_BETTER[metrics[axis.name]]}" if metrics.get(axis.name) else ""
        scale = "\n(log)" if axis.log else ""
        panel.text(
            x, 1.02, f"{_plain(_short(axis.name))}{goal}{scale}", ha="center", va="bottom", fontsize=9,
            weight="bold" if axis.name in metrics else "normal",
        )  # fmt: skip
    panel.set_xlim(-0.4, len(axes) - 0.65)
    panel.set_ylim(0, 1)
    panel.axis("off")


def _curve(heights: Sequence[float]) -> tuple[Any, Any]:
    """A smooth line through places, level at each axis, so that lines can be followed through a crossing."""
    share = np.linspace(0, 1, 30)
    ease = share * share * (3 - 2 * share)
    x = [i + share for i in range(len(heights) - 1)]
    y = [a + (b - a) * ease for a, b in itertools.pairwise(heights)]
    return (np.concatenate(x), np.concatenate(y)) if x else (np.asarray([-0.1, 0.1]), np.asarray([heights[0]] * 2))


def _apart(values: Sequence[float], at: Any) -> list[float]:
    """Those of ascending values whose names would not lie on each other, the ends first of all."""
    kept = [values[0], *([values[-1]] if len(values) > 1 else [])]
    for value in values[1:-1]:
        if all(abs(at(value) - at(other)) > 0.045 for other in kept):
            kept.append(value)
    return kept


def _plain(name: str) -> str:
    """A name as it is: dollars would make a formula of it."""
    return name.replace("$", r"\$")


def _short(text: str) -> str:
    return text if len(text) <= 24 else f"{text[:11]}…{text[-12:]}"


def _file_name(name: str) -> str:
    return "".join(letter if letter.isalnum() else "_" for letter in name)
