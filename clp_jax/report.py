"""`clp report`: the page, the plots and the tables of evaluated runs."""

import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from clp_jax.evaluation.report import write_report
from clp_jax.evaluation.sweep import Sweep
from clp_jax.evaluation.tables import print_comparison, print_examples, print_table
from clp_jax.training.metrics import read_metrics


def report(*, run_dirs: Sequence[str], output_dir: str | None = None) -> str:
    """Writes a self-contained HTML page and PNG plots, and prints the Pareto table and an example.

    Args:
        run_dirs: evaluated run directories, or their ``results.json``: the method first, then what it is compared with.
        output_dir: where the page goes; by default ``report`` in the first run directory.

    Returns:
        The path of the page.

    Raises:
        FileNotFoundError: when a run was not evaluated.
        ValueError: when a file is not a results file, or the runs have other rewards.
    """
    if not run_dirs:
        raise ValueError("report: no run directories: expected at least one evaluated run.")
    sweeps = [Sweep.load(path) for path in run_dirs]
    first = Path(run_dirs[0])
    home = first if first.is_dir() else first.parent
    metrics = read_metrics(home / "metrics.jsonl") if (home / "metrics.jsonl").is_file() else []
    page = write_report(sweeps, metrics, Path(output_dir) if output_dir else home / "report")
    console = Console()
    print_table(sweeps[0], console)
    if len(sweeps) > 1:
        print_comparison(sweeps, console)
    if len({(sweep.num_prompts, str(sweep.settings.get("data"))) for sweep in sweeps}) > 1:
        counts = ", ".join(f"{sweep.method} {sweep.num_prompts}" for sweep in sweeps)
        print(f"warning: these are results over other prompts ({counts}): compare with care.", file=sys.stderr)
    print_examples(sweeps[0], console)
    console.print(f"report: {page}")
    return str(page)
