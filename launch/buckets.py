"""Buckets of Cloud Storage as folders of the workers, for data and code; runs may write to ``gs://`` themselves."""

import dataclasses
import re
import shlex
from collections.abc import Mapping, Sequence

from clp_jax.launch.calls import call
from clp_jax.launch.errors import LaunchError
from clp_jax.launch.target import Run

_MOUNT = re.compile(r"([a-z0-9][a-z0-9._-]{1,61}[a-z0-9])=(/.*[^/])")
_PACKAGES, _KEY = "https://packages.cloud.google.com/apt", "/usr/share/keyrings/cloud.google.asc"


@dataclasses.dataclass(frozen=True)
class Mount:
    """A bucket and where workers have it.

    Attributes:
        bucket: its name.
        folder: an absolute path.
    """

    bucket: str
    folder: str


def read_mounts(words: Sequence[str]) -> list[Mount]:
    """The mounts of ``--mounts``.

    Raises:
        LaunchError: for a word of another form.
    """
    found = []
    for word in words:
        match = _MOUNT.fullmatch(word)
        if match is None:
            raise LaunchError(f"--mounts has {word!r}: expected BUCKET=/FOLDER, as in my-bucket=/mnt/my-bucket.")
        found.append(Mount(match[1], match[2]))
    return found


def check_buckets(mounts: Sequence[Mount], paths: Sequence[str | None]) -> None:
    """Raises `LaunchError` for a bucket that is not there, or that who launches may not see.

    Args:
        mounts: of the workers.
        paths: other places, some of them in buckets (``gs://``).
    """
    given = [f"gs://{mount.bucket}" for mount in mounts]
    given += ["/".join(path.split("/")[:3]) for path in paths if path is not None and path.startswith("gs://")]
    for bucket in dict.fromkeys(given):
        call(Run(("gcloud", "storage", "buckets", "describe", bucket, "--format=value(name)"), attempts=2))


def seen_from_here(run_dir: str | None, options: Mapping[str, str]) -> str | None:
    """Where a launcher can look at a run directory of the workers.

    Args:
        run_dir: as the workers have it.
        options: of the target, as they were typed.

    Returns:
        Its place in the bucket where it is below a mounted one; otherwise itself.
    """
    for mount in read_mounts(options.get("mounts", "").split(",") if options.get("mounts") else []):
        if run_dir is not None and f"{run_dir}/".startswith(f"{mount.folder}/"):
            return f"gs://{mount.bucket}{run_dir.removeprefix(mount.folder)}"
    return run_dir


def mount_lines(mounts: Sequence[Mount]) -> list[str]:
    """Lines of shell that mount buckets on a TPU VM, which has Ubuntu and its user all rights."""
    if not mounts:
        return []
    source = f"deb [signed-by={_KEY}] {_PACKAGES} gcsfuse-$(lsb_release -cs) main"
    lines = [
        "if ! command -v gcsfuse > /dev/null; then",
        f'  echo "{source}" | sudo tee /etc/apt/sources.list.d/gcsfuse.list',
        f"  curl -fsSL {_PACKAGES}/doc/apt-key.gpg | sudo tee {_KEY} > /dev/null",
        "  { sudo apt-get update --quiet && sudo apt-get install --yes --quiet gcsfuse; } || finish 75",
        "fi",
    ]
    for mount in mounts:
        folder = shlex.quote(mount.folder)
        made = f'sudo mkdir -p {folder} && sudo chown "$(id -u)" {folder}'
        mounted = f"gcsfuse --implicit-dirs {shlex.quote(mount.bucket)} {folder}"
        lines.append(f"mountpoint -q {folder} || {{ {made} && {mounted}; }} || finish 75")
    return lines
