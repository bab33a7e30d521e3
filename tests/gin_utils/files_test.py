"""Reading gin files: order, places, headers, and mistakes of grammar."""

from pathlib import Path

import pytest

from clp_jax.gin_utils.files import (
    ConfigError,
    Macro,
    Reference,
    SearchPath,
    all_files,
    bindings,
    leaves,
    read_binding,
    read_file,
    read_header,
    suggest,
)

FIXTURES = Path(__file__).parent.parent / "fixtures" / "gin"


def write(directory: Path, name: str, text: str) -> str:
    path = directory / name
    path.write_text(text)
    return str(path)


def test_included_files_come_first_and_say_where_they_are_from():
    file = read_file("short.gin", SearchPath([str(FIXTURES)]))
    steps = [(b.value, b.place) for b, _ in bindings([file]) if b.macro == "NUM_STEPS"]
    assert steps == [(100, f"{FIXTURES / 'base.gin'}:19"), (7, f"{FIXTURES / 'short.gin'}:4")]
    assert [f.path.name for f in all_files([file])] == ["base.gin", "short.gin"]


def test_the_names_of_a_file_are_its_own():
    file = read_file("short.gin", SearchPath([str(FIXTURES)]))
    owners = {b.selector: set(f.imports()) for b, f in bindings([file])}
    assert owners["toy_entry.toy"] == {"toy_entry"}
    assert file.imports() == {}


def test_values_keep_references_and_macros():
    read = read_binding("x.rewards=[@a/b.C(), @D, %E, {'k': 2.5}]")
    assert (read.selector, read.argument, read.macro) == ("x", "rewards", None)
    assert read.value == [Reference("a", "b.C", True), Reference("", "D", False), Macro("E"), {"k": 2.5}]
    assert leaves(read.value)[-2:] == ["k", 2.5]
    assert repr(read.value) == "[@a/b.C(), @D, %E, {'k': 2.5}]"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("RUN=/tmp/x", "/tmp/x"),
        ('RUN="/tmp/x"', "/tmp/x"),
        ("RUN = '/tmp/x'", "/tmp/x"),
        ("RUN=gs://bucket/a-b_c.d", "gs://bucket/a-b_c.d"),
        ("RUN=run1", "run1"),
        ("RUN=../x", "../x"),
        ("RUN=3", 3),
        ("RUN=-0.5", -0.5),
        ("RUN=None", None),
        ("RUN=('a', 'b')", ("a", "b")),
        ("RUN='a=b'", "a=b"),
    ],
)
def test_values_of_the_command_line_may_lack_quotes_where_nothing_else_makes_sense(text, value):
    read = read_binding(text)
    assert read.macro == "RUN"
    assert read.value == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("RUN", r"--gin.RUN has no value: write --gin.RUN=VALUE"),
        ("RUN=", r"--gin.RUN has no value"),
        ("RUN=0.2,0.8", r"'0.2,0.8' is not a gin value. Text needs quotes .*--gin.RUN='\"0.2,0.8\"'"),
        ("RUN=[1", r"'\[1' is not a gin value"),
        ("RUN=@", r"'@' is not a gin value"),
        ("a..b=3", r"'a..b' is not a name"),
        ("import os\nx=3", r"is not a name"),
    ],
)
def test_wrong_bindings(text, message):
    with pytest.raises(ConfigError, match=message):
        read_binding(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("X = 3\nY = [1,\n", r"bad.gin:\d+: "),
        ("X = 3\nY 4\n", r"bad.gin:2: Couldn't parse statement"),
        ("X = 3\nY = ten\n", r"bad.gin:2: .*'ten'"),
        ("X = 'open\n", r"bad.gin:1: "),
        ("import a\n", r"bad.gin:1: write `from __gin__ import dynamic_registration` before"),
        ("a.b = 3\n", r"bad.gin:1: write `from __gin__ import dynamic_registration` before"),
        ("X = @a.b()\n", r"bad.gin:1: write `from __gin__ import dynamic_registration` before"),
        ("include 'none.gin'\n", r"bad.gin:1: there is no file none.gin"),
        ("include 'bad.gin'\n", r"bad.gin:1: bad.gin includes itself"),
        ("include 3\n", r"bad.gin:1: Expected file path as string"),
    ],
)
def test_wrong_files(tmp_path, text, message):
    write(tmp_path, "bad.gin", text)
    with pytest.raises(ConfigError, match=message) as error:
        read_file("bad.gin", SearchPath([str(tmp_path)]))
    assert "\n" not in str(error.value)


def test_a_file_that_is_not_text(tmp_path):
    (tmp_path / "binary.gin").write_bytes(b"X = '\xff'\n")
    with pytest.raises(ConfigError, match=r"binary.gin is not UTF-8 text \(byte 5\)"):
        read_file("binary.gin", SearchPath([str(tmp_path)]))


def test_search_order_and_similar_names(tmp_path, monkeypatch):
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        write(tmp_path / name, "both.gin", f"X = '{name}'\n")
    write(tmp_path / "there", "other.gin", "X = 1\n")
    monkeypatch.chdir(tmp_path / "here")
    path = SearchPath([str(tmp_path / "there")])
    assert read_file("both.gin", path).statements[0].value == "here"
    assert read_file("other.gin", path).statements[0].value == 1
    with pytest.raises(
        ConfigError, match=r"no file othr.gin \(did you mean other.gin\?\). Looked in .*here, .*there, "
    ):
        path.find("othr.gin")
    with pytest.raises(ConfigError, match="nowhere is not a directory"):
        SearchPath(["nowhere"])


def test_header():
    header = read_header((FIXTURES / "base.gin").read_text())
    assert header.summary == "A toy that does nothing."
    assert header.required == {"RUN_DIR": "where the run goes, on two lines."}
    assert header.overridden == {"NUM_STEPS": "updates.", "TEACHER": ""}


def test_suggestions_are_similar_or_absent():
    assert suggest("num_step", ["num_steps", "seed"]) == " (did you mean num_steps?)"
    assert suggest("NUM_STEPS", ["num_steps"]) == " (did you mean num_steps?)"
    assert suggest("optimizer", ["seed"]) == ""
