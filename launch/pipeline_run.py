"""Runs the stages of a pipeline that are not done: each where it says, in the order of their needs, so many at once."""

import contextlib
import dataclasses
import os
import shlex
import signal
import threading
import time
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from clp_jax.launch.calls import show
from clp_jax.launch.cargo import Cargo
from clp_jax.launch.command import check_before_creating, files_lines, refuse_secrets, refuse_secrets_of
from clp_jax.launch.errors import LaunchError
from clp_jax.launch.lock import hold
from clp_jax.launch.pipeline import Pipeline, Stage
from clp_jax.launch.stage_job import StageJob, patience_for, stage_job, stage_target
from clp_jax.launch.stage_process import StageProcess
from clp_jax.launch.stage_state import Made, StageStates, check_movable, config_of, made_of, missing_outputs, move_away
from clp_jax.launch.target import Target

_LOOK = 0.1


@runtime_checkable
class Running(Protocol):
    """The command of a stage, wherever it runs."""

    def poll(self) -> str | None:
        """What went wrong when it is over, empty text when nothing did; None while it runs."""

    def stop(self, number: signal.Signals) -> None:
        """Lets it save and end, where it would not go on alone."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is to be done about a stage.

    Attributes:
        reason: why its command runs; None where nothing has changed.
        made: what it is made of now; None where a stage that it needs runs first.
        is_new: whether its outputs, where there are any, are of an earlier making and go aside.
    """

    reason: str | None
    made: Made | None
    is_new: bool = False


def run_pipeline(
    pipeline: Pipeline, directory: Path, commands: Collection[str], max_concurrent: int = 1, force: bool = False
) -> int:
    """Runs what is left to do.

    Args:
        pipeline: the stages.
        directory: of the pipeline's own files.
        commands: of `clp`.
        max_concurrent: stages at once.
        force: whether what does not fit its slice runs all the same.

    Returns:
        The exit code: 0, 1 where a stage failed, 128 and the signal's number where one came.

    Raises:
        LaunchError: for a command whose configuration does not resolve, an input that is not there and that no stage
            makes, a target that refuses or a secret, before any stage runs.
    """
    if max_concurrent < 1:
        raise LaunchError(f"--max_concurrent is {max_concurrent}: expected at least 1.")
    cargos: dict[str, Cargo] = {}
    for stage in pipeline.stages.values():
        refuse_secrets([*stage.command, *stage.target], {})
        if stage.target:
            cargos[stage.name] = Cargo(stage_job(pipeline.name, stage, ""), _check_outputs(stage).ships_code)
            refuse_secrets_of(cargos[stage.name])
    configs = _configs(pipeline)
    # Nobody is asked about what is done.
    for name, reason in _reasons(pipeline, configs, StageStates(directory)).items():
        if reason is not None and name in cargos:
            check_before_creating(stage_target(pipeline.stages[name]), cargos[name], commands, force)
    with hold(directory / ".lock", f"another process runs this pipeline in {directory}: wait for it."):
        return _Run(pipeline, directory, configs, max_concurrent).run()


def print_plan(pipeline: Pipeline, directory: Path) -> None:
    """Prints what would be done about each stage, and the commands."""
    cargos: dict[str, Cargo] = {}
    for stage in pipeline.stages.values():
        if stage.target:
            target = _check_outputs(stage)
            cargos[stage.name] = Cargo(stage_job(pipeline.name, stage, ""), target.ships_code)
            target.check(cargos[stage.name])
    for name, reason in _reasons(pipeline, _configs(pipeline), StageStates(directory)).items():
        stage = pipeline.stages[name]
        if reason is None:
            print(f"{name}: nothing to do")
            continue
        launch = f"clp launch {shlex.join(stage.target)} -- " if stage.target else ""
        print(f"{name}: would run: {reason}\n  $ {launch}{shlex.join(stage.command)}")
        for line in files_lines(cargos[name]) if name in cargos else ():
            print(f"  # {line}")


def plan_of(pipeline: Pipeline, stage: Stage, configs: Mapping[str, str], states: StageStates) -> Plan:
    """What is to be done about a stage all of whose needs are done.

    Raises:
        LaunchError: for an input that is not there.
    """
    made, earlier = made_of(pipeline, stage, configs[stage.name], states), states.made(stage)
    if earlier is None:
        return Plan("it has not run here before", made)
    difference = made.difference(earlier)
    if difference is not None:
        return Plan(difference, made, is_new=True)
    if not states.is_done(stage):
        return Plan("it was not done", made)
    missing = missing_outputs(stage)
    return Plan(f"{', '.join(missing)} is not there" if missing else None, made)


def _check_outputs(stage: Stage) -> Target:
    """The target of a stage; refuses one that would leave outputs on workers, which end with the job."""
    target = stage_target(stage)
    for output in stage.outputs if target.ships_code is not None else ():
        if not stage.is_elsewhere(output):
            raise LaunchError(
                f"stage {stage.name}: its output {output} would be on workers that end with the job: name one in a bucket "
                "(gs://BUCKET/NAME; or mounted, --mounts=BUCKET=/mnt/BUCKET)."
            )
    return target


def _reasons(pipeline: Pipeline, configs: Mapping[str, str], states: StageStates) -> dict[str, str | None]:
    """Why each stage would run; None where nothing is to be done.

    Raises:
        LaunchError: for an input that is not there and that no stage makes, and outputs in a bucket that are of an earlier
            making.
    """
    outputs = [Path(os.path.abspath(output)) for stage in pipeline.stages.values() for output in stage.outputs]
    for stage in pipeline.stages.values():
        for name in stage.inputs:
            path = Path(os.path.abspath(name))
            is_made = any(path in (output, *output.parents) or output in path.parents for output in outputs)
            if not (stage.is_elsewhere(name) or is_made or path.exists()):
                raise LaunchError(f"stage {stage.name}: its input {name} is not there.")
    found: dict[str, str | None] = {}
    for stage in pipeline.stages.values():
        changed = [need for need in stage.needs if found[need] is not None]
        try:
            plan = (
                Plan(f"{', '.join(changed)} would run", None) if changed else plan_of(pipeline, stage, configs, states)
            )
            reason = plan.reason
        except LaunchError:
            # An input that a stage makes which this one does not say that it needs.
            if not any(found.values()):
                raise
            reason = "an input is not there yet"
        else:
            if plan.is_new:
                check_movable(stage, states)
        found[stage.name] = reason
    return found


class _Run:
    """One run of a pipeline."""

    def __init__(self, pipeline: Pipeline, directory: Path, configs: Mapping[str, str], max_concurrent: int):
        self._pipeline, self._directory, self._configs = pipeline, directory, configs
        self._max_concurrent = max_concurrent
        self._states = StageStates(directory)
        self._waiting = dict(pipeline.stages)
        self._running: dict[str, Running] = {}
        self._done: set[str] = set()
        self._failed: list[str] = []

    def run(self) -> int:
        """Runs the stages."""
        with _signals() as received:
            while self._running or (self._waiting and not self._failed):
                if received:
                    return self._stop(received[0])
                # What runs is left to end well, but nothing is begun after a failure.
                if not self._failed:
                    self._begin_ready()
                if not self._look():
                    time.sleep(_LOOK)
        if self._failed:
            show(f"{self._pipeline.name}: {', '.join(self._failed)} failed; the same command goes on from there.")
            return 1
        return 0

    def _begin_ready(self) -> None:
        for stage in list(self._waiting.values()):
            if len(self._running) >= self._max_concurrent:
                return
            if not set(stage.needs) <= self._done:
                continue
            del self._waiting[stage.name]
            try:
                self._begin_or_skip(stage)
            except LaunchError as error:
                # Whatever else runs is looked after to its end.
                show(f"{stage.name}: failed: {error}")
                self._failed.append(stage.name)
                return

    def _begin_or_skip(self, stage: Stage) -> None:
        plan = plan_of(self._pipeline, stage, self._configs, self._states)
        if plan.reason is None:
            show(f"{stage.name}: nothing to do: {', '.join(stage.outputs)}")
            self._done.add(stage.name)
            return
        assert plan.made is not None
        moved = move_away(stage, self._states) if plan.is_new else []
        show(f"{stage.name}: {plan.reason}: {shlex.join(stage.command)}")
        for path in moved:
            show(f"{stage.name}: what it had made before is in {path}")
        self._states.write(stage, plan.made, done=False)
        self._running[stage.name] = self._begin(stage)

    def _begin(self, stage: Stage) -> Running:
        if stage.target:
            target = stage_target(stage)
            job = stage_job(self._pipeline.name, stage, self._states.identity(stage))
            return StageJob(job, target, patience_for(target))
        return StageProcess(stage, self._directory, is_alone=self._max_concurrent == 1)

    def _look(self) -> bool:
        """Looks at all that runs; whether anything has ended."""
        ended = False
        for name, running in list(self._running.items()):
            wrong = running.poll()
            if wrong is None:
                continue
            ended = True
            del self._running[name]
            stage = self._pipeline.stages[name]
            missing = missing_outputs(stage)
            if not wrong and missing:
                wrong = f"it ended well, but left no {', '.join(missing)}"
            if wrong:
                show(f"{name}: failed: {wrong}")
                self._failed.append(name)
                continue
            made = self._states.made(stage)
            assert made is not None
            self._states.write(stage, made, done=True)
            self._done.add(name)
        return ended

    def _stop(self, number: signal.Signals) -> int:
        for running in self._running.values():
            running.stop(number)
        names = ", ".join(self._running) or "nothing"
        show(f"{self._pipeline.name}: stopped by {number.name} while {names} ran; the same command goes on from there.")
        return 128 + number


def _configs(pipeline: Pipeline) -> dict[str, str]:
    """The fingerprint of each stage's configuration; those of several stages are resolved at the same time."""
    stages = list(pipeline.stages.values())
    with ThreadPoolExecutor(max(1, min(len(stages), os.cpu_count() or 1))) as pool:
        return dict(zip((stage.name for stage in stages), pool.map(config_of, stages), strict=True))


@contextlib.contextmanager
def _signals() -> Iterator[list[signal.Signals]]:
    """Collects the signals that ask to end; the second of a kind acts as it would have without us."""
    received: list[signal.Signals] = []
    previous: dict[int, Any] = {}

    def remember(number: int, frame: object) -> None:
        received.append(signal.Signals(number))
        signal.signal(number, previous[number])

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            previous[number] = signal.signal(number, remember)
    try:
        yield received
    finally:
        for caught, handler in previous.items():
            signal.signal(caught, handler)
