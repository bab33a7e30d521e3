"""`clp launch TARGET [options] -- COMMAND`: writes a job down, begins it, and looks after it."""

import contextlib
import dataclasses
import difflib
import hashlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from clp_jax.launch.buckets import seen_from_here
from clp_jax.launch.calls import begin, call_once, show
from clp_jax.launch.cargo import Cargo
from clp_jax.launch.code import code_version
from clp_jax.launch.command_words import run_dir_of
from clp_jax.launch.errors import LaunchError
from clp_jax.launch.job import Job, JobRecord, jobs_directory
from clp_jax.launch.local import local_command
from clp_jax.launch.options import build, describe, option, split
from clp_jax.launch.remote_code import left_behind
from clp_jax.launch.secret_values import holds_private_key, secrets_of
from clp_jax.launch.supervisor import Patience, supervise
from clp_jax.launch.target import Note, Run, Step, Target, Write
from clp_jax.launch.targets import TARGETS, find_target

# An archive, as text.
_LONG = re.compile(r"[A-Za-z0-9+/=]{2000,}")
_COMPILING_SECONDS = 3600.0
# What `clp compile` says where nothing is wrong but that it has no compiler.
_AOT = "clp-jax[aot]"


@dataclasses.dataclass(frozen=True)
class LaunchOptions:
    """What every target takes."""

    name: str | None = option("of the job; by default from the command, so that the same command is the same job", None)
    run_dir: str | None = option("where the run writes, if the configuration does not say it in run_dir", None)
    max_restarts: int = option("attempts after failures; preemptions do not count", Job.max_restarts)
    max_failures: int = option("failures in a row without a new checkpoint that end the job", Job.max_failures)
    dry_run: bool = option("print the exact files and commands, and do nothing", False)
    force: bool = option("launch what clp compile says does not fit, or what it can't look at", False)
    detach: bool = option("look after the job in the background", False)
    look: float = option("seconds between two looks at the job", 10.0)


def launch(words: Sequence[str], commands: Collection[str]) -> int:
    """Runs `clp launch`.

    Args:
        words: what was typed after it.
        commands: of `clp`, that a job's command may begin with.

    Returns:
        The exit code: 0, or 1 where the job failed.

    Raises:
        LaunchError: for what is wrong, before anything is created.
    """
    places, given, command = split(words)
    if "help" in given or not places:
        print(usage(places[0] if places and places[0] in TARGETS else None))
        return 0
    if len(places) > 1:
        raise LaunchError(f"what is {places[1]!r}? Options are --NAME=VALUE; the command comes after --.")
    ours = {field.name for field in dataclasses.fields(LaunchOptions)}
    options = build(LaunchOptions, {k: v for k, v in given.items() if k in ours}, "clp launch")
    patience = Patience(look=options.look)
    target_options = {k: v for k, v in given.items() if k not in ours}
    target = find_target(places[0], target_options)
    job = make_job(places[0], target_options, options, command, commands)
    cargo = Cargo(job, target.ships_code)
    target.check(cargo)
    jobs = jobs_directory()
    if options.dry_run:
        print_plan([cargo], jobs, lambda records: target.dry_run(*records))
        return 0
    record = _existing(jobs, job)
    if record is None:
        check_before_creating(target, cargo, commands, options.force)
        record = create(jobs, cargo)
    return look_after([record], detach=options.detach, patience=patience)


def check_before_creating(target: Target, cargo: Cargo, commands: Collection[str], force: bool) -> None:
    """Finds what is wrong with a job while nothing is created.

    Args:
        target: where it runs.
        cargo: the job, and what it brings along.
        commands: of `clp`.
        force: whether it runs even where it does not fit the slice.

    Raises:
        LaunchError: for a secret in the command or its files, what the target refuses, and what does not fit.
    """
    refuse_secrets_of(cargo)
    target.check(cargo)
    target.check_access(cargo.job)
    for line in left_behind(cargo) if cargo.extra is not None else ():
        show(line)
    if not force:
        check_that_it_fits(target, cargo.job, commands)


def create(jobs: Path, cargo: Cargo) -> JobRecord:
    """Writes the record of a job, with the code where its target has to bring it to the workers.

    Raises:
        LaunchError: for a secret in the command or its files.
    """
    refuse_secrets_of(cargo)
    return JobRecord.create(jobs, cargo.job, cargo.files.contents, cargo.archive)


def target_of(record: JobRecord, job: Job, target: Target) -> Target:
    """Where a job goes on: on what it was begun on, whatever is typed now.

    Args:
        record: of the job.
        job: what is asked now.
        target: that is asked for now.
    """
    own = record.job
    if (own.target, own.options) == (job.target, job.options) or (record.is_over and record.kept("deleted")):
        return target
    place = [own.target, *(f"--{name}={value}" for name, value in own.options.items())]
    show(f"{own.name} goes on where it was begun: {shlex.join(place)}")
    return find_target(own.target, own.options)


def make_job(
    target: str,
    target_options: Mapping[str, str],
    options: LaunchOptions,
    command: Sequence[str],
    commands: Collection[str],
) -> Job:
    """The job that a command line asks for.

    Raises:
        LaunchError: for a command that is refused, or that holds a secret.
    """
    words = ("clp", *command) if command and command[0] in commands else tuple(command)
    _refuse_slips(words, commands)
    refuse_secrets([*words, *target_options.values()], target_options)
    directory = str(Path.cwd())
    asked = (words, target, sorted(target_options.items()), directory)
    digest = hashlib.sha256(repr(asked).encode()).hexdigest()[:6]
    default = (
        re.sub(r"[^a-z0-9]+", "-", Path(words[min(1, len(words) - 1)]).stem.lower()).strip("-")[:30] if words else ""
    )
    run_dir = seen_from_here(options.run_dir or run_dir_of(words), target_options)
    return Job(
        name=options.name or (f"{default}-{digest}" if default[:1].isalpha() else f"job-{digest}"),
        command=words,
        target=target,
        options=dict(target_options),
        run_dir=run_dir,
        code_version=code_version(),
        directory=directory,
        max_restarts=options.max_restarts,
        max_failures=options.max_failures,
    )


def _refuse_slips(words: Sequence[str], commands: Collection[str]) -> None:
    """Refuses what is nearly one of `clp`'s commands; any other program may be there where the job runs."""
    close = difflib.get_close_matches(words[0], commands, 1) if words and words[0] != "clp" else []
    if close and shutil.which(words[0]) is None:
        raise LaunchError(f"there is no command {words[0]!r} (did you mean {close[0]}?).")


def refuse_secrets_of(cargo: Cargo) -> None:
    """Refuses a job whose command or whose files hold a secret of the environment.

    Raises:
        LaunchError: which names the variable, not the value; or a file that is a private key.
    """
    job = cargo.job
    refuse_secrets([*job.command, *job.options.values(), *job.parameters.values()], job.options)
    for name, content in cargo.files.contents.items():
        text = content.decode(errors="replace")
        refuse_secrets([text], job.options, name)
        if holds_private_key(text):
            raise LaunchError(
                f"{name} holds a private key, and the files of a command are stored and sent along: leave it out, and give it "
                "to the workers as docs/launching.md says under secrets."
            )


def refuse_secrets(words: Sequence[str], options: Mapping[str, str], where: str = "the command") -> None:
    """Refuses words that hold the value of a secret variable of the environment: they are stored and shown.

    Args:
        words: of a command, or the text of a file.
        options: of the target, as they were typed.
        where: the words stand.

    Raises:
        LaunchError: which names the variable, not the value.
    """
    for name, value in secrets_of(os.environ, options).items():
        if any(value in word for word in words):
            raise LaunchError(
                f"the value of ${name} stands in {where}, which is stored and shown: leave it out, and give it to the "
                "workers as docs/launching.md says under secrets."
            )


def check_that_it_fits(target: Target, job: Job, commands: Collection[str], trial: str = "") -> None:
    """Compiles the command's step for the slice that the target would rent, where the compiler is installed.

    Args:
        target: where it runs.
        job: whose command it is.
        commands: of `clp`.
        trial: one of several, with a space after it; what is true of all was said of the first.

    Raises:
        LaunchError: when it does not fit.
    """
    asked = target.compile_options()
    if asked is None or job.command[:2] != ("clp", "train") or "compile" not in commands:
        return
    if _has_compiler():
        show(f"compiling {trial}for {' '.join(asked)}; --force launches without")
    elif not trial:
        show("The extra `aot` is not installed: whether this fits the slice is not known before it runs.")
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        words = ("clp", "compile", *_gin_words(job.command[2:]), *asked, f"--output={report}")
        done = call_once(Run(local_command(words), timeout=_COMPILING_SECONDS))
        found = json.loads(report.read_text()) if report.is_file() else {}
    if found.get("fits") is False:
        raise LaunchError(
            f"it does not fit {asked[0].partition('=')[2]}: {_misfit(found)} (--force launches it all the same)"
        )
    if not _has_compiler() and _AOT in done.error:
        return  # All that is known without it is well.
    if done.code or not found:
        lines = (done.error.strip() or done.output.strip() or f"exit code {done.code}").splitlines()
        reason = lines[-1].strip().removeprefix("clp compile: error: ")
        raise LaunchError(f"it can't be compiled for the slice: {reason} (--force launches it all the same)")


def _misfit(report: Mapping[str, Any]) -> str:
    """What a report says of the first program that does not fit."""
    program = next(program for program in report["programs"] if not program["memory"]["fits"])
    needed, limit = (program["memory"][name] / 2**30 for name in ("needed", "limit"))
    return f"{program['name']} needs {needed:.1f} GiB of a device's {limit:.1f}. {program['advice']}".strip()


def _gin_words(words: Sequence[str]) -> list[str]:
    """Those words of a command that are gin's: the others are the command's own."""
    waiting, found = list(words), []
    while waiting:
        word = waiting.pop(0)
        if word.startswith("--gin"):
            found.append(word)
            if "=" not in word and waiting:
                found.append(waiting.pop(0))
    return found


def print_plan(planned: Sequence[Cargo], jobs: Path, plan: Callable[[Sequence[JobRecord]], Sequence[Step]]) -> None:
    """Prints the exact files and commands of a launch; what is too long to read is cut, and counted.

    Args:
        planned: the jobs, and what they bring along.
        jobs: the directory of their records.
        plan: the steps of jobs that are written down.
    """
    for line in dict.fromkeys(line for cargo in planned for line in files_lines(cargo)):
        print(f"# {line}")
    with tempfile.TemporaryDirectory() as folder:
        for step in plan([create(Path(folder), cargo) for cargo in planned]):
            if isinstance(step, Write):
                text = f"# writes {step.path}\n{step.text.rstrip()}\n"
            elif isinstance(step, Note):
                text = "".join(f"# {line}\n" for line in step.text.splitlines())
            else:
                text = f"$ {shlex.join(step.words)}\n"
            print(_LONG.sub(_cut, text.replace(folder, str(jobs))))


def files_lines(cargo: Cargo) -> list[str]:
    """What a dry run tells of the user's files: those that go to the workers, and what does not."""
    if cargo.extra is None:
        return []
    sizes = [f"{name} ({len(content)} bytes)" for name, content in cargo.files.contents.items()]
    return [f"with the command goes: {', '.join(sizes) or 'no file of yours'}", *left_behind(cargo)]


def look_after(records: Sequence[JobRecord], detach: bool, patience: Patience) -> int:
    """Looks after jobs until they are over, here or in the background.

    Returns:
        The exit code: 0, or 1 where a job failed.

    Raises:
        LaunchError: when another launcher does.
    """
    targets = [find_target(record.job.target, record.job.options) for record in records]
    if detach:
        for record in records:
            _in_background(record, patience)
        return 0
    with contextlib.ExitStack() as stack:
        for record in records:
            stack.enter_context(record.lock())
        try:
            ends = supervise(records, targets, patience)
        except KeyboardInterrupt:
            names = " ".join(record.job.name for record in records)
            show(
                f"\nnobody looks after {names} now; what runs, runs on. clp jobs watch {names} goes on, clp jobs stop ends it."
            )
            return 128 + 2
    return int(any(state.phase == "failed" for state in ends))


def usage(target: str | None) -> str:
    """The help of `clp launch`."""
    lines = ["clp launch: runs a command elsewhere, and looks after it.", ""]
    lines += ["usage: clp launch TARGET [--OPTION=VALUE] ... -- COMMAND", ""]
    lines += [f"targets: {', '.join(TARGETS)}; clp launch TARGET --help tells a target's options", ""]
    lines += ["Options:", *describe(LaunchOptions)]
    if target is not None:
        lines += ["", f"Options of {target}:", *describe(TARGETS[target])]
    return "\n".join([*lines, "", "clp jobs shows, stops and retries jobs."])


def _has_compiler() -> bool:
    return importlib.util.find_spec("libtpu") is not None


def _cut(word: re.Match[str]) -> str:
    return f"{word[0][:40]}... ({len(word[0])} characters)"


def _existing(jobs: Path, job: Job) -> JobRecord | None:
    """The record of the same job, if there is one: a launcher that is started again goes on with it."""
    if not (jobs / job.name).is_dir():
        return None
    record = JobRecord.load(jobs / job.name)
    same = dataclasses.replace(record.job, code_version=job.code_version)
    if same != job:
        raise LaunchError(f"there is another job {job.name!r} in {jobs}: give this one another name: --name=NAME.")
    if record.is_over:
        assert record.state is not None
        raise LaunchError(
            f"this job is there already, and {record.state.phase}: clp jobs retry {job.name} goes on with it (with "
            "the files and the code of now), another --name=NAME begins a new one."
        )
    show(f"going on with {job.name}, as it was written down, with the code of then ({record.job.code_version}).")
    return record


def _in_background(record: JobRecord, patience: Patience) -> None:
    words = local_command(("clp", "jobs", "watch", record.job.name, f"--look={patience.look}"))
    begin(words, record.path / "launcher.log")
    show(f"{record.job.name} is looked after in the background: clp jobs status {record.job.name}")
