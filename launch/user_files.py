"""The user's own files that a command names: gin files, what they include and import, Python with its modules, small data."""

import ast
import dataclasses
import functools
import os
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from clp_jax.launch.yaml_files import read_yaml

# Data of a run is in a bucket; a list of prompts, or a tokenizer, goes with the command.
LARGEST_BYTES = 16 * 2**20
_INCLUDE = re.compile(r"""^\s*include\s+['"]([^'"]+)['"]""", re.MULTILINE)
_IMPORT = re.compile(r"^\s*(?:import\s+([\w.]+)|from\s+([\w.]+)\s+import\s+([\w.]+))", re.MULTILINE)
_STRING = re.compile(r"""'([^'\n]+)'|"([^"\n]+)\"""")
_PACKAGE = "clp_jax"


@dataclasses.dataclass(frozen=True)
class UserFiles:
    """What a command names of this machine.

    Attributes:
        paths: the files that go along, by the names that a worker finds them under in its own directory; a file that is not
            below the directory of the command, which a worker would not find, under its absolute name.
        misplaced: what a worker would look for where it is not: why, by name.
        left: what else is here and does not go along: what it is, by name.
    """

    paths: Mapping[str, Path]
    misplaced: Mapping[str, str]
    left: Mapping[str, str]

    @functools.cached_property
    def contents(self) -> dict[str, bytes]:
        """Of the files that go along, as they are when they are first asked for."""
        return {name: path.read_bytes() for name, path in self.paths.items()}

    @property
    def executable(self) -> frozenset[str]:
        """Those that may be run as programs."""
        return frozenset(name for name, path in self.paths.items() if path.stat().st_mode & 0o111)


def user_files(command: Sequence[str], directory: Path) -> UserFiles:
    """The files here that a command needs.

    Gin files, wherever they are, and any other word, or value of an option, that is the name of a file below the directory,
    also in a list; modules that Python is to run; what these include, import and, in gin files, name in turn, and the
    commands of pipelines and sweeps. What comes with the package is none of them.

    Args:
        command: its words.
        directory: that the command was typed in.
    """
    found: dict[str, Path] = {}
    misplaced: dict[str, str] = {}
    left: dict[str, str] = {}
    searched = _search_paths(command)
    waiting: list[str | Path] = [*_named(command, directory, searched)]
    while waiting:
        given = waiting.pop(0)
        # The name as it was given: a link is followed where it is read.
        path = Path(os.path.normpath(directory / given))
        name = path.relative_to(directory).as_posix() if path.is_relative_to(directory) else path.as_posix()
        if isinstance(given, str) and not _goes(given, name, directory, misplaced, left):
            continue
        if name in found or not os.path.isfile(path):
            continue
        if (size := path.stat().st_size) > LARGEST_BYTES:
            left[name] = f"has {size} bytes, more than the {LARGEST_BYTES} of what is too large to go along"
            continue
        found[name] = path
        if path.suffix == ".gin":
            waiting += _named_in_gin(path.read_text(errors="replace"), path, directory, searched)
        if path.suffix == ".py":
            waiting += _imported(path.read_bytes(), path, directory)
        if path.suffix in (".yaml", ".yml"):
            for words in _commands_in_yaml(path):
                searched += [folder for folder in _search_paths(words) if folder not in searched]
                waiting += _named(words, directory, searched)
    for folder in searched:
        left.pop(folder, None)
        inside = os.path.normpath(folder)
        if (
            os.path.isdir(directory / folder)
            and inside != "."
            and not any(name.startswith(f"{inside}/") for name in found)
        ):
            misplaced[folder] = (
                f"--gin_search_paths has {folder}, of which no gin file goes with the command: a worker would not find it. "
                "Leave it out, or name a folder below the present directory that holds one."
            )
    return UserFiles(found, misplaced, left)


def _goes(given: str, name: str, directory: Path, misplaced: dict[str, str], left: dict[str, str]) -> bool:
    """Whether a name, as typed, is that of a file that goes along; says why where it is not, and there is something."""
    path = directory / given
    if os.path.isdir(path):
        left[given] = "is a directory"
        return False
    if not os.path.isfile(path):
        return False
    if os.path.isabs(given):
        if os.path.isabs(name):
            left[given] = "has an absolute path outside of the present directory"
        else:
            misplaced[given] = f"{given} has another path on a worker, which would not find it: write {name}."
        return False
    if os.path.isabs(name):
        misplaced[given] = (
            f"{given} is not below {directory}: a worker would not find it. Launch from a directory that it is in."
        )
        return False
    return True


def _search_paths(command: Sequence[str]) -> list[str]:
    """The folders of ``--gin_search_paths``."""
    values = _values(command, "--gin_search_paths")
    return [folder for value in values for folder in value.split(",") if folder]


def _values(command: Sequence[str], option: str) -> Iterator[str]:
    for word, following in zip(command, [*command[1:], ""], strict=True):
        name, equals, value = word.partition("=")
        if name == option:
            yield value if equals else following


def _named(command: Sequence[str], directory: Path, searched: Sequence[str]) -> Iterator[str | Path]:
    """What may be files: paths that are looked for, and text as it was typed."""
    for name in _values(command, "--gin_file"):
        yield from (directory / folder / name for folder in (".", *searched))
    for module in _values(command, "-m"):
        yield from _modules(module, directory)
        yield directory.joinpath(*module.split("."), "__main__.py")
    for program in _values(command, "-c"):
        yield from _imported(program.encode(), directory / "-c", directory)
    # A program has its own places; `clp train` is no folder.
    own = 2 if command[:1] == ("clp",) else int(os.path.isabs(command[0])) if command else 0
    for word in command[own:]:
        yield from _texts(word)
        yield from _texts(word.partition("=")[2])


def _texts(value: str) -> Iterator[str]:
    """What a value may name: itself, the strings in it, what stands between commas."""
    strings = [one or other for one, other in _STRING.findall(value)]
    found = [
        value,
        *strings,
        *(part.strip().strip("'\"[]()") for text in (value, *strings) for part in text.split(",")),
    ]
    yield from (text for text in dict.fromkeys(found) if text)


def _named_in_gin(text: str, path: Path, directory: Path, searched: Sequence[str]) -> Iterator[str | Path]:
    for included in _INCLUDE.findall(text):
        yield from (directory / folder / included for folder in (".", *searched))
        yield path.parent / included
    for module, package, member in _IMPORT.findall(text):
        for name in (module,) if module else (package, f"{package}.{member}"):
            yield from _modules(name, directory)
    for one, other in _STRING.findall(text):
        yield from _texts(one or other)


def _commands_in_yaml(path: Path) -> Iterator[tuple[str, ...]]:
    """The commands of a pipeline's stages, with their inputs, and that of a sweep."""
    try:
        content = read_yaml(path)
        stages = content.get("stages")
        for each in stages if isinstance(stages, list) else [content]:
            if isinstance(each, dict):
                texts = [each.get(key, ()) for key in ("command", "inputs")]
                words = [shlex.split(text) if isinstance(text, str) else text for text in texts]
                yield "clp", *(word for some in words for word in some if isinstance(word, str))
    except (ValueError, TypeError):
        return  # Whoever runs it is told.


def _imported(source: bytes, path: Path, directory: Path) -> Iterator[Path]:
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return  # Whoever runs it is told.
    for node in ast.walk(tree):
        names: list[str] = []
        roots = [directory, path.parent]
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = [node.module] if node.module else []
            names = [*base, *(".".join([*base, alias.name]) for alias in node.names)]
            if node.level:
                # More dots than there are folders: whoever runs it is told.
                roots = [*path.parents[node.level - 1 : node.level]]
        for name in names:
            for root in roots:
                yield from _modules(name, root)


def _modules(name: str, root: Path) -> Iterator[Path]:
    """Where a module and the packages that it is in would be."""
    parts = name.split(".")
    if not all(parts) or parts[0] == _PACKAGE:
        return
    for count in range(1, len(parts) + 1):
        yield root.joinpath(*parts[:count], "__init__.py")
    yield root.joinpath(*parts[:-1], f"{parts[-1]}.py")
