"""Documents and summaries from Python sources: what is read, what is cut, what is left out, and where it goes."""

import ast
import collections
import inspect
from pathlib import Path

import pytest

from clp_jax.data.docstrings import (
    SPLITS,
    PydocSettings,
    corpus,
    docstrings,
    python_files,
    source_roots,
    split_of,
    summarise,
)

BODY = "It goes through all of them in turn and keeps what is worth keeping, however long that may take."
LETTERS = "alpha beta gamma delta epsilon zeta eta theta iota kappa lamda omicron sigma upsilon omega"
WORDS = LETTERS.split()


def write(root: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


def module(*pairs: tuple[str, str]) -> str:
    return "\n".join(f'def {name}():\n    """{docstring}"""\n' for name, docstring in pairs)


def documented(number: int) -> tuple[str, str]:
    """A function whose document and summary are like no other's."""
    first, second = WORDS[number % len(WORDS)], WORDS[number // len(WORDS)]
    document = f"The {first} {second} is reached from both sides and written down twice before it is thrown away."
    return f"f{number}", f"Counts every {first} {second} it can find.\n\n    {document}\n    "


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """60 modules of three documented functions each, and copies of some of them."""
    files = {f"package{m % 7}/module{m}.py": module(*(documented(3 * m + i) for i in range(3))) for m in range(60)}
    files |= {f"copies/module{m}.py": files[f"package{m % 7}/module{m}.py"] for m in range(0, 60, 5)}
    return write(tmp_path_factory.mktemp("tree"), files)


def pairs_by_module(root: Path) -> dict[str, set[tuple[str, str]]]:
    """What `summarise` makes of each module, one by one."""
    found = collections.defaultdict(set)
    for name, path in python_files([root]):
        for function, docstring in docstrings(path):
            example = summarise(function, docstring, PydocSettings())
            assert example is not None
            found[name].add((example.inputs, example.targets))
    return found


def test_the_corpus_is_split_by_module_and_has_no_duplicates(tree):
    splits = corpus(PydocSettings(), [tree])
    assert tuple(splits) == SPLITS
    flat = [(e.inputs, e.targets) for examples in splits.values() for e in examples]
    assert len(flat) == 180 == len({document for document, _ in flat}) == len({summary for _, summary in flat})
    by_module = pairs_by_module(tree)
    assert sum(len(pairs) for pairs in by_module.values()) == 180 + 36
    assert set(flat) == set().union(*by_module.values())
    counted = dict.fromkeys(SPLITS, 0)
    for name, pairs in by_module.items():
        here = {split for split in SPLITS if pairs & {(e.inputs, e.targets) for e in splits[split]}}
        if not any("copies" in other and pairs & by_module[other] for other in by_module):
            assert here == {split_of(name)}
            counted[split_of(name)] += len(pairs)
    assert all(len(splits[split]) >= counted[split] > 0 for split in SPLITS)
    assert corpus(PydocSettings(), [tree]) == splits


def test_more_documents_add_to_fewer(tree):
    few, many = (corpus(PydocSettings(max_documents=n), [tree]) for n in (40, 90))
    assert [sum(map(len, splits.values())) for splits in (few, many)] == [40, 90]
    for split in SPLITS:
        assert many[split][: len(few[split])] == few[split]


def test_a_document_or_a_summary_seen_before_is_left_out(tmp_path):
    long = "the very same words stand here, more than two dozen of them so that they are taken to be equal: " + BODY
    same_document = [
        ("f", f"Says one thing here.\n\n{long} First."),
        ("f", f"Says another thing here.\n\n{long} Second."),
    ]
    same_summary = [("g", f"Says it all again.\n\n{BODY}"), ("h", f"says it all again.\n\nOther. {BODY}".capitalize())]
    write(tmp_path, {"m.py": module(*same_document, *same_summary)})
    texts = {e.targets for examples in corpus(PydocSettings(), [tmp_path]).values() for e in examples}
    assert texts == {"Says one thing here.", "Says it all again."}


def test_splits_are_decided_by_the_name_alone():
    named = {split: next(f"m{i}" for i in range(100) if split_of(f"m{i}") == split) for split in SPLITS}
    assert named == {"train": "m1", "validation": "m3", "test": "m0"}
    counts = collections.Counter(split_of(f"package.module{i}") for i in range(20_000))
    # Three standard deviations of a binomial count.
    for split, share in {"train": 0.9, "validation": 0.05, "test": 0.05}.items():
        assert abs(counts[split] - 20_000 * share) < 3 * (20_000 * share * (1 - share)) ** 0.5


def test_which_files_are_read(tmp_path):
    kept = {"a/__init__.py": "a", "a/b.py": "a.b", "c.py": "c"}
    left = [
        "a/tests/d.py",
        "a/test_e.py",
        "a/f_pb2.py",
        "site-packages/g.py",
        "__pycache__/h.py",
        "a/data.txt",
        "i.pyc",
    ]
    write(tmp_path, dict.fromkeys([*kept, *left], ""))
    found = python_files([tmp_path])
    assert sorted(name for name, _ in found) == sorted(kept.values())
    assert all(Path(path).is_file() for _, path in found)
    # The order is that of a hash: adding a root changes nothing about those that were there.
    other = write(tmp_path.parent / "other", {"z.py": "", "y.py": "", "x.py": ""})
    assert [pair for pair in python_files([tmp_path, other]) if pair in found] == found


def test_public_definitions_are_read_and_nothing_is_imported(tmp_path):
    source = """
raise SystemExit("imported")
class A:
    "Class A."
    def method(self):
        r'''Method \\d.'''
    def _private(self):
        "Not this."
    async def later(self):
        "Later."
def silent(): pass
X = "\\d"
"""
    write(tmp_path, {"m.py": source})
    assert docstrings(str(tmp_path / "m.py")) == [("A", "Class A."), ("method", "Method \\d."), ("later", "Later.")]


@pytest.mark.parametrize(
    "content",
    [b"", b"def f(:", b"def f():\n    '''\xe9t\xe9.'''\n", b"\x00", b"(" * 5000, None],
    ids=["empty", "syntax", "not_utf8", "null", "deep", "missing"],
)
def test_a_file_that_cannot_be_parsed_has_no_docstrings(tmp_path, content):
    path = tmp_path / "m.py"
    if content is not None:
        path.write_bytes(content)
    assert docstrings(str(path)) == []


def test_a_declared_encoding_is_followed(tmp_path):
    path = tmp_path / "m.py"
    path.write_bytes(b"# coding: latin-1\ndef f():\n    '''\xe9t\xe9.'''\n")
    assert docstrings(str(path)) == [("f", "été.")]


@pytest.mark.parametrize(
    ("name", "docstring", "inputs", "targets"),
    [
        ("f", f"Counts them all now. {BODY}", f"f: {BODY}", "Counts them all now."),
        ("f", f"Counts them all\n    right now!\n\n    {BODY}\n    ", f"f: {BODY}", "Counts them all right now!"),
        ("snake_case", f"Counts them all now.\n{BODY}", f"snake case: {BODY}", "Counts them all now."),
        ("CamelCase2Name", f"Counts them all now.\n{BODY}", f"Camel Case2 Name: {BODY}", "Counts them all now."),
        ("f", f"Counts ``x`` and :class:`~a.B` **now**.\n\n{BODY} `y`.", f"f: {BODY} y.", "Counts x and a.B now."),
        ("f", f"Counts them all now.\n\n{BODY}\n\nArgs:\n  x: left out.", f"f: {BODY}", "Counts them all now."),
        ("f", f"Counts them all now.\n\n{BODY}\n\nReturns\n-------\nint", f"f: {BODY}", "Counts them all now."),
        ("f", f"Counts them all now.\n\n>>> f()\n... 1\n{BODY}", f"f: {BODY}", "Counts them all now."),
        ("f", f"Counts them all now.\n\n.. note::\n  {BODY}", f"f: {BODY}", "Counts them all now."),
    ],
    ids=["plain", "lines", "snake", "camel", "markup", "google", "numpy", "doctest", "directive"],
)
def test_summarise(name, docstring, inputs, targets):
    example = summarise(name, docstring, PydocSettings())
    assert (example.inputs, example.targets) == (inputs, targets)


@pytest.mark.parametrize(
    "docstring",
    [
        f"Too short.\n\n{BODY}",
        f"{'Word ' * 19}ends.\n\n{BODY}",
        "Counts them all now.\n\nToo short a body.",
        f"counts them all now.\n\n{BODY}",
        f"Counts them all, e.g. some.\n\n{BODY}",
        f"Counts them all, été été.\n\n{BODY}",
        f"x = f(1, 2) + [3, 4] * {{}}.\n\n{BODY}",
        f"Counts them all now.\n\nCounts them all now. {BODY}",
        f"Counts them all now\n\n{BODY}",
        BODY.replace(".", ""),
        "",
    ],
    ids=[
        "short",
        "long",
        "body",
        "lower",
        "abbreviation",
        "accents",
        "code",
        "repeated",
        "no_stop",
        "no_sentence",
        "empty",
    ],
)
def test_what_makes_no_good_pair_is_left_out(docstring):
    assert summarise("f", docstring, PydocSettings()) is None


def test_the_settings_are_the_limits_themselves():
    limits = PydocSettings(min_summary_words=3, max_summary_words=5, min_document_words=20, max_document_chars=50)
    body = " ".join(["word"] * 20)
    for words, taken in {2: False, 3: True, 5: True, 6: False}.items():
        summary = " ".join(["Count"] + ["x"] * (words - 1)) + "."
        assert (summarise("f", f"{summary}\n\n{body}", limits) is not None) == taken
        assert summarise("f", f"{summary}\n\n{body[:-5]}", limits) is None
    assert summarise("f", f"Count x x.\n\n{body}", limits).inputs == f"f: {body}"[:50]


@pytest.mark.parametrize("name", ["max_documents", "min_document_words", "min_summary_words", "max_document_chars"])
def test_settings_below_one_are_refused(name):
    with pytest.raises(ValueError, match=f"PydocSettings.{name} is 0: expected at least 1"):
        PydocSettings(**{name: 0})


def test_settings_that_contradict_each_other_are_refused():
    with pytest.raises(ValueError, match="min_summary_words is larger than max_summary_words"):
        PydocSettings(min_summary_words=9, max_summary_words=8)


def test_the_running_python_is_read():
    roots = source_roots()
    stdlib = Path(inspect.getfile(ast)).resolve().parent
    assert stdlib in roots
    assert len(roots) == len(set(roots))
    folders = [stdlib / name for name in ("asyncio", "email", "importlib")]
    examples = [e for split in corpus(PydocSettings(max_documents=20), folders).values() for e in split]
    assert len(examples) == 20
    assert all(4 <= len(e.targets.split()) <= 18 and e.targets not in e.inputs for e in examples)
