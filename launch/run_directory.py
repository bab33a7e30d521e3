"""What a launcher can see of a run from its run directory: the newest checkpoint."""

from pathlib import Path

from clp_jax.launch.calls import call
from clp_jax.launch.target import Run

# Beside a step in a bucket, these say that it is none (yet).
_MARKS = (".unfinished", ".removing", ".damaged.txt")


def newest_step(run_dir: str | None, directory: str) -> int | None:
    """The step of the newest checkpoint.

    Args:
        run_dir: of the run; a bucket's path (``gs://``) is asked through ``gcloud``.
        directory: that a relative path is of.

    Returns:
        None where there is none, or nobody can say.
    """
    if run_dir is None:
        return None
    if run_dir.startswith("gs://"):
        done = call(Run(("gcloud", "storage", "ls", f"{run_dir.rstrip('/')}/checkpoints/"), attempts=2), may_fail=True)
        found = {line.rstrip("/").rpartition("/")[2] for line in done.output.split()}
        names = [name for name in found if not {f"{name}{mark}" for mark in _MARKS} & found]
    else:
        checkpoints = Path(directory) / run_dir / "checkpoints"
        names = [entry.name for entry in checkpoints.iterdir()] if checkpoints.is_dir() else []
    return max((int(name) for name in names if name.isdecimal()), default=None)
