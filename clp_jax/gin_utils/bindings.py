"""Bindings under full names: which value wins, and which calls the entry function leads to."""

import dataclasses
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from clp_jax.gin_utils import annotations
from clp_jax.gin_utils.files import REQUIRED, Binding, ConfigError, Import, Macro, Reference, leaves, suggest, transform
from clp_jax.gin_utils.names import Names, Target

MACRO = "%"
_NOT_CONFIGURED = "config_text"


class Call(NamedTuple):
    """A function or class called in a scope; or, in the scope `MACRO`, a macro that is used.

    Attributes:
        scope: where bindings are looked up.
        path: full name.
        complete: whether gin makes the call; it may also hand the function over, to be called with more arguments.
    """

    scope: str
    path: str
    complete: bool = True


@dataclasses.dataclass(frozen=True)
class Value:
    """A bound value, its references under full names, and where it was bound."""

    value: Any
    place: str


class Bindings:
    """Collects bindings; later ones replace earlier ones.

    Attributes:
        names: what names stand for.
        entry: full name of the entry function.
        values: for each (scope, full name), the arguments that are bound.
        macros: the value of each macro.
    """

    def __init__(self, entry: Target):
        self.names = Names()
        self.entry = self.names.register(entry, entry.__module__, [entry.__qualname__])
        self.values: dict[tuple[str, str], dict[str, Value]] = {}
        self.macros: dict[str, Value] = {}

    def add(self, binding: Binding, symbols: Mapping[str, Import]) -> None:
        """Takes a binding of a file that uses these names."""
        self._add(binding, lambda selector: self.names.resolve(selector, symbols, binding.place))

    def add_given(self, binding: Binding, symbols: Mapping[str, Sequence[Import]]) -> Binding:
        """Takes a binding of the command line; returns it with its full name."""
        return self._add(binding, lambda selector: self.names.resolve_given(selector, symbols, binding.place))

    def add_argument(self, name: str, value: Any) -> None:
        """Takes an argument of the entry function, or of a dataclass that is one of its arguments."""
        path, hints = self.entry, self.parameters(self.entry).hints
        groups = (
            (owner, hint)
            for owner, hint in hints.items()
            if name not in hints and isinstance(hint, type) and dataclasses.is_dataclass(hint)
            if name in [field.name for field in dataclasses.fields(hint)]
        )
        for owner, group in groups:
            reference = dataclasses.replace(self.reference(group), evaluate=True)
            path = reference.name
            self.values.setdefault(("", self.entry), {}).setdefault(owner, Value(reference, f"--{name}"))
        self.values.setdefault(("", path), {})[name] = Value(value, f"--{name}")

    def reference(self, target: Target) -> Reference:
        """A function that gin hands over without calling it."""
        return Reference("", self.names.register(target, target.__module__, [target.__qualname__]), False)

    def fill_texts(self) -> None:
        """Gives required macros that nobody set an empty text, where nothing but a text is asked for."""
        for name, value in self.macros.items():
            if value.value == REQUIRED:
                hints = [hint for macro, hint in self._uses() if macro == name]
                if hints and all(annotations.mismatch("", hint) is None for hint in hints):
                    self.macros[name] = Value("", value.place)

    def _uses(self) -> Iterator[tuple[str, Any]]:
        """Macros that are a whole argument, through other macros too, and the annotation of each."""
        for (_, path), arguments in self.values.items():
            hints = self.parameters(path).hints
            for argument, bound in arguments.items():
                value = bound.value
                while isinstance(value, Macro) and value.name in self.macros:
                    yield value.name, hints.get(argument, Any)
                    value = self.macros[value.name].value

    def _add(self, binding: Binding, resolve: Callable[[str], str]) -> Binding:
        def leaf(item: Any) -> Any:
            return dataclasses.replace(item, name=resolve(item.name)) if isinstance(item, Reference) else item

        value = Value(transform(binding.value, leaf), binding.place)
        if binding.macro is not None:
            self.macros[binding.macro] = value
            return binding
        path = resolve(binding.selector)
        known = self.parameters(path)
        if binding.argument not in known.hints and not known.open:
            short = path.rsplit(".", 1)[-1]
            hint = suggest(binding.argument, known.hints)
            raise ConfigError(f"{binding.place}: {short} has no argument {binding.argument!r}{hint}.")
        self.values.setdefault((binding.scope, path), {})[binding.argument] = value
        return dataclasses.replace(binding, selector=path)

    def parameters(self, path: str) -> annotations.Parameters:
        """What a function or class can be given."""
        found = annotations.parameters(self.names.targets[path])
        if path != self.entry:
            return found
        return dataclasses.replace(found, hints={n: h for n, h in found.hints.items() if n != _NOT_CONFIGURED})

    def arguments(self, scope: str, path: str) -> dict[str, Value]:
        """What is bound for a call in a scope: inner scopes win."""
        found: dict[str, Value] = {}
        for outer in self.enclosing(scope):
            found |= self.values.get((outer, path), {})
        return found

    @staticmethod
    def enclosing(scope: str) -> list[str]:
        """The scopes that a call in `scope` sees, from none to itself."""
        parts = scope.split("/") if scope else []
        return ["/".join(parts[:depth]) for depth in range(len(parts) + 1)]

    def reach(self) -> list[Call]:
        """What calling the entry function calls, and the macros it uses, in order."""
        found: dict[Call, None] = {}
        waiting = deque([Call("", self.entry)])
        while waiting:
            call = waiting.popleft()
            if call in found:
                continue
            found[call] = None
            scope = call.scope
            if scope == MACRO:
                values = [self.macros[call.path]] if call.path in self.macros else []
                scope = call.path  # Gin evaluates a macro in a scope of the macro's name.
            else:
                values = list(self.arguments(scope, call.path).values())
            for item in (item for value in values for item in leaves(value.value)):
                if isinstance(item, Macro) and item != REQUIRED:
                    waiting.append(Call(MACRO, item.name))
                elif isinstance(item, Reference):
                    waiting.append(Call(item.scopes or scope, item.name, item.evaluate))
        return list(found)

    def all_values(self) -> Iterator[Value]:
        """Every value, of macros and of arguments."""
        yield from self.macros.values()
        for arguments in self.values.values():
            yield from arguments.values()

    def concrete(self, value: Any, through: tuple[str, ...] = ()) -> tuple[Any, tuple[str, ...]]:
        """A value with macros replaced and references as `annotations.Produced`, and the macros it is reached through.

        Raises:
            ConfigError: for a macro that stands for itself.
        """
        if isinstance(value, Macro):
            if value.name in through:
                raise ConfigError(f"{self.macros[value.name].place}: the macro {value.name} stands for itself.")
            if value.name not in self.macros:
                return annotations.UNKNOWN, through
            return self.concrete(self.macros[value.name].value, (*through, value.name))

        def leaf(item: Any) -> Any:
            if isinstance(item, Macro):
                return self.concrete(item, through)[0]
            if isinstance(item, Reference):
                target = self.names.targets[item.name]
                return annotations.Produced(target) if item.evaluate else target
            return item

        return transform(value, leaf), through
