"""Places in both kinds of stores, over HTTP: names, objects, lists, and what is said where there is no bucket."""

from pathlib import Path

import pytest
from object_stores import SCHEMES, running

from clp_jax.interop.object_store import StoreError, StorePath, is_address


@pytest.fixture(scope="module", params=SCHEMES)
def store(request):
    return StorePath.parse(running(request.param)) / "names"


def test_addresses_are_read_and_written():
    place = StorePath.parse("gs://bucket//a/run/")
    assert str(place) == "gs://bucket/a/run" and (place.name, str(place.parent)) == ("run", "gs://bucket/a")
    assert place / "checkpoints/6" == place / "checkpoints" / "6" == StorePath("gs", "bucket", "a/run/checkpoints/6")
    assert place.relative(place / "x" / "y") == "x/y" and StorePath("gs", "bucket").relative(place) == "a/run"
    assert StorePath.parse(Path("s3://bucket/x")) == StorePath("s3", "bucket", "x")  # A path has lost a slash.
    for text, is_one in (
        ("gs://b", True),
        ("gs:/b/x", True),
        ("gs://", False),
        ("/gs/b", False),
        ("hdfs://b/x", False),
    ):
        assert is_address(text) == is_one
    with pytest.raises(StoreError, match="'runs/1' is no place in a store: expected gs://BUCKET/NAME"):
        StorePath.parse("runs/1")


def test_an_object_is_there_whole_or_not_at_all(store):
    place = store / "one" / "with a|name.é"
    assert not place.exists() and not store.exists()
    with pytest.raises(FileNotFoundError, match="with a|name.é does not exist"):
        place.read_bytes()
    for data in (b"first", b"", bytes(range(256))):
        place.write_bytes(data)
        assert place.read_bytes() == place.open().read() == data
    assert place.is_file() and not place.is_dir() and (store / "one").is_dir() and not (store / "one").is_file()
    place.unlink()
    place.unlink()
    assert not store.exists()
    with pytest.raises(FileNotFoundError):
        place.unlink(missing_ok=False)


def test_names_that_begin_alike_are_told_apart(store):
    for name in ("6/x", "6/y/z", "60/x", "6.unfinished", "6"):
        (store / "list" / name).write_text(name)
    place = store / "list"
    assert [place.relative(file) for file in place.files()] == ["6", "6.unfinished", "6/x", "6/y/z", "60/x"]
    assert [entry.name for entry in place.iterdir()] == ["6", "6.unfinished", "60"]
    (place / "6").rmtree()
    assert [place.relative(file) for file in place.files()] == ["6", "6.unfinished", "60/x"]


def test_a_missing_bucket_is_named(store):
    place = StorePath(store.scheme, "nobody-has-it", "run")
    with pytest.raises(StoreError, match=rf"there is no bucket {store.scheme}://nobody-has-it. Make it, or correct"):
        (place / "x").write_text("x")
