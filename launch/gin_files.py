"""The user's own files that a command names: gin files, what they include, and the modules next to them."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from clp_jax.launch.errors import LaunchError

_INCLUDE = re.compile(r"""^\s*include\s+['"]([^'"]+)['"]""", re.MULTILINE)
_IMPORT = re.compile(r"^\s*(?:import|from)\s+([\w.]+)", re.MULTILINE)


def files_of(command: Sequence[str], directory: Path) -> dict[str, bytes]:
    """The contents of the files below the present directory that a command needs, by relative path.

    Args:
        command: its words; ``--gin_file`` names gin files. Those that are not here come with the package.
        directory: that the command was typed in.

    Returns:
        What a worker finds in its own directory, under the same names.

    Raises:
        LaunchError: for a file outside the directory, which would have another name elsewhere.
    """
    found: dict[str, bytes] = {}
    waiting = list(_named(command))
    while waiting:
        name = waiting.pop(0)
        path = directory / name
        if not path.is_file():
            continue
        try:
            relative = path.resolve().relative_to(directory.resolve()).as_posix()
        except ValueError as error:
            raise LaunchError(
                f"{name} is not below {directory}: a worker would not find it. Launch from a directory that it is in."
            ) from error
        if relative in found:
            continue
        found[relative] = path.read_bytes()
        text = found[relative].decode(errors="replace")
        if path.suffix == ".gin":
            waiting += _INCLUDE.findall(text)
            waiting += [f"{Path(name).parent.as_posix()}/{included}" for included in _INCLUDE.findall(text)]
        waiting += [f"{module.replace('.', '/')}.py" for module in _IMPORT.findall(text)]
    return found


def _named(command: Sequence[str]) -> Iterator[str]:
    for word, following in zip(command, [*command[1:], ""], strict=True):
        name, equals, value = word.partition("=")
        if name == "--gin_file":
            yield value if equals else following
