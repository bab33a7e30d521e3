"""Manifests: digests against hashlib, arrays of every kind, parts of arrays put together, and round trips."""

import hashlib
import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from clp_jax.training.checkpoint_manifest import (
    ArrayDigest,
    DamagedError,
    FileDigest,
    Manifest,
    digest_arrays,
    file_digest,
    in_parallel,
    leaves_by_path,
    shards_of,
)
from clp_jax.training.checkpoint_steps import as_path

KINDS = ["float32", "bfloat16", "float16", "int8", "uint32", "bool", "float8_e4m3fn"]


def sha(data):
    return hashlib.sha256(data).hexdigest()


def manifest_of(arrays, files=None):
    return Manifest(step=7, processes=1, files=files or {}, arrays={"params": arrays})


@pytest.mark.parametrize("size", [0, 1, (1 << 22) - 1, 1 << 22, (1 << 22) + 1])
def test_files_are_digested_in_blocks(tmp_path, size):
    data = np.random.default_rng(size).bytes(size)
    (tmp_path / "file").write_bytes(data)
    assert file_digest(as_path(tmp_path / "file")) == FileDigest(size, sha(data))
    assert file_digest(as_path(tmp_path / "file"), to_disk=True) == FileDigest(size, sha(data))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(), (0,), (5,), (2, 3), (2, 0, 3)])
def test_arrays_of_every_kind(kind, shape):
    array = jnp.arange(int(np.prod(shape))).reshape(shape).astype(kind)
    ((place, data),) = shards_of(array).items()
    assert place == ",".join(f"0:{n}" for n in shape)
    found = digest_arrays({"a": (array.shape, kind, {place: data})})["a"]
    assert found == ArrayDigest(shape, kind, {place: sha(np.asarray(array).tobytes())})
    assert manifest_of({"a": found}).verify_arrays("params", {"a": array}) == (1, 1)
    if array.size:
        wrong = np.asarray(array).copy()
        wrong.reshape(-1).view(np.uint8)[-1] ^= 1
        with pytest.raises(DamagedError, match="array params/a .* has another SHA-256"):
            manifest_of({"a": found}).verify_arrays("params", {"a": wrong})


def test_arrays_that_are_no_blocks_of_memory():
    array = np.arange(24).reshape(4, 6)[:, ::2].T
    digest = digest_arrays({"a": (array.shape, "int64", shards_of(array))})["a"]
    assert digest.shards == {"0:3,0:4": sha(array.tobytes())}


def test_every_way_to_cut_is_put_together(monkeypatch):
    """Shards as they were saved, from shards as they are held: all pairs of grids of a 4 by 6 array."""
    array = np.arange(24, dtype=np.int32).reshape(4, 6)

    def cut(rows, columns):
        parts = itertools.product(range(0, 4, 4 // rows), range(0, 6, 6 // columns))
        size = (4 // rows, 6 // columns)
        return {f"{i}:{i + size[0]},{j}:{j + size[1]}": array[i : i + size[0], j : j + size[1]] for i, j in parts}

    grids = list(itertools.product((1, 2, 4), (1, 2, 3, 6)))
    for saved, held in itertools.product(grids, grids):
        manifest = manifest_of(digest_arrays({"a": (array.shape, "int32", cut(*saved))}))
        parts = cut(*held)
        monkeypatch.setattr("clp_jax.training.checkpoint_manifest.shards_of", lambda *_, parts=parts, **__: parts)
        count = saved[0] * saved[1]
        assert manifest.verify_arrays("params", {"a": array}) == (count, count)
        first = next(iter(parts))
        parts[first] = parts[first] + 1
        with pytest.raises(DamagedError, match="array params/a"):
            manifest.verify_arrays("params", {"a": array})
        del parts[first]  # Another host holds it: what it belongs to is not checked here.
        checked, there = manifest.verify_arrays("params", {"a": array})
        assert there == count and checked < count


def test_a_manifest_comes_back(tmp_path):
    files = {"params/d/x": FileDigest(3, "0" * 64), "run.json": FileDigest(5, "1" * 64)}
    manifest = manifest_of({"a/b": ArrayDigest((2, 3), "float32", {"0:2,0:3": "2" * 64})}, files)
    manifest.write(as_path(tmp_path))
    assert Manifest.read(as_path(tmp_path)) == manifest and manifest.size == 8


def test_a_manifest_of_a_newer_version_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr("clp_jax.training.checkpoint_manifest._FORMAT", 2)
    manifest_of({}).write(as_path(tmp_path))
    monkeypatch.undo()
    with pytest.raises(DamagedError, match="its format is 2, expected 1: a newer version wrote it"):
        Manifest.read(as_path(tmp_path))


def test_processes_share_the_files(tmp_path):
    names = [f"params/{i}" for i in range(7)]
    (tmp_path / "params").mkdir()
    for name in names:
        (tmp_path / name).write_text(name)
    manifest = manifest_of({}, {name: FileDigest(len(name), sha(name.encode())) for name in names})
    (tmp_path / "params/3").write_text("params/4")
    found = []
    for process in range(3):
        try:
            manifest.verify_files(as_path(tmp_path), share=slice(process, None, 3))
        except DamagedError as error:
            found.append((process, str(error)))
    assert found == [(0, "params/3 has another SHA-256 than what was written")]
    manifest.verify_files(as_path(tmp_path), ["ema"])
    with pytest.raises(DamagedError, match="params/3"):
        manifest.verify_files(as_path(tmp_path), ["params"])


def test_the_first_error_in_order_is_raised():
    def check(i):
        if i in (3, 5):
            raise DamagedError(str(i))
        return i

    with pytest.raises(DamagedError, match="3"):
        in_parallel(check, range(8))
    assert in_parallel(check, range(3)) == [0, 1, 2]


def test_leaves_are_named_by_their_paths():
    assert leaves_by_path({"b": {"c": 1, "a": 2}, "a": {"1|count": 3}, "empty": {}}) == {
        "a/1|count": 3,
        "b/a": 2,
        "b/c": 1,
    }
