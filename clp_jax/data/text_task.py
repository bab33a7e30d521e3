"""SeqIO tasks of plain text: what `tasks/` registers and `prepare` turns into token ids."""

import contextlib
import dataclasses
import importlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class TextTask(Protocol):
    """Something that can register a SeqIO task or mixture with the text features ``inputs`` and ``targets``."""

    def register(self) -> str:
        """Registers it with SeqIO, and returns its name there."""

    def describe(self) -> dict[str, Any]:
        """All that decides its examples, as JSON: data prepared from another description is not mistaken for its own."""


@dataclasses.dataclass(frozen=True)
class Registered:
    """A SeqIO task or mixture that Python modules register.

    Attributes:
        name: in SeqIO's registry.
        modules: to import first.
    """

    name: str
    modules: Sequence[str] = ()

    def register(self) -> str:
        """See `TextTask`.

        Raises:
            ValueError: when the modules register nothing of that name.
        """
        seqio = import_seqio()
        for module in self.modules:
            importlib.import_module(module)
        known = sorted(set(seqio.TaskRegistry.names()) | set(seqio.MixtureRegistry.names()))
        if self.name not in known:
            raise ValueError(
                f"task {self.name!r} is not registered by {', '.join(self.modules) or 'any module'}: "
                f"there are {', '.join(known) or 'none'}."
            )
        return self.name

    def describe(self) -> dict[str, Any]:
        """See `TextTask`."""
        return {"task": self.name, "modules": list(self.modules)}


@dataclasses.dataclass(frozen=True)
class TextExample:
    """One example, as text.

    Attributes:
        inputs: the prompt.
        targets: the completion.
    """

    inputs: str
    targets: str


def import_seqio() -> Any:
    """SeqIO, and with it TensorFlow, kept quiet and off the accelerators."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
    with contextlib.nullcontext() if "seqio" in sys.modules else _stderr_unless_it_fails():
        import absl.logging
        import seqio
        import tensorflow as tf

        tf.constant(0)  # Looks for devices, which is as noisy.
    absl.logging.set_verbosity(absl.logging.ERROR)
    return seqio


@contextlib.contextmanager
def _stderr_unless_it_fails() -> Iterator[None]:
    """Keeps what libraries write to the process's standard error to itself, unless there is an exception to explain."""
    sys.stderr.flush()
    with tempfile.TemporaryFile() as kept:
        saved = os.dup(2)
        os.dup2(kept.fileno(), 2)
        try:
            yield
        except BaseException:
            kept.seek(0)
            os.write(saved, kept.read())
            raise
        finally:
            os.dup2(saved, 2)
            os.close(saved)


def register_text_task(name: str, examples: Callable[[str], Sequence[TextExample]], splits: Sequence[str]) -> Any:
    """Registers a SeqIO task whose features are still text; preparing it chooses the vocabulary.

    Args:
        name: of the task; registering one again replaces it.
        examples: the examples of a split, called when the split is read.
        splits: its splits.

    Returns:
        The registered `seqio.Task`.
    """
    seqio = import_seqio()
    import tensorflow as tf

    def dataset(split: str, shuffle_files: bool = False, seed: int | None = None) -> Any:
        del shuffle_files, seed  # Prepared data is read by random access, in any order.
        found = examples(split)
        columns = {
            "inputs": tf.constant([e.inputs for e in found], tf.string),
            "targets": tf.constant([e.targets for e in found], tf.string),
        }
        return tf.data.Dataset.from_tensor_slices(columns)

    text = seqio.Feature(seqio.PassThroughVocabulary(1), add_eos=False, dtype=tf.string, rank=0)
    if name in seqio.TaskRegistry.names():
        seqio.TaskRegistry.remove(name)
    return seqio.TaskRegistry.add(
        name,
        source=seqio.FunctionDataSource(dataset, splits=tuple(splits)),
        preprocessors=[],
        output_features={"inputs": text, "targets": text},
    )
