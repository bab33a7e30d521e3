"""Looks after jobs: begins them, sees how they end, begins them again, and knows when to give up.

`advance` looks once and does one thing; every thing it does is on disk before and after, in an order that lets another
launcher go on wherever this one dies. Nothing is begun whose beginning was not written down, under a name that only this
attempt has: asked twice, it is there once.
"""

import contextlib
import dataclasses
import math
import re
import time
from collections import deque
from collections.abc import Callable, Sequence

from clp_jax.launch.calls import show
from clp_jax.launch.errors import Damaged, LaunchError
from clp_jax.launch.exit_codes import RESTARTABLE, may_restart
from clp_jax.launch.job import BETWEEN, FINAL, JobRecord, Phase, State
from clp_jax.launch.run_directory import Unseen, newest_step
from clp_jax.launch.target import Status, Target, Unavailable, Unreachable

LAST_LINES = 20
_SEVERAL = re.compile(r"\d+")


@dataclasses.dataclass(frozen=True)
class Patience:
    """How long a launcher waits.

    Attributes:
        look: seconds between two looks at a job.
        first_wait: seconds before the attempt after the first end; twice as many after each next one without progress.
        longest_wait: seconds, at most.
    """

    look: float = 10.0
    first_wait: float = 10.0
    longest_wait: float = 600.0

    def __post_init__(self) -> None:
        if not 0.0 < self.look < math.inf:
            raise LaunchError(f"--look is {self.look:g}: expected seconds, more than 0.")

    def wait(self, ends: int) -> float:
        """Seconds before the next attempt, after so many ends in a row without progress."""
        return min(self.first_wait * 2.0 ** min(max(ends - 1, 0), 30), self.longest_wait)


def advance(record: JobRecord, target: Target, patience: Patience | None = None) -> State:
    """Looks at a job once and does what is next; the caller holds its lock.

    Args:
        record: of the job.
        target: that its options make.
        patience: how long to wait between attempts.

    Returns:
        The job's state now.

    Raises:
        Unreachable: when the target does not answer; the job is as it was, and this may be called again.
    """
    patience = patience or Patience()
    state = record.state
    if state is None:
        return record.append("queued", attempt=1)
    if state.phase in (*FINAL, *BETWEEN):
        if not record.kept("deleted"):
            target.delete(record)
            record.keep("deleted", True)
        if state.phase in FINAL:
            return state
        if record.stop_request.exists():
            return record.append("stopped", detail="as asked")
        # A clock that went back is not waited for.
        if 0 <= time.time() - state.time < _wait(record.states, patience):
            return state
        return record.append("queued", attempt=state.attempt + 1)
    if record.stop_request.exists():
        target.stop(record)
        return _append_end(record, "stopped", "as asked")
    return _look(record, target, state)


def supervise(records: Sequence[JobRecord], targets: Sequence[Target], patience: Patience | None = None) -> list[State]:
    """Looks after jobs until all are over; the caller holds their locks.

    Args:
        records: of the jobs.
        targets: of each.
        patience: how long to wait.

    Returns:
        How each ended.
    """
    patience = patience or Patience()
    pairs = zip(records, targets, strict=True)
    watches = [Watch(pair[0].job.name, lambda pair=pair: pair, patience) for pair in pairs]
    known = [Sight() for _ in watches]
    while True:
        # Of a damaged record too: a person may mend it, and what is rented is not given back before.
        now = [watch.look() for watch in watches]
        if all(sight.is_done for sight in now):
            return [sight.state for sight in now if sight.state is not None]
        before, known = known, [new if new.state is not None else old for new, old in zip(now, known, strict=True)]
        if known == before:
            time.sleep(patience.look)


@dataclasses.dataclass(frozen=True)
class Sight:
    """What a look at a job has found.

    Attributes:
        state: the job's, after it; None where it could not be looked at.
        is_done: whether nothing more is to be done for the job.
        is_damaged: whether its record can't be read: asking again alone does not help.
    """

    state: State | None = None
    is_done: bool = False
    is_damaged: bool = False


class Watch:
    """Looks after one job, again and again.

    What goes wrong is told, once, and asked again with the next look: a launcher that gave up there would leave what was
    rented, and other jobs, alone.

    Args:
        name: of the job.
        hold: gives its record, which this process holds from then on, and its target; called at every look.
        patience: how long to wait between attempts.
        tells_states: whether the job's states are told too, as they change.
    """

    def __init__(
        self, name: str, hold: Callable[[], tuple[JobRecord, Target]], patience: Patience, tells_states: bool = True
    ):
        self._name, self._hold, self._patience, self._tells_states = name, hold, patience, tells_states
        self._told = ""

    def look(self) -> Sight:
        """Looks once, and does one thing."""
        try:
            record, target = self._hold()
            advance(record, target, self._patience)
            sight = Sight(record.state, record.is_over and bool(record.kept("deleted")))
            text = describe(record) if self._tells_states else self._told
        except Damaged as error:
            sight, text = Sight(is_damaged=True), f"{self._name}: {error}"
        except Exception as error:
            reason = str(error) if isinstance(error, LaunchError) else f"{type(error).__name__}: {error}."
            sight, text = Sight(), f"{self._name}: {reason} Asking again."
        if text != self._told:
            self._told = text
            show(text)
        return sight


def describe(record: JobRecord) -> str:
    """One line about a job."""
    state = record.state
    if state is None:
        return f"{record.job.name}: not begun"
    attempt = f" (attempt {state.attempt})" if state.attempt > 1 else ""
    step = f", checkpoint {state.step}" if state.step is not None else ""
    return f"{record.job.name}: {state.phase}{attempt}{step}{f': {state.detail}' if state.detail else ''}"


def retry(record: JobRecord) -> None:
    """Lets a job that is over go on with another attempt, with all its restarts again.

    Raises:
        LaunchError: when it has succeeded.
    """
    record.stop_request.unlink(missing_ok=True)
    if record.is_over:
        if record.state is not None and record.state.phase == "succeeded":
            raise LaunchError(f"{record.job.name} has succeeded: there is nothing to retry.")
        record.append("retried")


def ends_without_progress(states: Sequence[State], phases: tuple[Phase, ...] = ("broken", "preempted")) -> int:
    """How many attempts in a row ended like `phases` without a newer checkpoint than before, since the last retry."""
    newest, count = -1, 0
    for state in states:
        if state.phase == "retried":
            count = 0
        if state.phase not in BETWEEN:
            continue
        step = -1 if state.step is None else state.step
        if step > newest:
            newest, count = step, 0
        elif state.phase in phases:
            count += 1
    return count


def _look(record: JobRecord, target: Target, state: State) -> State:
    status = target.status(record)
    if status.phase == "gone" and state.phase == "queued":
        try:
            target.submit(record)
        except Unavailable as error:
            return record.append("preempted", detail=str(error))
        except Unreachable:
            raise
        except LaunchError as error:
            return record.append("failed", detail=str(error))
        status = target.status(record)
        return state if status.phase == "gone" else _note(record, state, status)
    if status.phase == "starting":
        _note(record, state, status)
        try:
            target.start(record)
        except Unreachable:
            raise
        except LaunchError as error:
            refusals = (record.kept("refusals") or 0) + 1
            record.keep("refusals", refusals)
            if refusals < record.job.max_failures:
                raise
            # What is rented is given back with the next look.
            return record.append("failed", detail=f"the command could not be begun, {refusals} times: {error}")
        return _note(record, record.state or state, target.status(record))
    if status.phase in ("preempted", "gone"):
        return _append_end(record, "preempted", status.detail or "it is not there any more")
    if status.phase == "failed":
        return _failed(record, target, status)
    return _note(record, state, status)


def _note(record: JobRecord, state: State, status: Status) -> State:
    """Writes a phase down where it, or why it lasts, is new; how an attempt ends is for the next look."""
    if status.phase not in ("queued", "starting", "running", "succeeded"):
        return state
    # "0/7 nodes are available" is no news after "0/5".
    is_told = not status.detail or _SEVERAL.sub("", status.detail) == _SEVERAL.sub("", state.detail)
    if status.phase == state.phase and is_told:
        return state
    if status.phase == "succeeded":
        return _append_end(record, "succeeded", status.detail)
    return record.append(status.phase, detail=status.detail)


def _failed(record: JobRecord, target: Target, status: Status) -> State:
    step, is_seen = _newest_step(record)
    detail = status.detail or f"exit code {status.code}"
    is_asked = status.code == RESTARTABLE
    if may_restart(status.code):
        # Of a run that nobody knows, its own word counts.
        is_seen = is_seen and not (is_asked and record.job.run_dir is None)
        broken = State("broken", record.attempt, time.time(), detail, step, is_seen, is_asked)
        # Where nobody can look, a failure may have saved: --max_restarts is the limit then.
        known = [state for state in (*record.states, broken) if state.is_seen]
        failures = ends_without_progress(known, ("broken",))
        restarts = _restarts(record.states)
        if failures < record.job.max_failures and restarts < record.job.max_restarts:
            return record.append("broken", detail=detail, step=step, is_seen=is_seen, is_asked=is_asked)
        if failures >= record.job.max_failures:
            detail = f"{failures} failures without a new checkpoint, the last: {detail}"
        else:
            detail = f"{restarts} restarts are all that --max_restarts allows; the last: {detail}"
    lines: deque[str] = deque(maxlen=LAST_LINES)
    with contextlib.suppress(LaunchError):  # The code is known; its last lines need not be.
        lines.extend(target.logs(record, lines=LAST_LINES))
    return record.append(
        "failed",
        detail="\n".join([f"{detail}. The last lines:" if lines else detail, *lines]),
        step=step,
        is_seen=is_seen,
    )


def _restarts(states: Sequence[State]) -> int:
    """Attempts after failures, since the last retry; not after ends that were asked for and left a newer checkpoint."""
    newest, count = -1, 0
    for state in states:
        if state.phase == "retried":
            count = 0
        step = -1 if state.step is None else state.step
        count += state.phase == "broken" and not (state.is_asked and step > newest)
        newest = max(newest, step)
    return count


def _wait(states: Sequence[State], patience: Patience) -> float:
    return 0.0 if states[-1].phase == "retried" else patience.wait(ends_without_progress(states))


def _append_end(record: JobRecord, phase: Phase, detail: str) -> State:
    step, is_seen = _newest_step(record)
    return record.append(phase, detail=detail, step=step, is_seen=is_seen)


def _newest_step(record: JobRecord) -> tuple[int | None, bool]:
    """The newest checkpoint, and whether anybody can say."""
    try:
        return newest_step(record.job), True
    except Unseen:
        return None, False
