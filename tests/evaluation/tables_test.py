"""What the terminal shows."""

import dataclasses
import io

from rich.console import Console
from sweeps import make_sweep

from clp_jax.evaluation.sweep import Example
from clp_jax.evaluation.tables import print_examples, print_table


def shown(function, *args, width=200, **settings):
    console = Console(file=io.StringIO(), width=width)
    function(*args, console, **settings)
    return console.file.getvalue()


def test_one_row_for_each_weight_with_its_figures():
    sweep = make_sweep()
    text = shown(print_table, sweep)
    for point in sweep.points:
        cells = [f"{w:.2f}" for w in point.weights]
        cells += [f"{r.mean:+.2f} ±{(r.high - r.low) / 2:.2f}" for r in point.rewards.values()]
        cells += [f"{point.kl.mean:.2f}", f"{point.length.mean:.1f}"]
        row = next(line for line in text.splitlines() if all(cell in line for cell in cells))
        assert ("●" in row) == point.non_dominated
    assert f"hypervolume {sweep.hypervolume:.3f}" in text and "20 prompts" in text
    assert "faithful: rank correlation with its weight +1.00" in text


def test_names_are_shown_as_they_are():
    """Square brackets are markup to the terminal library, not to us."""
    text = shown(print_table, make_sweep(method="run[/bold]", names=("r[red]", "[b]")))
    assert "run[/bold]" in text and "r[red]" in text and "[b]: rank correlation" in text


def test_one_document_at_a_few_weights():
    sweep = make_sweep()
    text = shown(print_examples, sweep, count=3)
    assert "first document" in text and "its summary" in text
    for index in (0, 2, 4):
        weights = sweep.points[index].weights
        assert f"faithful {weights[0]:.2f}, brief {weights[1]:.2f}: completion 0 at {weights[0]:.2f}" in text
    assert "at 0.25" not in text
    assert "second" in shown(print_examples, sweep, index=1)
    assert shown(print_examples, sweep, count=50).count("completion 0") == len(sweep.points)


def test_odd_completions():
    completions = ("", "[bold]not markup[/]", *["text"] * 3)
    sweep = dataclasses.replace(make_sweep(), examples=(Example("[/red] doc", "ref [x]", completions),))
    text = shown(print_examples, sweep)
    assert "(empty)" in text and "[bold]not markup[/]" in text and "[/red] doc" in text and "ref [x]" in text


def test_without_examples_there_is_nothing_to_show():
    assert shown(print_examples, make_sweep(prompts=(), references=())) == ""
