"""Summarising Python's own documentation: docstring body to first sentence, from the packages on this machine.

Importing this module registers the SeqIO task ``pydoc_summarize``.
"""

import dataclasses
import functools
from typing import Any

from clp_jax.data.docstrings import SPLITS, PydocSettings, corpus
from clp_jax.data.text_task import TextExample, register_text_task


@functools.cache
def _examples(settings: PydocSettings) -> dict[str, list[TextExample]]:
    return corpus(settings)


@dataclasses.dataclass(frozen=True)
class Pydoc:
    """The task with settings of your own; bind it in gin.

    Attributes:
        name: of the SeqIO task.
        settings: which docstrings are taken.
    """

    name: str = "pydoc_summarize"
    settings: PydocSettings = PydocSettings()

    def register(self) -> str:
        """See `clp_jax.data.text_task.TextTask`."""
        register_text_task(self.name, lambda split: _examples(self.settings)[split], SPLITS)
        return self.name

    def describe(self) -> dict[str, Any]:
        """The name and the settings; which packages are installed shows in the data's fingerprint alone."""
        return {"task": self.name, **dataclasses.asdict(self.settings)}


Pydoc().register()
