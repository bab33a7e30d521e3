"""Whether two runs came to the same: checkpoints, metrics, and what their processes were given.

On one mesh that is the same bits, whatever the processes. On another mesh sums are made in another order, and numbers are
compared to `ROUNDING` of the size of what they are made of: of the numbers that were added and subtracted, not of the little
that a difference leaves (`natural_scale`).
"""

import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from clp_jax.training import array_store
from clp_jax.training.checkpoint_manifest import Manifest
from clp_jax.training.checkpoint_steps import as_path, complete_steps, damaged_steps, read_run, unfinished_steps
from clp_jax.training.metrics import DIGEST_METRICS, TIMING_METRICS, read_metrics

# Of fp32 sums in another order.
ROUNDING = 1e-6
# Arrays smaller than this, or than this share of the largest of their kind, are compared at that size: what began at zero
# is a few updates, or their rounding.
LEAST_SCALE = 0.1


def natural_scale(name: str, line: dict[str, Any]) -> float:
    """The size of what a metric is made of; a relative difference is one of this.

    Most metrics are sums of numbers of one sign, or norms: their own size. The others are differences:

    - ``reward/*`` and ``objective`` are means of standardised rewards, of size 1 and both signs;
    - ``kl`` is ``log π - log π_ref``, each of about one nat a token: ``length``. ``objective`` subtracts a share of it;
    - ``advantage_mean`` is a mean of advantages of both signs, whose size is their root mean square ``A``;
    - ``policy_loss`` is a mean of advantages times log-probabilities: ``A · length``; ``loss`` adds the value's;
    - ``value_explained_variance`` is 1 less a ratio: 1 and that ratio.

    Args:
        name: of the metric.
        line: all metrics of the step.
    """
    own = max(abs(line[name]), LEAST_SCALE)
    length = line.get("length", 0.0)
    advantage = math.hypot(line.get("advantage_mean", 0.0), line.get("advantage_std", 0.0))
    if name.startswith("reward/"):
        return max(own, 1.0)
    others = {
        "kl": length,
        "objective": max(1.0, length),
        "advantage_mean": advantage,
        "policy_loss": advantage * length,
        "loss": advantage * length + line.get("value_loss", 0.0),
        "value_explained_variance": 2 - line.get("value_explained_variance", 0.0),
    }
    return max(own, others.get(name, 0.0))


class Comparison:
    """What differs between a run and an undisturbed one.

    Args:
        exact: whether all must be the same bits, as on the same mesh; otherwise whole numbers must, and others to rounding.

    Attributes:
        differences: sentences; none where the runs are the same.
        largest: relative difference of numbers.
    """

    def __init__(self, exact: bool):
        self._exact = exact
        self.differences: list[str] = []
        self.largest = 0.0

    def checkpoints(self, run: Path, calm: Path) -> None:
        """Everything that is saved: parameters, slots, random key, guards, position, metrics; verified."""
        found, wanted = (as_path(path / "checkpoints") for path in (run, calm))
        self._equal("saved steps", complete_steps(found), complete_steps(wanted))
        self._equal("unfinished steps", unfinished_steps(found), [])
        for step in complete_steps(wanted):
            if (found / str(step)).exists():
                now, then = (_arrays(folder / str(step)) for folder in (found, wanted))
                self._equal(f"arrays of step {step}", sorted(now), sorted(then))
                largest = _largest_by_kind(then)
                for name in now.keys() & then.keys():
                    self._array(f"{name} of step {step}", now[name], then[name], largest[_kind(name)])
                own, other = (read_run(folder / str(step)) for folder in (found, wanted))
                self._equal(f"position of step {step}", own["position"], other["position"])
                self._numbers(f"saved metrics of step {step}", own["metrics"], other["metrics"])

    def metrics(self, run: Path, calm: Path) -> None:
        """The metrics of every step, without those of time."""
        found, wanted = ([_lasting(line) for line in read_metrics(path / "metrics.jsonl")] for path in (run, calm))
        self._equal("steps of metrics", [line["step"] for line in found], [line["step"] for line in wanted])
        for now, then in zip(found, wanted, strict=False):
            self._numbers(f"metrics of step {now['step']}", now, then)

    def batches(self, run: Iterable[Path], calm: Iterable[Path]) -> None:
        """The whole numbers of all batches: ids of examples, tokens, and what was sampled."""
        wanted = dict(read_notes(calm))
        seen = set()
        for place, row in read_notes(run):
            seen.add(place)
            if wanted.get(place) != row:
                self.differences.append(f"row {place} of a batch is {row}: expected {wanted.get(place)}")
        self._equal("number of rows read", len(seen), len(wanted))

    def _array(self, name: str, now: np.ndarray, then: np.ndarray, largest: float) -> None:
        if now.dtype != then.dtype or now.shape != then.shape:
            self.differences.append(f"{name} is {now.dtype}{now.shape}: expected {then.dtype}{then.shape}")
        elif now.tobytes() != then.tobytes():
            if self._exact or not np.issubdtype(then.dtype, np.floating):
                self.differences.append(f"{name} has {int((now != then).sum())} other numbers of {now.size}")
            else:
                scale = max(float(np.abs(then).max()), LEAST_SCALE * min(1.0, largest))
                self._close(name, float(np.abs(now - then).max()) / scale)

    def _numbers(self, name: str, now: dict[str, Any], then: dict[str, Any]) -> None:
        self._equal(f"names in {name}", sorted(now), sorted(then))
        for key in now.keys() & then.keys():
            a, b = now[key], then[key]
            if a == b or (not self._exact and key in DIGEST_METRICS):
                continue
            if self._exact or not isinstance(a, float) or not isinstance(b, float):
                self.differences.append(f"{key} in {name} is {a}: expected {b}")
            else:
                self._close(f"{key} in {name}", abs(a - b) / natural_scale(key, then))

    def _close(self, name: str, difference: float) -> None:
        self.largest = max(self.largest, difference)
        if not difference <= ROUNDING:
            self.differences.append(f"{name} differs by {difference:.1e}: expected at most {ROUNDING:.0e}")

    def _equal(self, name: str, now: Any, then: Any) -> None:
        if now != then:
            self.differences.append(f"{name}: {now}, expected {then}")


def damaged(run: Path) -> dict[str, str]:
    """Steps that were set aside, with the reasons."""
    return damaged_steps(as_path(run / "checkpoints"))


def read_notes(paths: Iterable[Path]) -> Iterator[tuple[tuple[int, str, int], Any]]:
    """Position, name and number of each row that processes noted, and the row; a line that was cut off is left out."""
    for path in paths:
        for line in path.read_text().splitlines(keepends=True) if path.is_file() else ():
            if line.endswith("\n") and "rows" in (note := json.loads(line)):
                for name, shards in note["rows"].items():
                    for first, rows in shards:
                        for number, row in enumerate(rows):
                            yield (note["position"], name, first + number), row


def _lasting(line: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in line.items() if name not in TIMING_METRICS}


def _arrays(step: Any) -> dict[str, np.ndarray]:
    manifest = Manifest.read(step)
    manifest.verify_files(step)
    return {
        f"{item}/{jax.tree_util.keystr(path, simple=True, separator='/')}": np.asarray(array)
        for item in manifest.arrays
        for path, array in jax.tree_util.tree_leaves_with_path(array_store.read_to_host(step / item))
    }


def _kind(name: str) -> str:
    """Parameters, or the slots of one kind: ``params``, ``training/opt_state/1|mu``."""
    return "|".join(name.split("|")[:2]) if "|" in name else name.split("/")[0]


def _largest_by_kind(arrays: dict[str, np.ndarray]) -> dict[str, float]:
    found: dict[str, float] = {}
    for name, array in arrays.items():
        size = float(np.abs(array.astype(np.float64)).max()) if array.size else 0.0
        found[_kind(name)] = max(found.get(_kind(name), 0.0), size if math.isfinite(size) else 0.0)
    return found
