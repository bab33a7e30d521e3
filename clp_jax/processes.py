"""Several processes of one run: how they find each other, what they agree on, and how they end.

One process runs on each host (or for each GPU); all run the same command. Process 0 is the coordinator: it decides what
must be decided once, and alone writes what is written once. A command of one process imports nothing of this and pays
nothing.
"""

import contextlib
import dataclasses
import itertools
import json
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

# A failure of the machine or of the program, which somebody must mend.
FAILURE = 1
# EX_TEMPFAIL of sysexits.h: nothing is lost and the same command goes on. What a launcher should start again.
RESTARTABLE = 75
FLAGS = {
    "coordinator_address": "HOST:PORT of process 0, the same in all processes",
    "num_processes": "how many processes run this command",
    "process_id": "which of them this one is, from 0",
}
# Seconds without a sign of life after which a process counts as lost; seconds in which all must have started.
HEARTBEAT_VARIABLE, HEARTBEAT_SECONDS = "CLP_HEARTBEAT_SECONDS", 20
STARTUP_VARIABLE, STARTUP_SECONDS = "CLP_STARTUP_SECONDS", 300

_TPU_PORT = 8482
_TPU_DEVICES = ("/dev/accel0", "/dev/vfio/0")
_DAY_IN_MS = 86_400_000
_T = TypeVar("_T")


class ProcessError(RuntimeError):
    """Processes of a run could not find each other, or one failed; the message says which and what to do.

    Args:
        message: for the user.
        restartable: whether the same command may well find them the next time.
    """

    def __init__(self, message: str, restartable: bool = False):
        super().__init__(message)
        self.restartable = restartable
        if restartable:
            set_exit_code(self, RESTARTABLE)


def set_exit_code(error: BaseException, code: int) -> None:
    """Says what a process ends with that this error ends."""
    error.exit_code = code  # type: ignore[attr-defined]


def exit_code_of(error: BaseException) -> int | None:
    """What was said of this error, or of its kind; None where its kind is all there is to go by."""
    return getattr(error, "exit_code", None)


@dataclasses.dataclass(frozen=True)
class Processes:
    """Where the processes of a run are, and which of them this one is.

    Attributes:
        coordinator_address: ``HOST:PORT`` of process 0; None, with the others, on a TPU VM: JAX asks its metadata.
        num_processes: how many there are.
        process_id: this one's number.
        local_device: the one device that this process uses; None takes all of the host.
        source: where this was found, for errors.
    """

    coordinator_address: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    local_device: int | None = None
    source: str = "the flags"


def find_processes(flags: Mapping[str, str], environment: Mapping[str, str]) -> Processes | None:
    """What the command line or the environment says of other processes; None for a run of one.

    The first that says something counts: flags, completed by ``CLP_COORDINATOR_ADDRESS``, ``CLP_NUM_PROCESSES`` and
    ``CLP_PROCESS_ID``; a SLURM step of several tasks; a TPU slice on GKE; a TPU VM.

    Args:
        flags: those of `FLAGS` that were given.
        environment: the process's variables.

    Raises:
        ProcessError: for values that are incomplete or can't be.
    """
    given = {name: flags.get(name, environment.get(f"CLP_{name.upper()}")) for name in FLAGS}
    if any(value is not None for value in given.values()):
        return _explicit(given)
    return _slurm(environment) or _gke(environment) or _tpu_vm(environment)


def start(found: Processes) -> None:
    """Joins the other processes; before anything touches a device.

    Raises:
        ProcessError: when they can't be reached.
    """
    heartbeat = _seconds(HEARTBEAT_VARIABLE, HEARTBEAT_SECONDS)
    timeout = _seconds(STARTUP_VARIABLE, STARTUP_SECONDS)
    end = time.monotonic() + timeout
    bind = None
    if found.coordinator_address is not None:
        _reach(found, timeout)
        # A run on one machine is not offered to the network.
        bind = found.coordinator_address if _is_loopback(found.coordinator_address) else None
    import jax

    many = "the" if found.num_processes is None else f"all {found.num_processes}"
    apart = f"not {many} processes of this run came together within {timeout} s"
    mend = f"Start every one of them, and with the same {found.source}."
    # JAX ends a process that waited in vain with its own words, and SIGABRT.
    who = "" if found.process_id is None else f"process {found.process_id}: "
    patience = threading.Timer(max(end - time.monotonic(), 1.0), _end_at_once, (f"{who}{apart}. {mend}",))
    patience.daemon = True
    patience.start()
    try:
        jax.distributed.initialize(
            found.coordinator_address,
            found.num_processes,
            found.process_id,
            local_device_ids=found.local_device,
            cluster_detection_method=None if found.num_processes is None else "deactivate",
            initialization_timeout=timeout + 60,
            # JAX ends a process with its own words; the monitor, which says which was lost, comes first.
            heartbeat_timeout_seconds=3 * heartbeat,
            shutdown_timeout_seconds=timeout,
            coordinator_bind_address=bind,
        )
    except (RuntimeError, ValueError) as error:
        raise ProcessError(f"{apart} ({str(error).strip().splitlines()[0]}). {mend}", restartable=True) from error
    finally:
        patience.cancel()
    state = _state()
    if state is not None and state.num_processes > 1:
        global _monitor
        _monitor = _Monitor(state, heartbeat)
        _monitor.start()


def count() -> int:
    """How many processes this run has."""
    state = _state()
    return 1 if state is None else state.num_processes


def index() -> int:
    """Which of them this one is."""
    state = _state()
    return 0 if state is None else state.process_id


def is_main() -> bool:
    """Whether this process writes what is written once."""
    return index() == 0


_decisions = itertools.count()


def decide(name: str, choose: Callable[[], _T]) -> _T:
    """What process 0 chooses, for all: no other calls `choose`, and none goes on before it is done.

    All processes must call this in the same order.

    Args:
        name: of the decision, for errors.
        choose: gives something that JSON can hold; may write files that the others then read.

    Raises:
        ProcessError: in the other processes, when it failed in process 0.
    """
    state = _state()
    if state is None:
        return choose()
    key = f"clp/decisions/{next(_decisions)}/{name}"
    if state.process_id == 0:
        try:
            value = choose()
        except Exception as error:
            state.client.key_value_set(key, json.dumps({"error": str(error)}))
            raise
        state.client.key_value_set(key, json.dumps({"value": value}))
        return value
    found = json.loads(state.client.blocking_key_value_get(key, _DAY_IN_MS))
    if "error" in found:
        raise ProcessError(f"process 0 failed: {found['error']}")
    return found["value"]


def wait_for_all(name: str) -> None:
    """Returns when all processes have called this."""
    state = _state()
    if state is not None:
        state.client.wait_at_barrier(f"clp/{name}/{next(_decisions)}", _DAY_IN_MS)


_asks = itertools.count(1)  # JAX takes a process that has not asked for one at 0.


def asked_to_stop() -> bool:
    """Whether all processes stop here, because one of them got SIGTERM or JAX a notice of preemption; true once.

    It looks at a number that a thread of JAX keeps: nothing is sent until there is a notice. Then all agree on a question
    that none of them has asked yet. All must ask equally often.
    """
    from jax.experimental import multihost_utils

    return multihost_utils.reached_preemption_sync_point(next(_asks))


def wait_for_last_words(seconds: float) -> None:
    """Says that this process has told all it knows and ends; waits, so many seconds at most, until the others say the same.

    The coordinator goes a little later: its end is the end of those that still talk.
    """
    state = _state()
    if state is None:
        return
    sys.stderr.flush()
    end = time.monotonic() + seconds
    with contextlib.suppress(Exception):  # The coordinator is gone.
        state.client.key_value_set(f"{_LAST_WORDS}/{state.process_id}", "said")
        while time.monotonic() < end and len(state.client.key_value_dir_get(_LAST_WORDS)) < state.num_processes:
            time.sleep(0.2)
        if state.process_id == 0:
            time.sleep(2)


def leave(code: int, reason: str = "") -> int:
    """Leaves the run in good order, or at once: the last thing a process does.

    Args:
        code: this process's exit code; 0, and `RESTARTABLE` without a reason, wait for the others; all else ends them.
        reason: what happened, for the others to tell.

    Returns:
        The same, where the process may end as usual; where others may never come, it ends here.
    """
    state = _state()
    if state is None:
        return code
    sys.stdout.flush()
    sys.stderr.flush()
    orderly = code == 0 or (code == RESTARTABLE and not reason)
    try:
        if not orderly:
            end = {"process": state.process_id, "code": code, "reason": reason or f"it ended with code {code}"}
            state.client.key_value_set(f"{_END}/{state.process_id}", json.dumps(end))
        # Errors that all have, such as a wrong setting, each tells itself before the coordinator is gone.
        state.client.wait_at_barrier("clp/leave", 1000 * (STARTUP_SECONDS if orderly else 5))
    except Exception:  # Others are gone, or busy: waiting for them would be for ever.
        os._exit(code)
    if _monitor is not None:
        _monitor.stop()
    import jax

    jax.distributed.shutdown()
    return code


def await_verdict(error: BaseException) -> None:
    """Waits, after an error that the end of another process may have caused, until that end is known.

    If a process was lost, this one says which and ends here; otherwise it returns.
    """
    state = _state()
    if state is not None and _PEER_LOST.search(str(error)) and type(error).__module__.split(".")[0] != "clp_jax":
        print(f"{_who(state)}: lost touch with another process; waiting to hear which.", file=sys.stderr, flush=True)
        time.sleep(2 * _seconds(HEARTBEAT_VARIABLE, HEARTBEAT_SECONDS))


_PEER_LOST = re.compile(
    r"gloo|connection|socket|UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|CANCELLED|barrier", re.IGNORECASE
)
_ALIVE, _END, _LAST_WORDS = "clp/alive", "clp/end", "clp/last_words"


class _Monitor(threading.Thread):
    """Tells the others that this process lives, and ends it when another one does not or has failed.

    Each process writes a number at the coordinator a few times in the allowed time; process 0 sees which of them stand
    still, and the others ask it. That is one small message each way, whatever the number of processes. A coordinator that is
    cut off answers nothing, not even that it is gone: who asks waits for as long as for any other process.
    """

    def __init__(self, state: Any, heartbeat: int):
        super().__init__(daemon=True, name="clp-monitor")
        self._state = state
        self._client = state.client
        self._heartbeat = heartbeat
        self._moved: dict[str, tuple[str, float]] = {}
        self._answered = -1
        self._stopped = threading.Event()

    def stop(self) -> None:
        """Ends the thread."""
        self._stopped.set()
        self.join()

    def run(self) -> None:
        """Beats until it is stopped."""
        for beat in itertools.count():
            silent = threading.Timer(self._heartbeat, self._cut_off, (beat,))
            silent.daemon = True
            if self._state.process_id != 0:
                silent.start()
            try:
                self._client.key_value_set(f"{_ALIVE}/{self._state.process_id}", str(beat), True)
                ends = [json.loads(text) for _, text in self._client.key_value_dir_get(_END)]
                lost = self._standing_still() if self._state.process_id == 0 else []
            except Exception:
                ends, lost = [], [0]
            finally:
                self._answered = beat
                silent.cancel()
            if self._stopped.wait(0 if ends or lost else self._heartbeat / 5):
                return
            for end in ends:
                if end["process"] != self._state.process_id:
                    self._end(end["code"], f"process {end['process']} failed: {end['reason']}")
            if lost:
                self._announce(lost)

    def _cut_off(self, beat: int) -> None:
        time.sleep(1)  # An answer may be here that no thread could look at, since this process itself stood still.
        if self._answered < beat:
            self._announce([0])

    def _standing_still(self) -> list[int]:
        now = time.monotonic()
        for name, beat in self._client.key_value_dir_get(_ALIVE):
            if self._moved.get(name, ("", 0.0))[0] != beat:
                self._moved[name] = (beat, now)
        return sorted(
            int(name.rpartition("/")[2]) for name, (_, then) in self._moved.items() if now - then > self._heartbeat
        )

    def _announce(self, lost: list[int]) -> None:
        if self._state.process_id == 0:
            names = ", ".join(map(str, lost))
            reason = f"no sign of life for {self._heartbeat} s"
            end = {"process": lost[0], "code": RESTARTABLE, "reason": reason}
            with contextlib.suppress(Exception):
                self._client.key_value_set(f"{_END}/{lost[0]}", json.dumps(end))
                time.sleep(2 * self._heartbeat / 5)  # All must have heard of it before the coordinator ends.
            self._end(RESTARTABLE, f"process {names} was lost: {reason}")
        self._end(RESTARTABLE, "process 0, the coordinator, was lost: it does not answer")

    def _end(self, code: int, reason: str) -> None:
        ask = " The same command goes on from the last checkpoint." if code == RESTARTABLE else ""
        _end_at_once(f"{_who(self._state)}: {reason}.{ask}", code)


def _end_at_once(message: str, code: int = RESTARTABLE) -> None:
    sys.stdout.flush()
    print(message, file=sys.stderr, flush=True)
    os._exit(code)


_monitor: _Monitor | None = None


def _state() -> Any:
    """JAX's own of a run of several processes, or None."""
    if "jax" not in sys.modules:
        return None
    # The key-value store has no other door; Orbax takes this one, too.
    from jax._src import distributed

    return distributed.global_state if distributed.global_state.client is not None else None


def _who(state: Any) -> str:
    return f"process {state.process_id} of {state.num_processes}"


def _explicit(given: Mapping[str, str | None]) -> Processes | None:
    if given["num_processes"] == "1" and given["process_id"] in (None, "0"):
        return None
    missing = [name for name, value in given.items() if value is None]
    if missing:
        there = ", ".join(f"{name}={value}" for name, value in given.items() if value is not None)
        raise ProcessError(
            f"{there} without {' and '.join(missing)}: give all of {', '.join('--' + name for name in FLAGS)} (or "
            "CLP_COORDINATOR_ADDRESS, CLP_NUM_PROCESSES, CLP_PROCESS_ID), or none of them."
        )
    address, many, which = (str(given[name]) for name in FLAGS)
    host, colon, port = address.rpartition(":")
    if not (host and colon and port.isdecimal() and 0 < int(port) < 65536):
        raise ProcessError(f"coordinator_address is {address!r}: expected HOST:PORT of process 0, as in 10.0.0.1:8476.")
    if not (many.isdecimal() and int(many) >= 1):
        raise ProcessError(f"num_processes is {many!r}: expected a whole number, at least 1.")
    if not (which.isdecimal() and int(which) < int(many)):
        raise ProcessError(f"process_id is {which!r}: expected a whole number from 0 to {int(many) - 1}, one for each.")
    return Processes(address, int(many), int(which), source="coordinator_address")


def _slurm(environment: Mapping[str, str]) -> Processes | None:
    names = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_LOCALID")
    if any(name not in environment for name in names) or _whole(environment, "SLURM_STEP_NUM_TASKS", 1) < 2:
        return None
    nodes, many = environment["SLURM_STEP_NODELIST"], _whole(environment, "SLURM_STEP_NUM_TASKS", 1)
    job, local = (_whole(environment, name) for name in ("SLURM_JOB_ID", "SLURM_LOCALID"))
    which = _whole(environment, "SLURM_PROCID", 0, many - 1)
    match = re.match(r"([^,\[]+)(?:\[(\d+))?", nodes)
    if match is None:
        raise ProcessError(f"SLURM_STEP_NODELIST is {nodes!r}: its first host can't be read.")
    port = 61440 + job % 4096  # The same in all processes of a job, another for the next job on the node.
    # "1(x4)" is one task on each of four nodes, which has all of its node's devices.
    several = re.fullmatch(r"1(\(x\d+\))?", environment.get("SLURM_STEP_TASKS_PER_NODE", "1")) is None
    address = f"{match[1]}{match[2] or ''}:{port}"
    return Processes(address, many, which, local if several else None, "SLURM step")


def _gke(environment: Mapping[str, str]) -> Processes | None:
    hosts = [name for name in environment.get("TPU_WORKER_HOSTNAMES", "").split(",") if name]
    slices = max(_whole(environment, "MEGASCALE_NUM_SLICES"), 1)
    place = _whole(environment, "MEGASCALE_SLICE_ID", 0, slices - 1)
    many = len(hosts) * slices
    if many < 2 or "TPU_WORKER_ID" not in environment:
        return None
    first = environment.get("MEGASCALE_COORDINATOR_ADDRESS") or hosts[0]
    which = place * len(hosts) + _whole(environment, "TPU_WORKER_ID", 0, len(hosts) - 1)
    return Processes(f"{first.split(':')[0]}:{_TPU_PORT}", many, which, source="TPU_WORKER_HOSTNAMES")


def _tpu_vm(environment: Mapping[str, str]) -> Processes | None:
    elsewhere = environment.get("JAX_PLATFORMS", "tpu") not in ("", "tpu") or "TPU_SKIP_MDS_QUERY" in environment
    if elsewhere or environment.get("TPU_WORKER_HOSTNAMES") or not any(Path(name).exists() for name in _TPU_DEVICES):
        return None
    return Processes(source="TPU slice")


def _reach(found: Processes, timeout: int) -> None:
    """Waits for the coordinator's port, which JAX reports with the end of the process when it is not there."""
    assert found.coordinator_address is not None
    host, _, port = found.coordinator_address.rpartition(":")
    if found.process_id == 0:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1" if _is_loopback(found.coordinator_address) else "", int(port)))
            except OSError as error:
                raise ProcessError(
                    f"process 0 can't listen at port {port} ({error.strerror}): give a coordinator_address with a free port."
                ) from error
        return
    end = time.monotonic() + timeout
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > end:
                raise ProcessError(
                    f"process {found.process_id}: no coordinator at {found.coordinator_address} within {timeout} s "
                    f"({error.strerror or error}): start process 0 there, or correct the {found.source}.",
                    restartable=True,
                ) from error
        time.sleep(0.2)


def _is_loopback(address: str) -> bool:
    return address.rpartition(":")[0] in ("localhost", "127.0.0.1")


def _seconds(variable: str, default: int) -> int:
    text = os.environ.get(variable, str(default))
    if not text.isdecimal() or int(text) < 1:
        raise ProcessError(f"{variable} is {text!r}: expected a whole number of seconds, at least 1.")
    return int(text)


def _whole(environment: Mapping[str, str], variable: str, least: int = 0, most: int | None = None) -> int:
    """A number that a launcher has set; nothing, or an empty text, is the least."""
    text = environment.get(variable) or str(least)
    if not (text.isdecimal() and least <= int(text) and (most is None or int(text) <= most)):
        span = f"at least {least}" if most is None else f"from {least} to {most}"
        raise ProcessError(
            f"{variable} is {text!r}: expected a whole number, {span}. It is set by what starts the processes; "
            f"{', '.join('--' + name for name in FLAGS)} say the same outright."
        )
    return int(text)
