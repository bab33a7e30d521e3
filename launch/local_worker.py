"""Workers of this machine: a folder with the script of each, and what it has left there."""

import contextlib
import os
import platform
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from clp_jax.launch.errors import Damaged
from clp_jax.launch.exit_codes import KILLED
from clp_jax.launch.job import JobRecord
from clp_jax.launch.target import Unreachable
from clp_jax.launch.worker_script import CLAIM, EXIT, PID

SCRIPT = "run.sh"
# Seconds that a script may take from its start to its claim.
_STARTUP = 10.0


def exit_code(here: Path) -> int | None:
    """A worker's exit code; None while it runs or is about to.

    Args:
        here: the folder of the worker.
    """
    if not (here / EXIT).is_file():
        if (here / CLAIM).is_dir():
            is_over = not _processes(here)[0] and not _is_young(here / CLAIM)
        else:
            is_over = not _is_young(here / SCRIPT)
        # It may have ended between the two looks.
        if not is_over:
            return None
    return read_exit(here / EXIT) if (here / EXIT).is_file() else KILLED


def read_exit(path: Path) -> int:
    """The exit code that a worker has left.

    Raises:
        Damaged: when the file holds something else.
    """
    text = path.read_text().strip()
    if not text.isdecimal():
        raise Damaged(f"{path} holds {text[:40]!r}: expected an exit code. Write the one that the worker ended with.")
    return int(text)


def note_machine(record: JobRecord) -> None:
    """Keeps which machine an attempt is on: a directory of records may be that of several."""
    record.keep("machine", _machine())


def check_machine(record: JobRecord) -> None:
    """Raises `Unreachable` where an attempt is on another machine, whose processes can't be seen from here."""
    noted, own = record.kept("machine"), _machine()
    # One that got another name, or began anew, is still itself.
    if noted is not None and noted["name"] != own["name"] and noted["boot"] != own["boot"]:
        raise Unreachable(f"{record.resource} was begun on {noted['name']}: look after it there.")


def _machine() -> dict[str, str]:
    boot = Path("/proc/sys/kernel/random/boot_id")
    return {"name": platform.node(), "boot": boot.read_text().strip() if boot.is_file() else ""}


def end(workers: Sequence[Path], grace: float) -> None:
    """Asks workers to end; after `grace` seconds, ends them with all that they began."""
    for here in workers:
        _signal(here, signal.SIGTERM)
    until = time.monotonic() + grace
    while any(_processes(here)[1] for here in workers) and time.monotonic() < until:
        time.sleep(0.05)
    for here in workers:
        _signal(here, signal.SIGKILL)


def forbid(here: Path) -> None:
    """Takes the claim of a worker, so that it does not begin later."""
    if here.is_dir():
        (here / CLAIM).mkdir(exist_ok=True)


def _is_young(path: Path) -> bool:
    return path.exists() and 0 <= time.time() - path.stat().st_mtime < _STARTUP


def _processes(here: Path) -> tuple[bool, bool]:
    """Whether a worker's script lives, and whether anything does that it began: a process group that has its number."""
    number = (here / PID).read_text().strip() if (here / PID).is_file() else ""
    if not number:
        return False, False
    words = ("ps", "-A", "-ww", "-o", "pid=,pgid=,stat=,args=")
    lines = subprocess.run(words, capture_output=True, text=True, check=True).stdout.splitlines()
    rows = [line.split(None, 3) for line in lines]
    group = {row[0]: row[-1] for row in rows if row[1] == number and not row[2].startswith("Z")}
    leader = group.get(number)
    # The number may have gone to another process since; it can't while the group has members.
    is_ours = leader is None or str(here / SCRIPT) in leader
    return leader is not None and is_ours, bool(group) and is_ours


def _signal(here: Path, number: int) -> None:
    """Sends a signal to a worker: SIGTERM to its script, which passes it on once; SIGKILL to all that it began."""
    script, group = _processes(here)
    with contextlib.suppress(ProcessLookupError):
        if script and number == signal.SIGTERM:
            os.kill(int((here / PID).read_text()), number)
        elif group:
            os.killpg(int((here / PID).read_text()), number)
