"""Commands as files say them, and what their configuration comes to."""

import re
import shlex
import shutil
import subprocess
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from clp_jax.launch.job import LaunchError
from clp_jax.launch.local import local_command
from clp_jax.launch.options import suggest


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


def resolved_config(words: Sequence[str], directory: str | Path = ".") -> str:
    """What ``clp WORDS --print_config`` prints: the whole configuration, with nothing run.

    Raises:
        LaunchError: with what the command says is wrong.
    """
    line = (*local_command(("clp", *words)), "--print_config")
    done = subprocess.run(line, cwd=directory, capture_output=True, text=True, check=False)
    if done.returncode:
        said = [text for text in done.stderr.splitlines() if text.strip()] or [f"exit code {done.returncode}"]
        first = next((number for number, text in enumerate(said) if "error: " in text), len(said) - 1)
        raise LaunchError(re.sub(r"^clp \w+: error: ", "", said[first]))
    return done.stdout
