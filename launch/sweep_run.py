"""Runs the trials of a sweep as jobs, so many at once; everything it knows is in files, so it goes on wherever it was.

    DIR/sweep.json         the command, and the name that the sweep's jobs begin with
    DIR/trials.jsonl       one line for each trial: its hash, its bindings, its seed
    DIR/trials/HASH/       the run directory of a trial
    DIR/arrays/            scripts and logs of job arrays, where the target has them
    DIR/table.md, .csv     states and metrics

The record of a trial's job is where those of all jobs are, so `clp jobs` knows it.
"""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import platform
import re
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path

from clp_jax.launch.buckets import seen_from_here
from clp_jax.launch.calls import show
from clp_jax.launch.cargo import Cargo
from clp_jax.launch.code import code_version
from clp_jax.launch.command import (
    check_before_creating,
    check_that_it_fits,
    create,
    refuse_secrets,
    refuse_secrets_of,
    target_of,
)
from clp_jax.launch.command_words import program_words
from clp_jax.launch.errors import Held, LaunchError
from clp_jax.launch.job import Job, JobRecord, jobs_directory, write
from clp_jax.launch.lock import hold
from clp_jax.launch.renewal import begin_again
from clp_jax.launch.supervisor import Patience, Watch
from clp_jax.launch.sweep import Sweep, Trial, check_trials, command_lines, gin_text
from clp_jax.launch.sweep_table import Row, add_trial, read_metrics, read_trials, shown_metrics, to_csv, to_markdown
from clp_jax.launch.target import Batch, Target
from clp_jax.launch.targets import find_batch, find_target

SWEEP_FILE, TRIALS, ARRAYS = "sweep.json", "trials", "arrays"
# The state of a trial whose record can't be read.
DAMAGED = "damaged"
# Compiling takes minutes each.
_MOST_COMPILED = 8
_NEARLY_ONE = 1.0 - 2.0**-20
# Trials that are looked after at once where the target itself keeps the cap: each holds a file open.
_MOST_LOOKED_AFTER = 200


@dataclasses.dataclass(frozen=True)
class SweepDirectory:
    """Everything one sweep writes.

    Attributes:
        path: the directory.
        name: that the names of its jobs begin with.
        commands: of every trial, one after another.
        metrics: ``minimize`` or ``maximize`` by name.
        jobs: the directory of its jobs' records.
    """

    path: Path
    name: str
    commands: tuple[tuple[str, ...], ...]
    metrics: Mapping[str, str]
    jobs: Path

    @classmethod
    def load(cls, path: Path) -> "SweepDirectory":
        """Reads the directory of a sweep.

        Raises:
            LaunchError: when it is none.
        """
        try:
            stored = json.loads((path / SWEEP_FILE).read_text())
            commands = tuple(tuple(words) for words in stored["commands"])
            return cls(path, stored["name"], commands, stored["metrics"], Path(stored["jobs"]))
        except FileNotFoundError:
            raise LaunchError(f"{path} holds no sweep: there is no {SWEEP_FILE}.") from None
        except (ValueError, KeyError, TypeError):
            raise LaunchError(f"{path / SWEEP_FILE} is damaged: expected what clp sweep wrote.") from None

    @classmethod
    def of(cls, path: Path, sweep: Sweep) -> "SweepDirectory":
        """The directory of a new sweep, or of one of the same commands; writes nothing.

        Raises:
            LaunchError: when the directory holds a sweep of other commands, or something else.
        """
        commands = tuple(sweep.commands())
        if (path / SWEEP_FILE).is_file():
            found = dataclasses.replace(cls.load(path), metrics=dict(sweep.metrics))
            if found.commands != commands:
                raise LaunchError(
                    f"{path} holds a sweep of other commands ({' '.join(found.commands[0])} ...): give another --dir."
                )
            return found
        if path.exists() and not (path.is_dir() and not any(path.iterdir())):
            raise LaunchError(f"{path} is there and holds no sweep: give another --dir.")
        begin = re.sub("[^a-z0-9]+", "-", path.absolute().name.lower()).strip("-")
        begin = (begin if begin[:1].isalpha() else f"sweep-{begin}")[:18].strip("-")
        jobs = jobs_directory()
        return cls(path, _fresh_name(begin, path, jobs), commands, dict(sweep.metrics), jobs)

    def write(self) -> None:
        """Stores what `load` reads."""
        self.path.mkdir(parents=True, exist_ok=True)
        stored = dataclasses.asdict(self) | {"jobs": str(self.jobs)}
        del stored["path"]
        write(self.path / SWEEP_FILE, json.dumps(stored, indent=1) + "\n")

    def run_dir(self, trial: Trial) -> Path:
        """Where a trial writes."""
        return self.path / TRIALS / trial.name

    def job_name(self, trial: Trial, number: int) -> str:
        """The name of the job that runs a command of a trial."""
        return f"{self.name}-{trial.name}" + (f"-{number}" if number else "")

    def state(self, trial: Trial, tell: Callable[[str], None] | None = None) -> str:
        """``waiting``, or the phase of the job that the trial has come to; `DAMAGED` where its record can't be read.

        Args:
            trial: of the sweep.
            tell: is told what is wrong with its record.
        """
        for number in range(len(self.commands)):
            path = self.jobs / self.job_name(trial, number)
            try:
                record = JobRecord.load(path) if path.is_dir() else None
                state = None if record is None else record.state
                _ = record is not None and record.kept("deleted")
            except LaunchError as error:
                # One that is damaged hides no other.
                if tell is not None:
                    tell(str(error))
                return DAMAGED
            if state is None or state.phase != "succeeded":
                return "waiting" if state is None else state.phase
        return "succeeded"

    def rows(self, tell: Callable[[str], None] | None = None) -> list[Row]:
        """The table; `tell` is told what is wrong with records."""
        return [Row(t, self.state(t, tell), read_metrics(self.run_dir(t))) for t in read_trials(self.path)]

    def write_table(self) -> list[Row]:
        """Writes ``table.md`` and ``table.csv``; returns the table."""
        rows = self.rows()
        known = {name for row in rows for name in row.metrics}
        metrics = shown_metrics(rows, {name: goal for name, goal in self.metrics.items() if name in known})
        write(self.path / "table.csv", to_csv(rows))
        write(self.path / "table.md", to_markdown(rows, metrics))
        return rows


class _Run:
    """The jobs of one trial, one after another."""

    def __init__(self, trial: Trial, jobs: Sequence[Job], records: Path, target: Target, patience: Patience):
        self.trial = trial
        self._records, self._target = records, target
        self._locks = contextlib.ExitStack()
        self._held: dict[str, tuple[JobRecord, Target]] = {}
        self._watches = [
            Watch(job.name, functools.partial(self._hold, job), patience, tells_states=False) for job in jobs
        ]
        # What is known of how it ended.
        self.last_line = ""

    def look(self) -> str | None:
        """Looks after the trial once; its last phase when it is over, or `DAMAGED`."""
        phase = ""
        for watch in self._watches:
            sight = watch.look()
            if sight.is_damaged:
                self.last_line = "what runs of it, if anything, runs on, and nobody looks after it"
                phase = DAMAGED
                break
            if sight.state is None or not sight.is_done:
                return None
            phase, self.last_line = sight.state.phase, sight.state.detail.strip().rpartition("\n")[2]
            if phase != "succeeded":
                break
        self._locks.close()
        return phase

    def _hold(self, job: Job) -> tuple[JobRecord, Target]:
        if job.name not in self._held:
            path = self._records / job.name
            record = (
                JobRecord.load(path) if path.is_dir() else create(self._records, Cargo(job, self._target.ships_code))
            )
            if record.is_held:
                raise Held("another launcher looks after it.")
            target = target_of(record, job, self._target)
            self._locks.enter_context(record.lock())
            self._held[job.name] = (record, target)
        return self._held[job.name]


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a sweep runs.

    Attributes:
        target: where.
        options: of the target, as they were typed.
        commands: of `clp`; a command that begins with something else is any other program.
        max_concurrent: trials at once.
        retry_failed: whether trials that failed are tried again.
        force: whether what does not fit its slice runs all the same.
        patience: how long to wait between looks.
        code_version: of the code that runs.
        max_restarts: of each trial's jobs.
        max_failures: of each trial's jobs.
    """

    target: Target
    options: Mapping[str, str]
    commands: Collection[str]
    max_concurrent: int = 1
    retry_failed: bool = False
    force: bool = False
    patience: Patience = dataclasses.field(default_factory=Patience)
    code_version: str = dataclasses.field(default_factory=code_version)
    max_restarts: int = Job.max_restarts
    max_failures: int = Job.max_failures

    def __post_init__(self) -> None:
        if self.max_concurrent < 1:
            raise LaunchError(f"--max_concurrent is {self.max_concurrent}: expected at least 1.")

    @property
    def limits(self) -> dict[str, int]:
        """What a trial's jobs say of their restarts."""
        return {"max_restarts": self.max_restarts, "max_failures": self.max_failures}


def run_sweep(sweep: Sweep, path: Path, settings: Settings) -> list[Row]:
    """Runs what is left of a sweep.

    Args:
        sweep: what to try.
        path: of its directory.
        settings: where, and how many at once.

    Returns:
        The table.

    Raises:
        LaunchError: for a binding that does not exist, another sweep's directory, or another launcher at work.
    """
    directory = SweepDirectory.of(path, sweep)
    _check_words_and_files(sweep, directory, settings)
    if sweep.search is not None:
        from clp_jax.launch.search import Searcher, find_optuna

        find_optuna()
    # Nothing is made before all names are known to exist.
    known = {trial.name for trial in read_trials(path)}
    check_trials(
        sweep, [t for t in _examples(sweep) if t.name not in known], str(path / TRIALS / "HASH"), settings.commands
    )
    new = [(t, jobs) for t in _examples(sweep) if (jobs := _new_jobs(directory, t, settings))]
    for job in new[0][1] if new else ():
        check_before_creating(
            settings.target, Cargo(job, settings.target.ships_code), settings.commands, settings.force
        )
    # What a search that goes on may ask for was looked at when it began.
    if not settings.force and not (sweep.search is not None and known):
        _check_that_others_fit(new, settings)
    with hold(path / ".lock", f"another launcher runs the sweep in {path}: wait for it."):
        directory.write()
        if settings.retry_failed:
            _retry_failed(directory, settings)
        if sweep.search is None:
            trials = sweep.trials()
            for trial in trials:
                add_trial(path, trial)
            waiting = iter(trials)
            _run_all(directory, lambda: next(waiting, None), lambda trial: None, settings, _MOST_LOOKED_AFTER)
        else:
            searcher = Searcher(sweep, directory)
            _run_all(directory, searcher.next_trial, searcher.tell, settings, settings.max_concurrent)
        return directory.write_table()


def _run_all(
    directory: SweepDirectory,
    next_trial: Callable[[], Trial | None],
    tell: Callable[[Trial], None],
    settings: Settings,
    in_batches: int,
) -> None:
    """Runs trials, so many at once, until there are no more; a target that asks for them in batches may know of more."""
    active: list[_Run] = []
    batch = batch_of(directory, settings)
    target = batch or settings.target
    are_named = False
    at_once = settings.max_concurrent if batch is None else max(settings.max_concurrent, in_batches)
    while True:
        while len(active) < at_once:
            trial = next_trial()
            if trial is None:
                break
            add_trial(directory.path, trial)
            run = _Run(trial, jobs_of(directory, trial, settings), directory.jobs, target, settings.patience)
            if run.look() is None:
                show(f"{trial.name}: {trial}")
                active.append(run)
            else:
                tell(trial)
        if not active:
            return
        ended = [(run, phase) for run in active if (phase := run.look()) is not None]
        if batch is not None:
            batch.flush()
        for run, phase in ended:
            active.remove(run)
            show(f"{run.trial.name}: {phase}" + (f": {run.last_line}" if phase != "succeeded" else ""))
            tell(run.trial)
        if ended:
            rows = directory.write_table()
            are_named = are_named or _check_names(directory.metrics, rows)
        else:
            time.sleep(settings.patience.look)


def _check_names(metrics: Mapping[str, str], rows: Sequence[Row]) -> bool:
    """Tells of metrics that the first trials that have any do not have, while there is time to mend a name; whether any has."""
    known = dict.fromkeys(name for row in rows if row.state == "succeeded" for name in row.metrics)
    missing = [name for name in metrics if name not in known]
    if known and missing:
        show(f"no trial has {', '.join(missing)} yet: they have {', '.join(known)}.")
    return bool(known)


def batch_of(directory: SweepDirectory, settings: Settings) -> Batch | None:
    """What asks for several trials at once, where the target can."""
    where = (directory.path / ARRAYS).absolute()
    return find_batch(settings.target, directory.name, where, settings.max_concurrent)


def jobs_of(directory: SweepDirectory, trial: Trial, settings: Settings) -> list[Job]:
    """The jobs of a trial, one after another."""
    lines = command_lines(directory.commands, trial, str(directory.run_dir(trial)))
    return [
        Job(
            name=directory.job_name(trial, number),
            command=program_words(words, settings.commands, "command"),
            target=settings.target.name,
            options=settings.options,
            run_dir=seen_from_here(str(directory.run_dir(trial)), settings.options),
            code_version=settings.code_version,
            directory=str(Path.cwd()),
            parameters=trial.parameters,
            **settings.limits,
        )
        for number, words in enumerate(lines)
    ]


def preview(sweep: Sweep, path: Path, settings: Settings) -> tuple[list[Trial], SweepDirectory]:
    """The trials of a sweep, of a search the first that it may ask for, and where they would go; makes nothing.

    Raises:
        LaunchError: for a binding that does not exist, another sweep's directory, a secret, or what the target refuses.
    """
    directory = SweepDirectory.of(path, sweep)
    _check_words_and_files(sweep, directory, settings)
    check_trials(sweep, _examples(sweep), str(path / TRIALS / "HASH"), settings.commands)
    return list(_examples(sweep)), directory


def _fresh_name(begin: str, path: Path, jobs: Path) -> str:
    """The name of a new sweep: the same whenever it is asked, until there are jobs of it."""
    for number in itertools.count():
        made_of = f"{platform.node()} {path.absolute()} {number}"
        name = f"{begin}-{hashlib.sha256(made_of.encode()).hexdigest()[:4]}"
        if not any(jobs.glob(f"{name}-*")):
            return name
    raise AssertionError


def _check_words_and_files(sweep: Sweep, directory: SweepDirectory, settings: Settings) -> None:
    """Refuses secrets in any trial, and in what a search may choose; and what the target refuses of a new trial's files."""
    ranges = sweep.search.ranges.values() if sweep.search else ()
    refuse_secrets([gin_text(value) for given in ranges for value in given.values], settings.options)
    seen: set[tuple[str, ...]] = set()
    for trial in _examples(sweep):
        for line in command_lines(directory.commands, trial, str(directory.run_dir(trial))):
            refuse_secrets(line, settings.options)
        for job in _new_jobs(directory, trial, settings):
            cargo = Cargo(job, settings.target.ships_code)
            # Most trials name the same files.
            named = (*cargo.files.paths, "", *cargo.files.misplaced)
            if named not in seen:
                seen.add(named)
                refuse_secrets_of(cargo)
                settings.target.check(cargo)


def _new_jobs(directory: SweepDirectory, trial: Trial, settings: Settings) -> list[Job]:
    """The jobs of a trial that have no record yet."""
    return [job for job in jobs_of(directory, trial, settings) if not (directory.jobs / job.name).is_dir()]


def _check_that_others_fit(new: Sequence[tuple[Trial, Sequence[Job]]], settings: Settings) -> None:
    """Compiles the trials after the first that may need other memory: one of each shape, so many in all.

    Raises:
        LaunchError: for one that does not fit the slice.
    """
    if settings.target.compile_options() is None:
        return
    shapes: dict[frozenset[tuple[str, str]], tuple[Trial, Job]] = {}
    for trial, jobs in new:
        shapes.setdefault(trial.shape, (trial, jobs[0]))
    for trial, job in list(shapes.values())[1:_MOST_COMPILED]:
        try:
            check_that_it_fits(settings.target, job, settings.commands, f"{trial} ")
        except LaunchError as error:
            raise LaunchError(f"the trial {trial}: {error}") from None
    if len(shapes) > _MOST_COMPILED:
        show(
            f"{len(shapes) - _MOST_COMPILED} more kinds of trials are not compiled before they run: clp compile looks at "
            "those that you name."
        )


def _retry_failed(directory: SweepDirectory, settings: Settings) -> None:
    for trial in read_trials(directory.path):
        if directory.state(trial) in ("failed", "stopped"):
            for number in range(len(directory.commands)):
                path = directory.jobs / directory.job_name(trial, number)
                record = JobRecord.load(path) if path.is_dir() else None
                if record is not None and record.is_over and record.state and record.state.phase != "succeeded":
                    job = dataclasses.replace(record.job, **settings.limits)
                    with record.lock():
                        begin_again(record, find_target(job.target, job.options), job)


def _examples(sweep: Sweep) -> Iterator[Trial]:
    """Trials that bind all that the sweep binds; of a search those at the ends and in the middle of its ranges."""
    if sweep.search is None:
        yield from sweep.trials()
        return
    for place in (0.0, 0.5, _NEARLY_ONE):
        yield from sweep.repeats({name: given.at(place) for name, given in sweep.search.ranges.items()})[:1]
