"""What a worker does with the code that was brought to it, before the command runs."""

import re
import shlex
from collections.abc import Sequence

from clp_jax.launch.buckets import seen_from_here
from clp_jax.launch.cargo import Cargo
from clp_jax.launch.errors import LaunchError
from clp_jax.launch.job import STORES, Job


def unpack(archive: str, folder: str) -> list[str]:
    """Lines of shell that unpack the archive into ``code`` and put the package on Python's path.

    Args:
        archive: its path; a piece of shell, quoted.
        folder: to work in; a piece of shell, quoted.
    """
    return [
        f"mkdir -p {folder}",
        f"cd {folder} || finish 1",
        # What was brought may hold no file of the user.
        "mkdir -p code/work",
        f"tar -xzf {archive} -C code || finish 75",
        'export PYTHONPATH="$PWD/code" PYTHONUNBUFFERED=1',
    ]


def environment(environments: str) -> list[str]:
    """Lines of shell that make the Python environment of the requirements, once, and use it.

    Args:
        environments: the folder of all environments; a piece of shell, quoted.
    """
    return [
        # It belongs to its requirements: the next attempt, or another job on the same machine, finds it.
        f'environment={environments}/"$(cat code/ENVIRONMENT)"',
        'if [ ! -f "$environment/ready" ]; then',
        "  if python3 -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null; then",
        '    python3 -m venv "$environment" || finish 75',
        # TPU VMs come with Python 3.10, and without what makes environments.
        "  else",
        '    rm -rf "$environment"',
        "    python3 -m pip install --quiet --user uv || finish 75",
        '    python3 -m uv venv --quiet --seed --python 3.11 "$environment" || finish 75',
        "  fi",
        '  "$environment/bin/pip" install --quiet --constraint code/constraints.txt --requirement code/requirements.txt \\',
        "    || finish 75",
        '  touch "$environment/ready"',
        "fi",
        'export PATH="$environment/bin:$PATH"',
    ]


def remote_command(command: Sequence[str]) -> tuple[str, ...]:
    """The words that run a command where the code was brought to: ``clp`` is the package."""
    first, *rest = command
    return ("python3", "-P", "-m", "clp_jax.main", *rest) if first == "clp" else tuple(command)


def check_files(cargo: Cargo) -> None:
    """Raises `LaunchError` for a file of the user that could not have the same name where the code is brought to."""
    for name, reason in cargo.files.misplaced.items():
        if not _is_mounted(name, cargo.job):
            raise LaunchError(reason)
    for name in cargo.files.paths:
        if name.startswith("/"):
            raise LaunchError(
                f"{name} is not below {cargo.job.directory}: a worker would not find it. Launch from a directory that it "
                "is in."
            )


def left_behind(cargo: Cargo) -> list[str]:
    """A line for each thing of this machine that a command names and that is not brought to the workers."""
    return [
        f"{name} {reason}: it does not go with the command, and a worker finds it only on a disk that it shares."
        for name, reason in cargo.files.left.items()
        if not _is_mounted(name, cargo.job)
    ]


def _is_mounted(name: str, job: Job) -> bool:
    """Whether the workers have a path in a bucket."""
    return seen_from_here(name, job.options) != name


def check_run_directory(job: Job, shared: Sequence[str], advice: str) -> None:
    """Raises `LaunchError` for a run directory that other machines would not find again.

    Args:
        job: that writes there.
        shared: folders that all workers have.
        advice: how to name such a folder.
    """
    if job.run_dir is None or job.run_dir.startswith(STORES):
        return
    if not any(f"{job.run_dir}/".startswith(f"{folder.rstrip('/')}/") for folder in shared):
        raise LaunchError(
            f"the run directory is {job.run_dir!r}, which the workers do not share and which ends with them: give one in a "
            f"bucket (gs://BUCKET/NAME; or mounted, --mounts=BUCKET=/mnt/BUCKET), or {advice}."
        )


def check_secrets(words: Sequence[str], value: str, example: str) -> None:
    """Raises `LaunchError` for secrets that are not given as variables and names.

    Args:
        words: as they were typed.
        value: pattern of what a variable is from.
        example: of a right one.
    """
    for word in words:
        if not re.fullmatch(rf"[A-Za-z_]\w*={value}", word):
            raise LaunchError(f"--secrets has {word.partition('=')[0]!r}: expected the name of a secret: {example}.")


def read_secrets(words: Sequence[str]) -> list[str]:
    """Lines of shell that read variables from Google Cloud's Secret Manager."""
    lines = []
    for word in words:
        variable, _, secret = word.partition("=")
        read = f"gcloud secrets versions access latest --secret={shlex.quote(secret)}"
        lines.append(f'{variable}="$({read})" || finish 75; export {variable}')
    return lines
