"""Fields of a configuration, and of those inside it, that a user states by name: checked before they are taken."""

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from typing import Any

from clp_jax.models.config import ModelConfig

_EXPECTED = {bool: "true or false", int: "an integer", float: "a number", str: "a name"}
_NOT_GIVEN = object()


@dataclasses.dataclass
class _Stated:
    """What is said of a field.

    Attributes:
        name: as typed, from the policy's configuration on.
        value: of the field; `_NOT_GIVEN` where only fields inside it are stated.
        inside: what is said of these, by name.
    """

    name: str
    value: Any = _NOT_GIVEN
    inside: dict[str, "_Stated"] = dataclasses.field(default_factory=dict)

    def first(self) -> tuple[str, Any]:
        """A name that was typed, and its value."""
        return (self.name, self.value) if self.value is not _NOT_GIVEN else next(iter(self.inside.values())).first()


def checked(kind: type[ModelConfig], overrides: Mapping[str, Any] | None) -> dict[str, Any]:
    """Overrides as values of their fields.

    Args:
        kind: of the configuration.
        overrides: values by field; as typed, ``"none"`` is None, a token may stand for a tuple of one, and the name of a class
            for a configuration of its defaults, or of the fields that are stated with it: ``rope.scaling=LinearScaling`` and
            ``rope.scaling.factor=2``. Fields inside a configuration that is not stated itself are left to `nested`.

    Raises:
        ValueError: naming a field that there is not, or whose value is of another type.
    """
    stated = _stated(overrides)
    _check_names(kind, stated)
    return _values(kind, {name: each for name, each in stated.items() if each.value is not _NOT_GIVEN})


def nested(config: ModelConfig, overrides: Mapping[str, Any] | None) -> ModelConfig:
    """A configuration with the fields inside its configurations that overrides name, as ``moe.router.k``.

    Args:
        config: with the other overrides (`checked`).
        overrides: values by field, dots between the names.

    Raises:
        ValueError: as `checked`, and where there is no such configuration.
    """
    rest = {name: each for name, each in _stated(overrides).items() if each.value is _NOT_GIVEN}
    return dataclasses.replace(config, **_values(config, rest))


def _stated(overrides: Mapping[str, Any] | None) -> dict[str, _Stated]:
    found: dict[str, _Stated] = {}
    for name, value in (overrides or {}).items():
        parts, inside = name.split("."), found
        for depth, part in enumerate(parts, 1):
            each = inside.setdefault(part, _Stated(".".join(parts[:depth])))
            inside = each.inside
        each.value = value
    return found


def _values(owner: Any, stated: Mapping[str, _Stated]) -> dict[str, Any]:
    """Values of an owner's fields: those of a configuration, or of a class, whose defaults they then are."""
    kind = owner if isinstance(owner, type) else type(owner)
    _check_names(kind, stated)
    hints, found = typing.get_type_hints(kind), {}
    for field, each in stated.items():
        made = _made(each, hints[field])
        if made is not None:
            found[field] = made
            continue
        value = getattr(owner, field, None) if each.value is _NOT_GIVEN else _value(each.name, each.value, hints[field])
        if each.inside:
            if not dataclasses.is_dataclass(value):
                raise _no_fields(kind, field, value, each, hints[field])
            value = dataclasses.replace(value, **_values(value, each.inside))  # type: ignore[type-var]
        found[field] = value
    return found


def _made(each: _Stated, hint: Any) -> Any:
    """The configuration whose class is named, or None."""
    kind = next((kind for kind in _classes(hint) if kind.__name__ == each.value), None)
    if kind is None:
        return None
    values = _values(kind, each.inside)
    required = [f.name for f in dataclasses.fields(kind) if dataclasses.MISSING is f.default is f.default_factory]
    missing = [name for name in required if name not in values]
    if missing:
        raise ValueError(
            f"overrides: {each.name} is {each.value}, which needs {', '.join(missing)}: state it too, as "
            f"{each.name}.{missing[0]}=VALUE."
        )
    return kind(**values)


def _check_names(kind: type, stated: Mapping[str, _Stated]) -> None:
    known = [field.name for field in dataclasses.fields(kind)]
    for name, each in stated.items():
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            near = f" (did you mean {close[0]}?)" if close else ""
            if not close and not issubclass(kind, ModelConfig):
                near = f" (it has {', '.join(known)})"
            typed, value = each.first()
            what = "it" if typed == name else f"{typed!r}"
            raise ValueError(f"overrides: {kind.__name__} has no field {name!r}{near}; {what} was to be {value!r}.")


def _no_fields(kind: type, field: str, value: Any, each: _Stated, hint: Any) -> ValueError:
    classes, (typed, wanted) = _classes(hint), each.first()
    how = f"state it first, as {each.name}={classes[0].__name__}" if classes else "leave it out"
    return ValueError(
        f"overrides: {kind.__name__}.{field} is {value!r}, which has no fields, and {typed!r} was to be {wanted!r}: {how}."
    )


def _members(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)


def _classes(hint: Any) -> list[type]:
    """Those of configurations among what a field may be."""
    return [member for member in _members(hint) if dataclasses.is_dataclass(member) and isinstance(member, type)]


def _value(name: str, value: Any, hint: Any) -> Any:
    optional = type(None) in _members(hint)
    if optional and (value is None or value in ("none", "None")):
        return None
    wanted = [member for member in _members(hint) if member is not type(None)]
    rest = " or none" if optional else ""
    if typing.get_origin(wanted[0]) is tuple:
        item = typing.get_args(wanted[0])[0]
        values = value if isinstance(value, tuple | list) else (value,)
        expected = f"{_EXPECTED[item]}, or in Python a tuple of such"
        return tuple(_plain(name, value, each, [item], expected) for each in values)
    if wanted[0] in _EXPECTED:
        expected = " or ".join(_EXPECTED[each] for each in wanted)
        return _plain(name, value, value, wanted, f"{expected}{rest}")
    if not isinstance(value, tuple(wanted)):
        known = " or ".join(each.__name__ for each in wanted)
        some = dataclasses.fields(wanted[0])[0].name
        raise ValueError(
            f"overrides: {name} is {value!r}: expected a {known}{rest}; it has fields of its own, which are stated by "
            f"name, as {name}.{some}=VALUE."
        )
    return value


def _plain(name: str, given: Any, value: Any, wanted: list[type], expected: str) -> Any:
    if float in wanted and type(value) is int:
        return float(value)
    # What is typed as 0 or 1 comes as a number.
    if bool in wanted and type(value) is int and value in (0, 1):
        return bool(value)
    if type(value) not in wanted:
        raise ValueError(f"overrides: {name} is {given!r}: expected {expected}.")
    return value
