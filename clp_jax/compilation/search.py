"""Tries layouts, remat policies and batch sizes, and recommends."""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from clp_jax.compilation.report import Report


@dataclasses.dataclass(frozen=True)
class Trial:
    """One thing to try.

    Attributes:
        layout: a gin file of rules.
        remat: policy.
        batch: rows.
    """

    layout: str
    remat: str
    batch: int

    @property
    def files(self) -> tuple[str, ...]:
        """Gin files behind those of the run."""
        return (self.layout,)

    @property
    def bindings(self) -> tuple[str, ...]:
        """Bindings behind those of the run."""
        return (f"REMAT={self.remat!r}", f"BATCH_SIZE={self.batch}")


@dataclasses.dataclass(frozen=True)
class Findings:
    """What a search found.

    Attributes:
        tried: in order, with a report, or why there is none.
    """

    tried: tuple[tuple[Trial, Report | str], ...]

    @property
    def best(self) -> Report:
        """What fits and trains most tokens a second, in whole steps; where none fits, the one that comes closest.

        Raises:
            ValueError: when nothing could be compiled.
        """
        return self._best()[1]

    def _best(self) -> tuple[Trial, Report]:
        reports = [(trial, found) for trial, found in self.tried if isinstance(found, Report)]
        if not reports:
            raise ValueError(f"nothing could be compiled: {'; '.join(str(found) for _, found in self.tried)}")
        return max(reports, key=lambda pair: (pair[1].fits, pair[1].step_rate if pair[1].fits else -_excess(pair[1])))

    def to_json(self) -> dict[str, Any]:
        """All reports, and the recommendation: None where nothing could be compiled."""
        tried = [
            dataclasses.asdict(trial) | ({"refused": found} if isinstance(found, str) else {"report": found.to_json()})
            for trial, found in self.tried
        ]
        if all(isinstance(found, str) for _, found in self.tried):
            return {"tried": tried, "recommended": None, "fits": False}
        trial, report = self._best()
        return {"tried": tried, "recommended": dataclasses.asdict(trial), "fits": report.fits}

    def show(self, console: Console) -> None:
        """Writes a table, the recommendation and its report."""
        table = Table("layout", "remat", "batch", "HBM GiB", "fits", "ms a step", "made of", "MFU", "tokens/s/chip")
        for trial, found in self.tried:
            first = (trial.layout, trial.remat, str(trial.batch))
            if isinstance(found, str):
                table.add_row(*first, "", "refused")
                continue
            needed = max(program.memory.needed for program in found.programs) / 2**30
            made_of = " + ".join(
                f"{f'{runs} x ' if runs > 1 else ''}{program.seconds * 1e3:,.1f} {program.name}"
                for runs, program in found.parts
            )
            figures = (
                f"{found.step_seconds * 1e3:,.1f}",
                made_of,
                f"{100 * found.step_mfu:.1f} %",
                f"{found.step_rate:,.0f}",
            )
            table.add_row(*first, f"{needed:.2f}", "yes" if found.fits else "no", *(figures if found.fits else ()))
        console.print(table)
        for trial, found in self.tried:
            if isinstance(found, str):
                console.print(f"{trial.layout}, {trial.remat}, batch {trial.batch}: {found}")
        trial, report = self._best()
        verb = "recommended" if report.fits else "nothing fits; the closest is"
        console.print(f"{verb}: {trial.layout}, REMAT={trial.remat!r}, BATCH_SIZE={trial.batch}")
        report.show(console)


def alternatives(batch: int, layouts: Sequence[str], remats: Sequence[str], batches: Sequence[int]) -> list[Trial]:
    """Everything to try, smaller batches first.

    Args:
        batch: the run's own; its half, itself and its double are tried where `batches` is empty.
        layouts: gin files.
        remats: policies.
        batches: rows.
    """
    sizes = sorted(batches or {max(1, batch // 2), batch, 2 * batch})
    return [Trial(*one) for one in itertools.product(layouts, remats, sizes)]


def explore(
    trials: Iterable[Trial],
    compile_trial: Callable[[Sequence[str], Sequence[str]], Report],
    console: Console,
    note: Callable[[Findings], None],
) -> Findings:
    """Compiles one after another; larger batches of what did not fit are left out.

    Args:
        trials: smaller batches first.
        compile_trial: of gin files and bindings behind the run's own.
        console: where progress goes.
        note: is called with what was found so far, after each trial.
    """
    tried: list[tuple[Trial, Report | str]] = []
    full: set[tuple[str, str]] = set()
    for trial in trials:
        if (trial.layout, trial.remat) in full:
            continue
        console.print(f"compiling {trial.layout}, {trial.remat}, batch {trial.batch}")
        try:
            found: Report | str = compile_trial(trial.files, trial.bindings)
        except ValueError as error:  # A batch or a layer that does not divide, or the compiler's own refusal.
            found = str(error)
        if isinstance(found, Report) and not found.fits:
            full.add((trial.layout, trial.remat))
        tried.append((trial, found))
        note(Findings(tuple(tried)))
    return Findings(tuple(tried))


def _excess(report: Report) -> int:
    return max(program.memory.needed - program.memory.limit for program in report.programs)
