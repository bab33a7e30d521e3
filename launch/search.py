"""Adaptive search through Optuna (the extra ``optuna``): it proposes bindings, and is told what came of them."""

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from clp_jax.launch.errors import LaunchError
from clp_jax.launch.space import Range, rounded
from clp_jax.launch.sweep import Sweep, Trial, gin_text
from clp_jax.launch.sweep_run import SweepDirectory
from clp_jax.launch.sweep_table import Row, over_seeds, read_metrics, read_trials, written_metrics

JOURNAL = "search.journal"
# Proposals for each different setting that is asked for, at most: small spaces have fewer.
_MOST_REPEATS = 3


class Searcher:
    """Optuna's study of a sweep, kept in a journal in the sweep's directory.

    A proposal is a setting; its value is the mean of each metric over its trials, one for each seed. A setting of which a
    trial failed, or lacks a metric that others have, counts as failed.

    Args:
        sweep: with a search.
        directory: of the sweep.

    Raises:
        LaunchError: when Optuna is not installed, or the journal is of another search.
    """

    def __init__(self, sweep: Sweep, directory: SweepDirectory):
        assert sweep.search is not None
        self._sweep, self._search, self._directory = sweep, sweep.search, directory
        self._optuna = find_optuna()
        self._study = self._open()
        self._waiting: deque[Trial] = deque()
        self._open_settings: dict[str, tuple[int, dict[str, Trial]]] = {}
        states = self._optuna.trial.TrialState
        for frozen in self._study.get_trials(states=(states.FAIL,)):
            # What is tried again is proposed again: a study does not change what it was told.
            if any(directory.state(t) == "retried" for t in sweep.repeats(self._bindings(frozen.params))):
                self._study.enqueue_trial(frozen.params, skip_if_exists=False)
                asked = self._ask()
                self._propose(asked.number, asked.params)
        for frozen in self._study.get_trials(states=(states.RUNNING,)):
            if frozen.number not in [number for number, _ in self._open_settings.values()]:
                self._propose(frozen.number, frozen.params)

    def next_trial(self) -> Trial | None:
        """The next trial to run; None where none is left, or none can be proposed before others end."""
        while not self._waiting:
            if self._is_enough():
                return None
            asked = self._ask()
            self._propose(asked.number, asked.params)
        return self._waiting.popleft()

    def tell(self, trial: Trial) -> None:
        """Takes notice of a trial that is over."""
        entry = self._open_settings.get(trial.setting)
        if entry is None:
            return
        number, left = entry
        left.pop(trial.name, None)
        if left:
            return
        del self._open_settings[trial.setting]
        values = self._values(trial)
        state = None if values is not None else self._optuna.trial.TrialState.FAIL
        self._study.tell(number, values, state)

    def _ask(self) -> Any:
        return self._study.ask({name: self._distribution(given) for name, given in self._search.ranges.items()})

    def _is_enough(self) -> bool:
        """Whether there were enough different settings, or there are none left to find."""
        asked = self._study.get_trials(deepcopy=False)
        different = {self._sweep.repeats(self._bindings(each.params))[0].setting for each in asked}
        return len(different) >= self._search.trials or len(asked) >= _MOST_REPEATS * self._search.trials

    def _bindings(self, params: Mapping[str, Any]) -> dict[str, Any]:
        return {
            name: given.values[params[name]] if given.kind == "choice" else _plain(params[name])
            for name, given in self._search.ranges.items()
        }

    def _propose(self, number: int, params: dict[str, Any]) -> None:
        trials = self._sweep.repeats(self._bindings(params))
        known = self._open_settings.get(trials[0].setting)
        if known is not None:
            # It runs already, under another number: this proposal learns nothing new.
            self._study.tell(number, None, self._optuna.trial.TrialState.FAIL)
            return
        self._open_settings[trials[0].setting] = (number, {trial.name: trial for trial in trials})
        self._waiting.extend(trials)

    def _values(self, trial: Trial) -> list[float] | None:
        trials = self._sweep.repeats(dict(trial.bindings))
        if any(self._directory.state(each) != "succeeded" for each in trials):
            return None
        rows = [Row(each, "succeeded", read_metrics(self._directory.run_dir(each))) for each in trials]
        missing = [name for name in self._sweep.metrics if any(name not in row.metrics for row in rows)]
        if missing and not self._open_settings:
            self._check_names(missing, rows[0])
        if missing:
            return None
        means = over_seeds(rows)[0].means
        return [means[name] for name in self._sweep.metrics]

    def _check_names(self, names: Sequence[str], row: Row) -> None:
        """Refuses metrics that no trial has written: one may have diverged, but not all have a wrong name."""
        written: set[str] = set()
        for trial in read_trials(self._directory.path):
            written |= written_metrics(self._directory.run_dir(trial))
        for name in names:
            if name not in written:
                known = ", ".join(row.metrics) or "none"
                raise LaunchError(f"the trial {row.trial.name} has no metric {name!r}: it has {known}.")

    def _distribution(self, given: Range) -> Any:
        distributions = self._optuna.distributions
        if given.kind == "choice":
            return distributions.CategoricalDistribution(range(len(given.values)))
        if given.kind == "integers":
            return distributions.IntDistribution(int(given.low), int(given.high))
        return distributions.FloatDistribution(given.low, given.high, log=given.kind == "log_uniform")

    def _open(self) -> Any:
        optuna = self._optuna
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        backend = optuna.storages.journal.JournalFileBackend(str(self._directory.path / JOURNAL))
        storage = optuna.storages.JournalStorage(backend)
        study = optuna.create_study(
            storage=storage,
            study_name=self._directory.name,
            directions=list(self._sweep.metrics.values()),
            load_if_exists=True,
        )
        described = {name: _described(given) for name, given in self._search.ranges.items()}
        described |= self._sweep.metrics
        if study.user_attrs.setdefault("search", described) != described:
            raise LaunchError(f"{self._directory.path} holds a search of other ranges or metrics: give another --dir.")
        study.set_user_attr("search", described)
        # The sampler's own random numbers are not kept: those after a restart must be others than those before.
        seed = self._search.seed + 1000 * len(study.get_trials(deepcopy=False))
        study.sampler = optuna.samplers.TPESampler(
            seed=seed, n_startup_trials=min(10, max(2, self._search.trials // 3))
        )
        return study


def _plain(value: Any) -> Any:
    return rounded(value) if isinstance(value, float) else value


def _described(given: Range) -> str:
    values = [gin_text(value) for value in given.values]
    return f"{given.kind} {values if values else [given.low, given.high]}"


def find_optuna() -> Any:
    """The package.

    Raises:
        LaunchError: when it is not installed.
    """
    try:
        import optuna
        import optuna.storages.journal
    except ImportError:
        raise LaunchError("a search needs Optuna: pip install 'clp-jax[optuna]'.") from None
    return optuna
