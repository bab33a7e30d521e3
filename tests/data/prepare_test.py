"""From a SeqIO task to shards and a manifest: what is written, counted, fingerprinted and refused."""

import dataclasses
import json

import numpy as np
import pytest
from tiny_tokenizers import huggingface_directory

from clp_jax.data import records
from clp_jax.data.manifest import FILE_NAME, Manifest, file_digest
from clp_jax.data.prepare import Request, load_texts, materialise
from clp_jax.data.text_task import Registered, TextExample, import_seqio, register_text_task
from clp_jax.data.vocabulary import EOS_ID, Vocabulary

TEXT = "the quick brown fox jumps over a lazy dog while five boxing wizards pack my box with liquid jugs"
WORDS = TEXT.split()
LENGTHS = {"inputs": 24, "targets": 8}
SPLITS = {"train": 40, "validation": 5, "test": 6}


def texts(split: str) -> list[TextExample]:
    """Texts of very different lengths: some of one word, some that are too long."""
    rng = np.random.default_rng(list(split.encode()))

    def text(most):
        return " ".join(rng.choice(WORDS, rng.integers(1, most)))

    return [TextExample(text(14), text(6)) for _ in range(SPLITS[split])]


@dataclasses.dataclass(frozen=True)
class Toy:
    """A task as users write one; `edition` stands for what its files hold."""

    edition: int = 1
    source: object = texts

    def register(self):
        register_text_task("prepare_toy", self.source, tuple(SPLITS))
        return "prepare_toy"

    def describe(self):
        return {"task": "prepare_toy", "edition": self.edition}


REQUEST = Request(task=Toy(), lengths=LENGTHS, vocabulary_size=45, shard_records=16)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    directory = tmp_path_factory.mktemp("prepared") / "data"
    return directory, materialise(REQUEST, directory)


def read(directory, manifest, split):
    from grain.sources import ArrayRecordDataSource

    source = ArrayRecordDataSource([str(directory / shard.name) for shard in manifest.splits[split].shards])
    return [records.decode(source[i]) for i in range(len(source))]


def test_every_example_is_on_disk_in_order(prepared):
    directory, manifest = prepared
    vocabulary = Vocabulary.load(directory)
    for split in SPLITS:
        rows = read(directory, manifest, split)
        assert len(rows) == SPLITS[split] == manifest.splits[split].examples == manifest.splits[split].records
        for row, example in zip(rows, texts(split), strict=True):
            for name, length in LENGTHS.items():
                whole = [*vocabulary.encode(getattr(example, name)), EOS_ID]
                assert row[name].tolist() == whole[:length]
                assert row[f"{name}_ends"].tolist() == [min(len(whole), length)]


def test_a_tokenizer_of_hugging_face_is_used_and_travels(tmp_path):
    source = huggingface_directory(tmp_path / "llama3", "llama3")
    request = dataclasses.replace(REQUEST, vocabulary=str(source), lengths={"inputs": 60, "targets": 30})
    manifest = materialise(request, tmp_path / "data")
    vocabulary = Vocabulary.load(tmp_path / "data")
    fingerprint = Vocabulary.load(source).fingerprint
    assert vocabulary.fingerprint == manifest.vocabulary_fingerprint == request.describe()["vocabulary"] == fingerprint
    for row, example in zip(read(tmp_path / "data", manifest, "test"), texts("test"), strict=True):
        assert row["inputs"].tolist() == [vocabulary.bos_id, *vocabulary.encode(example.inputs)][:60]
        assert row["targets"].tolist() == [*vocabulary.encode(example.targets), vocabulary.eos_ids[0]][:30]
    assert materialise(request, tmp_path / "data") == manifest


def test_what_is_too_long_is_cut_without_an_end(prepared):
    directory, manifest = prepared
    for name, length in LENGTHS.items():
        cut = [row[name] for row in read(directory, manifest, "train") if row[name][-1] != EOS_ID]
        assert all(len(tokens) == length for tokens in cut)
        assert len(cut) / SPLITS["train"] == manifest.splits["train"].statistics[name]["truncated"] > 0


def test_the_statistics_are_those_of_the_tokens_before_they_are_cut(prepared):
    directory, manifest = prepared
    vocabulary = Vocabulary.load(directory)
    for split in SPLITS:
        for name, length in LENGTHS.items():
            counts = np.asarray([len(vocabulary.encode(getattr(e, name))) + 1 for e in texts(split)])
            expected = {"mean": counts.mean(), "max": counts.max(), "truncated": (counts > length).mean()}
            expected |= {f"p{q}": np.percentile(counts, q) for q in (50, 90, 99)}
            assert manifest.splits[split].statistics[name] == expected


def test_shards_and_the_rest_of_the_manifest(prepared):
    directory, manifest = prepared
    assert [shard.records for shard in manifest.splits["train"].shards] == [16, 16, 8]
    assert [shard.name for shard in manifest.splits["train"].shards] == [f"train-0000{i}.arrayrecord" for i in range(3)]
    for split in SPLITS:
        manifest.verify(directory, split, contents=True)
    assert Manifest.load(directory) == manifest
    assert (manifest.task, manifest.lengths, manifest.packed, manifest.vocabulary_size) == (
        "prepare_toy",
        LENGTHS,
        False,
        45,
    )
    assert manifest.vocabulary_fingerprint == Vocabulary.load(directory).fingerprint
    names = {shard.name for split in manifest.splits.values() for shard in split.shards}
    assert {path.name for path in directory.iterdir()} == names | {FILE_NAME, "vocabulary.model"}


def test_the_fingerprint_is_of_all_that_matters(prepared, tmp_path):
    directory, manifest = prepared
    model = str(directory / "vocabulary.model")

    def changed_text(split):
        return [*texts(split)[:-1], TextExample("the quick dog", "dog")] if split == "test" else texts(split)

    same = materialise(REQUEST, tmp_path / "same")
    assert same == manifest
    given = materialise(dataclasses.replace(REQUEST, vocabulary=model), tmp_path / "given")
    assert given.fingerprint == manifest.fingerprint
    changes = {
        "edition": {"task": Toy(edition=2)},
        "text": {"task": Toy(source=changed_text)},
        "lengths": {"lengths": {"inputs": 25, "targets": 8}},
        "vocabulary": {"vocabulary_size": 44},
        "packing": {"pack": True},
    }
    prints = {manifest.fingerprint}
    for name, change in changes.items():
        prints.add(materialise(dataclasses.replace(REQUEST, **change), tmp_path / name).fingerprint)
    assert len(prints) == 1 + len(changes)


def test_packing_keeps_every_example_in_fewer_rows(prepared, tmp_path):
    directory, manifest = prepared
    request = dataclasses.replace(REQUEST, pack=True, vocabulary=str(directory / "vocabulary.model"))
    packed = materialise(request, tmp_path / "packed")
    assert packed.packed
    for split in SPLITS:
        rows, plain = read(tmp_path / "packed", packed, split), read(directory, manifest, split)
        assert packed.splits[split].examples == len(plain) > len(rows) == packed.splits[split].records
        assert packed.splits[split].statistics == manifest.splits[split].statistics
        taken_apart = []
        for row in rows:
            assert all(len(row[name]) <= length for name, length in LENGTHS.items())
            parts = [np.split(row[name], row[f"{name}_ends"][:-1]) for name in LENGTHS]
            assert all(row[f"{name}_ends"][-1] == len(row[name]) for name in LENGTHS)
            taken_apart += [tuple(tuple(part.tolist()) for part in pair) for pair in zip(*parts, strict=True)]
        assert sorted(taken_apart) == sorted(tuple(tuple(row[name].tolist()) for name in LENGTHS) for row in plain)


def test_the_same_request_again_changes_nothing(prepared):
    directory, manifest = prepared
    before = {path: path.stat().st_mtime_ns for path in directory.iterdir()}
    assert materialise(REQUEST, directory) == manifest
    assert {path: path.stat().st_mtime_ns for path in directory.iterdir()} == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": Toy(edition=2)}, r"task was .*'edition': 1.*, now .*'edition': 2"),
        ({"lengths": {"inputs": 9, "targets": 8}}, r"lengths was .*'inputs': 24.*, now .*'inputs': 9"),
        ({"pack": True, "vocabulary_size": 9}, r"vocabulary_size was 45, now 9; pack was False, now True"),
    ],
    ids=["fingerprint", "lengths", "two"],
)
def test_another_request_is_refused(prepared, change, message):
    directory, manifest = prepared
    with pytest.raises(ValueError, match=rf"was prepared by another request \({message}.*choose another output_dir"):
        materialise(dataclasses.replace(REQUEST, **change), directory)
    assert Manifest.load(directory) == manifest


def test_damage_is_found_and_named(tmp_path):
    directory = tmp_path / "data"
    manifest = materialise(REQUEST, directory)
    shard = directory / manifest.splits["test"].shards[0].name
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    with pytest.raises(
        ValueError, match=r"test-00000.arrayrecord has \d+ bytes, \d+ were written: prepare the data again"
    ):
        materialise(REQUEST, directory)
    shard.write_bytes(whole)
    other = materialise(dataclasses.replace(REQUEST, vocabulary_size=44), tmp_path / "other")
    Vocabulary.load(tmp_path / "other").save(directory)
    with pytest.raises(ValueError, match="the vocabulary in .* is not the one it was prepared with"):
        materialise(REQUEST, directory)
    assert other.vocabulary_size == 44


def test_only_an_earlier_attempt_is_cleared_away(tmp_path):
    partial = tmp_path / "data.partial"
    partial.mkdir()
    (partial / "thesis.tex").write_text("words")
    with pytest.raises(ValueError, match="data.partial is in the way, and not of an earlier attempt"):
        materialise(REQUEST, tmp_path / "data")
    assert (partial / "thesis.tex").read_text() == "words"
    (partial / "UNFINISHED").touch()
    materialise(REQUEST, tmp_path / "data")
    assert not partial.exists() and not (tmp_path / "data" / "UNFINISHED").exists()


def test_a_directory_with_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("words")
    with pytest.raises(ValueError, match="is not empty and not a prepared data set: choose another output_dir"):
        materialise(REQUEST, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_it_is_there_whole_or_not_at_all(prepared, tmp_path):
    _, manifest = prepared

    def killed(what, count, total):
        if what == "writing validation" and count == 3:
            raise KeyboardInterrupt

    directory = tmp_path / "data"
    directory.mkdir()
    with pytest.raises(KeyboardInterrupt):
        materialise(REQUEST, directory, killed)
    assert list(directory.iterdir()) == []
    assert (tmp_path / "data.partial" / "train-00000.arrayrecord").is_file()
    assert materialise(REQUEST, directory) == manifest
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_progress_is_told(tmp_path):
    told = []
    materialise(REQUEST, tmp_path / "data", lambda *what: told.append(what))
    assert told[:4] == [
        ("reading train", 0, None),
        ("reading validation", 0, None),
        ("reading test", 0, None),
        ("training the vocabulary", 0, None),
    ]
    for split, size in SPLITS.items():
        assert [rest for what, *rest in told if what == f"writing {split}"] == [[n, size] for n in range(1, size + 1)]


def test_a_split_without_examples_is_named(tmp_path):
    task = Toy(source=lambda split: texts(split) if split != "test" else [])
    with pytest.raises(ValueError, match="split 'test' of task 'prepare_toy' has no examples: check its source"):
        materialise(dataclasses.replace(REQUEST, task=task), tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_a_missing_split_is_named(tmp_path):
    with pytest.raises(ValueError, match="task 'prepare_toy' has no split 'dev': it has .*train"):
        materialise(dataclasses.replace(REQUEST, splits=("train", "dev")), tmp_path / "data")


def test_one_example_is_enough_with_a_vocabulary(prepared, tmp_path):
    directory, _ = prepared
    one = Toy(source=lambda split: [TextExample("the quick fox", "fox")])
    request = dataclasses.replace(REQUEST, task=one, splits=("train",))
    manifest = materialise(dataclasses.replace(request, vocabulary=str(directory / "vocabulary.model")), tmp_path / "a")
    assert [row["inputs"][-1] for row in read(tmp_path / "a", manifest, "train")] == [EOS_ID]
    assert manifest.splits["train"].statistics["inputs"]["p99"] == manifest.splits["train"].statistics["inputs"]["mean"]
    with pytest.raises(ValueError, match=r"no vocabulary of 45 tokens can be trained on 2 lines of text: at most \d+"):
        materialise(request, tmp_path / "b")
    assert not (tmp_path / "b.partial").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lengths": {"inputs": 4}}, "expected at least 2 tokens for each of inputs and targets"),
        ({"lengths": {"inputs": 4, "targets": 1}}, "expected at least 2 tokens"),
        ({"lengths": {"inputs": 4, "targets": 4, "extra": 4}}, "expected at least 2 tokens"),
        ({"splits": ()}, "at least one split"),
        ({"vocabulary_size": 3}, "4 tokens in the vocabulary"),
        ({"shard_records": 0}, "1 record in a shard"),
    ],
)
def test_requests_that_make_no_sense_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(REQUEST, **change)


def test_a_request_is_described_as_json(prepared):
    directory, manifest = prepared
    described = dataclasses.replace(REQUEST, vocabulary=str(directory / "vocabulary.model")).describe()
    assert json.loads(json.dumps(described)) == described
    assert described["vocabulary"] == file_digest(directory / "vocabulary.model")
    assert manifest.request == REQUEST.describe()


def test_a_mixture_is_prepared_at_its_rates_until_a_task_ends(tmp_path):
    seqio = import_seqio()
    parts = {name: [TextExample(f"the quick {name} {i}", name) for i in range(20)] for name in ("mixed_a", "mixed_b")}
    for name, examples in parts.items():
        register_text_task(name, lambda split, examples=examples: examples, ("train",))
    if "prepare_mixture" in seqio.MixtureRegistry.names():
        seqio.MixtureRegistry.remove("prepare_mixture")
    seqio.MixtureRegistry.add("prepare_mixture", [("mixed_a", 4), ("mixed_b", 1)])
    request = Request(task=Registered("prepare_mixture"), lengths=LENGTHS, splits=("train",), vocabulary_size=28)
    texts = load_texts(request, "train")
    taken = {name: [text for text in texts if text[1] == name] for name in parts}
    for name, examples in parts.items():
        assert taken[name] == [(e.inputs, e.targets) for e in examples[: len(taken[name])]]
    assert len(taken["mixed_a"]) == 20 > 2 * len(taken["mixed_b"]) > 0
    assert load_texts(request, "train") == texts
    assert materialise(request, tmp_path / "data").splits["train"].examples == len(texts)
