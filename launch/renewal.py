"""Lets a job that is over go on with what is here now: its files, mended since, and the code of now."""

import dataclasses
import json
import os
import shutil
import tempfile
from pathlib import Path

from clp_jax.launch.calls import show
from clp_jax.launch.cargo import Cargo
from clp_jax.launch.code import code_version
from clp_jax.launch.command import refuse_secrets_of
from clp_jax.launch.job import CODE, Job, JobRecord
from clp_jax.launch.supervisor import retry
from clp_jax.launch.target import Target

_VERSION = "code_version"


def begin_again(record: JobRecord, target: Target, job: Job | None = None) -> JobRecord:
    """Lets a job go on with another attempt; the caller holds its lock.

    Args:
        record: of the job; one that is not over goes on as it is.
        target: that its options make.
        job: the same one with other limits, where they are asked for.

    Raises:
        LaunchError: when it has succeeded, for a secret in its files, and what its target refuses.
    """
    if record.is_over and record.state is not None and record.state.phase != "succeeded":
        record = renew(record, target, job or record.job)
    retry(record)
    return record


def renew(record: JobRecord, target: Target, job: Job) -> JobRecord:
    """Stores the files that a job needs as they are now, and the code of now; the caller holds its lock.

    The version of the code until now is kept with the attempt that was the last to have it.

    Args:
        record: of a job that is over.
        target: that runs the next attempt.
        job: as it goes on.

    Raises:
        LaunchError: for a secret in the files, and what the target refuses.
    """
    if not Path(job.directory).is_dir():
        show(f"{job.directory} is not here: {job.name} goes on with the code and the files of then.")
        return record
    job = dataclasses.replace(job, code_version=code_version())
    cargo = Cargo(job, target.ships_code)
    refuse_secrets_of(cargo)
    target.check(cargo)
    if record.job.code_version != job.code_version:
        record.keep(_VERSION, record.job.code_version)
    with tempfile.TemporaryDirectory(prefix=".new-", dir=record.path) as folder:
        new = JobRecord.create(Path(folder), job, cargo.files.contents, cargo.archive).path
        # The job last: where this is cut short, the next retry does it again.
        for name in ("files", CODE, "job.json"):
            if (record.path / name).is_dir():
                shutil.rmtree(record.path / name)
            if (new / name).exists():
                os.replace(new / name, record.path / name)
    return JobRecord(record.path, job)


def earlier_versions(record: JobRecord) -> dict[int, str]:
    """The code of attempts before the one of now: by the number of the last attempt that had it."""
    paths = record.path.glob(f"attempts/*/{_VERSION}.json")
    return dict(sorted((int(path.parent.name), json.loads(path.read_text())) for path in paths))
