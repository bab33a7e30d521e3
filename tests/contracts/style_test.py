"""The budgets of size and shape, counted with `ast`; each has a violation in `planted/style/`."""

import ast
import re
import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PLANTED = Path(__file__).parent / "planted" / "style"

FILE_LINES = 500
FUNCTION_LINES = 100
FUNCTION_LINES_P90 = 45
MEDIAN_FILE_LINES = 200
CLASS_DEPTH = 2

PRODUCT = ("clp_jax", "tasks", "launch")
ALL = (*PRODUCT, "tests", "benchmarks")

Functions = (ast.FunctionDef, ast.AsyncFunctionDef)


def lines_of(node: ast.AST) -> int:
    """Lines of a definition, from its name on."""
    return node.end_lineno - node.lineno + 1


def function_lengths(tree: ast.Module) -> Iterator[tuple[ast.AST, int]]:
    """All functions and methods, nested ones too."""
    return ((node, lines_of(node)) for node in ast.walk(tree) if isinstance(node, Functions))


def check_lengths(path: str, source: str) -> Iterator[str]:
    """Violations of the budget of files and of functions."""
    lines = source.count("\n")
    if lines > FILE_LINES:
        yield f"{path}: {lines} lines: expected at most {FILE_LINES}"
    for node, length in function_lengths(ast.parse(source)):
        if length > FUNCTION_LINES:
            yield f"{path}:{node.lineno}: {node.name} has {length} lines: expected at most {FUNCTION_LINES}"


def check_percentile(sources: Mapping[str, str]) -> Iterator[str]:
    """Violation of the budget of most functions together."""
    lengths = [length for source in sources.values() for _, length in function_lengths(ast.parse(source))]
    if len(lengths) > 1 and statistics.quantiles(lengths, n=10)[-1] > FUNCTION_LINES_P90:
        yield f"90 % of the functions have up to {statistics.quantiles(lengths, n=10)[-1]:.0f} lines: expected {FUNCTION_LINES_P90}"


def class_bases(sources: Mapping[str, str]) -> dict[str, list[str]]:
    """The project's classes and their bases, by dotted name, through each file's imports."""
    found = {}
    for path, source in sources.items():
        tree = ast.parse(source)
        module = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        known = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                known |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
        classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
        known |= {node.name: f"{module}.{node.name}" for node in classes}
        for node in classes:
            names = [ast.unparse(base).split("[")[0] for base in node.bases]
            firsts = [(name.partition(".")[0], name.partition(".")[2]) for name in names]
            found[f"{module}.{node.name}"] = [
                ".".join(filter(None, (known.get(first, first), rest))) for first, rest in firsts
            ]
    return found


def check_depth(sources: Mapping[str, str]) -> Iterator[str]:
    """Violations of the depth of inheritance, counted in classes of the project."""
    bases = class_bases(sources)

    def depth(name: str) -> int:
        return 1 + max((depth(base) for base in bases[name] if base != name), default=0) if name in bases else 0

    for name in bases:
        if depth(name) > CLASS_DEPTH:
            yield f"{name}: inherits through {depth(name)} classes: expected at most {CLASS_DEPTH}"


def check_docstrings(path: str, source: str) -> Iterator[str]:
    """Violations of: a module, and each public class, function and method of it, says what it is in a sentence."""

    def visit(node: ast.AST, inside: str) -> Iterator[str]:
        for child in getattr(node, "body", ()):
            if isinstance(child, (ast.ClassDef, *Functions)) and not child.name.startswith("_"):
                if not _has_sentence(child):
                    yield f"{path}:{child.lineno}: {inside}{child.name} has no docstring that ends its first sentence"
                if isinstance(child, ast.ClassDef):
                    yield from visit(child, f"{child.name}.")

    tree = ast.parse(source)
    if tree.body and not _has_sentence(tree):
        yield f"{path}: has no docstring that ends its first sentence"
    yield from visit(tree, "")


def _has_sentence(node: ast.AST) -> bool:
    first = (ast.get_docstring(node) or "").split("\n\n")[0]
    return re.search(r"[.:?!]\)?$", first.strip()) is not None


def check_comments(path: str, source: str) -> Iterator[str]:
    """Violations of: what is commented out is deleted."""
    for number, line in enumerate(source.splitlines(), start=1):
        if re.match(r"\s*#\s*(assert\b|def \w+\(|import \w+$|return\b \w+$|print\()", line):
            yield f"{path}:{number}: code that is commented out"


def violations(sources: Mapping[str, str]) -> list[str]:
    """All violations of a set of files."""
    found = []
    for path, source in sources.items():
        found += [*check_lengths(path, source), *check_comments(path, source)]
        if path.split("/")[0] in PRODUCT:
            found += check_docstrings(path, source)
    product = {path: source for path, source in sources.items() if path.split("/")[0] in PRODUCT}
    return [*found, *check_percentile(product), *check_depth(product)]


def sources() -> dict[str, str]:
    """The repository's Python files by path, without the planted ones."""
    files = [path for folder in ALL for path in sorted((ROOT / folder).rglob("*.py"))]
    kept = [path for path in files if not path.is_relative_to(PLANTED.parent)]
    return {path.relative_to(ROOT).as_posix(): path.read_text("utf-8") for path in kept}


def test_the_sources_keep_the_budgets():
    found = violations(sources())
    assert not found, "\n".join(found)


def test_the_median_file_is_short():
    lengths = [source.count("\n") for path, source in sources().items() if path.startswith("clp_jax") and source]
    assert len(lengths) > 60
    assert statistics.median(lengths) <= MEDIAN_FILE_LINES


@pytest.mark.parametrize("path", sorted(PLANTED.glob("*.py")), ids=lambda path: path.stem)
def test_a_planted_violation_is_found(path):
    source = path.read_text("utf-8")
    wrong = re.findall(r"^# wrong: (.+)$", source, flags=re.MULTILINE)
    found = violations({f"clp_jax/{path.name}": source})
    assert wrong
    assert len(found) == len(wrong), "\n".join(found)
    for text, message in zip(wrong, found, strict=True):
        assert text in message


def _planted(lines: int, functions: int = 1) -> str:
    function = 'def f{}():\n    """Is long."""\n' + "    x = 1\n" * (lines - 2)
    return '"""Planted."""\n' + "".join(function.format(i) for i in range(functions))


@pytest.mark.parametrize(
    ("source", "wrong"),
    [
        (_planted(100), None),
        (_planted(101), "f0 has 101 lines: expected at most 100"),
        (_planted(46, 10), "90 % of the functions have up to 46 lines: expected 45"),
        (_planted(45, 10), None),
        (_planted(7, 71) + "x = 1\n" * 2, None),
        (_planted(7, 71) + "x = 1\n" * 3, "501 lines: expected at most 500"),
    ],
    ids=["100", "101", "p90_46", "p90_45", "file_500", "file_501"],
)
def test_lengths_are_counted_to_the_line(source, wrong):
    found = violations({"clp_jax/planted.py": source})
    assert len(found) == (wrong is not None), found
    assert wrong is None or wrong in found[0]


def test_depth_is_counted_through_imports():
    files = {
        "clp_jax/a.py": '"""A."""\nclass A(Base):\n    """A."""\n',
        "clp_jax/b.py": '"""B."""\nfrom clp_jax import a\nfrom clp_jax.a import A as Aa\nclass B(Aa):\n    """B."""\n',
        "clp_jax/c.py": '"""C."""\nfrom clp_jax import b\nclass C(b.B):\n    """C."""\n',
    }
    assert violations(files) == ["clp_jax.c.C: inherits through 3 classes: expected at most 2"]
