"""Commands of other people's tools, run without a shell, with a limit of time."""

import contextlib
import dataclasses
import os
import queue
import re
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from clp_jax.launch.errors import LaunchError
from clp_jax.launch.job import write
from clp_jax.launch.target import Run, Step, Unreachable, Write

_Item, _Result = TypeVar("_Item"), TypeVar("_Result")

# What tools say when the same call may do better. Of gcloud, kubectl, ssh and SLURM.
_PASSING = re.compile(
    r"timed out|timeout|deadline exceeded|connection (refused|reset|closed)|temporarily unavailable|UNAVAILABLE|"
    r"Unable to contact slurm controller|Socket timed out|TLS handshake|i/o timeout|\b503\b|kex_exchange",
    re.IGNORECASE,
)

# Seconds that no tool is waited for longer.
LONGEST = 3600.0


@dataclasses.dataclass(frozen=True)
class Called:
    """How a command ended.

    Attributes:
        code: its exit code.
        output: what it wrote to its standard output.
        error: and to the other one.
    """

    code: int
    output: str
    error: str


def call(run: Run, may_fail: bool = False) -> Called:
    """Runs a command and waits for it.

    Args:
        run: the command, its time and how often it may be tried.
        may_fail: whether a refusal is the caller's to read; silence is always an error.

    Raises:
        Unreachable: when it did not answer in time, or said that the other side does not.
        LaunchError: when it is not installed, or refused.
    """
    run = dataclasses.replace(run, timeout=min(run.timeout, LONGEST))
    for attempt in range(1, run.attempts + 1):
        try:
            done = call_once(run)
        except Unreachable:
            if attempt == run.attempts:
                raise
            continue
        if done.code == 0 or (may_fail and not _PASSING.search(done.error)):
            return done
        if not _PASSING.search(done.error):
            raise LaunchError(f"{_short(run)} refused: {_reason(done)}")
    raise Unreachable(f"{_short(run)} can't reach the other side: {_reason(done)}")


def carry_out(steps: Sequence[Step]) -> None:
    """Writes the files and runs the commands of a plan, in order.

    Raises:
        LaunchError: at the first that does not succeed.
    """
    for step in steps:
        if isinstance(step, Write):
            step.path.parent.mkdir(parents=True, exist_ok=True)
            write(step.path, step.text)
        elif isinstance(step, Run):
            call(step)


def begin(words: Sequence[str], output: Path) -> None:
    """Starts a command that outlives this process, with a process group of its own.

    Args:
        words: of the command.
        output: a file that gets what it writes.
    """
    # The shell ends at once: what it began is nobody's child here.
    script = 'set -m; output="$1"; shift; "$@" >> "$output" 2>&1 < /dev/null &'
    subprocess.run(("bash", "-c", script, "bash", str(output), *words), start_new_session=True, check=True)


def stream(*runs: Run) -> Iterator[str]:
    """The lines that commands write at the same time, as they come; they are ended when nobody wants more.

    Raises:
        LaunchError: at the end, when one of them failed and none had anything to say.
    """
    lines: queue.Queue[str | None] = queue.Queue()
    is_silent = True
    processes = [_open(run, subprocess.PIPE) for run in runs]
    complaints = [deque[str](maxlen=20) for _ in processes]

    def read(process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.put(line.rstrip("\n"))
        lines.put(None)

    def listen(process: subprocess.Popen[str], said: deque[str]) -> None:
        assert process.stderr is not None
        said.extend(process.stderr)

    readers = [threading.Thread(target=read, args=(process,), daemon=True) for process in processes]
    readers += [
        threading.Thread(target=listen, args=pair, daemon=True) for pair in zip(processes, complaints, strict=True)
    ]
    for reader in readers:
        reader.start()
    try:
        for _ in processes:
            for line in iter(lines.get, None):
                is_silent = False
                yield line
        for run, process, said in zip(runs, processes, complaints, strict=True):
            if process.wait() and is_silent:
                raise LaunchError(f"{_short(run)} refused: {_reason(Called(process.returncode, '', ''.join(said)))}")
    finally:
        for process in processes:
            _signal(process, signal.SIGTERM)
        for reader in readers:
            reader.join()
        for process in processes:
            process.communicate()


def at_once(do: Callable[[_Item], _Result], items: Sequence[_Item]) -> list[_Result]:
    """Does the same with all items at the same time; raises what the first of them raised that failed."""
    with ThreadPoolExecutor(len(items)) as pool:
        return list(pool.map(do, items))


def call_once(run: Run) -> Called:
    """Runs a command and waits for it; what it says, and its exit code, are the caller's to read.

    Raises:
        Unreachable: when it did not answer in time.
        LaunchError: when it is not installed.
    """
    process = _open(run, subprocess.PIPE)
    try:
        output, error_text = process.communicate(timeout=run.timeout)
    except BaseException as stopped:
        _end(process, signal.SIGKILL)
        if isinstance(stopped, subprocess.TimeoutExpired):
            raise Unreachable(f"{_short(run)} did not answer within {run.timeout:g} s.") from stopped
        raise
    return Called(process.returncode, output, error_text)


def _open(run: Run, errors: int) -> subprocess.Popen[str]:
    try:
        return subprocess.Popen(
            run.words,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            errors="replace",
            start_new_session=True,
        )
    except FileNotFoundError as error:
        raise LaunchError(
            f"{run.words[0]} is not installed here, or not on the PATH: see docs/launching.md."
        ) from error


def _end(process: subprocess.Popen[str], number: signal.Signals) -> None:
    """Ends a tool, and what it has begun (gcloud begins ssh)."""
    _signal(process, number)
    process.communicate()


def _signal(process: subprocess.Popen[str], number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def _short(run: Run) -> str:
    return " ".join(run.words[:5])


def _reason(done: Called) -> str:
    lines = [line.strip() for line in (done.error or done.output).splitlines() if line.strip()]
    told = [line for line in lines if re.match(r"(ERROR|error|sbatch: error|Error from server)", line)]
    return (told or lines or [f"exit code {done.code}"])[-1 if not told else 0]


def show(text: str) -> None:
    """Tells a person what happens, at once."""
    print(text, file=sys.stderr, flush=True)
