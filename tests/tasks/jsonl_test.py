"""JSON lines: from a user's files to batches without writing Python, and every mistake with its file and line."""

import json
import re

import numpy as np
import pytest
from clp_jax.tasks.jsonl import Jsonl, read_jsonl

from clp_jax.data.manifest import Manifest
from clp_jax.data.prepare import load_texts
from clp_jax.data.reader import DataSource, prompt_batch
from clp_jax.data.text_task import TextExample, TextTask
from clp_jax.data.vocabulary import Vocabulary
from clp_jax.main import main
from clp_jax.prepare import prepare

TEXT = "the quick brown fox jumps over a lazy dog while five boxing wizards pack my box with liquid jugs"
WORDS = TEXT.split()
SIZES = {"train": 30, "validation": 4, "test": 3}


def examples(split: str) -> list[dict[str, str]]:
    rng = np.random.default_rng(list(split.encode()))
    return [
        {"inputs": " ".join(rng.choice(WORDS, 8)), "targets": " ".join(rng.choice(WORDS, 3))}
        for _ in range(SIZES[split])
    ]


@pytest.fixture
def files(tmp_path) -> dict[str, str]:
    paths = {split: tmp_path / f"{split}.jsonl" for split in SIZES}
    for split, path in paths.items():
        path.write_text("".join(json.dumps(example) + "\n" for example in examples(split)))
    return {split: str(path) for split, path in paths.items()}


def gin_words(files, output_dir, *more):
    names = {"TRAIN_FILE": files["train"], "VALIDATION_FILE": files["validation"], "TEST_FILE": files["test"]}
    names |= {"DATA_DIR": str(output_dir)}
    bindings = [f"--gin.{name}={value!r}" for name, value in names.items()]
    return ["prepare", "--gin_file=runs/prepare_jsonl.gin", "--vocabulary_size=45", *bindings, *more]


def test_from_gin_to_batches(files, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    output_dir = tmp_path / "data"
    assert main(gin_words(files, output_dir)) == 0
    printed = capsys.readouterr().out
    manifest = Manifest.load(output_dir)
    vocabulary = Vocabulary.load(output_dir)
    for split, size in SIZES.items():
        assert manifest.splits[split].examples == size
        assert re.search(rf"{split}\D+\b{size}\D+\b{size}\D+inputs", printed)
        source = DataSource(output_dir, split, batch_size=size, converter=prompt_batch)
        (batch,) = source.epoch_batches()
        for got, name in ((batch.inputs, "inputs"), (batch.targets, "targets")):
            assert vocabulary.decode_batch(got) == [example[name] for example in examples(split)]
    assert main(gin_words(files, output_dir)) == 0
    assert "is prepared already" in " ".join(capsys.readouterr().out.split())


def test_a_changed_file_is_another_request(files, tmp_path, capsys):
    output_dir = tmp_path / "data"
    assert main(gin_words(files, output_dir)) == 0
    with open(files["test"], "a") as file:
        file.write(json.dumps({"inputs": "a", "targets": "b"}))
    capsys.readouterr()
    assert main(gin_words(files, output_dir)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("clp prepare: error: ") and "was prepared by another request (task was" in line


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "{path} holds no examples: expected one JSON object a line"),
        (b"\n  \n", "{path} holds no examples"),
        (b'{"inputs": "a", "targets": "b"}\n\nnot json\n', "{path}, line 3 is not JSON: Expecting value at column 1."),
        (b'{"inputs": "a", "targets": "b"', "{path}, line 1 is not JSON: Expecting ',' delimiter at column 31."),
        (
            b'{"inputs": "a", "targets": "b"}\n{"inputs": "\xe9"}',
            "{path}, line 2 is not UTF-8 (byte 12): save the file as UTF-8",
        ),
        (b'["a", "b"]', '{path}, line 1 is list: expected an object with "inputs" and "targets".'),
        (b'{"inputs": "a"}', "{path}, line 1 has no 'targets': its names are 'inputs'."),
        (b'{"inputs": "", "targets": "b"}', "{path}, line 1: 'inputs' is '', expected a string that is not empty."),
        (
            b'{"inputs": "a", "targets": "\\ud800"}',
            "{path}, line 1: 'targets' has half a character (a surrogate) at 0.",
        ),
        (b'{"inputs": "a", "targets": 3}', "{path}, line 1: 'targets' is 3, expected a string that is not empty."),
    ],
    ids=["empty", "blank", "json", "cut", "utf8", "list", "missing", "empty_field", "surrogate", "number"],
)
def test_a_mistake_is_one_line_with_file_and_line(files, tmp_path, capfd, content, message):
    with open(files["validation"], "wb") as file:
        file.write(content)
    assert main(gin_words(files, tmp_path / "data")) == 2
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "error" in line]
    assert line.startswith(f"clp prepare: error: {message.format(path=files['validation'])}")
    assert not (tmp_path / "data").exists()


def test_one_line_of_json_is_read(tmp_path):
    path = tmp_path / "one.jsonl"
    path.write_bytes('{"inputs": "ça", "targets": "là", "more": 1}'.encode())
    assert list(read_jsonl(str(path))) == [TextExample("ça", "là")]
    path.write_bytes(b'\r\n{"inputs": "a", "targets": "b"}\r\n\r\n')
    assert list(read_jsonl(str(path))) == [TextExample("a", "b")]
    path.write_bytes(b'\xef\xbb\xbf{"inputs": "a", "targets": "b"}\n')
    assert list(read_jsonl(str(path))) == [TextExample("a", "b")]


def test_missing_files_are_named(files):
    with pytest.raises(ValueError, match=r"JSONL task 'mine': the file .*absent.jsonl of split 'test' does not exist"):
        Jsonl("mine", files | {"test": "absent.jsonl"})
    with pytest.raises(ValueError, match="JSONL task 'mine' has no files"):
        Jsonl("mine", {})


def test_it_is_described_by_its_contents(files):
    task = Jsonl("mine", files)
    assert isinstance(task, TextTask)
    before = task.describe()
    assert before == Jsonl("mine", dict(files)).describe()
    assert before["task"] == "mine" and set(before["files"]) == set(SIZES)
    with open(files["train"], "a") as file:
        file.write("\n")
    assert {split for split in SIZES if task.describe()["files"][split] != before["files"][split]} == {"train"}


def test_documents_longer_than_the_model_are_cut_and_counted(files, tmp_path):
    manifest = prepare(
        task=Jsonl("mine", files),
        output_dir=str(tmp_path / "data"),
        lengths={"inputs": 5, "targets": 32},
        vocabulary_size=45,
    )
    assert manifest.splits["train"].statistics["inputs"]["truncated"] == 1.0
    assert manifest.splits["train"].statistics["targets"]["truncated"] == 0.0
    (batch,) = DataSource(tmp_path / "data", "test", batch_size=3, converter=prompt_batch).epoch_batches()
    assert batch.inputs.shape == (3, 5) and np.all(batch.inputs > 1)


def test_texts_come_back_through_seqio(files):
    from clp_jax.data.prepare import Request

    request = Request(task=Jsonl("mine", files), lengths={"inputs": 9, "targets": 9})
    for split in SIZES:
        assert load_texts(request, split) == [(e["inputs"], e["targets"]) for e in examples(split)]
