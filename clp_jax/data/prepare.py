"""SeqIO to disk: a task or mixture as token ids in ArrayRecord shards, with a manifest."""

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from clp_jax.data import packing, records
from clp_jax.data.manifest import FILE_NAME, Manifest, Shard, Split, file_digest
from clp_jax.data.text_task import TextTask, import_seqio
from clp_jax.data.vocabulary import FILE_NAME as VOCABULARY_FILE
from clp_jax.data.vocabulary import Vocabulary, train_vocabulary

Progress = Callable[[str, int, int | None], None]

# Marks a directory that `materialise` has not finished.
_UNFINISHED = "UNFINISHED"


@dataclasses.dataclass(frozen=True)
class Request:
    """What to prepare.

    Attributes:
        task: registers a SeqIO task or mixture with the text features ``inputs`` and ``targets``.
        lengths: tokens of a row by feature, the end of sequence included; what is longer is cut.
        vocabulary_size: tokens of the vocabulary that is trained on the training split.
        vocabulary: a SentencePiece model file, or a directory with a vocabulary (Hugging Face's too), to use instead.
        splits: to prepare; the first trains the vocabulary.
        pack: put several short examples into one row.
        shard_records: rows in a file.
    """

    task: TextTask
    lengths: Mapping[str, int]
    vocabulary_size: int = 4096
    vocabulary: str | None = None
    splits: tuple[str, ...] = ("train", "validation", "test")
    pack: bool = False
    shard_records: int = 16_384

    def __post_init__(self):
        if set(self.lengths) != {"inputs", "targets"} or min(self.lengths.values()) < 2:
            raise ValueError(
                f"prepare: lengths are {dict(self.lengths)}: expected at least 2 tokens for each of inputs and targets."
            )
        if not self.splits or self.vocabulary_size < 4 or self.shard_records < 1:
            raise ValueError(
                "prepare: expected at least one split, 4 tokens in the vocabulary and 1 record in a shard."
            )

    def describe(self) -> dict[str, Any]:
        """The request as JSON, to recognise it again."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        content = fields | {"task": self.task.describe(), "lengths": dict(self.lengths)}
        if self.vocabulary is not None:
            content["vocabulary"] = Vocabulary.load(self.vocabulary).fingerprint
        return json.loads(json.dumps(content))


def load_texts(request: Request, split: str) -> list[tuple[str, str]]:
    """The examples of a split as text, through SeqIO.

    A mixture is sampled at its rates until the first of its tasks has no more: the rates hold, and what is left over of
    the other tasks is not prepared.

    Raises:
        ValueError: when the task is not registered, or the split is missing or empty.
    """
    name = request.task.register()
    task = import_seqio().get_mixture_or_task(name)
    if split not in task.splits:
        raise ValueError(f"task {name!r} has no split {split!r}: it has {', '.join(task.splits)}.")
    dataset = task.get_dataset(sequence_length=None, split=split, shuffle=False, num_epochs=1)
    texts = [(e["inputs"].decode(), e["targets"].decode()) for e in dataset.as_numpy_iterator()]
    if not texts:
        raise ValueError(f"split {split!r} of task {name!r} has no examples: check its source and its filters.")
    return texts


def materialise(request: Request, output_dir: Path, progress: Progress = lambda what, done, total: None) -> Manifest:
    """Prepares a data set into a directory that does not exist yet, or exists and was prepared by the same request.

    Everything is written beside the directory and moved there at the end: it is there whole or not at all.

    Args:
        request: what to prepare.
        output_dir: where it goes.
        progress: is told what is happening, how many examples are done, and of how many where that is known.

    Raises:
        ValueError: when `output_dir` holds something else, or a split has no examples.
    """
    if (output_dir / FILE_NAME).is_file():
        return _existing(request, output_dir)
    if output_dir.exists() and any(output_dir.iterdir()):
        raise ValueError(f"{output_dir} is not empty and not a prepared data set: choose another output_dir.")
    partial = _make_partial(output_dir)
    try:
        manifest = _write(request, partial, progress)
    except Exception:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    (partial / _UNFINISHED).unlink()
    if output_dir.exists():
        output_dir.rmdir()
    partial.rename(output_dir)
    return manifest


def _write(request: Request, directory: Path, progress: Progress) -> Manifest:
    given = None if request.vocabulary is None else Vocabulary.load(request.vocabulary)
    texts = {}
    for split in request.splits:
        progress(f"reading {split}", 0, None)
        texts[split] = load_texts(request, split)
    if given is None:
        progress("training the vocabulary", 0, None)
        train_vocabulary(
            [t for pair in texts[request.splits[0]] for t in pair], request.vocabulary_size, directory / VOCABULARY_FILE
        )
    else:
        given.save(directory)
    vocabulary = Vocabulary.load(directory)
    description = request.task.describe()
    settings = [description, dict(request.lengths), request.pack, vocabulary.fingerprint]
    digest = hashlib.sha256(json.dumps(settings).encode())
    splits = {
        split: _write_split(request, split, pairs, directory, vocabulary, digest, progress)
        for split, pairs in texts.items()
    }
    manifest = Manifest(
        task=str(description.get("task", type(request.task).__name__)),
        lengths=dict(request.lengths),
        packed=request.pack,
        vocabulary_size=vocabulary.size,
        vocabulary_fingerprint=vocabulary.fingerprint,
        request=request.describe(),
        fingerprint=digest.hexdigest(),
        splits=splits,
    )
    manifest.save(directory)
    return manifest


def _make_partial(output_dir: Path) -> Path:
    """A directory beside, without what an earlier attempt left there; anyone else's is left alone."""
    partial = output_dir.with_name(output_dir.name + ".partial")
    if (partial / _UNFINISHED).is_file():
        shutil.rmtree(partial)
    if partial.exists():
        raise ValueError(
            f"{partial} is in the way, and not of an earlier attempt: move it, or choose another output_dir."
        )
    try:
        partial.mkdir(parents=True)
        (partial / _UNFINISHED).touch()
    except OSError as error:
        raise ValueError(f"{output_dir} can't be made ({error.strerror}): choose another output_dir.") from error
    return partial


def _existing(request: Request, output_dir: Path) -> Manifest:
    manifest = Manifest.load(output_dir)
    asked = request.describe()
    different = [
        f"{k} was {manifest.request.get(k)!r}, now {asked[k]!r}" for k in asked if manifest.request.get(k) != asked[k]
    ]
    if different:
        raise ValueError(
            f"{output_dir} was prepared by another request ({'; '.join(different)}): choose another output_dir."
        )
    for split in manifest.splits:
        manifest.verify(output_dir, split, contents=True)
    if Vocabulary.load(output_dir).fingerprint != manifest.vocabulary_fingerprint:
        raise ValueError(f"the vocabulary in {output_dir} is not the one it was prepared with: prepare the data again.")
    return manifest


def _write_split(
    request: Request,
    split: str,
    texts: Sequence[tuple[str, str]],
    directory: Path,
    vocabulary: Vocabulary,
    digest: Any,
    progress: Progress,
) -> Split:
    names = tuple(request.lengths)
    encoders = {"inputs": vocabulary.encode_prompt, "targets": vocabulary.encode_target}
    counts: dict[str, list[int]] = {name: [] for name in names}

    def examples() -> Iterator[dict[str, np.ndarray]]:
        for done, pair in enumerate(texts, start=1):
            tokens = {}
            for (name, encode), text in zip(encoders.items(), pair, strict=True):
                ids = encode(text)
                counts[name].append(len(ids))
                # What is cut has no end of sequence: the model is not taught to stop there.
                tokens[name] = np.asarray(ids[: request.lengths[name]], np.int32)
            progress(f"writing {split}", done, len(texts))
            yield tokens

    rows = packing.pack(examples(), request.lengths) if request.pack else ([e] for e in examples())
    shards = list(_write_shards(map(_record, rows), split, request.shard_records, directory, digest))
    return Split(
        examples=len(texts),
        records=sum(shard.records for shard in shards),
        shards=tuple(shards),
        statistics={name: _statistics(counts[name], request.lengths[name]) for name in names},
    )


def _record(row: Sequence[Mapping[str, np.ndarray]]) -> bytes:
    """A row's examples, one after the other, and where each ends."""
    features = {}
    for name in row[0]:
        features[name] = np.concatenate([example[name] for example in row])
        features[f"{name}_ends"] = np.cumsum([len(example[name]) for example in row])
    return records.encode(features)


def _write_shards(
    rows: Iterable[bytes], split: str, shard_records: int, directory: Path, digest: Any
) -> Iterator[Shard]:
    from array_record.python.array_record_module import ArrayRecordWriter

    def finish(number: int, count: int, writer: Any) -> Shard:
        writer.close()
        path = directory / f"{split}-{number:05d}.arrayrecord"
        return Shard(name=path.name, records=count, size=path.stat().st_size, sha256=file_digest(path))

    number = count = 0
    writer = None
    for row in rows:
        if writer is None:
            # One record a group: reading is by random access.
            writer = ArrayRecordWriter(str(directory / f"{split}-{number:05d}.arrayrecord"), "group_size:1")
        writer.write(row)
        digest.update(row)
        count += 1
        if count == shard_records:
            yield finish(number, count, writer)
            number, count, writer = number + 1, 0, None
    if writer is not None:
        yield finish(number, count, writer)


def _statistics(counts: Sequence[int], length: int) -> dict[str, float]:
    array = np.asarray(counts)
    p50, p90, p99 = np.percentile(array, (50, 90, 99)).tolist()
    truncated = float(np.mean(array > length))
    mean, largest = float(array.mean()), float(array.max())
    return {"mean": mean, "p50": p50, "p90": p90, "p99": p99, "max": largest, "truncated": truncated}
