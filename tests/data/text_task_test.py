"""Text tasks: registered with SeqIO as they are described, and named when they are not."""

import os
import subprocess
import sys

import pytest

from clp_jax.data.text_task import Registered, TextExample, TextTask, import_seqio, register_text_task

EXAMPLES = {"train": [TextExample("a b", "c"), TextExample("dé", "\n")], "test": [TextExample("x", "y")]}


def read(name, split):
    dataset = import_seqio().get_mixture_or_task(name).get_dataset(None, split, shuffle=False)
    return [TextExample(e["inputs"].decode(), e["targets"].decode()) for e in dataset.as_numpy_iterator()]


def test_a_registered_task_gives_its_examples():
    task = register_text_task("text_task_test", EXAMPLES.__getitem__, tuple(EXAMPLES))
    assert set(task.splits) == set(EXAMPLES)
    for split, examples in EXAMPLES.items():
        assert read("text_task_test", split) == examples


def test_registering_again_replaces():
    register_text_task("text_task_test", EXAMPLES.__getitem__, tuple(EXAMPLES))
    register_text_task("text_task_test", lambda split: [TextExample("new", split)], ("dev",))
    assert read("text_task_test", "dev") == [TextExample("new", "dev")]


def test_examples_are_asked_for_when_a_split_is_read():
    asked = []
    register_text_task("text_task_test", lambda split: asked.append(split) or EXAMPLES[split], tuple(EXAMPLES))
    assert asked == []
    read("text_task_test", "test")
    assert set(asked) == {"test"}


def test_registered_imports_modules_and_finds_the_task(tmp_path, monkeypatch):
    source = "from clp_jax.data.text_task import *\nregister_text_task('of_mine', lambda s: [TextExample('i', 't')], ['train'])"
    (tmp_path / "module_of_mine.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    task = Registered("of_mine", ("module_of_mine",))
    assert isinstance(task, TextTask)
    assert task.register() == "of_mine"
    assert read("of_mine", "train") == [TextExample("i", "t")]
    assert task.describe() == {"task": "of_mine", "modules": ["module_of_mine"]}


def test_an_unknown_task_names_those_there_are():
    register_text_task("text_task_test", EXAMPLES.__getitem__, tuple(EXAMPLES))
    with pytest.raises(ValueError, match=r"task 'absent' is not registered by any module: there are .*text_task_test"):
        Registered("absent").register()
    with pytest.raises(ValueError, match=r"task 'absent' is not registered by json, math: there are"):
        Registered("absent", ("json", "math")).register()


def test_what_tensorflow_says_is_heard_when_its_import_fails(tmp_path):
    (tmp_path / "seqio.py").write_text("import os\nos.write(2, b'from below')\nraise ImportError('no seqio here')")
    (tmp_path / "quiet.py").write_text("import os\nos.write(2, b'chatter')")
    script = """
from clp_jax.data.text_task import _stderr_unless_it_fails, import_seqio
with _stderr_unless_it_fails():
    import quiet
try:
    import_seqio()
except ImportError as error:
    print(error)
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *filter(None, sys.path)])}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "no seqio here\n"
    assert "from below" in done.stderr and "chatter" not in done.stderr
