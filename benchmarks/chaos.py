"""Kills the processes of real runs again and again, and compares what comes out with runs that nobody disturbed.

A tiny policy is trained, packed supervised examples (packed) or reinforcement learning with rollouts (policy), on four
virtual devices of 1, 2 or 4 processes. SIGKILL of one or of all comes while they start, between steps, in a rollout, or
while a checkpoint is written. The run goes on with as many processes, or with another number, is killed again, and in the
end everything is compared: checkpoints with optimizer slots and random key, metrics of each step, batches. All bits must be
the same, on another number of processes too. Where each process brings four devices of its own (1-2x4), another number of
processes is another mesh: numbers must be the same to 1e-6 of what they are made of (`same_runs.natural_scale`).
"""

import argparse
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

KILLS_OF_A_RUN = 5
MOST_STARTS = 40


class Chaos:
    """Disturbs runs until so many kills, or so much time, are used up.

    Args:
        directory: for everything.
        kills: at most.
        seconds: after which nothing more is killed; what runs is brought to its end.
        seed: of what is killed when.
    """

    def __init__(self, directory: Path, kills: int, seconds: float, seed: int):
        self._directory, self._kills = directory, kills
        self._since, self._seconds = time.monotonic(), seconds
        self._rng = np.random.default_rng(seed)
        self._home = make_home(directory / "home")
        self._calm: dict[str, Run] = {}
        self._started: dict[tuple[str, int], float] = {}
        self._aims = self._moments()
        self.runs: list[Run] = []

    @property
    def killed(self) -> int:
        """Kills so far."""
        return sum(len(run.kills) for run in self.runs)

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
                kill = None if len(run.kills) >= KILLS_OF_A_RUN or self.is_over() else self._kill(life)
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


def table(runs: Sequence[Run]) -> str:
    """Two tables in Markdown: of kills by moment, and of runs."""
    kills = [kill for run in runs for kill in run.kills]
    lines = [
        "| killed | kills | of all processes | of one of several | on another number next | steps made again: median | most |",
        "|---|---|---|---|---|---|---|",
    ]
    names = {
        "start": "while starting or restoring",
        "step": "in an update",
        "read": "while reading a batch",
        "rollout": "in a rollout",
        "save": "while a checkpoint is written",
    }
    for moment, name in [*names.items(), ("", "in all")]:
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
    for name in Counter(run.course.name for run in runs):
        own = [run for run in runs if run.course.name == name]
        hit = [kill for run in own for kill in run.kills]
        exact = own[0].course.exact
        cells = (
            name,
            len(own),
            len(hit),
            sum(len(run.lives) for run in own),
            sum(run.by_itself for run in own),
            sum(kill.again for kill in hit),
            sum(len(damaged(run.path)) for run in own),
            sum(len(run.failures) for run in own),
            "the same bits" if exact and not any(run.failures for run in own) else f"{max(r.largest for r in own):.1e}",
        )
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    ended = [kill.others_ended for kill in kills if len(kill.victims) < kill.count]
    if ended:
        lines += ["", f"When one of several was killed, the others ended within {max(ended):.1f} s."]
    return "\n".join(lines)


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="at most (default: 20; 100 take half an hour on 2 cores)")
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
    parser.add_argument("--directory", type=Path, help="for the runs, which stay there; a temporary one by default")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> int:
    """Kills, prints the tables, and returns 1 where something was lost."""
    arguments = parse(words)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # No process of ours outlives this one.
    courses = [
        Course(stage, tuple(map(int, counts.split("-"))), arguments.steps, arguments.every, int(each) if each else None)
        for counts, _, each in (asked.partition("x") for asked in arguments.processes.split(","))
        for stage in arguments.stages.split(",")
    ]
    with tempfile.TemporaryDirectory() as temporary:
        directory = arguments.directory or Path(temporary)
        directory.mkdir(parents=True, exist_ok=True)
        chaos = Chaos(directory.absolute(), arguments.kills, arguments.seconds, arguments.seed)
        while not chaos.is_over():
            for course in courses:
                if not chaos.is_over():
                    chaos.disturb(course)
        print(f"\n{table(chaos.runs)}")
        if arguments.json:
            found = [
                {
                    "run": run.course.name,
                    "exact": run.course.exact,
                    "damaged": len(damaged(run.path)),
                    "kills": [dataclasses.asdict(kill) for kill in run.kills],
                    "starts": len(run.lives),
                    "by_itself": run.by_itself,
                    "failures": run.failures,
                    "largest": run.largest,
                }
                for run in chaos.runs
            ]
            Path(arguments.json).write_text(
                json.dumps({"arguments": vars(arguments), "runs": found}, indent=1, default=str)
            )
        return int(any(run.failures for run in chaos.runs))


if __name__ == "__main__":
    sys.exit(main())
