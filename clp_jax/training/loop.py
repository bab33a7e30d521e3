"""The training loop: dispatch a step, then look at the one before it."""

import dataclasses
import math
import time
from typing import Any

import jax

from clp_jax.training.checkpoints import Checkpoints
from clp_jax.training.learner import Learner
from clp_jax.training.metrics import MetricWriter
from clp_jax.training.progress import Progress
from clp_jax.training.signals import StopSignal
from clp_jax.training.stage import StageSetup
from clp_jax.training.train_state import TrainState
from clp_jax.training.watchdog import Watchdog


class NonFiniteLossError(RuntimeError):
    """The loss became NaN or infinite; the last checkpoint is from before."""


@dataclasses.dataclass(frozen=True)
class Cadence:
    """How often things happen, in steps.

    Attributes:
        num_steps: of the whole run.
        log_every: metrics are written.
        evaluate_every: the stage is evaluated; None evaluates at the end only.
        checkpoint_every: the state is saved; None saves at the end only.
    """

    num_steps: int
    log_every: int = 10
    evaluate_every: int | None = None
    checkpoint_every: int | None = None

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{field.name} is {value!r}: expected a whole number of steps, at least 1.")

    def due(self, step: int, every: int | None) -> bool:
        """Whether something that happens `every` so many steps, and at the end, happens after `step`."""
        return step == self.num_steps or (every is not None and step % every == 0)


class TrainLoop:
    """Runs a stage from a state to the last step.

    The device is never waited for while it has nothing else to do: the metrics of step ``t-1`` are fetched after step
    ``t`` is dispatched. Only evaluations, checkpoints and the end drain it.

    Args:
        learner: makes the updates.
        setup: the stage; its frozen tree has been placed by the learner.
        frozen: that tree.
        cadence: how often things happen.
        writer: where metrics go; None in the processes that leave it to process 0.
        progress: what the user sees.
        checkpoints: where states go.
        description: what rebuilds the model; is saved with every state.
        stop: tells that the process was asked to end.
        watchdog: hears of everything that gets done.
    """

    def __init__(
        self,
        *,
        learner: Learner,
        setup: StageSetup,
        frozen: Any,
        cadence: Cadence,
        writer: MetricWriter | None,
        progress: Progress,
        checkpoints: Checkpoints,
        description: dict[str, Any],
        stop: StopSignal,
        watchdog: Watchdog,
    ):
        self._learner = learner
        self._setup = setup
        self._frozen = frozen
        self._cadence = cadence
        self._writer = writer
        self._progress = progress
        self._checkpoints = checkpoints
        self._description = description
        self._stop = stop
        self._watchdog = watchdog
        self._logged = (0, time.monotonic())  # Step and time of the last line of metrics.

    def run(self, state: TrainState) -> TrainState:
        """Trains until the last step or a request to stop, and saves the last state.

        Args:
            state: is donated.

        Returns:
            The last state.

        Raises:
            NonFiniteLossError: when the loss is NaN or infinite.
            CheckpointError: when an earlier save failed.
        """
        step = saved = int(state.step)
        self._logged = (step, time.monotonic())
        pending = None
        while step < self._cadence.num_steps and not self._stop.requested(step):
            batch, source_metrics = self._setup.source.next(state, self._frozen)
            state, metrics = self._learner.update(state, self._frozen, batch)
            if pending is not None:
                self._report(*pending)
            step += 1
            pending = (step, metrics, source_metrics)
            self._checkpoints.raise_if_failed()
            evaluate = self._setup.evaluate is not None and self._cadence.due(step, self._cadence.evaluate_every)
            save = self._cadence.due(step, self._cadence.checkpoint_every)
            if evaluate or save:  # What is saved must be known to be finite.
                evaluation = self._evaluate(state) if evaluate else {}
                values = self._report(*pending, evaluation)
                pending = None
                if save:
                    self._save(step, state, values)
                    saved = step
        if pending is not None:
            self._report(*pending)
        if step > saved:
            self._save(step, state, {})
        return state

    def _report(
        self,
        step: int,
        metrics: dict[str, Any],
        source_metrics: dict[str, float],
        evaluation: dict[str, float] | None = None,
    ) -> dict[str, float]:
        """Checks the loss and the parameters, shows the loss, and writes a line when due; returns what it wrote."""
        loss = float(metrics["loss"])
        # The loss is of the parameters before the step, the norm of those after it, which may be saved.
        if not math.isfinite(loss) or not math.isfinite(float(metrics["param_norm"])):
            raise NonFiniteLossError(self._non_finite(step, loss, jax.device_get(metrics)))
        self._watchdog.progress()
        self._progress.update(step, f"loss {loss:.4g}")
        if not evaluation and not self._cadence.due(step, self._cadence.log_every):
            return {}
        values = {name: float(value) for name, value in jax.device_get(metrics).items()} | source_metrics
        values |= {f"evaluation/{name}": float(value) for name, value in (evaluation or {}).items()}
        before, then = self._logged
        now = time.monotonic()
        self._logged = (step, now)
        rate = (step - before) / max(now - then, 1e-9)
        speed = {"steps_per_second": rate, "tokens_per_second": rate * self._setup.tokens_per_batch}
        if self._writer is not None:
            self._writer.write(step, values | speed)
        return values

    def _evaluate(self, state: TrainState) -> dict[str, float]:
        with self._progress.activity("evaluating"):
            assert self._setup.evaluate is not None
            values = self._setup.evaluate(state.averaged_params)
        self._watchdog.progress()
        return values

    def _save(self, step: int, state: TrainState, values: dict[str, float]) -> None:
        self._checkpoints.save(step, state, self._setup.source.position(), self._description, values)
        self._watchdog.progress()

    def _non_finite(self, step: int, loss: float, metrics: dict[str, Any]) -> str:
        latest = self._checkpoints.latest_step()
        kept = f"step {latest} is saved and intact" if latest is not None else "no step was saved before"
        others = ", ".join(
            f"{name}={float(metrics[name]):.3g}" for name in ("grad_norm", "param_norm", "learning_rate")
        )
        what = f"the loss of step {step} is {loss}"
        if math.isfinite(loss):
            what = f"step {step}, whose loss is {loss:.4g}, made parameters that are not finite"
        return (
            f"{what} ({others}); {kept}. Lower the learning rate, clip the gradient "
            "(max_grad_norm), or look at the data of this step; then train in a new run directory."
        )
