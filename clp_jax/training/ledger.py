"""Where the time of a run went: every second since it began belongs to one activity, over all its restarts.

Activities nest: while one is inside another, time is the inner one's. Compiling is told by JAX, and taken from what caused it.
"""

import contextlib
import contextvars
import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from clp_jax.training.run_directory import write_atomically

OTHER, COMPILE, DATA, ROLLOUT, STEP = "other", "compile", "data", "rollout", "step"
SAVE, RESTORE, EVALUATION, LOST = "save", "restore", "evaluation", "lost"
ACTIVITIES = (COMPILE, DATA, ROLLOUT, STEP, SAVE, RESTORE, EVALUATION, OTHER, LOST)
SECONDS, REPEATED = "seconds/", "repeated_steps"
LEDGER_METRICS = frozenset({*(SECONDS + name for name in ACTIVITIES), REPEATED})
_KEPT = 16  # Records in the file: more than there are checkpoints to go back to.
_COMPILING = "/jax/core/compile/"

_CURRENT: contextvars.ContextVar["Ledger | None"] = contextvars.ContextVar("ledger", default=None)


class Ledger:
    """The seconds of each activity; a context manager that makes it the one `spending` writes to.

    Args:
        clock: seconds; replaced in tests.
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic):
        self.step = 0  # The last that was looked at.
        self._repeated = 0
        self._seconds = dict.fromkeys(ACTIVITIES, 0.0)
        self._clock = clock
        self._now = OTHER
        self._since = clock()
        self._compiled: list[tuple[float, float]] = []  # Disjoint, in order: reports of what is compiled inside nest.
        self._thread = threading.get_ident()
        self._token: Any = None

    def __enter__(self) -> "Ledger":
        _listen()
        self._token = _CURRENT.set(self)
        return self

    def __exit__(self, *exc_info: object) -> None:
        _CURRENT.reset(self._token)

    def carry(self, before: Mapping[str, float], repeated: int, step: int) -> None:
        """Adds what the earlier processes of the run spent, as `carried` says it.

        Args:
            before: seconds by activity.
            repeated: steps that were made, and are made again.
            step: where the run goes on.
        """
        for name, value in before.items():
            self._seconds[name] += value
        self._repeated += repeated
        self.step = step

    @property
    def seconds(self) -> dict[str, float]:
        """By activity, up to now; their sum is the time since the run began, without what it stood still."""
        self._settle()
        return dict(self._seconds)

    @property
    def metrics(self) -> dict[str, float | int]:
        """The same, as metrics."""
        return {SECONDS + name: value for name, value in self.seconds.items()} | {REPEATED: self._repeated}

    @contextlib.contextmanager
    def spend(self, activity: str) -> Iterator[None]:
        """Time inside is this activity's, unless another one is entered there."""
        self._settle()
        outer, self._now = self._now, activity
        try:
            yield
        finally:
            self._settle()
            self._now = outer

    def compiled(self, seconds: float) -> None:
        """Takes the last so many seconds from the present activity; those that were taken before only once."""
        end = self._clock()
        start = end - seconds
        self._settle()
        while self._compiled and self._compiled[-1][0] >= start:
            first, last = self._compiled.pop()
            seconds -= last - first
        if self._compiled and self._compiled[-1][1] > start:
            seconds -= self._compiled[-1][1] - start
            start = self._compiled.pop()[0]
        self._compiled.append((start, end))
        taken = min(max(seconds, 0.0), self._seconds[self._now])
        self._seconds[self._now] -= taken
        self._seconds[COMPILE] += taken

    def summary(self) -> str:
        """One line for people."""
        seconds = self.seconds
        total = max(sum(seconds.values()), 1e-9)
        useful = 100 * (seconds[STEP] + seconds[ROLLOUT]) / total
        parts = [f"{name} {seconds[name]:.1f}" for name in ACTIVITIES if seconds[name] >= 0.05]
        again = f"; {self._repeated} steps made again" if self._repeated else ""
        return f"time: {useful:.0f} % of {total:.1f} s were steps and rollouts ({', '.join(parts)}){again}"

    def note(self, path: Path) -> None:
        """Adds what was spent up to now to a run's file, for those who go on from there."""
        record = {"step": self.step, "seconds": self.seconds, "repeated": self._repeated}
        write_atomically(path, json.dumps([*read_records(path), record][-_KEPT:]) + "\n")

    def _settle(self) -> None:
        now = self._clock()
        self._seconds[self._now] += now - self._since
        self._since = now


def spending(activity: str) -> contextlib.AbstractContextManager[None]:
    """`Ledger.spend` of the active ledger; nothing where there is none."""
    ledger = _CURRENT.get()
    return contextlib.nullcontext() if ledger is None else ledger.spend(activity)


def read_records(path: Path) -> list[dict[str, Any]]:
    """What `Ledger.note` wrote."""
    return json.loads(path.read_text()) if path.is_file() else []


def carried(
    records: Iterable[Mapping[str, Any]], metrics: Iterable[Mapping[str, Any]], step: int
) -> tuple[dict[str, float], int]:
    """What the earlier processes of a run spent, seen from where it goes on.

    What was spent after that step is lost: its steps are made again.

    Args:
        records: of `Ledger.note`.
        metrics: lines of the run's metrics, before those after `step` are dropped.
        step: of the state that the run goes on from.

    Returns:
        Seconds by activity, and the steps made again, in all.
    """
    known = [(int(r["step"]), dict(r["seconds"]), int(r["repeated"])) for r in records]
    for line in metrics:
        if SECONDS + OTHER in line:
            seconds = {name: line[SECONDS + name] for name in ACTIVITIES}
            known.append((int(line["step"]), seconds, int(line[REPEATED])))
    known.sort(key=lambda record: sum(record[1].values()))
    if not known:
        return {}, 0
    last_step, last, repeated = known[-1]
    kept = next((seconds for at, seconds, _ in reversed(known) if at <= step), dict.fromkeys(ACTIVITIES, 0.0))
    lost = sum(last.values()) - sum(kept.values())
    return kept | {LOST: kept[LOST] + lost}, repeated + max(last_step - step, 0)


def _listen() -> None:
    """Hears of compiling, from the first ledger on."""
    global _listening
    if _listening:
        return
    _listening = True

    def heard(event: str, duration_secs: float, **_: Any) -> None:
        ledger = _CURRENT.get()
        if ledger is not None and event.startswith(_COMPILING) and ledger._thread == threading.get_ident():
            ledger.compiled(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(heard)


_listening = False
