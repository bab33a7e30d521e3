"""The places that jobs run on, by name."""

from collections.abc import Mapping
from pathlib import Path

from clp_jax.launch.arrays import Arrays
from clp_jax.launch.errors import LaunchError
from clp_jax.launch.gke import Gke
from clp_jax.launch.local import Local
from clp_jax.launch.options import build, suggest
from clp_jax.launch.slurm import Slurm
from clp_jax.launch.slurm_arrays import SlurmArrays
from clp_jax.launch.target import Batch, Target
from clp_jax.launch.tpu_vm import TpuVm
from clp_jax.launch.xmanager import XManager
from clp_jax.launch.xmanager_arrays import Experiments

TARGETS: dict[str, type] = {"local": Local, "tpu-vm": TpuVm, "gke": Gke, "slurm": Slurm, "xmanager": XManager}


def find_target(name: str, options: Mapping[str, str]) -> Target:
    """A target with its options.

    Raises:
        LaunchError: for an unknown name or option, or a wrong value.
    """
    if name not in TARGETS:
        raise LaunchError(f"there is no target {name!r}{suggest(name, list(TARGETS))}.")
    return build(TARGETS[name], options, f"clp launch {name}")


def find_batch(target: Target, name: str, directory: Path, most: int) -> Batch | None:
    """The same target for the jobs of a sweep, where it can ask for several at once.

    Args:
        target: where the jobs run.
        name: of the sweep.
        directory: of what is written for several jobs together.
        most: jobs at once.
    """
    arrays = Arrays(name, directory, most)
    if isinstance(target, Slurm):
        return SlurmArrays.of(target, arrays)
    return Experiments.of(target, arrays) if isinstance(target, XManager) else None
