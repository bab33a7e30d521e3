"""The shell script that one worker runs, whatever the target: quoted words, an exit code in a file, no second copy."""

import shlex
from collections.abc import Mapping, Sequence

LOG, EXIT, CLAIM, PID = "log", "exit", "claimed", "pid"


def worker_script(
    command: Sequence[str] | None,
    directory: str,
    here: str,
    environment: Mapping[str, str],
    setup: Sequence[str] = (),
    keeps_log: bool = True,
) -> str:
    """A script that runs a command once.

    It takes the claim (a directory, made by one of any number of copies), writes its process id, runs the command with its
    output in the log, passes SIGTERM on, and leaves the exit code.

    Args:
        command: its words; None for those that the script is given.
        directory: to run it in; a piece of shell, quoted.
        here: where claim, log and exit code go; made if it is missing. A piece of shell, quoted.
        environment: variables of the command; may be read in a listing of processes, so no secrets.
        setup: lines of shell to run before the command, in its directory's shell.
        keeps_log: whether the output goes to the log, or where the script's own goes.
    """
    exports = [f"export {name}={shlex.quote(value)}" for name, value in environment.items()]
    redirection = f' >> "$here/{LOG}" 2>&1' if keeps_log else ""
    words = '"$@"' if command is None else shlex.join(command)
    lines = [
        "#!/usr/bin/env bash",
        # Read to its end before it begins: a repeated start copies the script to workers that run it.
        "{",
        "set -u",
        f"here={here}",
        'mkdir -p "$here"',
        f'mkdir "$here/{CLAIM}" 2>/dev/null || exit 0',
        # On a full disk there is no code rather than an empty one, and nothing begins that nobody could see running.
        f'finish() {{ echo "$1" > "$here/{EXIT}.new" && mv "$here/{EXIT}.new" "$here/{EXIT}"; exit "$1"; }}',
        f'echo $$ > "$here/{PID}" || finish 75',
        "child=",
        # The setup may take minutes, and may be stopped too.
        'trap \'if [ -z "$child" ]; then finish 143; fi; told=1; kill -TERM "$child" 2>/dev/null\' TERM INT',
        *setup,
        f"cd {directory} || finish 1",
        *exports,
        f"{words}{redirection} &",
        "child=$!",
        # A trap interrupts `wait`, whose code is then the signal's; asked again it has the child's.
        'while true; do told=; wait "$child"; code=$?; [ -n "$told" ] || break; done',
        'finish "$code"',
        "}",
    ]
    return "\n".join(lines) + "\n"
