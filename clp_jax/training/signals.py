"""Being asked to stop: SIGTERM or a notice of preemption from a scheduler, Ctrl-C from a user."""

import signal
import threading
from types import FrameType

from clp_jax import processes


class StopSignal:
    """Remembers that the process was asked to end, so that the loop can save first; a context manager.

    The first signal is remembered, the second acts as it would have without us. Outside the main thread, where Python
    allows no handlers, nothing is caught. In a run of several processes JAX catches SIGTERM, and tells all of them.
    """

    def __init__(self):
        self.received: signal.Signals | None = None
        self._several = processes.count() > 1
        self._previous: dict[signal.Signals, object] = {}

    def requested(self, step: int) -> bool:
        """Whether the run stops after this step: a signal came, here or in another process.

        Args:
            step: asked once before each of the next steps, in all processes.
        """
        if not self._several:
            return self.received is not None
        agreed = processes.asked_to_stop(step)
        if agreed and self.received is None:
            self.received = signal.SIGTERM
        return agreed

    @property
    def exit_code(self) -> int:
        """What the process ends with: a launcher starts a run again that was preempted, not one that a user stopped."""
        return 128 + signal.SIGINT if self.received == signal.SIGINT else processes.RESTARTABLE

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():
            caught = (signal.SIGINT,) if self._several else (signal.SIGTERM, signal.SIGINT)
            self._previous = {number: signal.signal(number, self._remember) for number in caught}
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._restore()

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
        self._restore()
        if self._several:
            signal.raise_signal(signal.SIGTERM)  # JAX takes it for a notice of preemption.

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._previous = {}
