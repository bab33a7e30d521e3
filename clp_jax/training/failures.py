"""What a failure comes to once a run has begun: many of them the same command does not meet again."""

import errno
import os
from collections.abc import Iterator
from types import TracebackType

import jax

from clp_jax import processes
from clp_jax.interop.object_store import StoreError
from clp_jax.training.checkpoint_items import CheckpointError
from clp_jax.training.checkpoint_steps import is_full
from clp_jax.training.run_directory import RunDirectoryError
from clp_jax.training.signals import StopSignal

# What somebody must mend first; full disks and quotas besides.
_LASTING = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EFBIG)
# Of JAX: the program itself is wrong.
_WRONG = ("INVALID_ARGUMENT", "UNIMPLEMENTED")


class Failures:
    """Gives the failures of a run that has begun the exit code that tells whether to start it again; a context manager.

    Before a run has begun, a failure is most likely a mistake, and would come again. After that the same command did work: what
    a device, a disk, a store or the network does now, it may not do again.

    Args:
        stop: knows whether it has begun.
    """

    def __init__(self, stop: StopSignal):
        self._stop = stop

    def __enter__(self) -> "Failures":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        code = exit_code(error) if self._stop.has_begun and isinstance(error, Exception) else None
        if error is not None and code is not None and processes.exit_code_of(error) is None:
            processes.set_exit_code(error, code)


def exit_code(error: Exception) -> int | None:
    """What a process ends with for a failure of a device, a disk, a store or the network; None for other ones."""
    if not isinstance(error, OSError | CheckpointError | RunDirectoryError | jax.errors.JaxRuntimeError):
        return None
    causes = list(_causes(error))
    if any(isinstance(cause, jax.errors.JaxRuntimeError) and str(cause).startswith(_WRONG) for cause in causes):
        return None
    return processes.FAILURE if any(map(_lasts, causes)) else processes.RESTARTABLE


def _lasts(error: BaseException) -> bool:
    """Whether somebody must mend it first."""
    if isinstance(error, StoreError):
        return not error.restartable
    if isinstance(error, FileExistsError) or (isinstance(error, OSError) and error.errno in _LASTING):
        return True
    # TensorStore has words alone.
    return is_full(error) or any(os.strerror(number) in str(error) for number in _LASTING)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__
