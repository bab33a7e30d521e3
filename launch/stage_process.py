"""The command of a stage as a process here, which no second pipeline starts again while it lives."""

import fcntl
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

from clp_jax.launch.calls import show
from clp_jax.launch.local import local_command
from clp_jax.launch.pipeline import Stage


class StageProcess:
    """A stage that runs on this machine, with its output where the pipeline's goes.

    The process inherits a lock on a file, which ends with it: a pipeline that was killed and started again waits for what
    it left running.

    Args:
        stage: what to run.
        directory: of the pipeline's own files.
        is_alone: whether no other stage runs at the same time; otherwise each line begins with the stage's name.
    """

    def __init__(self, stage: Stage, directory: Path, is_alone: bool):
        self._stage, self._is_alone = stage, is_alone
        directory.mkdir(parents=True, exist_ok=True)
        self._lock = open(directory / f".{stage.name}.lock", "a")  # noqa: SIM115 - the process inherits it
        self._process: subprocess.Popen | None = None
        self._lines: threading.Thread | None = None
        if not self._try_to_begin():
            show(f"{stage.name}: it still runs, begun by a pipeline that is gone: waiting for it.")

    def poll(self) -> str | None:
        """What went wrong when it is over, empty text when nothing did; None while it runs."""
        if self._process is None:
            self._try_to_begin()
            return None
        code = self._process.poll()
        if code is None:
            return None
        if self._lines is not None:
            self._lines.join()
        self._lock.close()
        return f"exit code {code if code >= 0 else 128 - code}" if code else ""

    def stop(self, number: signal.Signals) -> None:
        """Passes a signal on, and waits until the process has saved and ended."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(number)
            self._process.wait()
        self._lock.close()

    def _try_to_begin(self) -> bool:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        sys.stdout.flush()
        self._process = subprocess.Popen(
            local_command(self._stage.command),
            stdin=subprocess.DEVNULL,
            stdout=None if self._is_alone else subprocess.PIPE,
            stderr=None if self._is_alone else subprocess.STDOUT,
            env=os.environ | {} if self._is_alone else os.environ | {"PYTHONUNBUFFERED": "1"},
            pass_fds=(self._lock.fileno(),),
            # A signal of the terminal reaches it once, through `stop`.
            process_group=0,
        )
        if not self._is_alone:
            self._lines = threading.Thread(target=self._show_lines, daemon=True)
            self._lines.start()
        return True

    def _show_lines(self) -> None:
        assert self._process is not None and self._process.stdout is not None
        with self._process.stdout as output:
            for line in output:
                show(f"[{self._stage.name}] {line.decode(errors='replace').rstrip()}")
