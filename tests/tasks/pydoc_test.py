"""The docstring task: registered on import, and with settings of one's own."""

import pytest
from clp_jax.tasks import pydoc

from clp_jax.data import docstrings
from clp_jax.data.docstrings import PydocSettings, corpus
from clp_jax.data.prepare import Request, load_texts
from clp_jax.data.text_task import Registered, TextTask, import_seqio

LENGTHS = {"inputs": 8, "targets": 8}


@pytest.fixture
def sources(tmp_path, monkeypatch):
    """A small Python installation of 30 documented modules."""
    body = "It is written down with care and at some length, so that there is enough of it to be summarised."
    for i in range(30):
        source = (
            f'def f():\n    """Gives number {i} to the caller.\n\n    The caller of f{i} is thanked. {body}\n    """\n'
        )
        (tmp_path / f"module{i}.py").write_text(source)
    monkeypatch.setattr(docstrings, "source_roots", lambda: [tmp_path])
    pydoc._examples.cache_clear()
    yield tmp_path
    pydoc._examples.cache_clear()


def test_importing_registers_the_task():
    assert Registered("pydoc_summarize", ("clp_jax.tasks.pydoc",)).register() == "pydoc_summarize"
    assert set(import_seqio().TaskRegistry.get("pydoc_summarize").splits) == {"train", "validation", "test"}


def test_all_splits_come_through_seqio(sources):
    settings = PydocSettings(max_documents=25)
    task = pydoc.Pydoc("pydoc_small", settings)
    assert isinstance(task, TextTask)
    expected = corpus(settings, [sources])
    assert sum(map(len, expected.values())) == 25
    for split, examples in expected.items():
        assert examples, split
        texts = load_texts(Request(task=task, lengths=LENGTHS), split)
        assert texts == [(e.inputs, e.targets) for e in examples]


def test_it_is_described_by_its_settings():
    small, large = (pydoc.Pydoc(settings=PydocSettings(max_documents=n)).describe() for n in (10, 20))
    assert small == large | {"max_documents": 10} and small["task"] == "pydoc_summarize"
