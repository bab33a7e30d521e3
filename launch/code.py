"""The code that workers run: one archive, laid out as an installation, that says its version."""

import gzip
import hashlib
import importlib.metadata
import io
import re
import subprocess
import tarfile
import tomllib
from collections.abc import Collection, Mapping
from pathlib import Path

from clp_jax.launch.errors import LaunchError

# Folders at the top of a checkout, and where an installation has them.
_FOLDERS = {
    "clp_jax": "clp_jax",
    "gin_configs": "clp_jax/gin_configs",
    "tasks": "clp_jax/tasks",
    "launch": "clp_jax/launch",
}
_SUFFIXES = (".py", ".gin", ".yaml")
_CONSTRAINTS = "constraints.txt"
_HERE = Path(__file__).resolve().parent


def checkout() -> Path | None:
    """The checkout that this package runs from; None where it is installed."""
    root = _HERE.parent
    return root if (root / "pyproject.toml").is_file() and (root / "clp_jax" / "__init__.py").is_file() else None


def source_files() -> dict[str, bytes]:
    """All files of the package by their place in an installation."""
    root = checkout()
    if root is None:
        return {f"clp_jax/{name}": content for name, content in _tree(_HERE.parent).items()}
    found: dict[str, bytes] = {}
    for folder, place in _FOLDERS.items():
        found |= {f"{place}/{name}": content for name, content in _tree(root / folder).items()}
    return found


def code_version() -> str:
    """What names the code: a digest of its files, and the commit of the checkout it is from."""
    digest = _digest(source_files())
    root = checkout()
    if root is None:
        return f"{importlib.metadata.version('clp-jax')}+{digest}"
    words = ("git", "-C", str(root), "describe", "--always", "--dirty")
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return digest
    return f"{done.stdout.strip()}+{digest}" if done.returncode == 0 else digest


def requirements(extra: str | None) -> list[str]:
    """What the package needs, with the packages of one extra.

    Raises:
        LaunchError: for an extra that there is not.
    """
    root = checkout()
    if root is not None:
        project = tomllib.loads((root / "pyproject.toml").read_text("utf-8"))["project"]
        extras = project["optional-dependencies"]
        needed = list(project["dependencies"])
    else:
        entries = importlib.metadata.requires("clp-jax") or []
        needed = [entry for entry in entries if "extra ==" not in entry]
        extras = {}
        for entry in entries:
            if found := re.search(r"""extra == ['"](\w+)['"]""", entry):
                extras.setdefault(found[1], []).append(entry.partition(";")[0].strip())
    if extra is not None and extra not in extras:
        raise LaunchError(f"there is no extra {extra!r}: there are {', '.join(sorted(extras))}.")
    return needed + (list(extras[extra]) if extra is not None else [])


def archive(files: Mapping[str, bytes], extra: str | None, executable: Collection[str] = ()) -> bytes:
    """The code as a tar archive, the same bytes for the same content.

    Args:
        files: of the user, found in ``work/``, where the command runs.
        extra: of the package that workers need.
        executable: names of those files that are programs.

    Returns:
        ``clp_jax/`` with its version in ``VERSION``, ``work/``, ``requirements.txt`` and ``constraints.txt``.
    """
    content = source_files() | {f"work/{name}": data for name, data in files.items()}
    content["requirements.txt"] = "".join(f"{line}\n" for line in requirements(extra)).encode()
    constraints = content[_CONSTRAINTS] = content[f"clp_jax/launch/{_CONSTRAINTS}"]
    content["VERSION"] = f"{code_version()}\n".encode()
    content["ENVIRONMENT"] = _digest({"r": content["requirements.txt"], "c": constraints}).encode()
    programs = {f"work/{name}" for name in executable}
    buffer = io.BytesIO()
    with gzip.GzipFile(fileobj=buffer, mode="wb", mtime=0) as zipped, tarfile.open(fileobj=zipped, mode="w") as tar:
        for name in sorted(content):
            member = tarfile.TarInfo(name)
            member.size = len(content[name])
            member.mode = 0o755 if name in programs else 0o644
            tar.addfile(member, io.BytesIO(content[name]))
    return buffer.getvalue()


def _tree(folder: Path) -> dict[str, bytes]:
    paths = (path for path in sorted(folder.rglob("*")) if path.suffix in _SUFFIXES or path.name == _CONSTRAINTS)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths if path.is_file()}


def _digest(files: Mapping[str, bytes]) -> str:
    whole = hashlib.sha256()
    for name in sorted(files):
        whole.update(f"{name}\0{len(files[name])}\0".encode() + files[name])
    return whole.hexdigest()[:12]
