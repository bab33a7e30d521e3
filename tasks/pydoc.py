"""Summarising Python's own documentation: docstring body to first sentence, from the packages on this machine.

Importing this module registers the SeqIO task ``pydoc_summarize``.
"""

import functools

import seqio

from clp_jax.data.docstrings import SPLITS, PydocSettings, corpus
from clp_jax.data.text_task import TextExample, register_text_task


@functools.cache
def _examples(settings: PydocSettings) -> dict[str, list[TextExample]]:
    return corpus(settings)


def register(name: str = "pydoc_summarize", settings: PydocSettings = PydocSettings()) -> seqio.Task:
    """Registers the task under a name, with settings of your own.

    Args:
        name: of the SeqIO task.
        settings: which docstrings are taken.
    """
    return register_text_task(name, lambda split: _examples(settings)[split], SPLITS)


register()
