"""Data and a supervised policy that the processes of all groups read."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))

from tiny_runs import LENGTHS, VOCAB_SIZE, WORDS, make_data, make_supervised

from clp_jax.data import records
from clp_jax.data.manifest import Manifest, Shard, Split, file_digest
from clp_jax.data.vocabulary import Vocabulary, train_vocabulary


def make_packed(directory: Path, rows: int = 40) -> Path:
    """Prepares rows that hold one to three examples each."""
    from array_record.python.array_record_module import ArrayRecordWriter

    directory.mkdir(parents=True)
    train_vocabulary([" ".join(WORDS), " ".join(reversed(WORDS))], VOCAB_SIZE, directory / "vocabulary.model")
    vocabulary = Vocabulary.load(directory)
    rng = np.random.default_rng(1)
    splits = {}
    for split, count in (("train", rows), ("validation", 8)):
        path = directory / f"{split}-00000.arrayrecord"
        writer = ArrayRecordWriter(str(path), "group_size:1")
        for _ in range(count):
            parts = rng.integers(1, 4)
            row = {}
            for name, length in LENGTHS.items():
                ends = np.sort(rng.choice(np.arange(1, length + 1), parts, replace=False))
                row |= {name: rng.integers(2, VOCAB_SIZE, ends[-1]), f"{name}_ends": ends}
            writer.write(records.encode(row))
        writer.close()
        shard = Shard(path.name, count, path.stat().st_size, file_digest(path))
        splits[split] = Split(examples=2 * count, records=count, shards=(shard,), statistics={})
    Manifest("toy", LENGTHS, True, vocabulary.size, vocabulary.fingerprint, {}, "0", splits).save(directory)
    return directory


@pytest.fixture(scope="session")
def home(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("home")
    make_packed(path / "packed")
    make_supervised(path / "sft", make_data(path / "prompts"))
    return path
