"""What is typed after `clp <command>`: flags for the arguments of an entry function, and gin's own flags.

The flags come from the signature and the docstring of the function, read from its source: nothing is imported, so help is
immediate and mistakes are found at once.
"""

import ast
import dataclasses
import importlib.util
import json
import math
import re
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from clp_jax.gin_utils.files import ConfigError, suggest
from clp_jax.processes import FLAGS as PROCESS_FLAGS

GIN_FLAGS = {
    "gin_file": "a gin file; repeatable, later files win",
    "gin_search_paths": "comma-separated directories with more gin files",
    "gin_bindings": "the same as --gin.NAME=VALUE, with NAME=VALUE as one word; repeatable",
}
SWITCHES = {
    "help": "show this",
    "debug": "show the whole traceback of an error",
    "print_config": "print the resolved configuration, and stop",
}
HIDDEN = ("config_text",)
# Arguments that are dataclasses, each of whose fields is a flag.
SPREAD = ("decoding", "partners", "devices")
# Commands that several processes run together.
SPANNING = ("train", "replay")

_ELEMENTARY = {"str", "int", "float", "bool", "None", "Path", "PathLike"}
_SEQUENCES = {"Sequence", "list", "tuple", "Iterable", "Collection"}
# `clp_jax.sampling.stop_strings.Texts`: commas and spaces are part of what is typed.
_TEXTS = "Texts"
_MAPPINGS = {"Mapping", "dict"}


@dataclasses.dataclass(frozen=True)
class Argument:
    """One argument of an entry function.

    Attributes:
        name: of the argument.
        annotation: parsed.
        default: as it stands in the source, or None for a required one.
        text: what the docstring says of it.
        is_positional: whether a word without a flag may stand for it.
    """

    name: str
    annotation: ast.expr | None
    default: str | None
    text: str
    is_positional: bool = False

    @property
    def expected(self) -> str:
        """The annotation as it is written."""
        return ast.unparse(self.annotation) if self.annotation is not None else "anything"

    @property
    def is_flag(self) -> bool:
        """Whether it can be typed on a command line."""
        return any(_convertible(member) for member in _members(self.annotation))


@dataclasses.dataclass(frozen=True)
class EntryPoint:
    """An entry function as its source describes it.

    Attributes:
        module: that defines it.
        function: its name.
        summary: the first sentence of its docstring.
        description: the rest, up to the arguments.
        arguments: those that a user may give.
        takes_config_text: whether it wants the resolved configuration.
    """

    module: str
    function: str
    summary: str
    description: str
    arguments: tuple[Argument, ...]
    takes_config_text: bool

    @classmethod
    def find(cls, module: str, function: str) -> "EntryPoint | None":
        """Reads an entry function's source, or returns None where this installation has no such module."""
        specification = importlib.util.find_spec(module)
        if specification is None or specification.origin is None:
            return None
        tree = ast.parse(Path(specification.origin).read_text("utf-8"))
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and node.name == function:
                return cls._read(module, node, tree)
        return None

    @classmethod
    def _read(cls, module: str, node: ast.FunctionDef, tree: ast.Module) -> "EntryPoint":
        docstring = ast.get_docstring(node) or ""
        prose, _, sections = docstring.partition("\nArgs:\n")
        summary, _, description = re.split(r"\n(?:Returns|Raises):", prose)[0].strip().partition("\n\n")
        texts = _argument_texts(sections)
        places = node.args.args
        defaults = [*[None] * (len(places) - len(node.args.defaults)), *(ast.unparse(d) for d in node.args.defaults)]
        arguments = [
            Argument(a.arg, a.annotation, default, texts.get(a.arg, ""), True)
            for a, default in zip(places, defaults, strict=True)
        ]
        arguments += [
            Argument(a.arg, a.annotation, None if default is None else ast.unparse(default), texts.get(a.arg, ""))
            for a, default in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)
        ]
        return cls(
            module=module,
            function=node.name,
            summary=" ".join(summary.split()),
            description=description.strip(),
            arguments=tuple(
                flag
                for argument in arguments
                if argument.name not in HIDDEN
                for flag in (_fields(argument, tree) if argument.name in SPREAD else [argument])
            ),
            takes_config_text=any(argument.name == "config_text" for argument in arguments),
        )


@dataclasses.dataclass
class Invocation:
    """A parsed command line.

    Attributes:
        arguments: of the entry function, converted.
        gin_files: in order.
        gin_bindings: ``NAME=VALUE``, in order.
        search_paths: for gin files.
        switches: those of `SWITCHES` that were given.
        processes: those of `PROCESS_FLAGS` that were given.
    """

    arguments: dict[str, Any] = dataclasses.field(default_factory=dict)
    gin_files: list[str] = dataclasses.field(default_factory=list)
    gin_bindings: list[str] = dataclasses.field(default_factory=list)
    search_paths: list[str] = dataclasses.field(default_factory=list)
    switches: set[str] = dataclasses.field(default_factory=set)
    processes: dict[str, str] = dataclasses.field(default_factory=dict)


def parse(words: Sequence[str], entry: EntryPoint) -> Invocation:
    """Parses the words after the command.

    Raises:
        ConfigError: for an unknown flag, a missing or a wrong value.
    """
    invocation = Invocation()
    flags = {argument.name: argument for argument in entry.arguments}
    places = [argument.name for argument in entry.arguments if argument.is_positional]
    waiting = list(words)
    while waiting:
        word = waiting.pop(0)
        if word == "-h":
            word = "--help"
        if places and not word.startswith("-"):
            _store(invocation, places.pop(0), word, flags)
            continue
        if not word.startswith("--") or word == "--":
            raise ConfigError(f"what is {word!r}? Every argument has a name: --NAME VALUE or --NAME=VALUE.")
        name, equals, value = word[2:].partition("=")
        if name.startswith("gin."):
            if not equals:
                raise ConfigError(f"{word} has no value: write {word}=VALUE, without spaces.")
            invocation.gin_bindings.append(f"{name.removeprefix('gin.')}={value}")
            continue
        name = name.replace("-", "_")
        if name in SWITCHES and not equals:
            invocation.switches.add(name)
            continue
        negated = flags.get(re.sub("^no_?", "", name)) if name not in flags else None
        if negated is not None and _is_boolean(negated) and not equals:
            invocation.arguments[negated.name] = False
            continue
        others = PROCESS_FLAGS if entry.function in SPANNING else {}
        if name not in flags and name not in GIN_FLAGS and name not in others:
            known = [*flags, *GIN_FLAGS, *SWITCHES, *others]
            raise ConfigError(f"there is no flag --{name}{suggest(name, known)}. Macros are set with --gin.NAME=VALUE.")
        if not equals:
            if name in flags and _is_boolean(flags[name]):
                value = "true"
            elif not waiting or waiting[0].startswith("--"):
                raise ConfigError(f"--{name} has no value.")
            else:
                value = waiting.pop(0)
        _store(invocation, name, value, flags)
    return invocation


def convert(text: str, argument: Argument) -> Any:
    """The value that a word stands for.

    Raises:
        ConfigError: when it does not fit the argument's annotation.
    """
    if not argument.is_flag:
        raise ConfigError(
            f"--{argument.name} takes {argument.expected}, which can't be typed here: bind it in a gin file, or with "
            f"--gin.FUNCTION.{argument.name}=@..."
        )
    for member in sorted(_members(argument.annotation), key=lambda m: _name(m) == "str"):
        if _convertible(member):
            try:
                return _convert(text, member)
            except ValueError:
                continue
    raise ConfigError(f"--{argument.name} is {text!r}: expected {argument.expected}{_example(argument)}.")


def usage(command: str, entry: EntryPoint) -> str:
    """The help of a command."""
    lines = [f"clp {command}: {entry.summary}", ""]
    places = [
        argument.name.upper() if argument.default is None else f"[{argument.name.upper()}]"
        for argument in entry.arguments
        if argument.is_positional
    ]
    if places:
        lines += [f"usage: clp {command} {' '.join(places)} [--NAME=VALUE] ...", ""]
    if entry.description:
        lines += [*textwrap.wrap(" ".join(entry.description.split("\n\n")[0].split()), 100), ""]
    lines += ["Arguments, as flags or in gin:"]
    for argument in entry.arguments:
        default = "required" if argument.default is None else f"default {argument.default}"
        how = "" if argument.is_flag else "; in gin only"
        lines.append(f"  --{argument.name}  {argument.expected}  ({default}{how})")
        lines += textwrap.wrap(argument.text, 94, initial_indent=" " * 6, subsequent_indent=" " * 6)
    lines += ["", "Gin:", "  --gin.NAME=VALUE  sets a macro, or an argument of anything the gin files use; repeatable"]
    lines += [f"  --{name}  {text}" for name, text in GIN_FLAGS.items()]
    if entry.function in SPANNING:
        lines += ["", "Several processes, where TPU VMs, GKE and SLURM do not tell:"]
        lines += [f"  --{name}  {text}" for name, text in PROCESS_FLAGS.items()]
    lines += ["", "Also:", *(f"  --{name}  {text}" for name, text in SWITCHES.items())]
    return "\n".join(lines)


def _store(invocation: Invocation, name: str, value: str, flags: dict[str, Argument]) -> None:
    if name == "gin_file":
        invocation.gin_files.append(value)
    elif name == "gin_bindings":
        invocation.gin_bindings.append(value)
    elif name == "gin_search_paths":
        invocation.search_paths += [path for path in value.split(",") if path]
    elif name in PROCESS_FLAGS and name not in flags:
        invocation.processes[name] = value
    else:
        converted = convert(value, flags[name])
        before = invocation.arguments.get(name)
        if isinstance(before, tuple) and _holds_strings(flags[name]):
            converted = before + converted
        invocation.arguments[name] = converted


def _fields(argument: Argument, tree: ast.Module) -> list[Argument]:
    """The fields of an argument's class, which a module imports by its name."""
    name = _name(argument.annotation or ast.Constant(None))
    (module,) = (
        node.module
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and node.module and name in [alias.name for alias in node.names]
    )
    specification = importlib.util.find_spec(module)
    assert specification is not None and specification.origin is not None
    source = ast.parse(Path(specification.origin).read_text("utf-8"))
    (found,) = (node for node in source.body if isinstance(node, ast.ClassDef) and node.name == name)
    texts = _argument_texts((ast.get_docstring(found) or "").partition("\nAttributes:\n")[2])
    return [
        Argument(
            node.target.id,
            node.annotation,
            None if node.value is None else ast.unparse(node.value),
            texts.get(node.target.id, ""),
        )
        for node in found.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    ]


def _argument_texts(sections: str) -> dict[str, str]:
    """The entries of an ``Args:`` section, up to the next section."""
    found: dict[str, str] = {}
    name = None
    for line in sections.splitlines():
        if line and not line[0].isspace():
            break
        if match := re.match(r" {4}(\w+)(?: \([^)]*\))?:\s*(.*)", line):
            name = match[1]
            found[name] = match[2]
        elif name is not None:
            found[name] = f"{found[name]} {line.strip()}".strip()
    return found


def _members(annotation: ast.expr | None) -> list[ast.expr]:
    """The members of a union."""
    if isinstance(annotation, ast.BinOp) and isinstance(annotation.op, ast.BitOr):
        return [*_members(annotation.left), *_members(annotation.right)]
    if isinstance(annotation, ast.Subscript) and _name(annotation) in ("Optional", "Union"):
        inner = annotation.slice.elts if isinstance(annotation.slice, ast.Tuple) else [annotation.slice]
        none = [ast.Constant(None)] if _name(annotation) == "Optional" else []
        return [*(member for item in inner for member in _members(item)), *none]
    return [] if annotation is None else [annotation]


def _name(annotation: ast.expr) -> str:
    if isinstance(annotation, ast.Subscript):
        return _name(annotation.value)
    if isinstance(annotation, ast.Attribute):
        return annotation.attr
    if isinstance(annotation, ast.Constant):
        return "None" if annotation.value is None else str(annotation.value)
    return annotation.id if isinstance(annotation, ast.Name) else ""


def _inner(annotation: ast.expr) -> list[ast.expr]:
    if not isinstance(annotation, ast.Subscript):
        return []
    inner = annotation.slice.elts if isinstance(annotation.slice, ast.Tuple) else [annotation.slice]
    return [item for item in inner if not (isinstance(item, ast.Constant) and item.value is ...)]


def _convertible(annotation: ast.expr) -> bool:
    name, inner = _name(annotation), _inner(annotation)
    if name == _TEXTS:
        return True
    if name in _SEQUENCES | _MAPPINGS:
        return bool(inner) and all(_name(m) in _ELEMENTARY - {"None"} for item in inner for m in _members(item))
    return name in _ELEMENTARY - {"None"} or name == "Literal"


def _holds_strings(argument: Argument) -> bool:
    """Whether it is a sequence of strings: every flag adds to it."""
    members = [m for m in _members(argument.annotation) if _name(m) in _SEQUENCES | {_TEXTS}]
    return any(_name(m) == _TEXTS or [_name(item) for item in _inner(m)] == ["str"] for m in members)


def _string_list(text: str) -> tuple[str, ...] | None:
    """The strings of a list as JSON or Python write it; None for any other text."""
    if not (text.startswith("[") and text.endswith("]")):
        return None
    for read in (json.loads, ast.literal_eval):
        try:
            found = read(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        if isinstance(found, list) and all(isinstance(item, str) for item in found):
            return tuple(found)
    return None


def _is_boolean(argument: Argument) -> bool:
    return "bool" in [_name(member) for member in _members(argument.annotation)]


def _convert(text: str, annotation: ast.expr) -> Any:
    members = _members(annotation)
    if len(members) > 1:
        for member in members:
            try:
                return _convert(text, member)
            except ValueError:
                continue
        raise ValueError
    name, inner = _name(annotation), _inner(annotation)
    if name == _TEXTS or (name in _SEQUENCES and [_name(item) for item in inner] == ["str"]):
        strings = _string_list(text)
        if name == _TEXTS and strings is None:
            strings = (text,)
        if strings is not None:
            return list(strings) if name == "list" else strings
    if name in _SEQUENCES:
        items = [item.strip() for item in text.strip("()[] ").split(",") if item.strip()]
        if name == "tuple" and len(inner) > 1 and len(inner) != len(items):
            raise ValueError
        kinds = inner if len(inner) == len(items) and name == "tuple" else inner[:1] * len(items)
        converted = [_convert(item, kind) for item, kind in zip(items, kinds, strict=True)]
        return converted if name == "list" else tuple(converted)
    if name in _MAPPINGS:
        pairs = [item.partition("=") for item in text.split(",") if item.strip()]
        if not all(equals for _, equals, _ in pairs):
            raise ValueError
        return {_convert(key.strip(), inner[0]): _convert(value.strip(), inner[1]) for key, _, value in pairs}
    if name == "Literal":
        choices = {str(choice.value): choice.value for choice in inner if isinstance(choice, ast.Constant)}
        if text not in choices:
            raise ValueError
        return choices[text]
    return _CONVERTERS[name](text)


def _boolean(text: str) -> bool:
    known = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if text.lower() not in known:
        raise ValueError
    return known[text.lower()]


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError
    return value


_CONVERTERS: dict[str, Callable[[str], Any]] = {
    "str": str, "Path": str, "PathLike": str, "int": int, "float": _number, "bool": _boolean,
}  # fmt: skip


def _example(argument: Argument) -> str:
    names = [_name(member) for member in _members(argument.annotation)]
    if set(names) & _SEQUENCES:
        return f", as in --{argument.name} A,B"
    return f", as in --{argument.name} A=1,B=2" if set(names) & _MAPPINGS else ""
