"""The shell script that one worker runs, whatever the target: quoted words, an exit code in a file, no second copy."""

import shlex
from collections.abc import Mapping, Sequence

LOG, EXIT, CLAIM, PID = "log", "exit", "claimed", "pid"


def worker_script(
    command: Sequence[str], directory: str, here: str, environment: Mapping[str, str], setup: Sequence[str] = ()
) -> str:
    """A script that runs a command once.

    It takes the claim (a directory, made by one of any number of copies), writes its process id, runs the command with its
    output in the log, passes SIGTERM on, and leaves the exit code.

    Args:
        command: its words.
        directory: to run it in.
        here: where claim, log and exit code go; made if it is missing. May name shell variables that `setup` sets.
        environment: variables of the command; may be read in a listing of processes, so no secrets.
        setup: lines of shell to run before.
    """
    exports = [f"export {name}={shlex.quote(value)}" for name, value in environment.items()]
    lines = [
        "#!/usr/bin/env bash",
        "set -u",
        *setup,
        f"here={here}",
        'mkdir -p "$here"',
        f'mkdir "$here/{CLAIM}" 2>/dev/null || exit 0',
        f'echo $$ > "$here/{PID}"',
        f"cd {shlex.quote(directory)} || exit 1",
        *exports,
        f'{shlex.join(command)} >> "$here/{LOG}" 2>&1 &',
        "child=$!",
        "trap 'kill -TERM \"$child\" 2>/dev/null' TERM INT",
        # A trap interrupts `wait`; only a child that is gone is waited for.
        'while true; do wait "$child"; code=$?; kill -0 "$child" 2>/dev/null || break; done',
        f'echo "$code" > "$here/{EXIT}.new"',
        f'mv "$here/{EXIT}.new" "$here/{EXIT}"',
        'exit "$code"',
    ]
    return "\n".join(lines) + "\n"
