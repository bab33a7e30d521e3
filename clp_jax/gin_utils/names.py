"""What the names in gin files and on command lines stand for."""

import importlib
import pkgutil
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from clp_jax.gin_utils.files import ConfigError, GinFile, Import, suggest

Target = Callable[..., Any]


class Names:
    """Functions and classes under their full names.

    Attributes:
        targets: the function or class of each full name that was met.
        modules: the module that holds it.
    """

    def __init__(self):
        self.targets: dict[str, Target] = {}
        self.modules: dict[str, str] = {}

    def of_file(self, file: GinFile) -> dict[str, Import]:
        """The names a file may use, imported."""
        found = file.imports()
        for statement in found.values():
            _import(statement)
        return found

    def of_files(self, files: Iterable[GinFile]) -> dict[str, list[Import]]:
        """The names of all files; files may use one name for different modules."""
        found: dict[str, list[Import]] = {}
        for file in files:
            for name, statement in self.of_file(file).items():
                others = found.setdefault(name, [])
                if not any(other.module == statement.module for other in others):
                    others.append(statement)
        return found

    def resolve(self, selector: str, symbols: Mapping[str, Import], place: str) -> str:
        """The full name of what a file calls `selector`."""
        first, *rest = selector.split(".")
        if first not in symbols:
            known = [path.rsplit(".", 1)[-1] for path in self.targets]
            hint = suggest(first, symbols) or (" (import its module)" if selector in known else "")
            raise ConfigError(f"{place}: the file imports nothing called {first!r}{hint}.")
        return self._walk(symbols[first], selector, rest, place)

    def resolve_given(self, selector: str, symbols: Mapping[str, Sequence[Import]], place: str) -> str:
        """The full name of what a command line calls `selector`.

        It may be the end of a full name in use (the entry function's first of all), a name as a file writes it, or
        something in a module that a file imports; a module may stand for the function of its name.
        """
        parts = selector.split(".")
        for find in (self._in_use, self._as_written, self._inside_modules):
            found = list(dict.fromkeys(find(parts, symbols)))
            if len(found) == 1:
                return found[0]
            if found:
                raise ConfigError(f"{place}: {selector!r} may be {' or '.join(found)}: write more of the name.")
        known = [*(path.rsplit(".", 1)[-1] for path in self.targets), *symbols, *self.targets]
        raise ConfigError(f"{place}: there is no function or class {selector!r} here{suggest(selector, known)}.")

    def _in_use(self, parts: Sequence[str], symbols: Mapping[str, Sequence[Import]]) -> list[str]:
        """What has a full name that ends so, or the method of such a class."""
        for cut in range(len(parts), 0, -1):
            head, rest = ".".join(parts[:cut]), parts[cut:]
            paths = [path for path in self.targets if f".{path}".endswith(f".{head}")]
            if paths and paths[0] == next(iter(self.targets)) and not rest:
                return paths[:1]
            found = [(path, _get(self.targets[path], rest)) for path in paths]
            if any(callable(target) for _, target in found):
                return [self._below(path, target, rest) for path, target in found if callable(target)]
        return []

    def _as_written(self, parts: Sequence[str], symbols: Mapping[str, Sequence[Import]]) -> list[str]:
        """What a file would mean by it; a module stands for the function of its name."""
        found = []
        for statement in symbols.get(parts[0], ()):
            names = list(parts[1:])
            if isinstance(_get(_import(statement), names), types.ModuleType):
                names.append(parts[-1])
            if callable(_get(_import(statement), names)):
                found.append(self._walk(statement, ".".join(parts), names, ""))
        return found

    def _inside_modules(self, parts: Sequence[str], symbols: Mapping[str, Sequence[Import]]) -> list[str]:
        """What is in a module that a file imports."""
        modules = dict.fromkeys(statement.module for group in symbols.values() for statement in group)
        found = [(module, _get(importlib.import_module(module), parts)) for module in modules]
        return [self.register(target, module, parts) for module, target in found if callable(target)]

    def _below(self, path: str, target: Target, names: Sequence[str]) -> str:
        if not names:
            return path
        module = self.modules[path]
        return self.register(target, module, [*path.removeprefix(f"{module}.").split("."), *names])

    def _walk(self, statement: Import, selector: str, names: Sequence[str], place: str) -> str:
        current: Any = _import(statement)
        for position, name in enumerate(names):
            if not hasattr(current, name):
                where = ".".join([statement.name, *names[:position]])
                known = [known for known in dir(current) if not known.startswith("_")]
                raise ConfigError(f"{place}: {where} has no {name!r}{suggest(name, known)}.")
            current = getattr(current, name)
        if not callable(current):
            own = selector.split(".")[-1]
            hint = f"; did you mean {selector}.{own}?" if callable(getattr(current, own, None)) else ""
            raise ConfigError(f"{place}: {selector} is a {type(current).__name__}, not a function or class{hint}.")
        module, attributes = statement.module, list(names)
        if statement.whole:
            module = statement.name
            while attributes and isinstance(getattr(importlib.import_module(module), attributes[0]), types.ModuleType):
                module = f"{module}.{attributes.pop(0)}"
        return self.register(current, module, attributes)

    def register(self, target: Target, module: str, attributes: Sequence[str]) -> str:
        """Files a target under the name its author gave it, if that leads to it, so that two ways to it are one."""
        home, name = getattr(target, "__module__", None), getattr(target, "__qualname__", "<>")
        if home and "<" not in name and _follow(home, name.split(".")) == target:
            module, attributes = home, name.split(".")
        path = ".".join([module, *attributes])
        self.targets[path] = target
        self.modules[path] = module
        return path


def _import(statement: Import) -> types.ModuleType:
    try:
        module = importlib.import_module(statement.module)
    except ModuleNotFoundError as error:
        if not error.name or not f"{statement.module}.".startswith(f"{error.name}."):
            raise ConfigError(
                f"{statement.place}: {statement.module} needs the module {error.name}, which is missing."
            ) from error
        parent, _, name = statement.module.rpartition(".")
        attribute = _follow(parent, [name]) if parent else None
        if attribute is not None:
            raise ConfigError(
                f"{statement.place}: gin imports modules, and {statement.module} is not one: import {parent} and write "
                f"{parent.rsplit('.', 1)[-1]}.{name}."
            ) from None
        hint = suggest(statement.module, _siblings(parent))
        raise ConfigError(f"{statement.place}: there is no module {statement.module}{hint}.") from None
    return importlib.import_module(statement.name) if statement.whole else module


def _siblings(package: str) -> list[str]:
    try:
        paths = importlib.import_module(package).__path__ if package else None
    except (ImportError, AttributeError):
        return []
    return [f"{package}.{m.name}" if package else m.name for m in pkgutil.iter_modules(paths)]


def _get(value: Any, names: Sequence[str]) -> Any:
    for name in names:
        value = getattr(value, name, None)
    return value


def _follow(module: str, names: Sequence[str]) -> Any:
    try:
        return _get(importlib.import_module(module), names)
    except ImportError:
        return None
