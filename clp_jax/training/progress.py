"""What the user sees of a running stage: a bar on a terminal, a line now and then elsewhere."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any


class Progress:
    """Steps per second, tokens per second, time left and the loss; a context manager.

    Args:
        name: of the stage.
        num_steps: of the whole run.
        start: steps made before.
        tokens_per_step: for tokens per second.
        unit: what a step is called.
        stream: standard error by default, so that results can be piped.
        line_every: seconds between lines where `stream` is not a terminal.
        clock: seconds; replaced in tests.
    """

    def __init__(
        self,
        name: str,
        num_steps: int,
        start: int,
        tokens_per_step: int,
        *,
        unit: str = "steps",
        stream: Any | None = None,
        line_every: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._name = name
        self._num_steps = num_steps
        self._start = start
        self._tokens_per_step = tokens_per_step
        self._stream = sys.stderr if stream is None else stream
        self._unit = unit
        self._line_every = line_every
        self._clock = clock
        self._rate = _Rate(start, clock())
        self._last_line = float("-inf")
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> "Progress":
        if self._stream.isatty():
            self._bar = _bar(self._stream)
            self._task = self._bar.add_task(
                self._name, total=self._num_steps, completed=self._start, speed="", left="", status="starting"
            )
            self._bar.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def update(self, step: int, status: str) -> None:
        """Shows that `step` steps are done, and a word on the last, such as its loss."""
        rate = self._rate.update(step, self._clock())
        speed = "" if rate is None else f"{rate:.3g} {self._unit}/s  {_short(rate * self._tokens_per_step)} tokens/s"
        left = "" if rate is None else f"{_duration((self._num_steps - step) / rate)} left"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, speed=speed, left=left, status=status)
            return
        now = self._clock()
        if now - self._last_line >= self._line_every or step == self._num_steps:
            self._last_line = now
            self._print("  ".join(part for part in (f"{step}/{self._num_steps}", speed, left, status) if part))

    @contextlib.contextmanager
    def activity(self, what: str) -> Iterator[None]:
        """Shows what happens meanwhile, and leaves its time out of the steps per second."""
        if self._bar is not None:
            self._bar.update(self._task, status=what)
        before = self._clock()
        try:
            yield
        finally:
            self._rate.skip(self._clock() - before)

    def message(self, text: str) -> None:
        """Prints a line, above the bar where there is one."""
        if self._bar is not None:
            self._bar.console.print(f"{self._name}: {text}", markup=False, highlight=False, soft_wrap=True)
        else:
            self._print(text)

    def _print(self, text: str) -> None:
        print(f"{self._name}: {text}", file=self._stream, flush=True)


class _Rate:
    """Steps per second over about the last half minute; the first step, which compiles, does not count."""

    WINDOW = 30.0

    def __init__(self, start: int, now: float):
        self._first = start + 1
        self._anchors: list[tuple[int, float]] = []

    def update(self, step: int, now: float) -> float | None:
        if step < self._first:
            return None
        self._anchors.append((step, now))
        while len(self._anchors) > 2 and now - self._anchors[1][1] > self.WINDOW:
            self._anchors.pop(0)
        before, then = self._anchors[0]
        elapsed = now - then
        return (step - before) / elapsed if step > before and elapsed > 0 else None

    def skip(self, seconds: float) -> None:
        self._anchors = [(step, then + seconds) for step, then in self._anchors]


def _bar(stream: Any) -> Any:
    from rich import progress  # Costs a tenth of a second, which runs without a terminal need not pay.
    from rich.console import Console

    return progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(bar_width=None),
        progress.MofNCompleteColumn(),
        progress.TextColumn("{task.fields[speed]}"),
        progress.TextColumn("{task.fields[left]}"),
        progress.TextColumn("{task.fields[status]}"),
        console=Console(file=stream),
        expand=True,
        refresh_per_second=4,
    )


def _short(number: float) -> str:
    for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.3g}{suffix}"
    return f"{number:.0f}"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
