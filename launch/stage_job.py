"""The command of a stage as a job on a target, which runs on without its pipeline."""

import contextlib
import dataclasses
import hashlib
import re
import signal
import time
from pathlib import Path

from clp_jax.launch.buckets import seen_from_here
from clp_jax.launch.calls import show
from clp_jax.launch.cargo import Cargo
from clp_jax.launch.code import code_version
from clp_jax.launch.command import create, target_of
from clp_jax.launch.command_words import run_dir_of
from clp_jax.launch.errors import Held, LaunchError
from clp_jax.launch.job import Job, JobRecord, jobs_directory
from clp_jax.launch.options import build, option, split
from clp_jax.launch.pipeline import Stage
from clp_jax.launch.renewal import renew
from clp_jax.launch.supervisor import Patience, Watch
from clp_jax.launch.target import Target
from clp_jax.launch.targets import find_target


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a stage's target says besides the target's own options."""

    max_restarts: int = option("attempts after failures; preemptions do not count", Job.max_restarts)
    max_failures: int = option("failures in a row without a new checkpoint that end the stage", Job.max_failures)


def stage_target(stage: Stage) -> Target:
    """The target of a stage.

    Raises:
        LaunchError: for an unknown one, or a wrong option.
    """
    try:
        place, options, _ = _parts(stage)
        return find_target(place, options)
    except Exception as error:
        raise LaunchError(f"stage {stage.name}: {error}") from None


def stage_job(pipeline: str, stage: Stage, made: str) -> Job:
    """The job of a stage.

    Args:
        pipeline: its name.
        stage: what to run.
        made: names what the stage is made of: the same is the same job, so that it is never begun twice.
    """
    digest = hashlib.sha256(f"{Path.cwd()} {made}".encode()).hexdigest()[:8]
    name = re.sub("[^a-z0-9]+", "-", f"{pipeline[:14]}-{stage.name[:14]}-{digest}")
    place, options, limits = _parts(stage)
    return Job(
        name=name,
        command=stage.command,
        target=place,
        options=options,
        run_dir=seen_from_here(run_dir_of(stage.command), options),
        code_version=code_version(),
        directory=str(Path.cwd()),
        max_restarts=limits.max_restarts,
        max_failures=limits.max_failures,
        inputs=stage.inputs,
    )


class StageJob:
    """A stage that a target runs, looked after until it is over.

    Args:
        job: of the stage.
        target: where it runs.
        patience: how long to wait between two looks.
    """

    def __init__(self, job: Job, target: Target, patience: Patience):
        self._patience = patience
        self._record = _record_of(job, target)
        self._target = target_of(self._record, job, target)
        self._locks = contextlib.ExitStack()
        self._is_mine = False
        self._watch = Watch(self._record.job.name, self._held, patience)
        self._next_look = 0.0
        if not self._record.is_held:
            self._hold()
            if self._record.is_over:
                # Its outputs are gone, or it failed and is tried again.
                limits = {"max_restarts": job.max_restarts, "max_failures": job.max_failures}
                self._record = renew(self._record, self._target, dataclasses.replace(self._record.job, **limits))
                self._record.append("retried")

    def poll(self) -> str | None:
        """What went wrong when it is over, empty text when nothing did; None while it runs."""
        if time.monotonic() < self._next_look:
            return None
        self._next_look = time.monotonic() + self._patience.look
        sight = self._watch.look()
        if sight.is_damaged:
            self._locks.close()
            return f"the record {self._record.path} is damaged, and nobody looks after what runs of it"
        if sight.state is None or not sight.is_done:
            return None
        self._locks.close()
        name, phase = self._record.job.name, sight.state.phase
        return "" if phase == "succeeded" else f"{phase}: clp jobs logs {name}"

    def stop(self, number: signal.Signals) -> None:
        """Leaves it running: it does not need this process."""
        show(f"{self._record.job.name} runs on; clp jobs stop {self._record.job.name} ends it.")
        self._locks.close()

    def _held(self) -> tuple[JobRecord, Target]:
        if not self._is_mine and self._record.is_held:
            raise Held("another launcher looks after it.")
        self._hold()
        return self._record, self._target

    def _hold(self) -> None:
        if not self._is_mine:
            self._locks.enter_context(self._record.lock())
            self._is_mine = True


def _parts(stage: Stage) -> tuple[str, dict[str, str], Limits]:
    """The name of a stage's target, its options, and the limits."""
    places, given, command = split(stage.target)
    if len(places) != 1 or command:
        raise LaunchError("target: expected its name and its options, as in local --processes=2.")
    ours = {field.name for field in dataclasses.fields(Limits)}
    limits = build(Limits, {name: value for name, value in given.items() if name in ours}, "target")
    return places[0], {name: value for name, value in given.items() if name not in ours}, limits


def _record_of(job: Job, target: Target) -> JobRecord:
    """The record of a stage's job: one that is not over, wherever it was begun; else that of this target, or a new one."""
    jobs = jobs_directory()
    names = [job.name, *(f"{job.name}-{number}" for number in range(1, 10))]
    records = [JobRecord.load(jobs / name) for name in names if (jobs / name).is_dir()]
    for record in records:
        if not (record.is_over and record.kept("deleted")):
            return record
    for record in records:
        if (record.job.target, record.job.options) == (job.target, job.options):
            return record
    return create(jobs, Cargo(dataclasses.replace(job, name=names[len(records)]), target.ships_code))


def patience_for(target: Target) -> Patience:
    """How often to look: what runs on this machine costs nothing to look at."""
    return dataclasses.replace(Patience(), look=0.5) if target.name == "local" else Patience()
