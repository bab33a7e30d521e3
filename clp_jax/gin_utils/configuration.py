"""Gin: files and bindings become the arguments of an entry function, and one text that says all of them.

Every name and type in the files is checked here, and what is left is written as a *resolved configuration*: plain gin with
full names, that holds what the entry function reaches, default values included. Gin then parses that text and builds the
objects, so what a run directory stores is what ran, and ``clp <command> --gin_file=RUN/config.gin`` runs it again.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import gin

from clp_jax.gin_utils.bindings import MACRO, Bindings, Call
from clp_jax.gin_utils.checks import check_complete, check_given, check_types, check_unused_macros
from clp_jax.gin_utils.files import (
    Binding,
    ConfigError,
    SearchPath,
    all_files,
    bindings,
    join_scope,
    read_binding,
    read_file,
)
from clp_jax.gin_utils.names import Target


@dataclasses.dataclass(frozen=True)
class Configuration:
    """The arguments of an entry function, checked and not yet built.

    Attributes:
        entry: the function.
        text: the resolved configuration.
        borrowed: see `configure`.
        again: configures once more, with more files and bindings behind those given.
    """

    entry: Target
    text: str
    borrowed: Mapping[str, Target] = dataclasses.field(default_factory=dict)
    again: Callable[[Sequence[str], Sequence[str]], "Configuration"] | None = None

    def build(self) -> dict[str, Any]:
        """Builds the arguments.

        A borrowed function becomes one that builds that function's arguments, when it is called, of this configuration
        with more gin files and bindings: ``(gin_files=(), gin_bindings=()) -> dict``.

        Raises:
            ConfigError: when an object refuses what it was given.
        """
        arguments = self._build(self.entry)
        return arguments | {name: functools.partial(self._lend, name) for name in self.borrowed}

    def _lend(self, name: str, gin_files: Sequence[str] = (), gin_bindings: Sequence[str] = ()) -> dict[str, Any]:
        assert self.again is not None
        return self.again(gin_files, gin_bindings)._build(self.borrowed[name])

    def _build(self, target: Target) -> dict[str, Any]:
        gin.clear_config()
        gin.parse_config(self.text)
        try:
            return gin.get_bindings(target)
        except (TypeError, ValueError) as error:
            # Gin adds on further lines which of its wrappers the error went through.
            raise ConfigError(str(error).split("\n  In call to configurable")[0].strip()) from error


def configure(
    entry: Target,
    *,
    gin_files: Sequence[str] = (),
    gin_bindings: Sequence[str] = (),
    search_paths: Sequence[str] = (),
    arguments: Mapping[str, Any] | None = None,
    borrowed: Mapping[str, Target] | None = None,
) -> Configuration:
    """Reads and checks a configuration.

    Args:
        entry: keyword-only function; an argument called ``config_text`` is not configured.
        gin_files: names of files; later ones win.
        gin_bindings: ``NAME=VALUE``, where a name is a macro or ``module.function.argument``, as short as it is
            unambiguous; they win over files.
        search_paths: more directories to look for files in.
        arguments: of the entry function itself; they win over everything.
        borrowed: arguments of the entry function that stand for another function, as it is configured. It is never called:
            texts that it requires, such as directories, may be left out.

    Raises:
        ConfigError: for anything that is wrong, before the entry function or any class is called.
    """
    path = SearchPath(search_paths)
    files = [read_file(name, path) for name in gin_files]
    bound = Bindings(entry)
    for binding, file in bindings(files):
        bound.add(binding, bound.names.of_file(file))
    check_unused_macros(bound)
    everywhere = bound.names.of_files(all_files(files))
    given: list[Binding] = [bound.add_given(read_binding(text), everywhere) for text in gin_bindings]
    for name, value in (arguments or {}).items():
        bound.add_argument(name, value)
    for name, target in (borrowed or {}).items():
        bound.add_argument(name, bound.reference(target))
    if borrowed:
        bound.fill_texts()
    reached = bound.reach()
    check_given(bound, given, reached)
    check_types(bound)
    check_complete(bound, reached, bool(files))

    def again(more_files: Sequence[str], more_bindings: Sequence[str]) -> Configuration:
        return configure(
            entry,
            gin_files=[*gin_files, *more_files],
            gin_bindings=[*gin_bindings, *more_bindings],
            search_paths=search_paths,
            arguments=arguments,
            borrowed=borrowed,
        )

    return Configuration(entry, resolved_text(bound, reached), borrowed or {}, again)


def resolved_text(bound: Bindings, reached: Iterable[Call]) -> str:
    """What is reached as gin: imports, macros, then a block for each function and class, the entry function first."""
    calls = [call for call in reached if call.scope != MACRO]
    macros = sorted(call.path for call in reached if call.scope == MACRO)
    paths = [bound.entry, *sorted({call.path for call in calls} - {bound.entry})]
    lines = ["from __gin__ import dynamic_registration"]
    lines += sorted({f"import {bound.names.modules[path]}" for path in paths})
    lines += ["", *(f"{name} = {bound.macros[name].value!r}" for name in macros)] if macros else []
    for path in paths:
        block = _block(bound, path, [call.scope for call in calls if call.path == path])
        lines += ["", *block] if block else []
    return "\n".join(lines) + "\n"


def _block(bound: Bindings, path: str, scopes: Sequence[str]) -> list[str]:
    """The arguments of one function or class in the scopes it is called in."""
    known = bound.parameters(path)
    order = {name: position for position, name in enumerate(known.hints)}
    lines = []
    for scope in sorted({outer for inner in scopes for outer in bound.enclosing(inner)}):
        own = {name: repr(value.value) for name, value in bound.values.get((scope, path), {}).items()}
        if not scope:
            # Without a scope, a default is what each call sees that binds nothing else.
            unbound = {n for n in known.defaults if any(n not in bound.arguments(inner, path) for inner in scopes)}
            own |= {n: repr(known.defaults[n]) for n in unbound & set(order) if _is_literal(known.defaults[n])}
        for name in sorted(own, key=lambda name: (order.get(name, len(order)), name)):
            lines.append(f"{join_scope(scope, path)}.{name} = {own[name]}")
    return lines


def _is_literal(value: Any) -> bool:
    """Whether gin reads the value back from its `repr`."""
    try:
        return bool(gin.config.parse_value(repr(value)) == value)
    except (SyntaxError, ValueError):
        return False
