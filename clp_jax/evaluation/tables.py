"""What the terminal shows of a sweep."""

import textwrap
from collections.abc import Sequence

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from clp_jax.evaluation.sweep import Sweep


def print_table(sweep: Sweep, console: Console) -> None:
    """The Pareto table: rewards with confidence intervals, KL and length at each weight."""
    title = f"{escape(sweep.method)}: {sweep.num_prompts} prompts, rewards in reference standard deviations"
    table = Table(title=title)
    for name in sweep.objectives:
        table.add_column(f"w {escape(name)}", justify="right")
    for name in sweep.objectives:
        table.add_column(escape(name), justify="right")
    for name in ("KL", "tokens"):
        table.add_column(name, justify="right")
    table.add_column("front", justify="center")
    for point in sweep.points:
        rewards = [f"{r.mean:+.2f} ±{(r.high - r.low) / 2:.2f}" for r in (point.rewards[n] for n in sweep.objectives)]
        table.add_row(
            *[f"{w:.2f}" for w in point.weights],
            *rewards,
            f"{point.kl.mean:.2f}",
            f"{point.length.mean:.1f}",
            "●" if point.non_dominated else "",
        )
    console.print(table)
    for name, s in sweep.steerability.items():
        console.print(
            f"{escape(name)}: rank correlation with its weight {s.rank_correlation:+.2f}, range {s.range:.2f} reference std"
        )
    console.print(f"hypervolume {sweep.hypervolume:.3f}, mean value {sweep.mean_value:+.3f}")


def print_comparison(sweeps: Sequence[Sweep], console: Console) -> None:
    """One row for each sweep: hypervolume, mean value, and the rank correlation and range of each reward."""
    table = Table(title="compared")
    table.add_column("method")
    for name in ("prompts", "hypervolume", "mean value"):
        table.add_column(name, justify="right")
    for name in sweeps[0].objectives:
        table.add_column(f"ρ, range: {escape(name)}", justify="right")
    for sweep in sweeps:
        steered = [sweep.steerability[name] for name in sweep.objectives]
        table.add_row(
            escape(sweep.method),
            str(sweep.num_prompts),
            f"{sweep.hypervolume:.2f}",
            f"{sweep.mean_value:+.2f}",
            *[f"{s.rank_correlation:+.2f}, {s.range:.2f}" for s in steered],
        )
    console.print(table)


def print_examples(sweep: Sweep, console: Console, *, count: int = 5, index: int = 0) -> None:
    """One document's completions at a few weights.

    Args:
        sweep: the sweep.
        console: where to print.
        count: weights, evenly spread over the grid.
        index: of the example.
    """
    if not sweep.examples:
        return
    example = sweep.examples[index]
    chosen = np.unique(np.linspace(0, len(sweep.points) - 1, count).round().astype(int))
    lines = Text()
    lines.append(textwrap.shorten(example.prompt, 400) + "\n", style="dim")
    lines.append(f"reference: {example.reference}\n\n", style="italic")
    for i in chosen:
        weights = ", ".join(f"{n} {w:.2f}" for n, w in zip(sweep.objectives, sweep.points[i].weights, strict=True))
        lines.append(f"{weights}: ", style="bold")
        lines.append((example.completions[i] or "(empty)") + "\n")
    console.print(Panel(lines, title="One document at several weights"))
