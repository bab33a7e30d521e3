"""Steps whose update was left out, as the host sees them: said, counted, and in the end too many."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clp_jax import processes
from clp_jax.training.guards import GuardError, Guards
from clp_jax.training.run_directory import disk_errors, write_atomically
from clp_jax.training.stage import Source

NON_FINITE_FILE = "non_finite.json"
# What is looked at after every step.
WATCHED = (
    "loss", "grad_norm", "param_norm", "learning_rate", "skipped", "non_finite", "grad_digest", "param_digest",
)  # fmt: skip


class SkippedSteps:
    """Follows the verdicts of the guards, and ends the run when non-finite steps do not end.

    Args:
        guards: that judge.
        source: of the batches.
        run_dir: where ``non_finite.json`` is left.
        skipped: updates left out before.
    """

    def __init__(self, guards: Guards, source: Source, run_dir: Path, skipped: int):
        self._guards = guards
        self._source = source
        self._run_dir = run_dir
        self._skipped = skipped
        self._row: list[dict[str, Any]] = []

    def check(self, step: int, position: dict[str, int], values: Mapping[str, Any], kept: int | None) -> str | None:
        """Looks at a step.

        Args:
            step: its number.
            position: where its batch began.
            values: numbers by name, at least those of `WATCHED`.
            kept: the last saved step.

        Returns:
            What to tell of it; None where its update was made.

        Raises:
            GuardError: when the row of non-finite steps is too long, or the parameters are not finite.
        """
        shown = ", ".join(f"{name} {float(values[name]):.4g}" for name in ("loss", "grad_norm", "learning_rate"))
        was_skipped = int(values["skipped"]) > self._skipped
        self._skipped = int(values["skipped"])
        if not values["non_finite"]:
            self._row = []
        else:
            known = {name: _json_number(values[name]) for name in WATCHED}
            self._row.append({"step": step, "position": position} | known)
        if not math.isfinite(values["param_norm"]):
            raise GuardError(f"step {step} made parameters that are not finite ({shown}); {_advice(kept)}")
        if values["non_finite"] >= self._guards.patience:
            raise GuardError(self._too_many(step, shown, kept))
        if not was_skipped:
            return None
        what = "is not finite" if values["non_finite"] else "is a spike"
        return f"step {step} {what}, its update was left out: {shown}"

    def _too_many(self, step: int, shown: str, kept: int | None) -> str:
        steps = [
            record | {"example_ids": self._source.example_ids(record["position"])}
            for record in self._row[-self._guards.patience :]
        ]
        path = self._run_dir / NON_FINITE_FILE
        if processes.is_main():
            with disk_errors(self._run_dir):
                write_atomically(path, json.dumps({"steps": steps}, indent=1) + "\n")
        return (
            f"steps {step - self._guards.patience + 1} to {step} had a loss or a gradient that is not finite ({shown}): "
            f"{self._guards.patience} in a row (Guards.patience). Their updates were left out, and their example ids are in "
            f"{path}; {_advice(kept)}"
        )


def _advice(kept: int | None) -> str:
    intact = f"step {kept} is saved and intact" if kept is not None else "no step was saved before"
    return (
        f"{intact}. Lower the learning rate, clip the gradient (max_grad_norm), or look at the data of these steps; then train "
        "in a new run directory."
    )


def _json_number(value: Any) -> float | int | str:
    number = value.item() if hasattr(value, "item") else value
    return number if math.isfinite(number) else str(number)
