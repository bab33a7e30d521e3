"""Several seeds of several methods: one front and one row of figures for each method."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from clp_jax.evaluation.statistics import Interval, t_interval
from clp_jax.evaluation.sweep import Steerability, Sweep


@dataclasses.dataclass(frozen=True)
class Summary:
    """Figures of one method over seeds, with 95 % Student intervals.

    Attributes:
        method: its name.
        num_seeds: runs.
        hypervolume: above the fixed reference point.
        mean_value: of the objective, over the grid of weights.
        kl: to the reference, mean over the grid, in nats a completion.
        rank_correlation: of each weight with its reward, by objective.
        range: of each reward over the grid, in standard deviations of the reference policy.
        decode_calls_per_token: models called for every token.
    """

    method: str
    num_seeds: int
    hypervolume: Interval
    mean_value: Interval
    kl: Interval
    rank_correlation: dict[str, Interval]
    range: dict[str, Interval]
    decode_calls_per_token: int


def summarise_seeds(sweeps: Sequence[Sweep]) -> Summary:
    """The figures of one method's seeds."""
    names = sweeps[0].objectives
    return Summary(
        method=sweeps[0].method,
        num_seeds=len(sweeps),
        hypervolume=t_interval([s.hypervolume for s in sweeps]),
        mean_value=t_interval([s.mean_value for s in sweeps]),
        kl=t_interval([float(np.mean([p.kl.mean for p in s.points])) for s in sweeps]),
        rank_correlation={n: t_interval([s.steerability[n].rank_correlation for s in sweeps]) for n in names},
        range={n: t_interval([s.steerability[n].range for s in sweeps]) for n in names},
        decode_calls_per_token=sweeps[0].decode_calls_per_token,
    )


def paired_difference(first: Sequence[Sweep], second: Sequence[Sweep], figure: str) -> Interval:
    """The difference of a figure, `first` minus `second`, over seeds that share their number.

    Args:
        first: sweeps of one method, in the order of the seeds.
        second: of another.
        figure: ``"hypervolume"`` or ``"mean_value"``.
    """
    return t_interval([getattr(a, figure) - getattr(b, figure) for a, b in zip(first, second, strict=True)])


def mean_sweep(sweeps: Sequence[Sweep]) -> Sweep:
    """The mean front over seeds; intervals are over seeds instead of prompts.

    Args:
        sweeps: of one method on one grid of weights.
    """
    first = sweeps[0]
    points = []
    for same in zip(*(s.points for s in sweeps), strict=True):
        points.append(
            dataclasses.replace(
                same[0],
                rewards={n: t_interval([p.rewards[n].mean for p in same]) for n in first.objectives},
                raw_rewards={n: float(np.mean([p.raw_rewards[n] for p in same])) for n in first.objectives},
                kl=t_interval([p.kl.mean for p in same]),
                length=t_interval([p.length.mean for p in same]),
                value=float(np.mean([p.value for p in same])),
                # In the majority of seeds.
                non_dominated=sum(p.non_dominated for p in same) * 2 > len(same),
            )
        )
    return dataclasses.replace(
        first,
        points=tuple(points),
        hypervolume=float(np.mean([s.hypervolume for s in sweeps])),
        mean_value=float(np.mean([s.mean_value for s in sweeps])),
        steerability={
            n: Steerability(*np.mean([dataclasses.astuple(s.steerability[n]) for s in sweeps], axis=0).tolist())
            for n in first.objectives
        },
    )


def markdown_table(summaries: Sequence[Summary], extra: Mapping[str, Mapping[str, str]] | None = None) -> str:
    """The figures as a Markdown table, one method a row.

    Args:
        summaries: of the methods.
        extra: further columns: title -> method -> cell.
    """
    extra = extra or {}
    names = list(summaries[0].rank_correlation)
    header = ["method", "hypervolume", "mean value", "KL", *[f"ρ {n}" for n in names], *[f"range {n}" for n in names]]
    header += ["model calls per token", *extra]
    lines = [_row(header), _row(["---", *["---:"] * (len(header) - 1)])]
    for s in summaries:
        cells = [s.method, format_interval(s.hypervolume), format_interval(s.mean_value), format_interval(s.kl)]
        cells += [
            *[format_interval(s.rank_correlation[n]) for n in names],
            *[format_interval(s.range[n]) for n in names],
        ]
        lines.append(
            _row([*cells, str(s.decode_calls_per_token), *[column.get(s.method, "") for column in extra.values()]])
        )
    return "\n".join(lines) + "\n"


def format_interval(interval: Interval) -> str:
    """``mean ± half width``; the mean alone for a single run."""
    half = (interval.high - interval.low) / 2
    return f"{interval.mean:.2f}" + (f" ± {half:.2f}" if np.isfinite(half) else "")


def _row(cells: Sequence[Any]) -> str:
    return f"| {' | '.join(map(str, cells))} |"
