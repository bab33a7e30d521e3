"""Jobs as work units of XManager experiments: a script for the `xmanager` package, on its local or its Vertex executor."""

import dataclasses
import importlib
import importlib.util
import json
import os
import re
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from clp_jax.launch.arrays import Array, ArrayTask
from clp_jax.launch.calls import begin, call, carry_out
from clp_jax.launch.cargo import Cargo
from clp_jax.launch.errors import LaunchError
from clp_jax.launch.exit_codes import KILLED, verdict
from clp_jax.launch.job import Job, JobRecord
from clp_jax.launch.local import local_command
from clp_jax.launch.local_worker import SCRIPT, end, exit_code, forbid, read_exit
from clp_jax.launch.log_files import read_logs
from clp_jax.launch.options import option
from clp_jax.launch.remote_code import check_run_directory
from clp_jax.launch.target import Run, Status, Step, Write
from clp_jax.launch.worker_script import CLAIM, EXIT, LOG, worker_script

_EXPERIMENT = Path(__file__).parent / "xmanager_experiment.py"
_UNIT = "work_unit.json"
_STOP_SECONDS = 300.0


@dataclasses.dataclass(frozen=True)
class XManager:
    """Work units of XManager experiments; the trials of a sweep are those of one."""

    executor: Literal["local", "vertex"] = option("of XManager: local (without Docker) or vertex", "local")
    image: str | None = option("vertex: a container whose entry point is clp", None)
    requirements: tuple[str, ...] = option("of each work unit, by XManager's names: A100=8,CPU=96,RAM=600 (GiB)", ())
    title: str | None = option("of the experiment; by default the name of the job or the sweep", None)
    grace: float = option("local: seconds to save in, when a work unit is stopped", 30.0)

    name = "xmanager"
    ships_code = None

    def __post_init__(self) -> None:
        if (self.executor == "vertex") != (self.image is not None):
            raise LaunchError("--executor=vertex and --image=IMAGE go together.")
        for word in self.requirements:
            name = word.partition("=")[0].lower()
            if not re.fullmatch(r"[A-Za-z]\w*=\d+", word):
                raise LaunchError(f"--requirements has {word!r}: expected NAME=NUMBER, as in A100=8,CPU=96.")
            if self.executor == "vertex" and name.startswith("tpu_") and name not in ("tpu_v2", "tpu_v3"):
                raise LaunchError(
                    f"--requirements has {word!r}: XManager's Vertex executor knows TPU v2 and v3 alone. The targets "
                    "tpu-vm and gke have the others."
                )

    def compile_options(self) -> None:
        """No slice of a known shape is rented."""

    def check(self, cargo: Cargo) -> None:
        """Raises `LaunchError` for a run directory that Vertex would lose, and for files that it would not have."""
        if self.executor == "vertex":
            files = cargo.files.paths
            if files:
                raise LaunchError(
                    f"Vertex has no {', '.join(files)} of this directory: use a gin file of the package with "
                    "--gin.NAME=VALUE, or build it into the image and give its path there."
                )
            check_run_directory(cargo.job, ("/gcs",), "a path below /gcs, where Vertex has buckets")

    def check_access(self, job: Job) -> None:
        """Raises `LaunchError` where `xmanager` is not installed, lacks credentials, or does not know what is required."""
        if importlib.util.find_spec("xmanager") is None:
            raise LaunchError("xmanager is not installed: see docs/launching.md.")
        known = importlib.import_module("xmanager.xm").ResourceType.__members__
        for word in self.requirements:
            if word.partition("=")[0].upper() not in known:
                raise LaunchError(f"--requirements has {word!r}: XManager knows {', '.join(sorted(known))}.")
        if self.executor == "vertex":
            _check_credentials()

    def submit(self, record: JobRecord) -> None:
        """Starts an experiment of this attempt alone; its script lives as long as it."""
        if self.status(record).phase == "gone":
            ArrayTask.forget(record)
            self.start_experiment(self.dry_run(record))

    def start(self, record: JobRecord) -> None:
        """Does nothing: submitting was all."""

    def status(self, record: JobRecord) -> Status:
        """Looks at what the work unit has left, and whether the script lives that begins it."""
        here, unit = _experiment(record), _work_unit(record)
        script = exit_code(here)
        if script is not None and not (here / CLAIM).is_dir():
            return Status("gone")
        if self.executor == "local" and (unit / CLAIM).is_dir():
            return _ended(exit_code(unit), unit)
        if (unit / EXIT).is_file():
            return _ended(read_exit(unit / EXIT), unit)
        if script is None:
            running = (unit / CLAIM).is_dir()
            return Status("running" if running else "queued", detail=_told(unit))
        code = KILLED if (unit / CLAIM).is_dir() else script or KILLED
        return Status("failed", code, f"XManager's script has ended with exit code {script}")

    def logs(self, record: JobRecord, lines: int | None = None, follow: bool = False) -> Iterator[str]:
        """The work unit's output where it is local, and that of the experiment's script."""
        files = {"xmanager": _experiment(record) / LOG, "0": _work_unit(record) / LOG}
        return read_logs(
            files, lines, (lambda: self.status(record).phase not in ("queued", "running")) if follow else None
        )

    def stop(self, record: JobRecord) -> None:
        """Ends the work unit; a local one has time to save."""
        here, unit = _experiment(record), _work_unit(record)
        if self.executor == "local":
            end([unit], self.grace)
        elif (unit / _UNIT).is_file() and not (unit / EXIT).is_file():
            call(Run((sys.executable, str(here / _EXPERIMENT.name), "stop", str(unit)), timeout=_STOP_SECONDS))

    def delete(self, record: JobRecord) -> None:
        """Ends the work unit, and takes its claim, so that it does not begin later."""
        self.stop(record)
        forbid(_work_unit(record))
        if ArrayTask.of(record) is None:
            end([_experiment(record)], self.grace)

    def dry_run(self, record: JobRecord) -> Sequence[Step]:
        """The scripts, what they read, and how the experiment is started."""
        return self.experiment(Array("experiment", {0: record}, 1), record.attempt_directory, record.job.name)

    def experiment(self, array: Array, directory: Path, title: str) -> list[Step]:
        """An experiment: its files, and last the command that starts its script.

        Args:
            array: the attempts, each a work unit.
            directory: of all experiments.
            title: of this one, where the options do not say another.
        """
        here = directory / array.name
        settings = {
            "title": self.title or title,
            "executor": self.executor,
            "image": self.image,
            "requirements": {w.partition("=")[0].lower(): int(w.partition("=")[2]) for w in self.requirements},
            "most": array.most,
            "trials": [self._trial(record) for record in array.records.values()],
        }
        first = next(iter(array.records.values()))
        script = worker_script(
            (sys.executable, str(here / _EXPERIMENT.name)),
            directory=shlex.quote(first.job.directory),
            here=shlex.quote(str(here)),
            environment={"PYTHONUNBUFFERED": "1"},
        )
        # XManager's shell would be the leader of the process group.
        unit = ["#!/usr/bin/env bash", "set -m", 'bash "$@" &', 'wait "$!"']
        return [
            *(Write(_work_unit(record) / SCRIPT, _unit_script(record)) for record in array.records.values()),
            Write(here / _EXPERIMENT.name, _EXPERIMENT.read_text("utf-8")),
            Write(here / "experiment.json", json.dumps(settings, indent=1) + "\n"),
            Write(here / "unit.sh", "\n".join(unit) + "\n"),
            Write(here / SCRIPT, script),
            Run(("bash", str(here / SCRIPT))),
        ]

    def start_experiment(self, steps: Sequence[Step]) -> None:
        """Writes the files and starts the script, which outlives this process and runs once."""
        carry_out(steps[:-1])
        run = steps[-1]
        assert isinstance(run, Run)
        begin(run.words, Path(run.words[-1] + ".out"))

    def _trial(self, record: JobRecord) -> dict[str, Any]:
        command = record.job.command
        words = local_command(command) if self.executor == "local" else command[command[0] == "clp" :]
        return {
            "name": record.job.name,
            "unit": str(_work_unit(record)),
            "words": list(words),
            "parameters": dict(record.job.parameters or overrides(command)),
        }


def overrides(words: Sequence[str]) -> Mapping[str, str]:
    """What a command binds, by name: the words ``--gin.NAME=VALUE`` and ``--seed=VALUE``."""
    matches = [re.fullmatch(r"--(?:gin\.([^=]+)|(seed))=(.*)", word, flags=re.DOTALL) for word in words]
    return {match[1] or match[2]: match[3] for match in matches if match is not None}


def _experiment(record: JobRecord) -> Path:
    task = ArrayTask.of(record)
    return record.attempt_directory / "experiment" if task is None else Path(task.directory) / task.name


def _work_unit(record: JobRecord) -> Path:
    return record.attempt_directory / "work-unit"


def _unit_script(record: JobRecord) -> str:
    return worker_script(
        None,
        directory=shlex.quote(record.job.directory),
        here=shlex.quote(str(_work_unit(record))),
        environment={"PYTHONUNBUFFERED": "1"},
    )


def _ended(code: int | None, unit: Path) -> Status:
    found = verdict([code])
    return dataclasses.replace(found, detail=found.detail.replace("worker 0", _told(unit)) or _told(unit))


def _told(unit: Path) -> str:
    """Where XManager has a work unit."""
    if not (unit / _UNIT).is_file():
        return "the work unit"
    found = json.loads((unit / _UNIT).read_text())
    return f"work unit {found['work_unit']} of experiment {found['experiment']}"


def _check_credentials() -> None:
    auth = importlib.import_module("google.auth")
    try:
        _, project = auth.default()
    except auth.exceptions.DefaultCredentialsError:
        raise LaunchError("there are no credentials for Vertex: run gcloud auth application-default login.") from None
    if not project:
        raise LaunchError("Vertex needs a project: run gcloud config set project PROJECT.")
    if not os.environ.get("GOOGLE_CLOUD_BUCKET_NAME"):
        raise LaunchError("Vertex needs a bucket to stage in: set GOOGLE_CLOUD_BUCKET_NAME to its name.")
