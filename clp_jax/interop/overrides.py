"""Fields of a configuration that a user states by name, checked before they are taken."""

import difflib
import types
import typing
from collections.abc import Mapping
from typing import Any

from clp_jax.models.config import ModelConfig

_EXPECTED = {bool: "true or false", int: "an integer", float: "a number", str: "a name"}


def checked(kind: type[ModelConfig], overrides: Mapping[str, Any] | None) -> dict[str, Any]:
    """Overrides as values of their fields.

    Args:
        kind: of the configuration.
        overrides: values by field; as typed, ``"none"`` is None, and a token may stand for a tuple of one.

    Raises:
        ValueError: naming a field that there is not, or whose value is of another type.
    """
    hints = typing.get_type_hints(kind)
    found = {}
    for name, value in (overrides or {}).items():
        if name not in hints:
            close = difflib.get_close_matches(name, list(hints), n=1)
            hint = f" (did you mean {close[0]}?)" if close else ""
            raise ValueError(f"overrides: {kind.__name__} has no field {name!r}{hint}; it was to be {value!r}.")
        found[name] = _value(name, value, hints[name])
    return found


def _value(name: str, value: Any, hint: Any) -> Any:
    members = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    optional = type(None) in members
    if optional and (value is None or value in ("none", "None")):
        return None
    (wanted,) = (member for member in members if member is not type(None))
    rest = " or none" if optional else ""
    if typing.get_origin(wanted) is tuple:
        item = typing.get_args(wanted)[0]
        values = value if isinstance(value, tuple | list) else (value,)
        expected = f"{_EXPECTED[item]}, or in Python a tuple of such"
        return tuple(_plain(name, value, each, item, expected) for each in values)
    if wanted in _EXPECTED:
        return _plain(name, value, value, wanted, f"{_EXPECTED[wanted]}{rest}")
    if not isinstance(value, wanted):
        hint = "; it has fields of its own, which can't be typed here: state the policy in gin"
        raise ValueError(f"overrides: {name} is {value!r}: expected a {wanted.__name__}{rest}{hint}.")
    return value


def _plain(name: str, given: Any, value: Any, wanted: type, expected: str) -> Any:
    if wanted is float and type(value) is int:
        return float(value)
    # What is typed as 0 or 1 comes as a number.
    if wanted is bool and type(value) is int and value in (0, 1):
        return bool(value)
    if type(value) is not wanted:
        raise ValueError(f"overrides: {name} is {given!r}: expected {expected}.")
    return value
