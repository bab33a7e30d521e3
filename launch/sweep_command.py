"""`clp sweep --file=FILE TARGET` and `clp sweep report DIR`."""

import dataclasses
import shlex
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from clp_jax.launch.calls import show
from clp_jax.launch.cargo import Cargo
from clp_jax.launch.command import print_plan
from clp_jax.launch.errors import LaunchError
from clp_jax.launch.job import Job
from clp_jax.launch.options import build, describe, option, split
from clp_jax.launch.stage_job import patience_for
from clp_jax.launch.sweep import GOALS, read_sweep
from clp_jax.launch.sweep_run import Settings, SweepDirectory, batch_of, jobs_of, preview, run_sweep
from clp_jax.launch.sweep_table import Row, columns, over_seeds, shown_metrics, to_csv, to_markdown
from clp_jax.launch.targets import TARGETS, find_target

_VALUED = ("--file", "--dir", "--max_concurrent", "--max_restarts", "--max_failures", "--metrics")


@dataclasses.dataclass(frozen=True)
class SweepOptions:
    """What `clp sweep` takes."""

    file: str | None = option("sweep.yaml, or sweep.py that defines sweep", None)
    dir: str | None = option("where the sweep goes; by default runs/sweeps/ and the name of the file", None)
    max_concurrent: int = option("trials at once", 1)
    max_restarts: int = option("attempts of a trial after failures; preemptions do not count", Job.max_restarts)
    max_failures: int = option("failures of a trial in a row without a new checkpoint that end it", Job.max_failures)
    retry_failed: bool = option("try trials that failed again", False)
    force: bool = option("run what clp compile says does not fit, or what it can't look at", False)
    look: float | None = option("seconds between two looks at the trials; by default the target's", None)
    dry_run: bool = option("print the trials, and the exact files and commands that launch the first", False)


@dataclasses.dataclass(frozen=True)
class ReportOptions:
    """What `clp sweep report` takes."""

    metrics: tuple[str, ...] = option("NAME:minimize,NAME:maximize,... to show, instead of the sweep's own", ())


def sweep(words: Sequence[str], commands: Collection[str]) -> int:
    """Runs `clp sweep`.

    Args:
        words: what was typed after it.
        commands: of `clp`, that a sweep's command may begin with.

    Returns:
        The exit code: 0, or 1 where a trial failed.

    Raises:
        LaunchError: for what is wrong, before anything is created.
    """
    places, given, command = split(_joined(words))
    if "help" in given or not (places or given):
        print(_usage(places[0] if places and places[0] in TARGETS else None))
        return 0
    if places[:1] == ["report"]:
        return _report_command(places[1:], given)
    if command or len(places) > 1:
        raise LaunchError(
            f"what is {[*places[1:], *command][0]!r}? The file says the command: clp sweep --file=FILE TARGET."
        )
    ours = {field.name for field in dataclasses.fields(SweepOptions)}
    options = build(SweepOptions, {k: v for k, v in given.items() if k in ours}, "clp sweep")
    if options.file is None or not places:
        raise LaunchError(f"which {'file' if options.file is None else 'target'}? clp sweep --file=FILE TARGET.")
    target_options = {k: v for k, v in given.items() if k not in ours}
    target = find_target(places[0], target_options)
    found = read_sweep(Path(options.file))
    path = Path(options.dir or Path("runs/sweeps") / Path(options.file).stem)
    patience = patience_for(target)
    if options.look is not None:
        patience = dataclasses.replace(patience, look=options.look)
    settings = Settings(
        target,
        target_options,
        commands,
        options.max_concurrent,
        options.retry_failed,
        options.force,
        patience,
        max_restarts=options.max_restarts,
        max_failures=options.max_failures,
    )
    if options.dry_run:
        trials, directory = preview(found, path, settings)
        for trial in trials:
            print(f"{trial.name}: {trial}")
        jobs, batch = [jobs_of(directory, trial, settings) for trial in trials], batch_of(directory, settings)
        for number, job in enumerate(jobs[0]):
            print(f"\nThe first one runs: {shlex.join(job.command)}")
            if batch is None:
                print_plan([Cargo(job, target.ships_code)], directory.jobs, lambda records: target.dry_run(*records))
            else:
                print_plan([Cargo(these[number], target.ships_code) for these in jobs], directory.jobs, batch.plan)
        return 0
    try:
        rows = run_sweep(found, path, settings)
    except KeyboardInterrupt:
        show(
            "\nnobody looks after the trials now; what runs, runs on. The same command goes on; clp jobs stop ends them."
        )
        return 128 + 2
    write_report(SweepDirectory.load(path), {})
    failed = [row.trial.name for row in rows if row.state in ("failed", "stopped")]
    # What was given up goes on under the state that its record had last.
    damaged = [row.trial.name for row in rows if row.state not in ("succeeded", "waiting", "failed", "stopped")]
    if failed:
        show(f"{len(failed)} of {len(rows)} trials failed: {', '.join(failed)}. --retry_failed tries them again.")
    if damaged:
        show(
            f"{len(damaged)} of {len(rows)} trials have damaged records: {', '.join(damaged)}. See that nothing of them runs, "
            "and move the records away: the same command begins these trials again, in their run directories."
        )
    return int(bool(failed or damaged))


def write_report(directory: SweepDirectory, metrics: Mapping[str, str]) -> list[Path]:
    """Writes the table as Markdown and CSV and the plots, and prints the table.

    Args:
        directory: of the sweep.
        metrics: to show, with ``minimize``, ``maximize`` or nothing; none shows the sweep's own.

    Returns:
        What was written.

    Raises:
        LaunchError: for a metric that no trial has.
    """
    from clp_jax.launch.sweep_plots import plot_fronts, plot_parallel

    rows = directory.rows(show)
    shown = shown_metrics(rows, metrics or directory.metrics)
    table = to_markdown(rows, shown)
    written = [directory.path / "table.md", directory.path / "table.csv"]
    written[0].write_text(table)
    written[1].write_text(to_csv(rows))
    names, settings = columns(row.trial for row in rows), over_seeds(rows)
    parallel = plot_parallel(settings, names, shown)
    figures = ({} if parallel is None else {"parallel": parallel}) | plot_fronts(settings, names, shown)
    for name, figure in figures.items():
        written.append(directory.path / f"{name}.png")
        figure.savefig(written[-1], dpi=150)
    print(table)
    states = ", ".join(f"{count} {state}" for state, count in _counts(rows).items())
    print(f"{states}: {', '.join(str(path) for path in written)}", file=sys.stderr)
    return written


def _report_command(places: Sequence[str], given: Mapping[str, str]) -> int:
    if len(places) != 1:
        raise LaunchError("of which sweep? clp sweep report DIR.")
    options = build(ReportOptions, given, "clp sweep report")
    metrics = {}
    for text in options.metrics:
        name, colon, goal = text.rpartition(":")
        if not colon or goal not in GOALS:
            raise LaunchError(f"--metrics: {text!r}: expected NAME:minimize or NAME:maximize.")
        metrics[name] = goal
    write_report(SweepDirectory.load(Path(places[0])), metrics)
    return 0


def _counts(rows: Sequence[Row]) -> dict[str, int]:
    states = [row.state for row in rows]
    return {state: states.count(state) for state in dict.fromkeys(states)}


def _joined(words: Sequence[str]) -> list[str]:
    """``--file FILE`` as ``--file=FILE``."""
    waiting, found = list(words), list[str]()
    while waiting:
        word = waiting.pop(0)
        found.append(f"{word}={waiting.pop(0)}" if word in _VALUED and waiting else word)
    return found


def _usage(target: str | None) -> str:
    lines = ["clp sweep: tries a command with many bindings and seeds, on a target.", ""]
    lines += [
        "usage: clp sweep --file=FILE TARGET [--OPTION=VALUE] ...",
        "       clp sweep report DIR [--metrics=...]",
        "",
    ]
    lines += ["Options:", *describe(SweepOptions), "", "Options of report:", *describe(ReportOptions)]
    if target is not None:
        lines += ["", f"Options of {target}:", *describe(TARGETS[target])]
    return "\n".join([*lines, "", f"targets: {', '.join(TARGETS)}. docs/sweeps.md tells what a sweep file says."])
