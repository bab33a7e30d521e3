"""A run that stands still ends: with the stacks of all its threads, and a code that a launcher starts again."""

import contextlib
import faulthandler
import fcntl
import os
import signal
import sys
import threading
from collections.abc import Iterator

from clp_jax import processes


class Watchdog:
    """Ends the process after a time without progress; a context manager.

    In a run of several processes all stand still together, so each shows its own stacks, and process 0 leaves last. A process
    in which no thread of Python can run is ended by SIGABRT, some time later, and shows its stacks too; as it does when JAX
    ends it that way.

    Args:
        seconds: without progress; None never ends anything. The first step compiles: less than that takes is too little.
    """

    TICKS = 60  # Time is counted in pieces, of which a process that was stopped and goes on loses one.
    GRACE = 60.0  # Seconds, beyond twice the limit, until a process ends in which no thread can run.

    def __init__(self, seconds: float | None):
        if seconds is not None and seconds <= 0:
            raise ValueError(f"watchdog_seconds is {seconds}: expected a positive number, or None for no watchdog.")
        self._seconds = seconds
        self._left = self.TICKS
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="clp-watchdog")

    def __enter__(self) -> "Watchdog":
        if self._seconds is not None:
            self._stack = contextlib.ExitStack()
            self._abort = self._stack.enter_context(_abort_when_written())
            self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stopped.set()
        if self._seconds is not None:
            self._thread.join()
            faulthandler.cancel_dump_traceback_later()
            self._stack.close()

    def progress(self) -> None:
        """Says that something got done."""
        self._left = self.TICKS

    def _watch(self) -> None:
        assert self._seconds is not None
        while not self._stopped.wait(self._seconds / self.TICKS):
            # A thread of C, which no thread of Python can hold up. By itself it ends the process with 1, which nobody starts
            # again.
            later, abort = 2 * self._seconds + self.GRACE, self._abort
            faulthandler.dump_traceback_later(later, exit=abort is None, file=sys.stderr if abort is None else abort)
            self._left -= 1
            if self._left <= 0:
                self._end()

    def _end(self) -> None:
        assert self._seconds is not None
        who = f"process {processes.index()} of {processes.count()}: " if processes.count() > 1 else ""
        print(
            f"{who}no progress for {self._seconds:g} s (watchdog_seconds). What every thread is doing:",
            file=sys.stderr,
            flush=True,
        )
        faulthandler.dump_traceback(all_threads=True)
        # Their limits end at about the same time; with the coordinator's process, JAX ends all.
        processes.wait_for_last_words(10 + self._seconds / 10)
        print(f"{who}ends; the same command goes on from the last checkpoint.", file=sys.stderr, flush=True)
        os._exit(processes.RESTARTABLE)


@contextlib.contextmanager
def _abort_when_written() -> Iterator[int | None]:
    """A file that ends the process with SIGABRT when anything is written to it, though no thread can run; None but on Linux.

    While it is there, SIGABRT shows the stacks of all threads.
    """
    shown = faulthandler.is_enabled()
    if not shown:
        faulthandler.enable(file=sys.__stderr__ or 2)
    with contextlib.ExitStack() as stack:
        if not shown:
            stack.callback(faulthandler.disable)
        if sys.platform != "linux":
            yield None
            return
        # It is full: Linux says so to the reader, once, and whoever writes waits. A second signal would end the process before
        # it has shown anything.
        read, write = os.pipe()
        stack.callback(os.close, write)
        stack.callback(os.close, read)
        os.write(write, bytes(fcntl.fcntl(write, fcntl.F_GETPIPE_SZ)))
        fcntl.fcntl(read, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(read, fcntl.F_SETSIG, signal.SIGABRT)
        fcntl.fcntl(read, fcntl.F_SETFL, os.O_ASYNC)
        stack.callback(fcntl.fcntl, read, fcntl.F_SETFL, 0)  # To be closed is an event, too.
        yield write
