"""Commands as files say them, and what their configuration comes to."""

import re
import shlex
import shutil
from collections.abc import Collection, Sequence
from typing import Any

from clp_jax.launch.calls import call_once
from clp_jax.launch.errors import LaunchError
from clp_jax.launch.job import STORES
from clp_jax.launch.local import local_command
from clp_jax.launch.options import suggest
from clp_jax.launch.target import Run

_RESOLVING_SECONDS = 600.0
# Commands that have no configuration of their own: the files they name say what they do.
WITHOUT_CONFIG = ("launch", "jobs", "sweep", "pipeline")


def command_words(command: Any, where: str) -> tuple[str, ...]:
    """The words of a command, without ``clp``.

    Args:
        command: one text as typed, or a list of words.
        where: the place, for the message.

    Raises:
        LaunchError: when it is empty, or something else.
    """
    try:
        words = shlex.split(command) if isinstance(command, str) else command
    except ValueError as error:
        raise LaunchError(f"{where}: {command}: {str(error).lower()}.") from None
    if not isinstance(words, list | tuple) or not all(isinstance(word, str) for word in words):
        raise LaunchError(f"{where}: {command!r}: expected text, or a list of words.")
    words = words[1:] if words and words[0] == "clp" else words
    if not words:
        raise LaunchError(f"{where}: it is empty: expected what is typed after clp, as in train --gin_file=FILE.")
    return tuple(words)


def program_words(words: Sequence[str], commands: Collection[str], where: str) -> tuple[str, ...]:
    """The words that run a command: ``clp`` and one of its commands, or any other program.

    Args:
        words: of the command, without ``clp``.
        commands: of `clp`.
        where: the place, for the message.

    Raises:
        LaunchError: when there is no such program here.
    """
    if words[0] in commands:
        return ("clp", *words)
    if shutil.which(words[0]) is None:
        raise LaunchError(f"{where}: there is no command {words[0]!r}{suggest(words[0], list(commands))}.")
    return tuple(words)


def resolved_config(words: Sequence[str]) -> str:
    """What ``clp WORDS --print_config`` prints: the whole configuration, with nothing run.

    Raises:
        LaunchError: with what the command says is wrong.
    """
    done = call_once(Run((*local_command(("clp", *words)), "--print_config"), timeout=_RESOLVING_SECONDS))
    if done.code:
        said = [text for text in done.error.splitlines() if text.strip()] or [f"exit code {done.code}"]
        first = next((number for number, text in enumerate(said) if "error: " in text), len(said) - 1)
        raise LaunchError(re.sub(r"^clp \w+: error: ", "", said[first]))
    return done.output


def run_dir_of(command: Sequence[str]) -> str | None:
    """Where a command writes, as its resolved configuration says; this also finds what is wrong with it.

    Args:
        command: its words, with ``clp`` where it is one of this package.

    Raises:
        LaunchError: with what the command says is wrong.
    """
    program, name = (*command, "", "")[:2]
    if program != "clp" or name in WITHOUT_CONFIG or "--help" in command:
        return None
    try:
        config = resolved_config(command[1:])
    except LaunchError as error:
        raise LaunchError(f"the command is refused. {error}") from None
    values = dict(re.findall(r"^([\w.]+) = (.+)$", config, flags=re.MULTILINE))
    value = next((text for name, text in values.items() if name.split(".")[-1] == "run_dir"), "")
    for _ in range(len(values)):
        if not value.startswith("%"):
            break
        value = values.get(value[1:], "")
    found = re.fullmatch(r"'([^'\\]*)'|\"([^\"\\]*)\"", value)
    run_dir = (found[1] or found[2]) if found else None
    if run_dir is not None and "://" in run_dir and not run_dir.startswith(STORES):
        raise LaunchError(
            f"the run directory is {run_dir!r}: expected a directory, gs://BUCKET/NAME or s3://BUCKET/NAME."
        )
    return run_dir
