"""What a job brings along: its files of this machine, read once, and the archive of them and the code, packed once."""

import dataclasses
import functools
from pathlib import Path

from clp_jax.launch.code import archive
from clp_jax.launch.job import Job
from clp_jax.launch.user_files import UserFiles, user_files


@dataclasses.dataclass(frozen=True)
class Cargo:
    """What workers need of this machine for a job, as it is when it is first asked for.

    Attributes:
        job: that needs it.
        extra: of the package that workers get with the code; empty for none; None where they have code and files.
    """

    job: Job
    extra: str | None

    @functools.cached_property
    def files(self) -> UserFiles:
        """The files of this machine that the job needs."""
        return user_files((*self.job.command, *self.job.inputs), Path(self.job.directory))

    @functools.cached_property
    def archive(self) -> bytes | None:
        """The code and the files; None where the workers have them."""
        if self.extra is None:
            return None
        return archive(self.files.contents, self.extra or None, self.files.executable)
