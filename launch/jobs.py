"""`clp jobs list|status|logs|stop|retry|watch`: what is known of jobs, and what a person may ask of them."""

import dataclasses
import shlex
import time
from collections.abc import Callable, Sequence

from clp_jax.launch.calls import show
from clp_jax.launch.command import look_after
from clp_jax.launch.errors import Held, LaunchError
from clp_jax.launch.job import JobRecord, all_records, jobs_directory
from clp_jax.launch.options import build, describe, option, split, suggest
from clp_jax.launch.renewal import begin_again, earlier_versions
from clp_jax.launch.supervisor import Patience, advance
from clp_jax.launch.supervisor import describe as describe_job
from clp_jax.launch.target import Unreachable
from clp_jax.launch.targets import find_target


@dataclasses.dataclass(frozen=True)
class JobsOptions:
    """What `clp jobs` takes."""

    follow: bool = option("logs: go on with what is written", False)
    lines: int | None = option("logs: the last lines of each worker", None)
    detach: bool = option("retry: look after the job in the background", False)
    look: float = option("retry, watch: seconds between two looks at a job", 10.0)

    def __post_init__(self) -> None:
        if self.lines is not None and self.lines < 0:
            raise LaunchError(f"--lines is {self.lines}: expected at least 0.")
        Patience(look=self.look)


def jobs(words: Sequence[str]) -> int:
    """Runs `clp jobs`.

    Args:
        words: what was typed after it.

    Returns:
        The exit code.

    Raises:
        LaunchError: for what is wrong with the words.
    """
    places, given, _ = split(words)
    if "help" in given or not places:
        print("\n".join([_USAGE, "", "Options:", *describe(JobsOptions)]))
        return 0
    action, *names = places
    if action not in _ACTIONS:
        raise LaunchError(f"clp jobs can't {action!r}{suggest(action, list(_ACTIONS))}.")
    if action not in ("list", "watch") and not names:
        raise LaunchError(f"of which job? clp jobs {action} NAME; clp jobs list tells the names.")
    options = build(JobsOptions, given, "clp jobs")
    records = [JobRecord.load(jobs_directory() / name) for name in names]
    return _ACTIONS[action](records, options)


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows with columns as wide as they need."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _list(records: Sequence[JobRecord], options: JobsOptions) -> int:
    rows: list[tuple[str, ...]] = [("NAME", "TARGET", "STATE", "ATTEMPT", "CHECKPOINT", "SINCE")]
    here = jobs_directory()
    found = sorted(path for path in here.glob("[!.]*") if (path / "job.json").is_file()) if not records else []
    for path in [record.path for record in records] or found:
        try:
            rows.append(_row(JobRecord.load(path)))
        except LaunchError as error:
            # One that is damaged hides no other.
            show(str(error))
            rows.append((path.name, "", "damaged", "", "", ""))
    print(table(rows))
    return 0


def _row(record: JobRecord) -> tuple[str, ...]:
    state = record.state
    if state is None:
        return record.job.name, record.job.target, "not begun", "", "", ""
    steps = [str(s.step) for s in record.states if s.step is not None]
    step = (steps or [""])[-1]
    return record.job.name, record.job.target, state.phase, str(state.attempt), step, _clock(state.time)


def _status(records: Sequence[JobRecord], options: JobsOptions) -> int:
    for record in records:
        job = record.job
        print(f"{job.name}\n  command: {shlex.join(job.command)}\n  directory: {job.directory}")
        if job.parameters:
            print(f"  tries: {' '.join(f'{name}={value}' for name, value in job.parameters.items())}")
        print(f"  target: {job.target} {' '.join(f'--{k}={v}' for k, v in job.options.items())}".rstrip())
        print(f"  code: {job.code_version}\n  run directory: {job.run_dir or 'not known'}\n  record: {record.path}")
        for attempt, version in earlier_versions(record).items():
            print(f"  code until attempt {attempt}: {version}")
        if not (record.is_over and record.kept("deleted")):
            print(f"  looked after: {'yes' if record.is_held else 'no: clp jobs watch ' + job.name}")
        for state in record.states:
            step = f"  checkpoint {state.step}" if state.step is not None else ""
            detail = state.detail.replace("\n", "\n" + " " * 31)
            print(f"  {_clock(state.time)}  attempt {state.attempt}  {state.phase}{step}  {detail}".rstrip())
    return 0


def _logs(records: Sequence[JobRecord], options: JobsOptions) -> int:
    for record in records:
        target = find_target(record.job.target, record.job.options)
        is_silent = True
        try:
            for line in target.logs(record, options.lines, options.follow):
                print(line, flush=True)
                is_silent = False
        except LaunchError:
            if not record.kept("deleted"):
                raise
        if is_silent and record.kept("deleted"):
            name = record.job.name
            show(
                f"{name}: what it ran on is given back, and its output with it; clp jobs status {name} has the last lines."
            )
    return 0


def _stop(records: Sequence[JobRecord], options: JobsOptions) -> int:
    for record in records:
        if record.is_over and record.kept("deleted"):
            print(describe_job(record))
            continue
        record.stop_request.touch()
        show(f"{record.job.name} is asked to save and end; its target is given back then.")
        target = find_target(record.job.target, record.job.options)
        told = ""
        while not (record.is_over and record.kept("deleted")):
            try:
                with record.lock():
                    while not (record.is_over and record.kept("deleted")):
                        advance(record, target)
            except Held:
                reason = f"another launcher looks after {record.job.name}, and was told."
            except Unreachable as error:
                # It does not answer, or is not gone yet.
                reason = f"{error} Asking again."
            else:
                break
            if reason != told:
                told = reason
                show(reason)
            time.sleep(0.2)
        print(describe_job(record))
    return 0


def _retry(records: Sequence[JobRecord], options: JobsOptions) -> int:
    renewed = []
    for record in records:
        with record.lock():
            renewed.append(begin_again(record, find_target(record.job.target, record.job.options)))
    return look_after(renewed, options.detach, Patience(look=options.look))


def _watch(records: Sequence[JobRecord], options: JobsOptions) -> int:
    if not records:
        unfinished = [r for r in all_records(jobs_directory(), show) if not (r.is_over and r.kept("deleted"))]
        records = [record for record in unfinished if not record.is_held]
    return look_after(records, options.detach, Patience(look=options.look))


def _clock(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


_USAGE = """clp jobs: what is known of jobs, and what you may ask of them.

usage: clp jobs list
       clp jobs status|logs|stop|retry NAME ...
       clp jobs watch [NAME ...]      looks after jobs whose launcher is gone"""

_ACTIONS: dict[str, Callable[[Sequence[JobRecord], JobsOptions], int]] = {
    "list": _list,
    "status": _status,
    "logs": _logs,
    "stop": _stop,
    "retry": _retry,
    "watch": _watch,
}
