"""Disk to device: prepared records by random access through Grain, without TensorFlow.

The position in the data is one number, the global index of the next example. The order is a function of the seed and
that number alone: resuming costs nothing and is exact, whatever the number of processes. Each of them reads only the rows
of a global batch that its devices hold.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from clp_jax.data import packing, records
from clp_jax.data.batch import Batch, PromptBatch
from clp_jax.data.manifest import Manifest
from clp_jax.data.vocabulary import Vocabulary
from clp_jax.host_rows import row_indices

# (records, their ids, lengths by feature, padding) -> a batch. An id of -1 stands for an empty row.
Converter: TypeAlias = Callable[[Sequence[dict[str, np.ndarray]], np.ndarray, dict[str, int], int], Any]


class UnreadableError(OSError, ValueError):
    """Prepared records can't be read, now or for good; the message says what to do."""


class DataSource:
    """Batches of a prepared split, without end.

    Args:
        directory: of the prepared data.
        split: its name.
        batch_size: examples of a global batch.
        converter: turns records into a batch: `sequence_batch`, `prompt_batch`.
        seed: decides the order; every epoch has its own.
        shuffle: read in the order on disk when False.
        rows: from the size of a global batch to the places in it that this process reads, ascending.
        pad_id: what fills prompts up, a policy's; None takes the vocabulary's.

    Raises:
        FileNotFoundError: when the directory is not prepared.
        ValueError: when a shard is damaged, or a batch has no examples.
    """

    def __init__(
        self,
        directory: str | Path,
        split: str,
        *,
        batch_size: int,
        converter: Converter,
        seed: int = 0,
        shuffle: bool = True,
        rows: Callable[[int], np.ndarray] = row_indices,
        pad_id: int | None = None,
    ):
        self.manifest = Manifest.load(directory)
        self.manifest.verify(directory, split)
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}: expected at least 1.")
        vocabulary = Vocabulary.load(directory)
        found = vocabulary.fingerprint
        if found != self.manifest.vocabulary_fingerprint:
            raise ValueError(
                f"the vocabulary in {directory} (fingerprint {found[:12]}) is not the one the data was prepared with "
                f"({self.manifest.vocabulary_fingerprint[:12]}): prepare the data again."
            )
        self.size = self.manifest.splits[split].records
        self.position = 0
        self._pad_id = vocabulary.pad_id if pad_id is None else pad_id
        self._where = f"split {split!r} in {directory}"
        self._paths = [str(Path(directory) / shard.name) for shard in self.manifest.splits[split].shards]
        self.batch_size = batch_size
        self._converter = converter
        self._seed = seed
        self._shuffle = shuffle
        self._rows = rows

    @functools.cached_property
    def _records(self) -> Any:
        from grain.sources import ArrayRecordDataSource

        return ArrayRecordDataSource(self._paths)

    def example_ids(self, start: int, count: int) -> np.ndarray:
        """Record numbers of the global example indices from `start` on; each epoch has every record once."""
        return self._ids_at(np.arange(start, start + count, dtype=np.int64))

    def _ids_at(self, index: np.ndarray) -> np.ndarray:
        from grain.experimental import index_shuffle

        epochs, within = index // self.size, index % self.size
        if not self._shuffle:
            return within.astype(np.int32)
        seeds = (self._seed * 1_000_003 + epochs) % 2**32
        shuffled = [
            index_shuffle(int(i), max_index=self.size - 1, seed=int(s), rounds=4)
            for i, s in zip(within, seeds, strict=True)
        ]
        return np.asarray(shuffled, np.int32)

    def next(self) -> Any:
        """This process's part of the next global batch."""
        ids = self._ids_at(self.position + self._rows(self.batch_size))
        self.position += self.batch_size
        return self.read(ids)

    def seek(self, position: int) -> None:
        """Goes to a global example index."""
        if position < 0:
            raise ValueError(f"position {position}: expected a global example index, 0 or more.")
        self.position = int(position)

    def epoch_batches(self, max_examples: int | None = None) -> Iterator[Any]:
        """One pass in the order on disk; rows that fill up the last batch have example id -1."""
        total = self.size if max_examples is None else min(self.size, max_examples)
        for start in range(0, total, self.batch_size):
            ids = np.arange(start, start + self.batch_size, dtype=np.int32)
            yield self.read(np.where(ids < total, ids, -1)[self._rows(self.batch_size)])

    def read(self, ids: np.ndarray) -> Any:
        """A batch of these records.

        Args:
            ids: record numbers, -1 for empty rows.

        Raises:
            UnreadableError: when they can't be read.
        """
        wanted = [int(i) for i in ids if i >= 0]  # None where this part of a last batch is filled up.
        try:
            raw = iter(self._records.__getitems__(wanted) if wanted else ())
            rows = [records.decode(next(raw)) if i >= 0 else {} for i in ids]
        except Exception as error:  # Readers in C++ raise what they like.
            raise UnreadableError(
                f"{self._where} has records that can't be read ({error}): a file is damaged, or the disk does not answer. "
                "Prepare the data again if that stays so."
            ) from error
        return self._converter(rows, ids.astype(np.int32), self.manifest.lengths, self._pad_id)


def sequence_batch(
    rows: Sequence[dict[str, np.ndarray]],
    ids: np.ndarray,
    lengths: dict[str, int],
    pad_id: int = 0,
    *,
    start_id: int = 0,
) -> Batch:
    """Rows as a `Batch`, packed or not; segments tell padding, whatever its token is.

    Targets are decoded from the policy's `start_id` on; decoders start with the prompt's last token, whatever it is.
    """
    laid = {name: _lay_out(rows, name, length) for name, length in lengths.items()}
    targets, segments, positions = laid["targets"]
    return Batch(
        inputs=laid["inputs"][0],
        input_segments=laid["inputs"][1],
        input_positions=laid["inputs"][2],
        decoder_inputs=packing.shift_right(targets, positions, start_id),
        targets=targets,
        target_segments=segments,
        target_positions=positions,
        loss_weights=(segments > 0).astype(np.float32),
        example_ids=ids,
    )


def prompt_batch(
    rows: Sequence[dict[str, np.ndarray]], ids: np.ndarray, lengths: dict[str, int], pad_id: int = 0
) -> PromptBatch:
    """Rows as a `PromptBatch`, padded with `pad_id`.

    Raises:
        ValueError: when the data is packed: a prompt is one example.
    """
    if any(len(row["inputs_ends"]) > 1 for row in rows if row):
        raise ValueError("these prompts are packed: prepare the data with pack=False for rollouts and evaluation.")
    laid = (_lay_out(rows, name, lengths[name]) for name in ("inputs", "targets"))
    inputs, targets = (np.where(segments > 0, tokens, pad_id) for tokens, segments, _ in laid)
    return PromptBatch(inputs=inputs, targets=targets, example_ids=ids)


def _lay_out(rows: Sequence[dict[str, np.ndarray]], name: str, length: int) -> tuple[np.ndarray, ...]:
    laid = [packing.lay_out(np.split(row[name], row[f"{name}_ends"][:-1]) if row else [], length) for row in rows]
    return tuple(np.stack(column) for column in zip(*laid, strict=True))
