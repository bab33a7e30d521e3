"""What functions and classes take, and whether a configured value is of the annotated type, before anything is built."""

import collections.abc
import dataclasses
import inspect
import types
import typing
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from beartype import BeartypeConf
from beartype.door import is_bearable

_CONFIGURATION = BeartypeConf(is_pep484_tower=True)  # An int will do where a float is expected.
_SIMPLE = (bool, int, float, str)


@dataclasses.dataclass(frozen=True)
class Parameters:
    """What a function or class can be given by name.

    Attributes:
        hints: the annotation of each parameter; `Any` where there is none or it can't be resolved.
        defaults: of the parameters that have one.
        required: the parameters without one.
        open: whether it takes any other name too.
    """

    hints: Mapping[str, Any]
    defaults: Mapping[str, Any]
    required: tuple[str, ...]
    open: bool


def parameters(target: Callable[..., Any]) -> Parameters:
    """Reads the signature of a function or class."""
    try:
        signature = inspect.signature(target)
    except (TypeError, ValueError):  # Some builtins have none.
        return Parameters({}, {}, (), True)
    kinds = inspect.Parameter
    named = [p for p in signature.parameters.values() if p.kind in (kinds.POSITIONAL_OR_KEYWORD, kinds.KEYWORD_ONLY)]
    hints = _hints(target)
    is_open = any(p.kind is kinds.VAR_KEYWORD for p in signature.parameters.values())
    found = Parameters(
        hints={p.name: hints.get(p.name, Any) for p in named},
        defaults={p.name: p.default for p in named if p.default is not kinds.empty},
        required=tuple(p.name for p in named if p.default is kinds.empty),
        open=is_open,
    )
    owner = getattr(target, "__self__", None)
    if is_open and dataclasses.is_dataclass(owner) and isinstance(owner, type):
        # A class method with ``**fields``: a preset of the dataclass.
        fields = parameters(owner)
        return dataclasses.replace(found, hints={**fields.hints, **found.hints}, open=False)
    return found


def mismatch(value: Any, hint: Any) -> str | None:
    """What is expected, when a value is not that.

    Args:
        value: a Python value; `Produced` stands for what a function or class will make.
        hint: an annotation.

    Returns:
        The annotation, as it is written in Python, or None when the value fits or that can't be known.
    """
    if hint is Any or hint is inspect.Parameter.empty:
        return None
    filled, known = _fill(value)
    return None if not known or _fits(filled, hint) else show(hint)


@dataclasses.dataclass(frozen=True)
class Produced:
    """Stands for a value that will be made by calling something."""

    by: Callable[..., Any]


UNKNOWN = Produced(lambda: None)


def show(hint: Any) -> str:
    """An annotation as one writes it, without the names of modules."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return " | ".join(show(member) for member in typing.get_args(hint))
    if hint is types.NoneType:
        return "None"
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return " | ".join(repr(argument) for argument in arguments)
    if origin is collections.abc.Callable:
        return "a function"
    if origin is typing.Annotated:
        return show(arguments[0])
    name = getattr(origin or hint, "__name__", None) or str(hint).replace("typing.", "")
    if arguments:
        return f"{name}[{', '.join('...' if a is ... else show(a) for a in arguments)}]"
    return name


def _hints(target: Any) -> dict[str, Any]:
    if isinstance(target, type):
        sources = [target] if dataclasses.is_dataclass(target) else [target.__init__]  # type: ignore[misc]
    else:
        sources = [inspect.unwrap(target), getattr(inspect.unwrap(target), "__call__", None)]  # noqa: B004
    for source in sources:
        try:
            hints = typing.get_type_hints(source)
        except Exception:  # Names that exist for type checkers only, and the like.
            continue
        if hints:
            return hints
    return {}


def _fits(value: Any, hint: Any) -> bool:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if isinstance(hint, types.UnionType) or origin is typing.Union:
        return any(_fits(value, member) for member in arguments)
    if isinstance(value, bool) and hint in (int, float):
        return False  # Python counts True as an int,
    is_iterable = isinstance(origin, type) and issubclass(origin, collections.abc.Iterable)
    if isinstance(value, str) and is_iterable:
        return False  # and a string as a sequence of strings.
    # Beartype looks at one item of a container, not at all of them.
    if isinstance(value, list | tuple) and is_iterable and len(arguments) - (... in arguments) == 1:
        return isinstance(value, origin) and all(_fits(item, arguments[0]) for item in value)
    if isinstance(value, dict) and isinstance(origin, type) and issubclass(origin, collections.abc.Mapping):
        return all(_fits(item, hint) for pair in value.items() for item, hint in zip(pair, arguments, strict=True))
    if getattr(hint, "_is_protocol", False):
        return all(_has(value, member) for member in _members(hint))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return is_bearable(value, hint, conf=_CONFIGURATION)
    except Exception:  # Annotations that beartype does not support are not checked.
        return True


def _members(protocol: type) -> set[str]:
    """What a protocol asks for; its `isinstance` would run the properties of an instance that was never initialised."""
    named = {name for name in vars(protocol) if name == "__call__" or not name.startswith("_")}
    return named | set(vars(protocol).get("__annotations__", {}))


def _has(value: Any, member: str) -> bool:
    try:
        inspect.getattr_static(value, member)
    except AttributeError:
        return False
    return True


def _fill(value: Any) -> tuple[Any, bool]:
    """Puts an instance, never initialised, where `Produced` is; and whether its class is known."""
    if isinstance(value, list | tuple):
        items = [_fill(item) for item in value]
        return type(value)(item for item, _ in items), all(known for _, known in items)
    if isinstance(value, dict):
        filled = {key: _fill(item) for key, item in value.items()}
        return {key: item for key, (item, _) in filled.items()}, all(known for _, known in filled.values())
    if not isinstance(value, Produced):
        return value, True
    made = value.by if isinstance(value.by, type) else _hints(value.by).get("return")
    if not isinstance(made, type) or made in _SIMPLE or typing.get_origin(made) is not None:
        return None, False
    try:
        instance: Any = object.__new__(made)
        for name in getattr(made, "__dataclass_fields__", {}):
            object.__setattr__(instance, name, None)  # Protocols look for attributes.
    except (TypeError, AttributeError):
        return None, False
    return instance, True
