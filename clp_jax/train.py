"""Trains any stage: enters the run directory, resumes where it was, runs the loop, saves."""

import contextlib
import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from clp_jax import processes
from clp_jax.compilation.chips import peak_flops
from clp_jax.host_rows import meet
from clp_jax.partitioning import Rules, make_mesh, use_mesh
from clp_jax.training.adafactor_slots import take_over
from clp_jax.training.checkpoint_steps import KeepBest, Retention
from clp_jax.training.checkpoints import Checkpoints
from clp_jax.training.failures import Failures
from clp_jax.training.guards import Guards
from clp_jax.training.learner import Learner
from clp_jax.training.ledger import RESTORE, Ledger, carried, read_records, spending
from clp_jax.training.loop import Cadence, Reports, TrainLoop
from clp_jax.training.metrics import MetricWriter, Scalars, owed_metrics, read_metrics
from clp_jax.training.optimizers import OptimizerConfig
from clp_jax.training.profiling import Profile
from clp_jax.training.progress import Progress
from clp_jax.training.run_directory import RunDirectory, find_run_directory, open_run_directory
from clp_jax.training.signals import StopSignal
from clp_jax.training.stage import Stage, StageSetup
from clp_jax.training.train_state import TrainState
from clp_jax.training.wandb_scalars import WandbScalars
from clp_jax.training.watchdog import Watchdog


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """What a complete run leaves.

    Attributes:
        run_dir: everything it wrote; of a run in a store, a view of it without arrays.
        step: its last.
        metrics: the last line of its metrics.
    """

    run_dir: Path
    step: int
    metrics: dict[str, Any]


def train(
    *,
    run_dir: str | os.PathLike,
    stage: Stage,
    optimizer: OptimizerConfig,
    num_steps: int,
    seed: int = 0,
    log_every: int = 10,
    evaluate_every: int | None = None,
    checkpoint_every: int | None = None,
    keep_checkpoints: int = 2,
    keep_every: int | None = None,
    keep_best: KeepBest | None = None,
    accumulation: int = 1,
    ema_decay: float | None = None,
    mesh: Mesh | None = None,
    rules: Rules = Rules(),
    guards: Guards = Guards(),
    watchdog_seconds: float | None = 1800.0,
    replica_check_every: int | None = None,
    profile_steps: tuple[int, int] | None = None,
    wandb_project: str | None = None,
    config_text: str = "",
) -> TrainResult:
    """Trains a stage, or goes on where an earlier call in the same run directory was.

    A resumed run is the uninterrupted one, bit for bit; on another mesh, to rounding. A complete run returns at once.
    SIGTERM and Ctrl-C save first. Several processes call it together, in a run directory that all see, or in a store.

    Args:
        run_dir: where everything goes, also ``gs://``, ``s3://`` and what fsspec knows; see `clp_jax.training.run_directory`.
        stage: what to train.
        optimizer: how.
        num_steps: updates in all; a finished run goes on when this is raised.
        seed: decides every random number, in ``[0, 2^32)``.
        log_every: steps between lines of metrics.
        evaluate_every: steps between evaluations; None evaluates at the end.
        checkpoint_every: steps between checkpoints; None saves at the end, and when the process is asked to stop.
        keep_checkpoints: the last so many are kept.
        keep_every: those whose step is a multiple of it are kept too; None keeps no others.
        keep_best: the best one is kept too, by this metric.
        accumulation: micro-batches of a batch, one after another.
        ema_decay: of a moving average of the parameters, which is then evaluated and served; None keeps none.
        mesh: all devices, data-parallel, by default.
        rules: maps logical axes to mesh axes.
        guards: which updates are left out: those of a NaN, and of a spike.
        watchdog_seconds: without a step after which the process shows what it is doing, and ends; None waits for ever.
        replica_check_every: steps between comparisons of the devices' copies of the state; None makes none.
        profile_steps: the first and the last step of a trace by JAX's profiler, as in 10,13, in ``profile/``.
        wandb_project: shows the metrics at W&B too, in this project; needs 'clp-jax[wandb]'.
        config_text: the resolved configuration, stored in the run directory; another one is refused there.

    Raises:
        RunDirectoryError: when the run directory can't be used.
        CheckpointError: when a checkpoint can't be written or read.
        GuardError: when too many steps in a row are not finite.
        ReplicaError: when devices hold different copies of the state.
        SystemExit: after a signal, once the state is saved: `clp_jax.processes.RESTARTABLE`, or 130 after Ctrl-C.
    """
    retention = Retention(keep_checkpoints, keep_every, keep_best)
    cadence = Cadence(num_steps, log_every, evaluate_every, checkpoint_every, replica_check_every)
    _check_seed(seed)
    with contextlib.ExitStack() as stack:
        ledger, stop = stack.enter_context(Ledger()), stack.enter_context(StopSignal())
        stack.enter_context(Failures(stop))
        watchdog = stack.enter_context(Watchdog(watchdog_seconds))
        directory, done, is_whole = _enter(run_dir, config_text, stack)
        if done >= num_steps and is_whole:
            return _complete(directory, done, num_steps)
        profile = Profile(directory.path, profile_steps)
        mesh = meet(make_mesh() if mesh is None else mesh)
        setup = _set_up(stage, directory, seed, mesh, rules, watchdog)
        learner = Learner.for_stage(
            setup, optimizer, mesh=mesh, rules=rules, accumulation=accumulation, ema_decay=ema_decay, guards=guards
        )
        description = _describe(directory, setup, config_text)
        stack.callback(_close, ledger, directory)
        checkpoints = stack.enter_context(Checkpoints(directory.checkpoints, retention, directory.put))
        state = _first_state(checkpoints, learner, setup, seed, watchdog)
        (start, owed), name = _carry(ledger, directory, state), str(description["stage"])
        also = _wandb(wandb_project, directory, config_text)
        writer, progress = _writers(stack, directory, setup, name, start, num_steps, also)
        loop = TrainLoop(
            learner=learner,
            guards=guards,
            setup=setup,
            frozen=learner.place_frozen(setup.frozen),
            cadence=cadence,
            directory=directory,
            reports=Reports(writer, progress, ledger, stack.enter_context(profile), _peak(mesh)),
            checkpoints=checkpoints,
            description=description | {"config": config_text},
            stop=stop,
            watchdog=watchdog,
        )
        with learner.activate():  # Rollouts and evaluations follow the mesh, too.
            state = loop.run(state, owed)
    return _end(name, directory, int(state.step), num_steps, None if loop.is_complete else stop)


def _check_seed(seed: int) -> None:
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed is {seed}: expected a whole number in [0, 2**32).")


def _enter(run_dir: str | os.PathLike, config_text: str, stack: contextlib.ExitStack) -> tuple[RunDirectory, int, bool]:
    """The run directory, locked, its last step, and whether nothing is missing up to there: process 0 enters it for all."""

    entered: list[RunDirectory] = []

    def enter() -> list[Any]:
        directory = open_run_directory(run_dir, config_text)
        stack.enter_context(directory.lock())
        entered.append(directory)
        done = directory.latest_step() or 0
        return [str(directory), done, directory.description() is not None and owed_metrics(directory, done) is None]

    path, done, is_whole = processes.decide("run directory", enter)
    if not entered:
        entered.append(find_run_directory(path))
        stack.callback(entered[0].put)  # What it wrote itself: traces.
    return entered[0], done, is_whole


def _writers(
    stack: contextlib.ExitStack,
    directory: RunDirectory,
    setup: StageSetup,
    name: str,
    start: int,
    num_steps: int,
    also: Sequence[Scalars],
) -> tuple[MetricWriter | None, Progress]:
    """Where metrics go, and what the user sees: of process 0 alone."""
    writer = stack.enter_context(MetricWriter(directory, name, start, also)) if processes.is_main() else None
    shown = sys.stderr if processes.is_main() else open(os.devnull, "w")  # noqa: SIM115 - closed with the process
    progress = stack.enter_context(Progress(name, num_steps, start, setup.tokens_per_batch, stream=shown))
    if start:
        progress.message(f"going on from step {start}")
    return writer, progress


def _set_up(
    stage: Stage, directory: RunDirectory, seed: int, mesh: Mesh, rules: Rules, watchdog: Watchdog
) -> StageSetup:
    """The stage; what it reads of other runs' checkpoints goes to where the mesh has it."""
    with use_mesh(mesh, rules):
        setup = stage.setup(directory.path, seed)
    watchdog.progress()
    return setup


def _first_state(
    checkpoints: Checkpoints, learner: Learner, setup: StageSetup, seed: int, watchdog: Watchdog
) -> TrainState:
    """The newest intact checkpoint's, or a new one."""
    if checkpoints.latest_step() is None:
        state = fresh_state(learner, setup, seed)
    else:
        with spending(RESTORE):
            state, position = checkpoints.restore(learner.abstract_state(setup.params))
            setup.source.restore(position)
    watchdog.progress()
    return state


def _carry(ledger: Ledger, directory: RunDirectory, state: TrainState) -> tuple[int, dict[str, float] | None]:
    """Adds what earlier processes spent, as far as they got; returns the step the run goes on from, and what it owes."""
    start = int(state.step)
    ledger.carry(*carried(read_records(directory.ledger), read_metrics(directory.metrics), start), start)
    return start, processes.decide("owed", lambda: owed_metrics(directory, start))


def _peak(mesh: Mesh) -> float | None:
    return peak_flops(mesh.devices.flat[0].device_kind)


def _wandb(project: str | None, directory: RunDirectory, config_text: str) -> list[WandbScalars]:
    if project is None or not processes.is_main():
        return []
    return [WandbScalars(project, directory.path, config_text)]


def fresh_state(learner: Learner, setup: StageSetup, seed: int) -> TrainState:
    """The state before the first step of a stage, with the optimizer's state of what it begins with."""
    fresh = learner.init_state(setup.params, seed)
    if setup.slots is None:
        return fresh
    state = take_over(fresh, setup.slots)
    taken = "are left: the optimizer is another" if state is fresh else "are gone on from"
    _say(f"the {setup.slots.count} updates of the initial checkpoint's Adafactor {taken}.")
    return state


def _close(ledger: Ledger, directory: RunDirectory) -> None:
    """Says where the time went, and notes it for those who go on."""
    if processes.is_main():
        with contextlib.suppress(OSError):  # What ended the run is the error to look at.
            ledger.note(directory.ledger)
        _say(ledger.summary())


def _end(name: str, directory: RunDirectory, step: int, num_steps: int, stop: StopSignal | None) -> TrainResult:
    if stop is not None and stop.received is not None:
        _say(f"stopped by {stop.received.name} after step {step} of {num_steps}. Run the same command again to go on.")
        raise SystemExit(stop.exit_code)
    return _say_held_out(name, _result(directory, step))


def _complete(directory: RunDirectory, step: int, num_steps: int) -> TrainResult:
    _say(f"{directory} is complete: {step} steps of {num_steps}; more need a higher num_steps.")
    return _result(directory, step)


def _say_held_out(name: str, result: TrainResult) -> TrainResult:
    found = {key.split("/", 1)[1]: value for key, value in result.metrics.items() if key.startswith("evaluation/")}
    if found:
        _say(f"{name}: held out: " + ", ".join(f"{key} {value:.3f}" for key, value in found.items()))
    return result


def _describe(directory: RunDirectory, setup: StageSetup, config_text: str) -> dict[str, Any]:
    description = setup.describe()
    if "stage" not in description:
        raise ValueError(f"the stage's description has no 'stage', only {sorted(description)}.")

    def write() -> None:
        directory.write_description(description)
        _say_layout(directory.write_config(config_text))
        if setup.vocabulary is not None:
            setup.vocabulary.save(directory.path)

    processes.decide("description", write)
    return description


def _say_layout(changed: Sequence[str]) -> None:
    if changed:
        _say(
            "going on in another layout (old -> new):\n"
            + "".join(f"  {line}\n" for line in changed)
            + "From here on the numbers are those of the old layout but for rounding, not to the bit. Other micro-batches draw "
            "other dropout, and take the losses of routers over other rows."
        )


def _result(directory: RunDirectory, step: int) -> TrainResult:
    lines = read_metrics(directory.metrics)
    return TrainResult(directory.path, step, lines[-1] if lines else {})


def _say(text: str) -> None:
    if processes.is_main():
        print(text, file=sys.stderr, flush=True)
