"""Being asked to stop: SIGTERM or a notice of preemption from a scheduler, Ctrl-C from a user."""

import signal
import threading
from types import FrameType

from clp_jax import processes


class StopSignal:
    """Remembers that the process was asked to end, so that the loop can save first; a context manager.

    Before training begins there is nothing to save: a run of one process ends at once.

    The first signal is remembered. Another SIGTERM changes nothing, since schedulers send it to a process and to its group;
    another SIGINT acts as it would have without us. Outside the main thread, where Python allows no handlers, nothing is
    caught. In a run of several processes JAX catches SIGTERM, and tells all of them.
    """

    def __init__(self):
        self.received: signal.Signals | None = None
        self._several = processes.count() > 1
        self._agreed = False
        self.has_begun = False
        self._previous: dict[signal.Signals, object] = {}

    def requested(self) -> bool:
        """Whether the run stops here: a signal came, here or in another process. All processes ask equally often."""
        if not self._several:
            return self.received is not None
        if not self._agreed:
            self._agreed = processes.asked_to_stop()
        if self._agreed and self.received is None:
            self.received = signal.SIGTERM
        return self._agreed

    def begin(self) -> None:
        """Says that training begins: from now on there is something to save."""
        self.has_begun = True

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
        for number in list(self._previous):
            self._restore(number)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            self._restore(signal.SIGINT)
        if self.received is not None:
            return
        self.received = signal.Signals(number)
        if self._several:
            signal.raise_signal(signal.SIGTERM)  # JAX takes it for a notice of preemption.
        elif not self.has_begun:
            raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(self.exit_code)

    def _restore(self, number: signal.Signals) -> None:
        signal.signal(number, self._previous.pop(number))  # type: ignore[arg-type]
