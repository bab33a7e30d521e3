"""Places in stores, over HTTP and through fsspec: names, objects, lists, and what is said where there is no bucket."""

import os
from pathlib import Path

import numpy as np
import pytest
from object_stores import SCHEMES, Disk, running

from clp_jax.interop import orbax_item
from clp_jax.interop.arrays import ArraySpec
from clp_jax.interop.object_store import StoreError, StorePath, is_address


@pytest.fixture(scope="module", params=[*SCHEMES, "memory"])
def store(request):
    return StorePath.parse("memory://bucket" if request.param == "memory" else running(request.param)) / "names"


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
        ("abfs://b/x", True),
        ("memory:/b/x", True),
        ("nobodys://b/x", False),
        ("file:///b/x", False),
        ("https://b/x", False),
        ("simplecache::memory://b/x", False),
    ):
        assert is_address(text) == is_one
    assert StorePath.parse("gcs://bucket/x") == StorePath("gs", "bucket", "x")  # As fsspec calls it.
    for text in ("runs/1", "nobodys://b/x"):
        with pytest.raises(StoreError, match=f"'{text}' is no place in a store: expected gs://BUCKET/NAME"):
            StorePath.parse(text)


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
    both = ("6",) if store.has_kvstore else ()  # Elsewhere a file is no folder.
    for name in ("6/x", "6/y/z", "60/x", "6.unfinished", *both):
        (store / "list" / name).write_text(name)
    place = store / "list"
    assert [place.relative(file) for file in place.files()] == [*both, "6.unfinished", "6/x", "6/y/z", "60/x"]
    assert sorted(entry.name for entry in place.iterdir()) == ["6", "6.unfinished", "60"]
    (place / "6").rmtree()
    assert [place.relative(file) for file in place.files()] == [*both, "6.unfinished", "60/x"]


def test_a_missing_bucket_is_named(store):
    if not store.has_kvstore:
        pytest.skip("its buckets are folders, which are made where they are missing")
    place = StorePath(store.scheme, "nobody-has-it", "run")
    with pytest.raises(StoreError, match=rf"there is no bucket {store.scheme}://nobody-has-it. Make it, or correct"):
        (place / "x").write_text("x")


class Gone(Exception):
    """The process has died."""


def test_an_object_is_replaced_whole_whatever_interrupts(monkeypatch):
    """A process dies before each of the things that it does to the file system; the next one goes on."""
    place = StorePath.parse(running("disk")) / "replaced" / "x"
    outcomes = []
    for at in range(20):
        place.write_bytes(b"before" * 100)
        left = iter(range(at))

        def dies(name, plain, left=left):
            def call(*given, **named):
                if next(left, None) is None:
                    if name == "pipe_file":
                        Path(Disk._strip_protocol(given[1])).write_bytes(given[2][:7])
                    raise Gone
                return plain(*given, **named)

            return call

        with monkeypatch.context() as patch:
            for name in ("makedirs", "pipe_file", "mv", "rm_file"):
                patch.setattr(Disk, name, dies(name, getattr(Disk, name)))
            try:
                place.write_bytes(b"after" * 100)
                break
            except StoreError as error:
                if not isinstance(error.__cause__, Gone):
                    raise
        outcomes.append(place.read_bytes())
        assert place.is_file() and place.parent.files() == [place]
    assert outcomes == [b"before" * 100] * 4 + [b"after" * 100] and place.read_bytes() == b"after" * 100
    place.unlink()
    assert not place.parent.exists() and not os.listdir(Disk._strip_protocol(str(place.parent)))


def test_a_process_that_died_leaves_nothing_that_comes_back(monkeypatch):
    place = StorePath.parse(running("disk")) / "removed" / "x"
    place.write_bytes(b"first")
    with monkeypatch.context() as patch:
        patch.setattr(Disk, "rm_file", lambda *_: (_ for _ in ()).throw(Gone()))
        with pytest.raises(StoreError):
            place.write_bytes(b"second")  # Is there; what was before is still beside it.
    for _ in range(2):
        place.unlink()
        assert not place.exists()


def test_what_another_process_writes_is_seen():
    place = StorePath.parse(running("disk")) / "seen"
    assert place.files() == []
    here = Path(Disk._strip_protocol(str(place)))
    here.mkdir()
    (here / "x").write_text("of another")
    assert [file.name for file in place.files()] == ["x"] and (place / "x").read_text() == "of another"


def test_packages_that_are_missing_and_formats_that_are_not_known_are_named(tmp_path):
    with pytest.raises(StoreError, match=r"abfs://box/x: nothing here speaks to abfs:// \(.*[iI]nstall adlfs"):
        StorePath.parse("abfs://box/x").files()
    writer = orbax_item.writer(tmp_path / "item", {"w": ArraySpec((3,), np.dtype(np.float32))})
    writer.write("w", np.arange(3, dtype=np.float32))
    writer.finish()
    place = StorePath.parse("memory://bucket/copied")
    for file in (file for file in (tmp_path / "item").rglob("*") if file.is_file()):
        (place / file.relative_to(tmp_path / "item")).write_bytes(file.read_bytes())
    with pytest.raises(
        StoreError, match="TensorStore alone reads, and it does not know memory://. Copy it to a directory"
    ):
        orbax_item.read(place)
