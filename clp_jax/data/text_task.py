"""SeqIO tasks of plain text: what `tasks/` registers and `prepare` turns into token ids."""

import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import Any


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
    import absl.logging
    import seqio

    absl.logging.set_verbosity(absl.logging.ERROR)
    return seqio


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
