"""Jobs as XManager experiments: a script for the `xmanager` package, on its local or its Vertex executor."""

import dataclasses
import importlib.util
import json
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from clp_jax.launch.errors import LaunchError
from clp_jax.launch.job import Job, JobRecord
from clp_jax.launch.local import Local, local_command
from clp_jax.launch.options import option
from clp_jax.launch.remote_code import check_run_directory
from clp_jax.launch.target import Status, Step, Write

_SCRIPT = Path(__file__).parent / "xmanager_experiment.py"


@dataclasses.dataclass(frozen=True)
class XManager:
    """An experiment of one work unit for each trial."""

    executor: Literal["local", "vertex"] = option("of XManager: local (without Docker) or vertex", "local")
    image: str | None = option("vertex: a container whose entry point is clp", None)
    requirements: tuple[str, ...] = option("of each work unit, by XManager's names: A100=8,CPU=96,RAM=600 (GiB)", ())
    trials: str | None = option(
        "a JSON file of trials: a list of {name, words, parameters}; words go after the command", None
    )
    title: str | None = option("of the experiment; by default the job's name", None)

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

    def check(self, job: Job) -> None:
        """Raises `LaunchError` for trials that can't be read, or a run directory that Vertex would lose."""
        self._trials(Path(job.directory))
        if self.executor == "vertex":
            check_run_directory(job, ("/gcs",), "a path below /gcs, where Vertex has buckets")

    def check_access(self, job: Job) -> None:
        """Raises `LaunchError` where `xmanager` is not installed."""
        if importlib.util.find_spec("xmanager") is None:
            raise LaunchError("xmanager is not installed: pip install 'clp-jax[xmanager]'.")

    def submit(self, record: JobRecord) -> None:
        """Starts the script, which lives as long as the experiment."""
        for step in self._files(record):
            step.path.parent.mkdir(parents=True, exist_ok=True)
            if not step.path.exists():
                step.path.write_text(step.text)
                step.path.chmod(0o755)
        self._process.submit(self._of_script(record))

    def start(self, record: JobRecord) -> None:
        """Does nothing: submitting was all."""

    def status(self, record: JobRecord) -> Status:
        """How the script stands."""
        return self._process.status(self._of_script(record))

    def logs(self, record: JobRecord, lines: int | None = None, follow: bool = False) -> Iterator[str]:
        """The script's output, with that of local work units."""
        return self._process.logs(self._of_script(record), lines, follow)

    def stop(self, record: JobRecord) -> None:
        """Asks the script to stop the work units."""
        self._process.stop(self._of_script(record))

    def delete(self, record: JobRecord) -> None:
        """Ends the script."""
        self._process.delete(self._of_script(record))

    def dry_run(self, record: JobRecord) -> Sequence[Step]:
        """The script, what it reads, and how it is started."""
        return [*self._files(record), *self._process.dry_run(self._of_script(record))]

    @property
    def _process(self) -> Local:
        return Local()

    def _of_script(self, record: JobRecord) -> JobRecord:
        command = (sys.executable, str(record.attempt_directory / "experiment.py"))
        return dataclasses.replace(record, job=dataclasses.replace(record.job, command=command))

    def _files(self, record: JobRecord) -> list[Write]:
        here = record.attempt_directory
        directory = shlex.quote(record.job.directory)
        unit = [
            "#!/usr/bin/env bash",
            "set -u",
            f"cd {directory} || exit 1",
            '"$@"',
            "code=$?",
            f'echo "$code" > {shlex.quote(str(here))}/unit-"$CLP_WORK_UNIT".exit',
            'exit "$code"',
        ]
        command = record.job.command
        words = local_command(command) if self.executor == "local" else command[command[0] == "clp" :]
        settings = {
            "title": self.title or record.job.name,
            "executor": self.executor,
            "image": self.image,
            "requirements": {w.partition("=")[0].lower(): int(w.partition("=")[2]) for w in self.requirements},
            "command": list(words),
            "trials": self._trials(Path(record.job.directory)),
        }
        return [
            Write(here / "experiment.py", _SCRIPT.read_text("utf-8")),
            Write(here / "experiment.json", json.dumps(settings, indent=1) + "\n"),
            Write(here / "unit.sh", "\n".join(unit) + "\n"),
        ]

    def _trials(self, directory: Path) -> list[dict[str, Any]]:
        if self.trials is None:
            return [{"name": "run", "words": [], "parameters": {}}]
        path = directory / self.trials
        try:
            found = json.loads(path.read_text())
            trials = [
                {
                    "name": str(t["name"]),
                    "words": [str(word) for word in t["words"]],
                    "parameters": dict(t["parameters"]),
                }
                for t in found
            ]
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise LaunchError(
                f"--trials is {self.trials!r}: expected a list of {{name, words, parameters}}: {error}"
            ) from error
        if not trials:
            raise LaunchError(f"--trials is {self.trials!r}: there are no trials in it.")
        return trials
