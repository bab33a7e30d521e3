"""The training loop: dispatch a step, then look at the one before it."""

import dataclasses
import math
import time
from typing import Any, NamedTuple

import jax

from clp_jax.training.checkpoints import Checkpoints
from clp_jax.training.guards import Guards
from clp_jax.training.learner import Learner
from clp_jax.training.ledger import DATA, EVALUATION, SAVE, STEP, Ledger, spending
from clp_jax.training.metrics import MetricWriter
from clp_jax.training.profiling import Profile
from clp_jax.training.progress import Progress
from clp_jax.training.replicas import check_replicas
from clp_jax.training.run_directory import RunDirectory, disk_errors
from clp_jax.training.signals import StopSignal
from clp_jax.training.skipped import WATCHED, SkippedSteps
from clp_jax.training.stage import StageSetup
from clp_jax.training.train_state import TrainState
from clp_jax.training.watchdog import Watchdog


@dataclasses.dataclass(frozen=True)
class Cadence:
    """How often things happen, in steps.

    Attributes:
        num_steps: of the whole run.
        log_every: metrics are written.
        evaluate_every: the stage is evaluated; None evaluates at the end only.
        checkpoint_every: the state is saved; None saves at the end only.
        replica_check_every: the devices' copies of the state are compared; None never does.
    """

    num_steps: int
    log_every: int = 10
    evaluate_every: int | None = None
    checkpoint_every: int | None = None
    replica_check_every: int | None = None

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{field.name} is {value!r}: expected a whole number of steps, at least 1.")

    def due(self, step: int, every: int | None) -> bool:
        """Whether something that happens `every` so many steps, and at the end, happens after `step`."""
        return step == self.num_steps or (every is not None and step % every == 0)


@dataclasses.dataclass(frozen=True)
class Reports:
    """What a run tells, and where.

    Attributes:
        writer: where metrics go; None in the processes that leave it to process 0.
        progress: what the user sees.
        ledger: of the run's time.
        profile: the steps to record.
        peak_flops: of one device, per second; None where it is not known.
    """

    writer: MetricWriter | None
    progress: Progress
    ledger: Ledger
    profile: Profile
    peak_flops: float | None = None


class _Pending(NamedTuple):
    """A step that was dispatched and not looked at."""

    step: int
    position: dict[str, int]
    metrics: dict[str, Any]
    source_metrics: dict[str, float]


class TrainLoop:
    """Runs a stage from a state to the last step.

    The device is never waited for while it has nothing else to do: the metrics of step ``t-1`` are fetched after step
    ``t`` is dispatched. Only evaluations, checkpoints and the end drain it.

    Args:
        learner: makes the updates.
        guards: that the learner judges by.
        setup: the stage; its frozen tree has been placed by the learner.
        frozen: that tree.
        cadence: how often things happen.
        directory: of the run.
        reports: what it tells, and where.
        checkpoints: where states go.
        description: what rebuilds the model; is saved with every state.
        stop: tells that the process was asked to end.
        watchdog: hears of everything that gets done.
    """

    def __init__(
        self,
        *,
        learner: Learner,
        guards: Guards,
        setup: StageSetup,
        frozen: Any,
        cadence: Cadence,
        directory: RunDirectory,
        reports: Reports,
        checkpoints: Checkpoints,
        description: dict[str, Any],
        stop: StopSignal,
        watchdog: Watchdog,
    ):
        self._learner = learner
        self._guards = guards
        self._setup = setup
        self._frozen = frozen
        self._cadence = cadence
        self._directory = directory
        self._reports = reports
        self._checkpoints = checkpoints
        self._description = description
        self._stop = stop
        self._watchdog = watchdog
        self._logged = (0, time.monotonic())  # Step and time of the last line of metrics.
        self._skipped: SkippedSteps
        self._saved: int | None = None
        self.is_complete = False

    def run(self, state: TrainState, owed: dict[str, float] | None = None) -> TrainState:
        """Trains until the last step or a request to stop, and saves the last state.

        Args:
            state: is donated.
            owed: metrics of the state's step, where a request to stop came before it was evaluated.

        Returns:
            The last state; `is_complete` tells which it is.

        Raises:
            GuardError: when too many steps in a row are not finite.
            CheckpointError: when an earlier save failed.
            ReplicaError: when devices hold different copies of the state.
        """
        self._stop.begin()
        step = start = int(state.step)
        self._saved = start or None
        self._logged = (step, time.monotonic())
        skipped = int(state.guard.skipped)
        self._skipped = SkippedSteps(self._guards, self._setup.source, self._directory.path, skipped)
        pending: _Pending | None = None
        values: dict[str, float] = {}  # Of the last step.
        if owed is not None:
            owed = self._pay(step, state, owed)
        while step < self._cadence.num_steps and not self._stop.requested():
            position = self._setup.source.position()
            with spending(DATA):
                batch, source_metrics = self._setup.source.next(state, self._frozen)
            with spending(STEP):
                self._reports.profile.before(step + 1, state.step)
                state, metrics = self._learner.update(state, self._frozen, batch)
                if pending is not None:
                    self._report(pending)
                step += 1
                self._reports.profile.after(step, metrics)
            pending = _Pending(step, position, metrics, source_metrics)
            self._checkpoints.raise_if_failed()
            evaluate = self._setup.evaluate is not None and self._cadence.due(step, self._cadence.evaluate_every)
            save = self._cadence.due(step, self._cadence.checkpoint_every)
            if self._cadence.replica_check_every is not None and self._cadence.due(
                step, self._cadence.replica_check_every
            ):
                check_replicas(state, step)
            if evaluate or save:  # What is saved must be known to be finite.
                evaluation = self._evaluate(state) if evaluate else {}
                if evaluation is None:
                    self._look_at(pending)
                    values = self._metrics(pending)
                    owed = values | self._speed(step)
                else:
                    values = self._report(pending, evaluation, is_last=True)
                    if save:
                        self._save(step, state, values)
                pending = None
        if pending is not None:
            values = self._report(pending, is_last=True)
        if step > (self._saved or start):
            self._save(step, state, values, owed)
        self._checkpoints.wait()
        self.is_complete = step >= self._cadence.num_steps and owed is None
        return state

    def _pay(self, step: int, state: TrainState, owed: dict[str, float]) -> dict[str, float] | None:
        """Evaluates the step that a run goes on from, and writes its line; returns what is still owed."""
        evaluation = self._evaluate(state)
        if evaluation is None:
            return owed
        self._write(step, owed | _as_metrics(evaluation))
        return None

    def _report(
        self, pending: _Pending, evaluation: dict[str, float] | None = None, is_last: bool = False
    ) -> dict[str, float]:
        """Looks at a step, and writes a line when due; returns its metrics where they are written or last."""
        self._look_at(pending)
        is_due = bool(evaluation) or self._cadence.due(pending.step, self._cadence.log_every)
        if not is_due and not is_last:
            return {}
        values = self._metrics(pending) | _as_metrics(evaluation or {})
        if is_due:
            self._write(pending.step, values | self._speed(pending.step))
        return values

    def _look_at(self, pending: _Pending) -> None:
        """Waits for a step, and shows its loss."""
        step = pending.step
        with spending(STEP):
            seen = jax.device_get({name: pending.metrics[name] for name in WATCHED})
        said = self._skipped.check(step, pending.position, seen, self._saved)
        if said is not None:
            self._reports.progress.message(said)
        self._reports.ledger.step = step
        self._watchdog.progress()
        self._reports.progress.update(step, f"loss {float(seen['loss']):.4g}")

    def _metrics(self, pending: _Pending) -> dict[str, float]:
        """Of a step."""
        fetched = jax.device_get(pending.metrics)
        del fetched["non_finite"]  # The loss says it.
        return {name: value.item() for name, value in fetched.items()} | pending.source_metrics

    def _write(self, step: int, values: dict[str, float]) -> None:
        if self._reports.writer is not None:
            self._reports.writer.write(step, values | self._reports.ledger.metrics)

    def _speed(self, step: int) -> dict[str, float]:
        """Since the last line; of the stage's own operations, where the peak of the devices is known."""
        before, then = self._logged
        now = time.monotonic()
        self._logged = (step, now)
        rate = (step - before) / max(now - then, 1e-9)
        tokens, devices = rate * self._setup.tokens_per_batch, self._learner.mesh.size
        found = {
            "steps_per_second": rate,
            "tokens_per_second": tokens,
            "tokens_per_second_per_device": tokens / devices,
        }
        if self._reports.peak_flops is not None and self._setup.flops is not None:
            found["mfu"] = rate * self._setup.flops / (devices * self._reports.peak_flops)
        return found

    def _evaluate(self, state: TrainState) -> dict[str, float] | None:
        """What the stage's evaluation found; None where a request to stop came first."""
        with spending(STEP):
            jax.block_until_ready(state.step)
        with self._reports.progress.activity("evaluating"), spending(EVALUATION):
            assert self._setup.evaluate is not None
            evaluation = self._setup.evaluate(state.averaged_params)
            while True:
                try:
                    next(evaluation)
                except StopIteration as end:
                    self._watchdog.progress()
                    return end.value
                self._watchdog.progress()
                if self._stop.requested():
                    evaluation.close()
                    return None

    def _save(
        self, step: int, state: TrainState, values: dict[str, float], owed: dict[str, float] | None = None
    ) -> None:
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        with spending(SAVE):
            self._checkpoints.save(step, state, self._setup.source.position(), self._description, finite, owed)
        if self._reports.writer is not None:
            with disk_errors(self._directory.path):
                self._reports.ledger.note(self._directory.ledger)
        self._saved = step
        self._watchdog.progress()


def _as_metrics(evaluation: dict[str, float]) -> dict[str, float]:
    return {f"evaluation/{name}": float(value) for name, value in evaluation.items()}
