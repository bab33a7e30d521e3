"""Reads gin files and bindings into statements, with the place each came from; imports nothing that they name.

The grammar is gin's own (its parser is used), so `clp <command> --help` can list the macros of a file at once.
"""

import dataclasses
import difflib
import io
import re
import tokenize
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from gin import config_parser

_DYNAMIC_REGISTRATION = "__gin__.dynamic_registration"
_PLAIN_TEXT = re.compile(r"[\w./~+:-][\w./~+:@%=-]*")
_HEADER_ITEM = re.compile(r"#\s*(?:-\s*)?([A-Z][A-Z0-9_]*)\s*(?::\s*(.*))?$")


class ConfigError(ValueError):
    """A mistake in gin files, in bindings or in flags; its message is one line that names the place."""


@dataclasses.dataclass(frozen=True)
class Reference:
    """``@scopes/name`` or ``@scopes/name()``."""

    scopes: str
    name: str
    evaluate: bool

    def __repr__(self) -> str:
        return f"@{join_scope(self.scopes, self.name)}{'()' if self.evaluate else ''}"


@dataclasses.dataclass(frozen=True)
class Macro:
    """``%name``."""

    name: str

    def __repr__(self) -> str:
        return f"%{self.name}"


REQUIRED = Macro("gin.REQUIRED")


@dataclasses.dataclass(frozen=True)
class Import:
    """``import module`` or ``from package import module``, perhaps ``as alias``.

    Attributes:
        module: in full.
        name: what the file calls it.
        whole: whether `name` is the first component of `module` (``import a.b``) rather than the module itself.
        place: file and line.
    """

    module: str
    name: str
    whole: bool
    place: str


@dataclasses.dataclass(frozen=True)
class Binding:
    """``scope/selector.argument = value``, or ``macro = value`` with an empty argument."""

    scope: str
    selector: str
    argument: str
    value: Any
    place: str

    @property
    def macro(self) -> str | None:
        """The name of the macro that this sets, if it sets one."""
        return None if self.argument else join_scope(self.scope, self.selector)


@dataclasses.dataclass(frozen=True)
class Header:
    """The comment a gin file starts with.

    Attributes:
        summary: its first paragraph.
        required: macros that must be given, with what is said of them.
        overridden: macros that are commonly given.
    """

    summary: str
    required: dict[str, str]
    overridden: dict[str, str]


@dataclasses.dataclass(frozen=True)
class GinFile:
    """One file, and at their places in `statements` the files it includes.

    Attributes:
        path: of the file.
        header: what its first comment says.
        statements: in order.
    """

    path: Path
    header: Header
    statements: tuple["Import | Binding | GinFile", ...]

    def imports(self) -> dict[str, Import]:
        """What the names of this file, and of no other, stand for."""
        return {statement.name: statement for statement in self.statements if isinstance(statement, Import)}


Statement: TypeAlias = Import | Binding | GinFile


class SearchPath:
    """Where gin files are looked for: the working directory, the given directories, and the ones that come with clp_jax."""

    def __init__(self, directories: Sequence[str] = ()):
        for directory in directories:
            if not Path(directory).expanduser().is_dir():
                raise ConfigError(f"--gin_search_paths: {directory} is not a directory.")
        self.directories = (Path(), *(Path(d).expanduser() for d in directories), shipped_files())

    def find(self, name: str, asked_by: str = "--gin_file") -> Path:
        """The first file of that name.

        Raises:
            ConfigError: when there is none, with the most similar name.
        """
        for directory in self.directories:
            path = directory / Path(name).expanduser()
            if path.is_file():
                return path
        shipped = (path.relative_to(d).as_posix() for d in self.directories[1:] for path in sorted(d.rglob("*.gin")))
        looked = ", ".join(str(d.absolute()) for d in self.directories)
        raise ConfigError(f"{asked_by}: there is no file {name}{suggest(name, shipped)}. Looked in {looked}.")


def shipped_files() -> Path:
    """The directory of the gin files that come with clp_jax."""
    package = Path(__file__).parent.parent
    installed = package / "gin_configs"
    return installed if installed.is_dir() else package.parent / "gin_configs"


def read_file(
    name: str, search_path: SearchPath, asked_by: str = "--gin_file", parents: tuple[Path, ...] = ()
) -> GinFile:
    """Reads a file and what it includes.

    Raises:
        ConfigError: for a missing file, one that includes itself, or a mistake in its grammar.
    """
    path = search_path.find(name, asked_by)
    if path.resolve() in parents:
        raise ConfigError(f"{asked_by}: {name} includes itself.")
    try:
        text = path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{asked_by}: {path} is not UTF-8 text (byte {error.start}).") from None
    except OSError as error:
        raise ConfigError(f"{asked_by}: {path} can't be read: {error.strerror}.") from None
    statements: list[Statement] = []
    dynamic = False
    for parsed in _parse(text, str(path)):
        place = f"{path}:{parsed.location.line_num}"
        match parsed:
            case config_parser.IncludeStatement():
                statements.append(read_file(parsed.filename, search_path, place, (*parents, path.resolve())))
            case config_parser.ImportStatement(module=module) if module == _DYNAMIC_REGISTRATION:
                dynamic = True
            case config_parser.ImportStatement():
                whole = not parsed.is_from and not parsed.alias
                statements.append(Import(parsed.module, parsed.bound_name(), whole, place))
            case config_parser.BindingStatement():
                value = parsed.value
                statements.append(Binding(parsed.scope, parsed.selector, parsed.arg_name, value, place))
        last = statements[-1] if statements else None
        if not dynamic and (isinstance(last, Import) or (isinstance(last, Binding) and _names_something(last))):
            raise ConfigError(f"{place}: write `from __gin__ import dynamic_registration` before this line.")
    return GinFile(path, read_header(text), tuple(statements))


def read_binding(text: str) -> Binding:
    """Reads ``NAME=VALUE`` as given on a command line.

    A value that only makes sense as a string may go without its quotes, which shells take away.

    Raises:
        ConfigError: for a mistake in its grammar.
    """
    name, equals, value = (part.strip() for part in text.partition("="))
    place = f"--gin.{name}"
    if not equals or not value:
        raise ConfigError(f"{place} has no value: write {place}=VALUE.")
    if not re.fullmatch(r"(\w+/)*\w+(\.\w+)*", name):
        raise ConfigError(f"{place}={value}: {name!r} is not a name.")
    try:
        (parsed,) = _parse(f"{name} = {value}\n", place)
    except ConfigError:
        if not _PLAIN_TEXT.fullmatch(value):
            raise ConfigError(
                f"{place}={value}: {value!r} is not a gin value. Text needs quotes that the shell leaves alone: "
                f"{place}='\"{value}\"'; a list needs brackets."
            ) from None
        (parsed,) = _parse(f"{name} = {value!r}\n", place)
    return Binding(parsed.scope, parsed.selector, parsed.arg_name, parsed.value, place)


def read_header(text: str) -> Header:
    """Reads the comment that a file starts with: ``# Required:`` and ``# Commonly overridden:``, then ``# - NAME: text``."""
    summary: list[str] = []
    sections: dict[str, dict[str, str]] = {"required": {}, "commonly overridden": {}}
    section: dict[str, str] | None = None
    name = None
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        content = line.lstrip("# ").strip()
        heading = next((h for h in sections if content.lower().startswith(h)), None)
        if heading is not None and content.endswith(":"):
            section, name = sections[heading], None
        elif section is None:
            summary.append(content)
        elif match := _HEADER_ITEM.match(line):
            name = match[1]
            section[name] = match[2] or ""
        elif name is not None and content:
            section[name] = f"{section[name]} {content}".strip()
    paragraphs = "\n".join(summary).strip().split("\n\n")
    return Header(" ".join(paragraphs[0].split()), sections["required"], sections["commonly overridden"])


def bindings(files: Iterable[GinFile]) -> Iterator[tuple[Binding, GinFile]]:
    """Every binding of the files in the order they take effect, with the file whose names it uses."""
    for file in files:
        for statement in file.statements:
            if isinstance(statement, GinFile):
                yield from bindings([statement])
            elif isinstance(statement, Binding):
                yield statement, file


def all_files(files: Iterable[GinFile]) -> Iterator[GinFile]:
    """The files and all they include, included ones first."""
    for file in files:
        yield from all_files(s for s in file.statements if isinstance(s, GinFile))
        yield file


def transform(value: Any, leaf: Callable[[Any], Any]) -> Any:
    """Applies `leaf` to what is in nested lists, tuples and dictionaries."""
    if isinstance(value, list | tuple):
        return type(value)(transform(item, leaf) for item in value)
    if isinstance(value, dict):
        return {transform(key, leaf): transform(item, leaf) for key, item in value.items()}
    return leaf(value)


def leaves(value: Any) -> list[Any]:
    """What is in nested lists, tuples and dictionaries."""
    found: list[Any] = []
    transform(value, found.append)
    return found


def join_scope(scopes: str, name: str) -> str:
    """``scopes/name``, or ``name`` without scopes."""
    return f"{scopes}/{name}" if scopes else name


def closest(name: str, known: Iterable[str], least: float = 0.6) -> str | None:
    """The most similar known name, if the similarity is at least `least` of 1."""
    folded = {k.lower(): k for k in known}
    close = difflib.get_close_matches(name.lower(), folded, n=1, cutoff=least)
    return folded[close[0]] if close else None


def suggest(name: str, known: Iterable[str]) -> str:
    """`` (did you mean x?)`` with the most similar known name, or nothing."""
    similar = closest(name, known)
    return "" if similar is None else f" (did you mean {similar}?)"


def _names_something(binding: Binding) -> bool:
    return bool(binding.argument) or any(isinstance(leaf, Reference) for leaf in leaves(binding.value))


class _Delegate(config_parser.ParserDelegate):
    """Keeps references and macros as they are written."""

    def configurable_reference(self, scoped_configurable_name, evaluate):
        *scopes, name = scoped_configurable_name.split("/")
        return Reference("/".join(scopes), name, evaluate)

    def macro(self, macro_name):
        return Macro(macro_name)


def _parse(text: str, place: str) -> list[Any]:
    lines = io.StringIO(text)
    lines.name = place
    try:
        return list(config_parser.ConfigParser(lines, _Delegate()))
    except (SyntaxError, tokenize.TokenError) as error:
        # Gin's own errors carry its Location, the tokenizer's a (line, column).
        details: Any = error.args[1] if len(error.args) > 1 else ()
        line = details[1] if len(details) > 2 else details[0] if details else 0
        where = f"{place}:{line}" if line else place
        message = str(error.args[0]).replace("\n", " ")
        near = f" at {str(details[3]).strip()!r}" if len(details) > 3 and details[3] else ""
        raise ConfigError(f"{where}: {message.rstrip('.')}{near}.") from None
