"""Kills the processes of real runs again and again, and compares what comes out with runs that nobody disturbed.

A tiny policy is trained, packed supervised examples (packed) or reinforcement learning with rollouts (policy), on four
virtual devices of 1, 2 or 4 processes. SIGKILL of one or of all comes while they start, between steps, in a rollout, or
while a checkpoint is written. The run goes on with as many processes, or with another number, is killed again, and in the
end everything is compared: checkpoints with optimizer slots and random key, metrics of each step, batches. All bits must be
the same, on another number of processes too. Where each process brings four devices of its own (1-2x4), another number of
processes is another mesh: numbers must be the same to 1e-6 of what they are made of (`same_runs.natural_scale`).
"""

import argparse
import contextlib
import dataclasses
import json
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from killed_runs import AIMS, Course, Kill, Life, Run
from same_runs import damaged

from groups import make_home  # isort: skip - `killed_runs` says where it is.

MOST_KILLS_OF_A_RUN = 5
MOST_STARTS = 40


class Chaos:
    """Disturbs runs until so many kills, or so much time, are used up.

    Args:
        directory: for everything.
        kills: at most.
        seconds: after which nothing more is killed; what runs is brought to its end.
        seed: of what is killed when.
        courses: among which the kills are divided.
    """

    def __init__(self, directory: Path, kills: int, seconds: float, seed: int, courses: int):
        self._directory, self._kills = directory, kills
        self._kills_of_a_run = min(MOST_KILLS_OF_A_RUN, -(-kills // courses))
        self._since, self._seconds = time.monotonic(), seconds
        self._rng = np.random.default_rng(seed)
        self._home = directory / "home"
        if not (self._home / "sft").is_dir():
            make_home(self._home)
        self._calm: dict[str, Run] = {}
        self._started: dict[tuple[str, int], float] = {}
        self._aims = self._moments()
        self.runs: list[Run] = []

    @property
    def killed(self) -> int:
        """Kills so far."""
        return sum(len(run.kills) for run in self.runs)

    @property
    def outcomes(self) -> list["Outcome"]:
        """Of the runs that are complete."""
        return [Outcome.of(run) for run in self.runs if run.compared]

    def is_over(self) -> bool:
        """Whether nothing more is killed."""
        return self.killed >= self._kills or time.monotonic() - self._since > self._seconds

    def disturb(self, course: Course) -> None:
        """Disturbs one run, and compares it."""
        calm = self._undisturbed(course)
        run = self._new(course)
        self.runs.append(run)
        count = int(self._rng.choice(course.counts))
        for _ in range(MOST_STARTS):
            life = run.begin(count)
            try:
                kill = None if len(run.kills) >= self._kills_of_a_run or self.is_over() else self._kill(life)
                complete = run.end(life, kill)
            finally:
                life.group.kill()
            if kill is not None:
                self._say(str(kill))
            if complete:
                break
            others = [other for other in course.counts if other != count]
            # Another number twice as often as the same.
            count = int(self._rng.choice([count, *others, *others]))
        run.compare(calm)
        rounding = "" if course.exact else f", the largest difference {run.largest:.1e}"
        self._say(f"{course.name}: complete after {len(run.lives)} starts, {len(run.failures)} failures{rounding}")
        for line in run.failures[:8]:
            self._say(f"  {line}")

    def _kill(self, life: Life) -> Kill | None:
        key = (life.course.stage, life.count)
        every = life.count == 1 or self._rng.random() < 0.5
        victims = list(range(life.count)) if every else [int(self._rng.integers(life.count))]
        kill = life.kill(next(self._aims), victims, self._rng, self._started.get(key, 4.0))
        if life.started is not None:
            self._started[key] = life.started
        return kill

    def _undisturbed(self, course: Course) -> Run:
        """On one process."""
        if course.stage not in self._calm:
            run = self._new(dataclasses.replace(course, counts=(1,), each=None))
            life = run.begin(1)
            try:
                run.end(life, None)
            finally:
                life.group.kill()
            assert len(life.begun()) == course.steps, life.group.text()
            self._calm[course.stage] = run
            self._say(f"{course.stage}: undisturbed")
        return self._calm[course.stage]

    def _new(self, course: Course) -> Run:
        number = len(self.runs) + len(self._calm)
        directory = self._directory / f"{number}-{course.name.replace(', ', '-')}"
        return Run(course, directory, self._home)

    def _moments(self) -> Iterator[str]:
        while True:
            # Starts are long, and the least likely to hurt.
            yield str(self._rng.choice(AIMS, p=(0.1, 0.25, 0.3, 0.35)))

    def _say(self, text: str) -> None:
        print(f"[{self.killed:3}/{self._kills} {time.monotonic() - self._since:5.0f} s] {text}", flush=True)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of a run that was disturbed.

    Attributes:
        run: the name of its course.
        exact: whether all bits had to be the same.
        kills: that it took.
        starts: of all its lives.
        by_itself: starts that ended, restartable, without a kill.
        damaged: checkpoints that were set aside.
        failures: what must not be.
        largest: relative difference of numbers, in the end.
    """

    run: str
    exact: bool
    kills: list[Kill]
    starts: int
    by_itself: int
    damaged: int
    failures: list[str]
    largest: float

    @classmethod
    def of(cls, run: Run) -> "Outcome":
        """That of a run that has been compared."""
        return cls(
            run=run.course.name,
            exact=run.course.exact,
            kills=run.kills,
            starts=len(run.lives),
            by_itself=run.by_itself,
            damaged=len(damaged(run.path)),
            failures=run.failures,
            largest=run.largest,
        )

    @classmethod
    def read(cls, path: str) -> list["Outcome"]:
        """Those that ``--json`` wrote."""
        rows = json.loads(Path(path).read_text())["runs"]
        return [cls(**row | {"kills": [Kill(**kill) for kill in row["kills"]]}) for row in rows]


MOMENTS = {
    "start": "while starting or restoring",
    "step": "in an update",
    "read": "while reading a batch",
    "rollout": "in a rollout",
    "save": "while a checkpoint is written",
    "": "in all",
}


def table(outcomes: Sequence[Outcome]) -> str:
    """Two tables in Markdown: of kills by moment, and of runs."""
    kills = [kill for outcome in outcomes for kill in outcome.kills]
    lines = [
        "| killed | kills | of all processes | of one of several | on another number next | steps made again: median | most |",
        "|---|---|---|---|---|---|---|",
    ]
    for moment, name in MOMENTS.items():
        rows = [kill for kill in kills if not moment or moment in kill.found]
        if rows:
            whole = sum(len(kill.victims) == kill.count for kill in rows)
            moved = sum(kill.went_on_with != kill.count for kill in rows)
            again = [kill.again for kill in rows]
            cells = (name, len(rows), whole, len(rows) - whole, moved, f"{statistics.median(again):g}", max(again))
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    lines += [
        "",
        "| run, processes | runs | kills | starts | ended by themselves | steps made again | damaged checkpoints | failures | "
        "largest difference |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name in Counter(outcome.run for outcome in outcomes):
        own = [outcome for outcome in outcomes if outcome.run == name]
        hit = [kill for outcome in own for kill in outcome.kills]
        failures = sum(len(outcome.failures) for outcome in own)
        same = own[0].exact and not failures
        cells = (
            name,
            len(own),
            len(hit),
            sum(outcome.starts for outcome in own),
            sum(outcome.by_itself for outcome in own),
            sum(kill.again for kill in hit),
            sum(outcome.damaged for outcome in own),
            failures,
            "the same bits" if same else f"{max(outcome.largest for outcome in own):.1e}",
        )
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    ended = [kill.others_ended for kill in kills if len(kill.victims) < kill.count]
    if any(ended):
        lines += ["", f"When one of several was killed, the others ended within {max(ended):.1f} s."]
    return "\n".join(lines)


def write(outcomes: Sequence[Outcome], arguments: argparse.Namespace) -> None:
    """What ``--json`` asks for, of the runs so far."""
    if arguments.json:
        found = {"arguments": vars(arguments), "runs": [dataclasses.asdict(outcome) for outcome in outcomes]}
        Path(arguments.json).write_text(json.dumps(found, indent=1, default=str))


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--kills", type=int, default=20, help="at most (default: 20; 100 take half an hour on 2 quiet cores)"
    )
    parser.add_argument(
        "--seconds", type=float, default=3600, help="after which nothing more is killed (default: 3600)"
    )
    parser.add_argument("--stages", default="packed,policy", help="which runs (default: packed,policy)")
    parser.add_argument(
        "--processes",
        default="1,2,4,1-2-4,1-2x4",
        help="on how many, of four devices; 1-2-4 takes another number each time, 1-2x4 another mesh too, each process having "
        "four devices (default: 1,2,4,1-2-4,1-2x4)",
    )
    parser.add_argument("--steps", type=int, default=16, help="of each run (default: 16)")
    parser.add_argument("--every", type=int, default=3, help="steps between checkpoints (default: 3)")
    parser.add_argument("--seed", type=int, default=0, help="of what is killed when (default: 0)")
    parser.add_argument("--json", metavar="FILE", help="write kills and runs there, too")
    parser.add_argument(
        "--show", metavar="FILE", nargs="+", help="kill nothing, and print the tables of what --json wrote"
    )
    parser.add_argument(
        "--directory",
        type=Path,
        help="for the runs, which stay there, with data and compiled programs for others; a temporary one by default",
    )
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> int:
    """Kills, prints the tables, and returns 1 where something was lost."""
    arguments = parse(words)
    if arguments.show:
        print(table([outcome for path in arguments.show for outcome in Outcome.read(path)]))
        return 0
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # No process of ours outlives this one.
    courses = [
        Course(stage, tuple(map(int, counts.split("-"))), arguments.steps, arguments.every, int(each) if each else None)
        for counts, _, each in (asked.partition("x") for asked in arguments.processes.split(","))
        for stage in arguments.stages.split(",")
    ]
    with tempfile.TemporaryDirectory() as temporary:
        directory = arguments.directory or Path(temporary)
        directory.mkdir(parents=True, exist_ok=True)
        chaos = Chaos(directory.absolute(), arguments.kills, arguments.seconds, arguments.seed, len(courses))
        # Whoever stops it is told what came of the runs so far.
        with contextlib.suppress(KeyboardInterrupt):
            while not chaos.is_over():
                for course in courses:
                    if not chaos.is_over():
                        chaos.disturb(course)
                        write(chaos.outcomes, arguments)
        outcomes = chaos.outcomes
    write(outcomes, arguments)
    print(f"\n{table(outcomes)}")
    return int(any(outcome.failures for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
