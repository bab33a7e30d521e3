"""Makes steps of a run again, and compares what comes out with what the run wrote: the same bits, or something is wrong."""

import json
import math
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax

from clp_jax import processes
from clp_jax.host_rows import meet
from clp_jax.partitioning import Rules, make_mesh, use_mesh
from clp_jax.train import fresh_state
from clp_jax.training.checkpoint_manifest import DamagedError
from clp_jax.training.checkpoint_steps import complete_steps, metrics_of
from clp_jax.training.checkpoints import restore_state
from clp_jax.training.learner import Learner, learner_settings
from clp_jax.training.metrics import TIMING_METRICS, read_metrics
from clp_jax.training.places import as_path
from clp_jax.training.run_directory import RunDirectory, find_run_directory
from clp_jax.training.skipped import NON_FINITE_FILE
from clp_jax.training.stage import StageSetup
from clp_jax.training.train_state import TrainState


class ReplayError(RuntimeError):
    """A step gave other numbers than the run wrote, or can't be made again."""


def replay(run_dir: str, *, step: int, training: Callable[..., Mapping[str, Any]]) -> dict[int, list[str]]:
    """Makes a step again from the checkpoint before it, and compares all its numbers and digests, to the bit.

    Changes nothing in the run directory. What differs is not deterministic, or was damaged, in memory or in a chip.
    Another mesh, other chips and other versions of JAX round otherwise: use those of the run.

    Args:
        run_dir: of the run; its own configuration is taken where no gin file is given.
        step: to make again; where the run wrote no metrics of it, up to the next one with metrics, where all are compared.
        training: what `clp train` was given: its gin files and bindings.

    Returns:
        For each step that was made again and has metrics, the names of what was compared.

    Raises:
        ReplayError: naming the first step that differs, and all that differs in it.
    """
    directory, arguments = find_run_directory(run_dir), training()
    recorded = _recorded(directory)
    last = min((other for other in recorded if other >= step), default=None)
    if step < 1 or last is None:
        near = sorted(recorded, key=lambda other: (abs(other - step), other))[:5]
        those = f"it has steps {', '.join(map(str, sorted(near)))} near it" if near else "it has none"
        raise ReplayError(f"{directory} has no metrics of step {step}, or of a later one, to compare with: {those}.")
    if last != step:
        _say(
            f"the run wrote no metrics of step {step}: it goes on to step {last}, the next with metrics, and compares there"
        )
    mesh = arguments.get("mesh")
    mesh = meet(make_mesh() if mesh is None else mesh)
    seed = arguments.get("seed", 0)
    with use_mesh(mesh, arguments.get("rules", Rules())):
        setup = arguments["stage"].setup(directory.path, seed)
    learner = Learner.for_stage(setup, **learner_settings(arguments) | {"mesh": mesh})
    state = _state_before(step, directory, learner, setup, seed)
    compared: dict[int, list[str]] = {}
    frozen = learner.place_frozen(setup.frozen)
    _say(f"steps {int(state.step) + 1} to {last} are made again")
    with learner.activate():
        for number in range(int(state.step) + 1, last + 1):
            batch, values = setup.source.next(state, frozen)
            state, metrics = learner.update(state, frozen, batch)
            if number in recorded:
                found = {name: value.item() for name, value in jax.device_get(metrics).items()} | values
                compared[number] = _compare(number, found, recorded[number])
                names = ", ".join(compared[number])
                _say(f"step {number}: the same to the bit: {names}")
    return compared


def _compare(step: int, found: Mapping[str, Any], recorded: Mapping[str, Any]) -> list[str]:
    names = sorted(recorded.keys() & found.keys() - TIMING_METRICS)
    different = [name for name in names if _plain(found[name]) != _plain(recorded[name])]
    if different:
        listed = "\n".join(f"  {name}: {recorded[name]} -> {found[name]}" for name in different)
        raise ReplayError(
            f"step {step} gave other numbers than the run (the run's -> now):\n{listed}\nOn the run's devices and versions, "
            "something is not deterministic, or bits were damaged, then or now: replay it once more, and on other devices."
        )
    return names


def _plain(value: Any) -> float | int | None:
    """As metrics hold it: what is not finite is None, or a text in the file of non-finite steps."""
    return value if not isinstance(value, str) and value is not None and math.isfinite(value) else None


def _recorded(directory: RunDirectory) -> dict[int, dict[str, Any]]:
    """Numbers by step: of the metrics, of the checkpoints, and of the steps that ended the run."""
    path = directory.path / NON_FINITE_FILE
    rows = json.loads(path.read_text())["steps"] if path.is_file() else []
    saved = metrics_of(as_path(directory.checkpoints), complete_steps(directory.checkpoints))
    found = {step: metrics for step, metrics in saved.items() if metrics}
    return found | {int(row["step"]): row for row in [*rows, *read_metrics(directory.metrics)]}


def _state_before(step: int, directory: RunDirectory, learner: Learner, setup: StageSetup, seed: int) -> TrainState:
    """The newest intact checkpoint's before the step, or the first state."""

    def before() -> list[int]:
        return [at for at in reversed(complete_steps(directory.checkpoints)) if at < step]

    for at in processes.decide("replay", before):
        try:
            state, position = restore_state(directory.checkpoints / str(at), learner.abstract_state(setup.params))
        except DamagedError as damage:
            _say(f"checkpoint {at} is damaged: {damage}. An older one is taken.")
            continue
        setup.source.restore(position)
        _say(f"from the checkpoint of step {at}")
        return state
    _say(f"there is no checkpoint before step {step}: all steps are made again")
    return fresh_state(learner, setup, seed)


def _say(text: str) -> None:
    if processes.is_main():
        print(f"replay: {text}", file=sys.stderr, flush=True)
