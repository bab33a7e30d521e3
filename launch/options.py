"""Options of targets as they are typed: the fields of a frozen dataclass, with their types and texts."""

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from clp_jax.launch.errors import LaunchError

_T = TypeVar("_T")


def option(text: str, default: Any = dataclasses.MISSING) -> Any:
    """A field that is an option; required without a default."""
    return dataclasses.field(default=default, metadata={"text": text})


def split(words: Sequence[str]) -> tuple[list[str], dict[str, str], list[str]]:
    """Splits words into places, options (``--name=value``; ``--name`` is true) and what comes after ``--``.

    Raises:
        LaunchError: for an option that is given twice.
    """
    words = list(words)
    cut = words.index("--") if "--" in words else len(words)
    waiting, command = words[:cut], words[cut + 1 :]
    places: list[str] = []
    options: dict[str, str] = {}
    while waiting:
        word = waiting.pop(0)
        if word == "-h":
            word = "--help"
        if not word.startswith("--"):
            places.append(word)
            continue
        name, equals, value = word[2:].partition("=")
        name = name.replace("-", "_")
        if name in options:
            raise LaunchError(f"--{name} is given twice.")
        options[name] = value if equals else "true"
    return places, options, command


def build(cls: type[_T], options: Mapping[str, str], where: str) -> _T:
    """Makes a dataclass from options as they were typed.

    Args:
        cls: the dataclass.
        options: values by name.
        where: for errors: what the options are of.

    Raises:
        LaunchError: for an unknown option, a missing or a wrong value.
    """
    fields = {field.name: field for field in dataclasses.fields(cls) if "text" in field.metadata}  # type: ignore[arg-type]
    kinds = typing.get_type_hints(cls)
    for name in options:
        if name not in fields:
            raise LaunchError(f"{where} has no option --{name}{suggest(name, list(fields))}.")
    missing = [name for name, f in fields.items() if f.default is dataclasses.MISSING and name not in options]
    if missing:
        texts = ", ".join(f"--{name}=VALUE ({fields[name].metadata['text']})" for name in missing)
        raise LaunchError(f"{where} still needs {texts}.")
    return cls(**{name: _convert(name, value, kinds[name]) for name, value in options.items()})


def describe(cls: type) -> list[str]:
    """The lines of help about the options of a dataclass."""
    lines = []
    for field in dataclasses.fields(cls):
        if "text" in field.metadata:
            default = "required" if field.default is dataclasses.MISSING else f"default {field.default}"
            lines.append(f"  --{field.name}  {field.metadata['text']} ({default})")
    return lines


def suggest(name: str, known: Sequence[str]) -> str:
    """``(did you mean X?)``, or what there is."""
    close = difflib.get_close_matches(name, known, 1)
    return f" (did you mean {close[0]}?)" if close else f": there are {', '.join(sorted(known))}" if known else ""


def _convert(name: str, text: str, kind: Any) -> Any:
    if isinstance(kind, types.UnionType):
        if text == "none":
            return None
        kind = next(member for member in typing.get_args(kind) if member is not type(None))
    if typing.get_origin(kind) is typing.Literal:
        choices = typing.get_args(kind)
        if text not in choices:
            raise LaunchError(f"--{name} is {text!r}: expected {' or '.join(choices)}.")
        return text
    if kind is bool:
        if text not in ("true", "false"):
            raise LaunchError(f"--{name} is {text!r}: expected true or false.")
        return text == "true"
    if typing.get_origin(kind) is tuple:
        return tuple(item for item in text.split(",") if item)
    try:
        return kind(text)
    except ValueError as error:
        expected = {int: "a whole number", float: "a number"}.get(kind, kind.__name__)
        raise LaunchError(f"--{name} is {text!r}: expected {expected}.") from error
