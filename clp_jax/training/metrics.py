"""Metrics of a run: one line of JSON per logged step at full precision, and TensorBoard's event files."""

import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from clp_jax.training.checkpoint_steps import owed_by
from clp_jax.training.event_file import EventFileWriter
from clp_jax.training.ledger import LEDGER_METRICS
from clp_jax.training.places import as_path
from clp_jax.training.run_directory import RunDirectory, disk_errors, write_atomically

# What differs between two runs of the same computation.
TIMING_METRICS = LEDGER_METRICS | {
    "wall_time",
    "steps_per_second",
    "tokens_per_second",
    "tokens_per_second_per_device",
    "mfu",
}
# Checksums: equal or not, and nothing to plot. On another mesh, where sums are rounded otherwise, they differ.
DIGEST_METRICS = frozenset({"grad_digest", "param_digest"})


@runtime_checkable
class Scalars(Protocol):
    """Where numbers are shown: TensorBoard, W&B."""

    def scalars(self, step: int, values: Mapping[str, float], wall_time: float) -> None:
        """Adds the numbers of a step."""

    def close(self) -> None:
        """Ends, when all is written."""


class MetricWriter:
    """Appends to the metrics of a run; a context manager.

    A resumed run makes the steps after its checkpoint again, so their lines are dropped first: no step appears twice.

    Args:
        directory: of the run.
        stage: its name, on every line.
        step: where the run goes on; later lines are dropped.
        also: other places than TensorBoard; closed at the end.

    Raises:
        RunDirectoryError: when the disk is full or not writable.
    """

    def __init__(self, directory: RunDirectory, stage: str, step: int, also: Sequence[Scalars] = ()):
        self._stage = stage
        self._directory = directory
        with disk_errors(directory.path):
            drop_lines_after(directory.metrics, step)
            self._file = open(directory.metrics, "a")  # noqa: SIM115 - closed on exit
            self._shown: list[Scalars] = [EventFileWriter(directory.tensorboard, purge_step=step + 1), *also]

    def __enter__(self) -> "MetricWriter":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._file.close()
        for shown in self._shown:
            shown.close()

    def write(self, step: int, metrics: Mapping[str, float | int]) -> None:
        """Writes the metrics of one step, and sees them to the file.

        Args:
            step: updates made so far.
            metrics: by name; ``/`` groups them.

        Raises:
            RunDirectoryError: when the disk is full.
        """
        now = time.time()
        # JSON has no NaN; a metric other than the loss may well be undefined at some step.
        values = {name: _number(v) if math.isfinite(v) else None for name, v in metrics.items()}
        line = json.dumps({"step": step, "stage": self._stage, "wall_time": now} | values)
        finite = {name: v for name, v in values.items() if v is not None and name not in DIGEST_METRICS}
        with disk_errors(self._directory.path):
            self._file.write(line + "\n")
            self._file.flush()
            for shown in self._shown:
                shown.scalars(step, finite, now)


def _number(value: float | int) -> float | int:
    return value if isinstance(value, int) else float(value)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file; one that was cut off while being written is left out.

    Args:
        path: of ``metrics.jsonl``.

    Raises:
        ValueError: when a line other than the last is not JSON.
    """
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    records = []
    for number, line in enumerate(lines, 1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise ValueError(f"{path}: line {number} is not JSON ({error}).") from error
    return records


def owed_metrics(directory: RunDirectory, step: int) -> dict[str, float] | None:
    """What the line of a saved step is to say, where its evaluation is still to be made; None where nothing is missing."""
    owed = owed_by(as_path(directory.checkpoints / str(step)))
    return None if any(line["step"] == step for line in read_metrics(directory.metrics)) else owed


def drop_lines_after(path: Path, step: int) -> None:
    """Rewrites a metrics file without what is later than `step`, or cut off; the rest keeps its exact bytes."""
    if not path.is_file():
        return
    text = path.read_text()
    records = read_metrics(path)
    kept = "".join(
        line
        for line, record in zip(text.splitlines(keepends=True), records, strict=False)
        if record["step"] <= step and line.endswith("\n")
    )
    if kept != text:
        write_atomically(path, kept)
