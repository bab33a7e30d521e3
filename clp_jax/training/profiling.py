"""A trace of some steps by JAX's profiler, for TensorBoard and Perfetto."""

import sys
from pathlib import Path
from typing import Any

import jax

from clp_jax import processes

PROFILE_DIRECTORY = "profile"


class Profile:
    """Records the steps from a first to a last one; a context manager that ends what goes on.

    Args:
        directory: of the run; traces go to ``profile/`` there, each process's under its host's name.
        steps: the first and the last; None records nothing.

    Raises:
        ValueError: when the last is before the first.
    """

    def __init__(self, directory: Path, steps: tuple[int, int] | None):
        if steps is not None and not 1 <= steps[0] <= steps[1]:
            raise ValueError(f"profile_steps is {steps}: expected a first and a last step, as in 10,13, from 1 on.")
        self._directory = directory / PROFILE_DIRECTORY
        self._steps = steps
        self._recording = False
        self._has_recorded = False

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stop()
        if self._steps is not None and not self._has_recorded and processes.is_main():
            first, last = self._steps
            print(
                f"profile_steps: nothing was recorded: no step from {first} to {last} was made here. Ask for steps that are "
                "to come, up to num_steps.",
                file=sys.stderr,
                flush=True,
            )

    def before(self, step: int, pending: Any) -> None:
        """Begins where this step is the first; a run that goes on in between begins there.

        Args:
            step: that will be dispatched next.
            pending: arrays of the step before, which is waited for and not recorded.
        """
        if self._steps is not None and not self._recording and self._steps[0] <= step <= self._steps[1]:
            jax.block_until_ready(pending)
            jax.profiler.start_trace(str(self._directory))
            self._recording = self._has_recorded = True

    def after(self, step: int, made: Any) -> None:
        """Ends where this step is the last.

        Args:
            step: that was dispatched.
            made: its arrays, which are waited for.
        """
        if self._recording and self._steps is not None and step >= self._steps[1]:
            jax.block_until_ready(made)
            self._stop()

    def _stop(self) -> None:
        if self._recording:
            self._recording = False
            jax.profiler.stop_trace()
