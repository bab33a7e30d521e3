"""The table of a sweep: its trials, their states, and the metrics they left, read from plain files."""

import csv
import dataclasses
import io
import json
import math
import statistics
from ast import literal_eval
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from clp_jax.launch.errors import LaunchError
from clp_jax.launch.sweep import TRIALS_FILE, Trial

METRICS_FILE, RESULTS_FILE = "metrics.jsonl", "results.json"
# What says how a run was made or how fast it was, not how good it is.
_NO_RESULTS = frozenset({"settings", "version", "wall_time"})
_BETTER = {"minimize": "lower", "maximize": "higher"}


@dataclasses.dataclass(frozen=True)
class Row:
    """One trial of the table.

    Attributes:
        trial: the trial.
        state: ``waiting``, the phase of its job, or ``succeeded``.
        metrics: by name; those that it has.
    """

    trial: Trial
    state: str
    metrics: Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class Setting:
    """Some bindings, over their seeds.

    Attributes:
        bindings: by name.
        seeds: trials that succeeded.
        means: of each metric over those that have it.
        errors: standard errors of the means; none for a single trial.
    """

    bindings: Mapping[str, str]
    seeds: int
    means: Mapping[str, float]
    errors: Mapping[str, float]


def add_trial(directory: Path, trial: Trial) -> None:
    """Adds a trial to the sweep's list, unless it is there."""
    if any(known.name == trial.name for known in read_trials(directory)):
        return
    path = directory / TRIALS_FILE
    cut = path.is_file() and not path.read_text().endswith("\n")
    with open(path, "a") as file:
        file.write(("\n" if cut else "") + json.dumps({"name": trial.name, **dataclasses.asdict(trial)}) + "\n")


def read_trials(directory: Path) -> list[Trial]:
    """The trials of a sweep's directory, in the order they were made; a line that was cut off is left out.

    Raises:
        LaunchError: when the directory holds no sweep.
    """
    path = directory / TRIALS_FILE
    found: dict[str, Trial] = {}
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            stored = json.loads(line)
            trial = Trial(stored["bindings"], stored["seed"])
        except (ValueError, KeyError, TypeError):
            continue
        found[trial.name] = trial
    return list(found.values())


def read_metrics(run_dir: Path) -> dict[str, float]:
    """The last value of each metric of a run, and the numbers of its results by their path (``steerability/brevity/range``).

    A metric whose last value is not finite, as of a run that has diverged, is left out.
    """
    return {name: value for name, value in _last_values(run_dir).items() if math.isfinite(value)}


def written_metrics(run_dir: Path) -> set[str]:
    """The names of all metrics that a run wrote, whatever came of them."""
    return set(_last_values(run_dir))


def _last_values(run_dir: Path) -> dict[str, float]:
    found: dict[str, float] = {}
    path = run_dir / METRICS_FILE
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            found |= dict(_numbers(json.loads(line)))
        except ValueError:
            continue
    path = run_dir / RESULTS_FILE
    if path.is_file():
        try:
            found |= dict(_numbers(json.loads(path.read_text())))
        except ValueError as error:
            raise LaunchError(f"{path} is no JSON ({error}): evaluate this trial again.") from None
    return found


def over_seeds(rows: Iterable[Row]) -> list[Setting]:
    """Means and standard errors over the seeds of the same bindings, in the rows' order."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.trial.setting, []).append(row)
    found = []
    for group in groups.values():
        done = [row for row in group if row.state == "succeeded"]
        names = dict.fromkeys(name for row in done for name in row.metrics)
        values = {name: [row.metrics[name] for row in done if name in row.metrics] for name in names}
        means = {name: statistics.fmean(v) for name, v in values.items()}
        errors = {name: statistics.stdev(v) / math.sqrt(len(v)) for name, v in values.items() if len(v) > 1}
        found.append(Setting(group[0].trial.bindings, len(done), means, errors))
    return found


def shown_metrics(rows: Sequence[Row], wanted: Mapping[str, str]) -> dict[str, str]:
    """The metrics that tables and plots show, and their goals where they have any: the wanted ones, or what was evaluated.

    Raises:
        LaunchError: when no trial has a wanted metric, with those that they have.
    """
    known = dict.fromkeys(name for row in rows for name in row.metrics)
    for name in wanted:
        if known and name not in known:
            raise LaunchError(f"no trial has a metric {name!r}: they have {', '.join(known)}.")
    if wanted:
        return dict(wanted)
    evaluated = [name for name in known if name.startswith("evaluation/")]
    results = [name for name in known if name in ("hypervolume", "mean_value")]
    return dict.fromkeys([*results, *evaluated] or [name for name in known if name == "loss"], "")


def ordered(settings: Sequence[Setting], metrics: Mapping[str, str]) -> list[Setting]:
    """The settings, the best by the first metric that has a goal first, those without it last."""
    name = next((name for name, goal in metrics.items() if goal), None)
    if name is None:
        return list(settings)
    sign = -1.0 if metrics[name] == "maximize" else 1.0
    return sorted(settings, key=lambda s: sign * s.means[name] if name in s.means else math.inf)


def on_front(settings: Sequence[Setting], metrics: Mapping[str, str]) -> list[bool]:
    """Which settings no other is at least as good as in every metric with a goal, and better in one."""
    signs = {name: -1.0 if goal == "maximize" else 1.0 for name, goal in metrics.items() if goal}
    costs = [
        [sign * s.means[n] for n, sign in signs.items()] if signs.keys() <= s.means.keys() else None for s in settings
    ]

    def beats(a: list[float] | None, b: list[float]) -> bool:
        return a is not None and a != b and all(x <= y for x, y in zip(a, b, strict=True))

    return [cost is not None and bool(signs) and not any(beats(other, cost) for other in costs) for cost in costs]


def columns(trials: Iterable[Trial]) -> list[str]:
    """The names that some trial binds, in order."""
    return list(dict.fromkeys(name for trial in trials for name in trial.bindings))


def value_of(text: str | None) -> float | str:
    """A binding's value as a number where it is one, for axes."""
    name = text or ""
    try:
        found = literal_eval(name)
        value = float(found) if isinstance(found, int | float) and not isinstance(found, bool) else math.nan
    except (ValueError, SyntaxError, OverflowError):
        return name
    return value if math.isfinite(value) else name


def to_csv(rows: Sequence[Row]) -> str:
    """Every trial with every metric."""
    names = columns(row.trial for row in rows)
    metrics = list(dict.fromkeys(name for row in rows for name in row.metrics))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["trial", *names, "seed", "state", *metrics])
    for row in rows:
        bindings = [row.trial.bindings.get(name, "") for name in names]
        seed = "" if row.trial.seed is None else row.trial.seed
        writer.writerow([row.trial.name, *bindings, seed, row.state, *(row.metrics.get(m, "") for m in metrics)])
    return text.getvalue()


def to_markdown(rows: Sequence[Row], metrics: Mapping[str, str]) -> str:
    """Two tables: the settings over their seeds, the best first, and the trials."""
    names = columns(row.trial for row in rows)
    settings = ordered(over_seeds(rows), metrics)
    goals = [name for name, goal in metrics.items() if goal]
    front = on_front(settings, metrics) if len(goals) > 1 else []
    heads = [f"{name} ({_BETTER[goal]} is better)" if goal else name for name, goal in metrics.items()]
    lines = ["Means over seeds ± standard errors.", ""]
    lines += _table(
        [*names, "seeds", *heads, *(["front"] if front else [])],
        [
            [*(s.bindings.get(name, "") for name in names), str(s.seeds), *(_mean(s, name) for name in metrics)]
            + ([" ●"[front[number]]] if front else [])
            for number, s in enumerate(settings)
        ],
    )
    lines += ["", "Trials.", ""]
    lines += _table(
        ["trial", *names, "seed", "state", *metrics],
        [
            [row.trial.name, *(row.trial.bindings.get(name, "") for name in names)]
            + ["" if row.trial.seed is None else str(row.trial.seed), row.state]
            + [f"{row.metrics[name]:.5g}" if name in row.metrics else "" for name in metrics]
            for row in rows
        ],
    )
    return "\n".join(lines) + "\n"


def _mean(setting: Setting, name: str) -> str:
    if name not in setting.means:
        return ""
    error = f" ± {setting.errors[name]:.2g}" if name in setting.errors else ""
    return f"{setting.means[name]:.5g}{error}"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", r"\|").replace("\n", " ") for cell in cells) + " |"

    return [line(heads), "|" + "---|" * len(heads), *map(line, rows)]


def _numbers(content: Any, path: str = "") -> Iterator[tuple[str, float]]:
    """The numbers in nested mappings, by their path; a number that is not finite is written as null, and is NaN here."""
    if isinstance(content, Mapping):
        for key, value in content.items():
            if key not in _NO_RESULTS:
                yield from _numbers(value, f"{path}/{key}" if path else str(key))
    elif content is None:
        yield path, math.nan
    elif isinstance(content, int | float) and not isinstance(content, bool):
        try:
            yield path, float(content)
        except OverflowError:  # An integer beyond all floats.
            yield path, math.inf if content > 0 else -math.inf
