"""What can be wrong with a whole configuration, found before anything is built."""

import os
from collections.abc import Iterable, Sequence
from typing import Any

from clp_jax.gin_utils import annotations
from clp_jax.gin_utils.bindings import MACRO, Bindings, Call
from clp_jax.gin_utils.files import REQUIRED, Binding, ConfigError, Macro, closest, leaves, suggest


def check_unused_macros(bound: Bindings) -> None:
    """A macro of a file that nothing uses, called almost like one that is used, is a slip of the pen.

    Files for several commands may well set macros that one of the commands does not use.
    """
    used = {item.name for value in bound.all_values() for item in leaves(value.value) if isinstance(item, Macro)}
    for name, value in bound.macros.items():
        similar = closest(name, used, least=0.8)
        numbered = similar is not None and similar.rstrip("0123456789") == name.rstrip("0123456789")
        if name not in used and similar is not None and not numbered:
            raise ConfigError(f"{value.place}: nothing uses the macro {name} (did you mean {similar}?).")


def check_given(bound: Bindings, given: Sequence[Binding], reached: Iterable[Call]) -> None:
    """A binding of the command line that changes nothing is a mistake."""
    calls = [call for call in reached if call.scope != MACRO]
    macros = [call.path for call in reached if call.scope == MACRO]
    flags = list(bound.parameters(bound.entry).hints)
    for binding in given:
        if binding.macro is not None and binding.macro not in macros:
            flag = closest(binding.macro, flags)
            hint = suggest(binding.macro, macros) or (f" (did you mean --{flag}?)" if flag else "")
            raise ConfigError(f"{binding.place}: nothing here uses a macro {binding.macro}{hint}.")
        if binding.macro is None and not any(call.path == binding.selector for call in calls):
            short = [call.path.rsplit(".", 1)[-1] for call in calls]
            raise ConfigError(f"{binding.place}: nothing here uses {binding.selector}; it uses {', '.join(short)}.")


def check_complete(bound: Bindings, reached: Iterable[Call], has_files: bool) -> None:
    """Everything that is needed has a value."""
    unset: dict[str, None] = {}
    for call in reached:
        if call.scope == MACRO:
            if call.path not in bound.macros:
                place = next(v.place for v in bound.all_values() if Macro(call.path) in leaves(v.value))
                raise ConfigError(f"{place}: the macro {call.path} is set nowhere{suggest(call.path, bound.macros)}.")
            if REQUIRED in leaves(bound.macros[call.path].value):
                unset[f"--gin.{call.path}=VALUE"] = None
            continue
        arguments = bound.arguments(call.scope, call.path)
        parameters = bound.parameters(call.path)
        missing = [name for name in parameters.required if call.complete and name not in arguments]
        missing += [name for name, value in arguments.items() if REQUIRED in leaves(value.value)]
        for name in missing:
            is_flag = call.path == bound.entry and parameters.hints.get(name) in (str, int, float, str | os.PathLike)
            short = call.path.rsplit(".", 1)[-1]
            unset[f"--{name}=VALUE" if is_flag else f"--gin.{short}.{name}=VALUE"] = None
    if unset:
        typed = all(not name.startswith("--gin.") for name in unset)
        hint = "" if has_files or typed else "; most of it comes from a gin file: --gin_file=FILE"
        raise ConfigError(f"{bound.entry.rsplit('.', 1)[-1]} still needs {', '.join(unset)}{hint}.")


def check_types(bound: Bindings) -> None:
    """Every bound value is of the annotated type."""
    for (_, path), arguments in bound.values.items():
        hints = bound.parameters(path).hints
        for argument, value in arguments.items():
            concrete, through = bound.concrete(value.value)
            expected = annotations.mismatch(concrete, hints.get(argument, Any))
            if expected is not None:
                last = bound.macros[through[-1]] if through else value
                name = f"{path.rsplit('.', 1)[-1]}.{argument}"
                via = f"%{through[0]}, " if through else ""
                raise ConfigError(f"{last.place}: {name} is {via}{_brief(last.value)}: expected {expected}.")


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
