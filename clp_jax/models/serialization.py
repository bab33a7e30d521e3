"""Frozen dataclasses as JSON and back, so that a checkpoint rebuilds what it was made of.

Only classes marked `@serializable` are read: a name in a file never imports or evaluates anything.
"""

import dataclasses
import difflib
from typing import Any, TypeVar

_CLASSES: dict[str, type] = {}
_TYPE = "type"

T = TypeVar("T")


def serializable(cls: type[T]) -> type[T]:
    """Lets `to_json` and `from_json` handle a frozen dataclass of JSON values, tuples and serializable dataclasses."""
    if _CLASSES.get(cls.__name__, cls).__qualname__ != cls.__qualname__:
        raise ValueError(f"two serializable classes are called {cls.__name__!r}.")
    _CLASSES[cls.__name__] = cls
    return cls


def to_json(value: Any) -> Any:
    """The JSON form: dataclasses become dictionaries with their class name under ``"type"``.

    Raises:
        TypeError: for a value that would not come back as it was.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        name = type(value).__name__
        if name not in _CLASSES:
            raise TypeError(f"{name} can't be stored with a checkpoint: it is not marked @serializable.")
        return {_TYPE: name} | {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, tuple | list):
        return [to_json(item) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{value!r} of type {type(value).__name__} can't be stored with a checkpoint.")


def from_json(value: Any) -> Any:
    """What `to_json` was given; lists come back as tuples.

    Raises:
        ValueError: for an unknown class, or fields it does not have.
    """
    if isinstance(value, list):
        return tuple(from_json(item) for item in value)
    if not isinstance(value, dict):
        return value
    name = value.get(_TYPE)
    if name not in _CLASSES:
        close = difflib.get_close_matches(str(name), list(_CLASSES), n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise ValueError(f"a checkpoint names the unknown type {name!r}{hint}. Known: {', '.join(sorted(_CLASSES))}.")
    cls = _CLASSES[name]
    fields = {key: from_json(item) for key, item in value.items() if key != _TYPE}
    unknown = set(fields) - {f.name for f in dataclasses.fields(cls)}
    if unknown:
        raise ValueError(f"a checkpoint's {name} has the unknown fields {', '.join(sorted(unknown))}.")
    return cls(**fields)
