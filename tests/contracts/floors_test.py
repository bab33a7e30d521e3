"""The floors of the house: who may import what, read from the sources with `ast`.

Every rule has a violation in `planted/`: Python files that say where they pretend to be and what is wrong with them.
"""

import ast
import dataclasses
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PLANTED = Path(__file__).parent / "planted"

FLOORS = (
    ("array_types", "host_rows", "partitioning", "preferences", "processes"),
    ("nn", "objectives"),
    ("models", "data"),
    ("interop", "sampling", "rewards"),
    ("training", "evaluation", "compilation"),
    (
        "prepare",
        "train",
        "evaluate",
        "report",
        "sample",
        "score",
        "experiment",
        "convert",
        "compile",
        "checkpoints",
        "replay",
    ),
    ("gin_utils", "command_line", "allocator", "main"),
)
FLOOR_OF = {name: floor for floor, names in enumerate(FLOORS) for name in names}
TOP = len(FLOORS) - 1
# `clp_jax/__init__.py` holds the version, and finds the folders beside it.
BELOW_ALL = -1

# Where devices are told what to do by hand.
_BY_HAND = r"clp_jax/(partitioning|nn/(moe|attention\w*))\.py"

# Packages that only some modules may import: a pattern for the package, one for the paths, and why.
CONFINED = (
    (r"gin", r"clp_jax/(gin_utils/.*|main|command_line)\.py", "gin belongs to the command line"),
    # TensorFlow logs through `absl.logging`: whoever imports the one keeps the other quiet.
    (
        r"absl(?!\.logging)",
        # XManager's own flags are absl's.
        r"clp_jax/(gin_utils/.*|main|command_line)\.py|launch/xmanager_experiment\.py",
        "flags belong to the command line",
    ),
    (
        r"seqio|tensorflow|tensorflow_datasets|absl\.logging",
        r"(clp_jax/data/(prepare\w*|text_task)|tasks/.*)\.py",
        "data is prepared apart from training",
    ),
    (r"orbax", r"clp_jax/training/array_store\.py", "one module knows the format of checkpoints"),
    (
        r"jax\.shard_map|jax\.experimental\.shard_map|jax\.experimental\.pallas",
        _BY_HAND,
        "sharding is a table, but for experts, attention kernels and what the compiler can't split by rows",
    ),
    (r"pickle|cPickle|dill|cloudpickle|shelve|marshal", r"(?!)", "stored data must not run code"),
    (r"flax\.linen|jax\.experimental\.(pjit|maps)|jax\.(pmap|interpreters)", r"(?!)", "one way to write a model"),
)
LAZY = ("seqio", "tensorflow", "tensorflow_datasets")
CALLS = {
    "eval": "it runs what it reads",
    "exec": "it runs what it reads",
    "os.system": "it runs a shell",
    "os.popen": "it runs a shell",
    "jax.pmap": "it has a successor",
    "nnx.jit": "models are functional at the edge",
    "nnx.pmap": "models are functional at the edge",
    "nnx.Optimizer": "models are functional at the edge",
}
VAGUE_NAMES = {"utils", "util", "common", "helpers", "helper", "misc"}


@dataclasses.dataclass(frozen=True)
class Import:
    """One imported module or name: `from a import b` is ``a.b``."""

    name: str
    line: int
    at_load: bool
    in_function: bool


def imports(tree: ast.Module) -> Iterator[Import]:
    """All imports, wherever they stand."""

    def visit(node: ast.AST, at_load: bool, in_function: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno, at_load, in_function) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = "." * node.level + (node.module or "")
            yield from (Import(f"{start}.{alias.name}", node.lineno, at_load, in_function) for alias in node.names)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            at_load, in_function = False, True
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            at_load = False
        for child in ast.iter_child_nodes(node):
            yield from visit(child, at_load, in_function)

    return visit(tree, True, False)


def module_of(path: str) -> str:
    """The dotted name a file has when it is installed."""
    name = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    return f"clp_jax.{name}" if name.split(".")[0] in ("tasks", "launch") else name


def unit(module: str) -> str:
    """The folder or lone module on a floor that a dotted name below `clp_jax` belongs to."""
    return [*module.split("."), ""][1]


def may_import(importer: str, imported: str) -> str | None:
    """What is wrong with one module of the project importing another, or None."""
    here, there = unit(importer), unit(imported)
    if here == "launch":
        return None if there == "launch" else "launch imports nothing of clp_jax"
    if here == "tasks":
        return None if there in ("tasks", "data") else "tasks know clp_jax.data only"
    if there in ("tasks", "launch"):
        return f"nothing imports {there}: gin names it"
    if here == there or there == "":
        return None
    floors = [FLOOR_OF.get(name, BELOW_ALL) for name in (here, there)]
    if floors[1] > floors[0]:
        return f"imports point down only: F{floors[0]} imports F{floors[1]}"
    if floors[0] == floors[1] and _is_folder(here, importer) and _is_folder(there, imported):
        return "folders on one floor do not import each other"
    return None


def _is_folder(name: str, module: str) -> bool:
    return not (ROOT / "clp_jax" / f"{name}.py").is_file()


def project_imports(tree: ast.Module, modules: Mapping[str, str]) -> Iterator[tuple[str, Import]]:
    """Imported modules of the project: `from clp_jax.data import packing` is the module ``clp_jax.data.packing``."""
    for found in imports(tree):
        if found.name.split(".")[0] == "clp_jax":
            parent = found.name.rpartition(".")[0]
            yield (found.name if found.name in modules or "." not in found.name else parent), found


def _matches(pattern: str, name: str) -> bool:
    return re.match(rf"(?:{pattern})(?:\.|$)", name) is not None


def check_imports(path: str, tree: ast.Module, modules: Mapping[str, str]) -> Iterator[str]:
    """Violations of the floors and of the confined packages in one file."""
    for name, found in project_imports(tree, modules):
        wrong = may_import(module_of(path), name)
        if wrong:
            yield f"{path}:{found.line}: imports {name}: {wrong}"
    for found in imports(tree):
        where = f"{path}:{found.line}: imports {found.name}"
        if found.name.startswith("."):
            yield f"{where}: imports are absolute"
        if found.name.endswith(".*"):
            yield f"{where}: names are imported one by one"
        if found.name.split(".")[0] in ("tasks", "launch", "gin_configs"):
            yield f"{where}: no such module once installed: it is clp_jax.{found.name.split('.')[0]}"
        for pattern, paths, why in CONFINED:
            if _matches(pattern, found.name) and not re.fullmatch(paths, path):
                yield f"{where}: {why}"
        if found.name.split(".")[0] in LAZY and not found.in_function:
            yield f"{where}: imported when used, inside a function"


def check_calls(path: str, tree: ast.Module) -> Iterator[str]:
    """Violations that are not imports."""
    for node in ast.walk(tree):
        is_shard_map = isinstance(node, ast.Attribute) and ast.unparse(node) == "jax.shard_map"
        if is_shard_map and not re.fullmatch(_BY_HAND, path):
            yield f"{path}:{node.lineno}: uses jax.shard_map: sharding is a table"
        if isinstance(node, ast.With) and any(ast.unparse(item.context_expr) == "mesh" for item in node.items):
            yield f"{path}:{node.lineno}: `with mesh`: shardings are stated"
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        if called in CALLS:
            yield f"{path}:{node.lineno}: calls {called}: {CALLS[called]}"
        if any(k.arg == "shell" and ast.unparse(k.value) != "False" for k in node.keywords):
            yield f"{path}:{node.lineno}: calls {called} with a shell"
        if called == "getattr" and _guesses_a_field(node):
            yield f"{path}:{node.lineno}: getattr of a configuration: name the field"


def _guesses_a_field(call: ast.Call) -> bool:
    """Whether a configuration is asked for a field that it may not have; going through its fields is another thing."""
    of_config = "config" in ast.unparse(call.args[0]).lower()
    return of_config and (len(call.args) == 3 or isinstance(call.args[1], ast.Constant))


def check_place(path: str) -> Iterator[str]:
    """Violations of a file's name."""
    names = Path(path).with_suffix("").parts
    for name in names:
        if name in VAGUE_NAMES:
            yield f"{path}: {name!r} says nothing about what is inside"
    if names[0] == "clp_jax" and unit(module_of(path)) not in {*FLOOR_OF, ""}:
        yield f"{path}: is on no floor"


def check_cycles(graph: Mapping[str, set[str]]) -> Iterator[str]:
    """Modules that import each other while they load."""
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> Iterator[str]:
        if module in trail:
            yield f"{' -> '.join(trail[trail.index(module) :])} -> {module}: imports go round"
        elif module not in done:
            for other in sorted(graph.get(module, ())):
                yield from visit(other, (*trail, module))
            done.add(module)

    for module in sorted(graph):
        yield from visit(module, ())


def violations(sources: Mapping[str, str], known: Mapping[str, str] | None = None) -> list[str]:
    """All violations of files given by path; `known` are more modules that exist."""
    modules = {module_of(path): path for path in sources} | dict(known or {})
    found, graph = [], {}
    for path, source in sources.items():
        tree = ast.parse(source)
        found += [*check_place(path), *check_imports(path, tree, modules), *check_calls(path, tree)]
        graph[module_of(path)] = {name for name, i in project_imports(tree, modules) if i.at_load}
    return found + list(check_cycles(graph))


def sources() -> dict[str, str]:
    """The product's own files by path."""
    files = [path for folder in ("clp_jax", "tasks", "launch") for path in sorted((ROOT / folder).rglob("*.py"))]
    return {path.relative_to(ROOT).as_posix(): path.read_text("utf-8") for path in files}


def read_planted(path: Path) -> tuple[dict[str, str], list[str]]:
    """The pretended files of a planted one (``# at: PATH``), and what is wrong with them (``# wrong: TEXT``)."""
    _, *parts = re.split(r"^# at: (.+)\n", path.read_text("utf-8"), flags=re.MULTILINE)
    text = dict(zip(parts[::2], parts[1::2], strict=True))
    return text, re.findall(r"^# wrong: (.+)$", path.read_text("utf-8"), flags=re.MULTILINE)


def test_the_house_stands():
    found = violations(sources())
    assert not found, "\n".join(found)


def test_everything_is_read():
    read = sources()
    assert len(read) > 80
    assert {"clp_jax/main.py", "clp_jax/training/checkpoints.py", "tasks/pydoc.py", "launch/__init__.py"} <= set(read)
    edges = {name for path, source in read.items() for name, _ in project_imports(ast.parse(source), _modules())}
    assert {"clp_jax.data.packing", "clp_jax.array_types", "clp_jax.train"} <= edges


def _modules() -> dict[str, str]:
    return {module_of(path): path for path in sources()}


@pytest.mark.parametrize("path", sorted((PLANTED / "floors").glob("*.py")), ids=lambda path: path.stem)
def test_a_planted_violation_is_found(path):
    files, wrong = read_planted(path)
    assert files, "a planted file says where it pretends to be"
    found = violations(files, _modules())
    assert len(found) == len(wrong), "\n".join(found)
    for text, message in zip(wrong, found, strict=True):
        assert text in message


def test_orbax_is_in_one_module():
    using = {
        path for path, text in sources().items() if any(i.name.startswith("orbax") for i in imports(ast.parse(text)))
    }
    assert using == {"clp_jax/training/array_store.py"}


def test_the_table_names_every_folder_and_module():
    there = {
        p.stem if p.suffix == ".py" else p.name for p in (ROOT / "clp_jax").iterdir() if not p.name.startswith("__")
    }
    assert there <= set(FLOOR_OF)
