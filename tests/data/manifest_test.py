"""The manifest: stored and read back whole, and refused when it or a file is not what was written."""

import dataclasses
import json

import pytest

from clp_jax.data.manifest import FILE_NAME, Manifest, Shard, Split, file_digest

CONTENTS = {"train-00000.arrayrecord": b"one", "train-00001.arrayrecord": b"four"}


@pytest.fixture
def manifest(tmp_path) -> Manifest:
    shards = []
    for name, content in CONTENTS.items():
        (tmp_path / name).write_bytes(content)
        shards.append(Shard(name, 2, len(content), file_digest(tmp_path / name)))
    statistics = {"inputs": {"mean": 1 / 3, "max": 7.0}}
    splits = {"train": Split(5, 4, tuple(shards), statistics), "test": Split(0, 0, (), {})}
    made = Manifest("toy", {"inputs": 8, "targets": 4}, True, 40, "aa", {"pack": True}, "bb", splits)
    made.save(tmp_path)
    return made


def test_it_comes_back_as_it_was(manifest, tmp_path):
    assert Manifest.load(tmp_path) == Manifest.load(str(tmp_path)) == manifest


def test_whole_files_pass(manifest, tmp_path):
    for split in ("train", "test"):
        manifest.verify(tmp_path, split, contents=True)


def test_a_digest_is_sha_256(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert file_digest(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_what_is_wrong_with_a_file_names_it(manifest, tmp_path):
    path = tmp_path / "train-00001.arrayrecord"
    path.write_bytes(b"fou")
    with pytest.raises(ValueError, match=r"shard .*train-00001.arrayrecord has 3 bytes, 4 were written: prepare"):
        manifest.verify(tmp_path, "train")
    path.write_bytes(b"five")
    manifest.verify(tmp_path, "train")
    with pytest.raises(ValueError, match=r"shard .*train-00001.arrayrecord has other contents than were written"):
        manifest.verify(tmp_path, "train", contents=True)
    path.unlink()
    with pytest.raises(ValueError, match=r"shard .*train-00001.arrayrecord is missing: prepare"):
        manifest.verify(tmp_path, "train")
    with pytest.raises(ValueError, match=r"has no split 'dev': it has train, test"):
        manifest.verify(tmp_path, "dev")


def test_a_directory_without_one_is_not_prepared(tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a prepared data set .*run `clp prepare` first"):
        Manifest.load(tmp_path)


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: "[]",
        lambda text: text.replace('"version": 1', '"version": 2'),
        lambda text: text.replace('"version": 1,', ""),
        lambda text: text.replace('"packed"', '"pakced"'),
        lambda text: text.replace('"sha256"', '"md5"'),
        lambda text: json.dumps(json.loads(text) | {"splits": None}),
    ],
    ids=["cut", "empty", "list", "version", "no_version", "field", "shard_field", "splits"],
)
def test_a_damaged_one_is_named(manifest, tmp_path, damage):
    path = tmp_path / FILE_NAME
    path.write_text(damage(path.read_text()))
    with pytest.raises(ValueError, match=r"manifest.json can't be read .*prepare the data again"):
        Manifest.load(tmp_path)


def test_it_is_frozen(manifest):
    with pytest.raises(dataclasses.FrozenInstanceError):
        manifest.fingerprint = "c"
