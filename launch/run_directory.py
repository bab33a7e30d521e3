"""What a launcher can see of a run from its run directory: the newest checkpoint."""

from pathlib import Path

from clp_jax.launch.calls import call
from clp_jax.launch.errors import LaunchError
from clp_jax.launch.job import STORES, Job
from clp_jax.launch.target import Run

# Beside a step in a bucket, these say that it is none (yet).
_MARKS = (".unfinished", ".removing", ".damaged.txt")
# Where machines of Vertex have buckets.
_VERTEX = "/gcs"


class Unseen(LaunchError):
    """Nobody here can say which checkpoints there are."""


def newest_step(job: Job) -> int | None:
    """The step of the newest checkpoint; None where there is none.

    Args:
        job: whose run it is; a bucket's path (``gs://``) is asked through ``gcloud``.

    Raises:
        Unseen: where the run directory can't be looked at from here.
    """
    if job.run_dir is None:
        return None
    if job.run_dir.startswith("gs://"):
        names = _in_bucket(f"{job.run_dir.rstrip('/')}/checkpoints/")
    else:
        disks = [disk for disk in (job.options.get("shared_disk"), _VERTEX) if disk is not None]
        is_absent = any(Path(job.run_dir).is_relative_to(disk) and not Path(disk).is_dir() for disk in disks)
        if is_absent or job.run_dir.startswith(STORES):
            raise Unseen(f"{job.run_dir} can't be looked at from here.")
        checkpoints = Path(job.directory) / job.run_dir / "checkpoints"
        names = [entry.name for entry in checkpoints.iterdir()] if checkpoints.is_dir() else []
    return max((int(name) for name in names if name.isdecimal()), default=None)


def _in_bucket(folder: str) -> list[str]:
    try:
        done = call(Run(("gcloud", "storage", "ls", folder), attempts=2), may_fail=True)
    except LaunchError as error:
        raise Unseen(f"{folder} can't be looked at from here: {error}") from error
    if done.code and "matched no objects" not in done.error:
        raise Unseen(f"{folder} can't be looked at from here: {done.error.strip()}")
    found = {line.rstrip("/").rpartition("/")[2] for line in done.output.split()}
    return [name for name in found if not {f"{name}{mark}" for mark in _MARKS} & found]
