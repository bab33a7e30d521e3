"""Documents and summaries from Python docstrings, parsed from source files and never imported.

The first sentence of a docstring is a human-written summary of the rest: an XSum that needs no network.
"""

import ast
import dataclasses
import hashlib
import inspect
import multiprocessing
import os
import re
import site
import sysconfig
import textwrap
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from clp_jax.data.text_task import TextExample

SPLITS = ("train", "validation", "test")

_SECTION = re.compile(
    r"^\s*(Args?|Arguments|Parameters|Returns?|Raises|Yields?|Examples?|Notes?|References|See Also|Attributes|Usage|"
    r"Keyword Args|Warnings?|Todo)\s*:?\s*$",
    re.IGNORECASE,
)
_FIRST_SENTENCE = re.compile(r"^(.+?[.!?])(?:\s+|$)", re.DOTALL)
_ABBREVIATION = re.compile(r"\b(e\.g|i\.e|etc|vs|cf|resp|approx|Dr|Mr|al)\.$")
_MARKUP = re.compile(r":\w+:`~?([^`]+)`|``?([^`]+)``?|\*\*([^*]+)\*\*")
_DOCTEST = re.compile(r"^\s*(>>>|\.\.\.) ")
_SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "__pycache__", "idlelib", "lib2to3"})


@dataclasses.dataclass(frozen=True)
class PydocSettings:
    """Which docstrings are taken.

    Attributes:
        max_documents: documents in all; files are read in an order decided by a hash of their names until there are
            enough, so that a larger number adds documents and takes none away.
        min_document_words: of the body.
        min_summary_words: of the first sentence.
        max_summary_words: of the first sentence.
        max_document_chars: longer bodies are cut here; the model sees far less.
    """

    max_documents: int = 12_000
    min_document_words: int = 12
    min_summary_words: int = 4
    max_summary_words: int = 18
    max_document_chars: int = 1_500

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if getattr(self, field.name) < 1:
                raise ValueError(f"PydocSettings.{field.name} is {getattr(self, field.name)}: expected at least 1.")
        if self.min_summary_words > self.max_summary_words:
            raise ValueError("PydocSettings: min_summary_words is larger than max_summary_words.")


def source_roots() -> list[Path]:
    """The standard library and the installed packages of the running Python."""
    paths = sysconfig.get_paths()
    roots = [Path(paths["stdlib"]), Path(paths["purelib"]), Path(paths["platlib"]), *map(Path, site.getsitepackages())]
    return [root for root in dict.fromkeys(path.resolve() for path in roots) if root.is_dir()]


def python_files(roots: Sequence[Path]) -> list[tuple[str, str]]:
    """Module names and files below `roots`, in an order decided by a hash of the names; tests are left out."""
    found = {}
    for root in roots:
        for folder, subfolders, names in os.walk(root):
            subfolders[:] = [d for d in subfolders if d not in _SKIPPED_FOLDERS and "test" not in d.lower()]
            for name in names:
                if name.endswith(".py") and "test" not in name.lower() and not name.endswith("_pb2.py"):
                    path = Path(folder) / name
                    parts = path.relative_to(root).with_suffix("").parts
                    found[".".join(part for part in parts if part != "__init__")] = str(path)
    return sorted(found.items(), key=lambda item: _digest(item[0]))


def split_of(module: str) -> str:
    """The split of a module, by a hash of its name: 90 % train, 5 % validation, 5 % test."""
    bucket = int(_digest("split:" + module)[:8], 16) % 20
    return "validation" if bucket == 0 else "test" if bucket == 1 else "train"


def docstrings(path: str) -> list[tuple[str, str]]:
    """Names and cleaned docstrings of a file's public classes and functions; a file that does not parse has none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Invalid escapes and the like are other people's.
            tree = ast.parse(Path(path).read_bytes())
    except (SyntaxError, ValueError, OSError, RecursionError, MemoryError):
        return []
    kinds = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(tree) if isinstance(node, kinds) and not node.name.startswith("_")]
    return [(node.name, doc) for node in nodes if (doc := ast.get_docstring(node, clean=True))]


def summarise(name: str, docstring: str, settings: PydocSettings) -> TextExample | None:
    """Cuts a docstring into document and summary; None when it does not make a good pair."""
    docstring = inspect.cleandoc(docstring)
    match = _FIRST_SENTENCE.match(docstring)
    if not match or "\n\n" in match.group(1) or _ABBREVIATION.search(match.group(1)):
        return None
    summary = _clean(match.group(1))
    body = _body(docstring[match.end() :])
    words = summary.split()
    if not settings.min_summary_words <= len(words) <= settings.max_summary_words:
        return None
    if len(body.split()) < settings.min_document_words or not _is_prose(summary) or summary in body:
        return None
    document = f"{re.sub('_+', ' ', _camel_to_words(name)).strip()}: {body}"
    return TextExample(inputs=document[: settings.max_document_chars], targets=summary)


def corpus(settings: PydocSettings, roots: Sequence[Path] | None = None) -> dict[str, list[TextExample]]:
    """All examples by split: deduplicated, and no module in two splits.

    Args:
        settings: which docstrings are taken.
        roots: folders of Python sources; by default those of the running Python.
    """
    splits: dict[str, list[TextExample]] = {split: [] for split in SPLITS}
    seen: set[str] = set()
    count = 0
    for module, name, docstring in _read(python_files(source_roots() if roots is None else roots)):
        example = summarise(name, docstring, settings)
        if example is None:
            continue
        # Overloads and wrappers repeat a docstring with small changes: compare the first words only.
        document = " ".join(re.findall(r"\w+", example.inputs.lower().partition(":")[2])[:24])
        keys = {"document " + document, "summary " + example.targets.lower()}
        if seen & keys:
            continue
        seen |= keys
        splits[split_of(module)].append(example)
        count += 1
        if count >= settings.max_documents:
            break
    return splits


def _read(files: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str, str]]:
    """Module, name and docstring of everything documented; other processes parse a batch of files at a time."""
    files = list(files)
    batch = 512
    # Spawned, as the parent may hold the threads of TensorFlow, which do not survive a fork.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=os.cpu_count() or 1, mp_context=context) as pool:
        for start in range(0, len(files), batch):
            part = files[start : start + batch]
            found = pool.map(docstrings, [path for _, path in part], chunksize=32)
            for (module, _), entries in zip(part, found, strict=True):
                for name, docstring in entries:
                    yield module, name, docstring


def _body(text: str) -> str:
    """The prose of the rest: up to the first section of arguments and the like, without doctests."""
    lines: list[str] = []
    for line in text.splitlines():
        if _SECTION.match(line) or re.match(r"^\s*(-{3,}|={3,})\s*$", line):
            if sum(len(x.split()) for x in lines) >= 12:
                break
            continue
        if not _DOCTEST.match(line):
            lines.append(line)
    return _clean("\n".join(lines))


def _clean(text: str) -> str:
    text = _MARKUP.sub(lambda m: next(g for g in m.groups() if g), text)
    text = re.sub(r"^\s*\.\. [\w-]+::.*$", " ", text, flags=re.MULTILINE)
    return re.sub(r"\s+", " ", textwrap.dedent(text)).strip()


def _is_prose(text: str) -> bool:
    letters = sum(c.isalpha() or c == " " for c in text)
    return text.isascii() and letters >= 0.85 * len(text) and text[0].isupper()


def _camel_to_words(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", name)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()
