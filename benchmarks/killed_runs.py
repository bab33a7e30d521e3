"""Runs that are killed: real processes, watched through what they leave on the disk, and what came of each kill."""

import dataclasses
import json
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from etils import epath

ROOT = Path(__file__).parents[1]
DEVICES = 4
sys.path[:0] = [str(ROOT / place) for place in ("benchmarks", "tests/multi_process", "tests/fixtures", ".")]

from groups import start  # noqa: E402
from same_runs import Comparison, damaged  # noqa: E402

from clp_jax.processes import RESTARTABLE  # noqa: E402
from clp_jax.training.checkpoint_steps import complete_steps, unfinished_steps  # noqa: E402

ROWS = {"packed": 8, "policy": 16}  # Examples of a batch.
AIMS = ("start", "step", "rollout", "save")
# Codes of those that were not killed: complete, restartable, or ended by JAX because process 0 is gone.
ENDS = (0, RESTARTABLE, -signal.SIGABRT)
LOOK = 0.01  # Seconds between looks at what processes have left.
LONGEST_LIFE = 1200.0
OTHERS_END = 60.0


@dataclasses.dataclass(frozen=True)
class Course:
    """What is run, and on what.

    Attributes:
        stage: a name of `worker.JOBS`.
        counts: of processes, from which each start takes one.
        steps: of the run.
        every: steps between checkpoints.
        each: devices of each process, so that another number of processes is another mesh; None divides `DEVICES` among them.
    """

    stage: str
    counts: tuple[int, ...]
    steps: int
    every: int
    each: int | None = None

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.stage}, {'-'.join(map(str, self.counts))}" + (f"x{self.each}" if self.each else "")

    @property
    def exact(self) -> bool:
        """Whether the mesh is always that of the undisturbed run, and so are the bits."""
        return all(count * self.devices(count) == DEVICES for count in self.counts)

    def devices(self, count: int) -> int:
        """Those of each of so many processes."""
        return DEVICES // count if self.each is None else self.each


@dataclasses.dataclass
class Kill:
    """One SIGKILL, and what came of it.

    Attributes:
        course: its name.
        count: of processes.
        victims: those that were killed.
        aim: what was waited for.
        found: what the processes were doing, by what they left.
        reached: steps made, as far as the notes tell.
        kept: the last complete step when all had ended.
        others_ended: seconds until those that were not killed had ended.
        went_on_with: processes of the next start.
        went_on_from: its first step.
        failure: what those that were not killed did instead of ending well; None where they did.
    """

    course: str
    count: int
    victims: list[int]
    aim: str
    found: list[str]
    reached: int
    kept: int
    others_ended: float
    went_on_with: int | None = None
    went_on_from: int | None = None
    failure: str | None = None

    @property
    def again(self) -> int:
        """Steps that were made, and are made again."""
        return max(0, self.reached - (self.went_on_from or 0))

    def __str__(self) -> str:
        who = f"{len(self.victims)} of {self.count}"
        return f"{self.course}: killed {who} ({', '.join(self.found)}) at step {self.reached}, kept {self.kept}"


class Life:
    """One start of a run: its processes, watched through what they leave on the disk.

    Args:
        course: of the run.
        directory: of the run; the number tells one life's notes from the other's.
        home: with the data.
        number: of this start.
        count: of processes.
    """

    def __init__(self, course: Course, directory: Path, home: Path, number: int, count: int):
        self.course, self.count = course, count
        self._checkpoints = epath.Path(directory / "run" / "checkpoints")
        notes = directory / f"life{number}"
        job = {"name": course.stage, "run_dir": str(directory / "run"), "notes": str(notes)}
        job |= {"num_steps": course.steps, "checkpoint_every": course.every}
        self._since = time.monotonic()
        self.started: float | None = None  # Seconds from the start to the first step.
        self.group = start(
            notes.with_suffix(".group"),
            home,
            [job],
            num_processes=count,
            devices=course.devices(count),
            CLP_HEARTBEAT_SECONDS="6",
            # One that is killed before it has joined is, for the others, one that was never started.
            CLP_STARTUP_SECONDS=str(int(0.75 * OTHERS_END)),
        )
        self.notes = [directory / f"life{number}.notes.{count}.{i}" for i in range(count)]

    def has_ended(self) -> bool:
        """Whether any process has."""
        return any(process.poll() is not None for process in self.group.processes)

    def begun(self, process: int = 0) -> list[int]:
        """Steps that were made before each step that a process has begun."""
        text = self.notes[process].read_text() if self.notes[process].is_file() else ""
        lines = [json.loads(line) for line in text.splitlines() if line.startswith('{"begins"') and line.endswith("}")]
        return [line["begins"] // ROWS[self.course.stage] for line in lines]

    def draws(self, process: int) -> bool:
        """Whether a process is making a batch: reads, or rolls out."""
        path = self.notes[process]
        return path.is_file() and path.read_text().rpartition("\n")[0].rpartition("\n")[2].startswith('{"begins"')

    def saves(self) -> bool:
        """Whether a checkpoint is being written, or removed."""
        return bool(unfinished_steps(self._checkpoints))

    def wait_until(self, happened: Callable[[], object]) -> bool:
        """Whether it happened before a process ended."""
        while not happened():
            if self.has_ended() or time.monotonic() - self._since > LONGEST_LIFE:
                return False
            time.sleep(LOOK)
        return not self.has_ended()

    def kill(self, aim: str, victims: Sequence[int], rng: np.random.Generator, started: float) -> Kill | None:
        """Kills at a moment; None where a process ended before.

        Args:
            aim: one of `AIMS`.
            victims: numbers of processes.
            rng: decides the moment.
            started: seconds that such a start took before.
        """
        if aim == "start":
            end = time.monotonic() + rng.uniform(0.1, 1.0) * started
            lives = self.wait_until(lambda: time.monotonic() > end)
        else:
            lives = self.wait_until(self.begun)
            self.started = time.monotonic() - self._since
            more = int(rng.integers(1, 2 * self.course.every + 1))
            lives = lives and self.wait_until(
                lambda: len(self.begun()) >= min(more, self.course.steps - self.begun()[0])
            )
            pause = rng.uniform(0, {"step": 0.15, "rollout": 0.02, "save": 0.1}[aim])
            happens = {"rollout": lambda: self.draws(victims[0]), "save": self.saves}.get(aim, lambda: True)
            lives = lives and self.wait_until(happens)
            if lives:
                time.sleep(pause)
                lives = self.wait_until(happens)  # It may be over: then the next time.
        if not lives or self.has_ended():
            return None
        saving = self.saves()
        for victim in victims:
            self.group.processes[victim].kill()
        found = self._found(victims, saving and self.saves())
        since = time.monotonic()
        failure = None
        try:
            codes = self.group.wait(OTHERS_END)
            if any(code not in ENDS for number, code in enumerate(codes) if number not in victims):
                failure = f"processes that were not killed ended with {codes}.\n{self.group.text()}"
        except AssertionError as error:  # They live on, or did until now.
            failure = str(error)
        others = time.monotonic() - since if len(victims) < self.count else 0.0
        reached = max(self._made(number) for number in range(self.count))
        kept = max(complete_steps(self._checkpoints), default=0)
        return Kill(self.course.name, self.count, list(victims), aim, found, reached, kept, others, failure=failure)

    def _made(self, process: int) -> int:
        """Updates that a process had begun, this life's and those before."""
        begun = self.begun(process)
        return begun[-1] + (not self.draws(process)) if begun else 0

    def _found(self, victims: Sequence[int], saving: bool) -> list[str]:
        found = ["save"] if saving else []
        if not self.begun(victims[0]):
            return [*found, "start"]
        if self.draws(victims[0]):
            return [*found, "rollout" if self.course.stage == "policy" else "read"]
        return [*found, "step"]


class Run:
    """A run that is disturbed until it is complete.

    Args:
        course: what is run.
        directory: for it.
        home: with the data.

    Attributes:
        lives: its starts.
        kills: what happened to it.
        by_itself: starts that ended, restartable, without a kill.
        failures: what must not be.
        largest: relative difference of numbers, in the end.
        compared: whether that has been looked at.
    """

    def __init__(self, course: Course, directory: Path, home: Path):
        self.course, self._directory, self._home = course, directory, home
        self.path = directory / "run"
        self.lives: list[Life] = []
        self.kills: list[Kill] = []
        self.by_itself = 0
        self.failures: list[str] = []
        self.largest = 0.0
        self.compared = False

    @property
    def notes(self) -> list[Path]:
        """Of all processes that it ever had."""
        return [path for life in self.lives for path in life.notes]

    def begin(self, count: int) -> Life:
        """Starts its processes."""
        life = Life(self.course, self._directory, self._home, len(self.lives), count)
        self.lives.append(life)
        if self.kills and self.kills[-1].went_on_with is None:
            self.kills[-1].went_on_with = count
        return life

    def end(self, life: Life, kill: Kill | None) -> bool:
        """Looks at what a start has come to; whether the run is complete."""
        codes = life.group.wait(LONGEST_LIFE) if kill is None else []
        if life.begun():
            self._check_resumption(life.begun()[0])
        if kill is not None:
            if self.kills and kill.kept < self.kills[-1].kept:
                self.failures.append(f"{kill}: step {self.kills[-1].kept} was there before")
            if kill.failure is not None:
                self.failures.append(f"{kill}: {kill.failure}")
            self.kills.append(kill)
        elif set(codes) <= set(ENDS) and any(codes):
            self.by_itself += 1
        elif any(codes):
            raise AssertionError(f"{self.course.name} ended with {codes}.\n{life.group.text()}")
        return set(codes) == {0}

    def compare(self, calm: "Run") -> None:
        """Everything, with a run that nobody disturbed."""
        comparison = Comparison(exact=self.course.exact)
        comparison.checkpoints(self.path, calm.path)
        comparison.metrics(self.path, calm.path)
        comparison.batches(self.notes, calm.notes)
        self.failures += comparison.differences
        self.failures += [f"{name} was set aside: {reason}" for name, reason in damaged(self.path).items()]
        self.largest = comparison.largest
        self.compared = True

    def _check_resumption(self, step: int) -> None:
        open_kills = [kill for kill in self.kills if kill.went_on_from is None]
        for kill in open_kills:
            kill.went_on_from = step
        if not open_kills:
            return
        kill = open_kills[-1]
        if step != kill.kept:
            self.failures.append(f"{kill}: went on from step {step}")
        # A save is over before the next one begins: what is lost is less than what comes before that.
        most = 2 * self.course.every if "save" in kill.found else self.course.every
        if kill.reached - kill.kept > most:
            self.failures.append(f"{kill}: more than {most} steps were lost")
