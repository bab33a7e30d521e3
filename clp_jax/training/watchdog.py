"""A run that stands still ends: with the stacks of all its threads, and a code that a launcher starts again."""

import faulthandler
import os
import sys
import threading

from clp_jax import processes


class Watchdog:
    """Ends the process after a time without progress; a context manager.

    In a run of several processes all stand still together, so each shows its own stacks.

    Args:
        seconds: without progress; None never ends anything. The first step compiles: less than that takes is too little.
    """

    TICKS = 60  # Time is counted in pieces, of which a process that was stopped and goes on loses one.

    def __init__(self, seconds: float | None):
        if seconds is not None and seconds <= 0:
            raise ValueError(f"watchdog_seconds is {seconds}: expected a positive number, or None for no watchdog.")
        self._seconds = seconds
        self._left = self.TICKS
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="clp-watchdog")

    def __enter__(self) -> "Watchdog":
        if self._seconds is not None:
            self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stopped.set()
        if self._seconds is not None:
            self._thread.join()
            faulthandler.cancel_dump_traceback_later()

    def progress(self) -> None:
        """Says that something got done."""
        self._left = self.TICKS

    def _watch(self) -> None:
        assert self._seconds is not None
        several = processes.count() > 1
        while not self._stopped.wait(self._seconds / self.TICKS):
            if several:
                # Where a thread stands still and lets no other one run, this is what ends the process.
                faulthandler.dump_traceback_later(2 * self._seconds + 60, exit=True)
            self._left -= 1
            if self._left <= 0:
                self._end()

    def _end(self) -> None:
        who = f"process {processes.index()} of {processes.count()}: " if processes.count() > 1 else ""
        print(
            f"{who}no progress for {self._seconds:g} s (watchdog_seconds). What every thread is doing:",
            file=sys.stderr,
            flush=True,
        )
        faulthandler.dump_traceback(all_threads=True)
        print(f"{who}ends; the same command goes on from the last checkpoint.", file=sys.stderr, flush=True)
        os._exit(processes.RESTARTABLE)
