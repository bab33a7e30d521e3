"""Pieces and parts of arrays in files, against numpy; what writers refuse; directories that appear whole or not at all."""

import io
import itertools

import ml_dtypes
import numpy as np
import pytest

from clp_jax.interop import arrays, regions
from clp_jax.interop.arrays import ArraySpec
from clp_jax.interop.regions import CheckpointFileError

FLOAT = np.dtype(np.float32)
BFLOAT = np.dtype(ml_dtypes.bfloat16)


@pytest.mark.parametrize("shape", [(), (0,), (5,), (3, 4), (3, 0), (2, 3, 4), (1, 1, 6), (2, 1, 3, 2)])
@pytest.mark.parametrize("limit", [1, 2, 7, 12, 1000])
def test_blocks_cover_an_array_once_in_order(shape, limit):
    numbers = np.arange(regions.size_of(shape)).reshape(shape)
    pieces = [numbers[block].reshape(-1) for block in regions.blocks(shape, 1, limit)]
    assert np.concatenate([np.zeros(0, int), *pieces]).tolist() == list(range(numbers.size))
    assert all(0 < piece.size <= limit for piece in pieces)


@pytest.mark.parametrize("dtype", [np.int16, np.float32, np.float64])
def test_every_part_of_an_array_is_read(monkeypatch, dtype):
    """In its own type, and cast into another."""
    stored = np.arange(3 * 4 * 2, dtype=np.int16).reshape(3, 4, 2)
    file = io.BytesIO(b"??" + stored.tobytes() + b"??")
    file.name = "file"
    slices = [[slice(a, b) for a in range(n) for b in range(a, n + 1)] for n in stored.shape]
    for limit in (1, 6, 1000):
        monkeypatch.setattr(regions, "BLOCK_BYTES", limit)
        for region in itertools.product(*slices):
            out = np.full(regions.shape_of(region), -1, dtype)
            file.seek(2)
            regions.read_stored(file, stored.shape, stored.dtype, out, region)
            np.testing.assert_array_equal(out, stored[region])


def test_a_part_goes_into_any_view():
    stored = np.arange(12, dtype=np.float32).reshape(3, 4)
    out = np.zeros((4, 3), np.float32)
    file = io.BytesIO(stored.tobytes())
    file.name = "file"
    regions.read_stored(file, stored.shape, stored.dtype, out.T, regions.whole(stored.shape))
    np.testing.assert_array_equal(out, stored.T)


@pytest.mark.parametrize("limit", [1, 6, 1000])
def test_any_view_is_written_in_c_order_and_rounded_to_even(monkeypatch, limit):
    monkeypatch.setattr(regions, "BLOCK_BYTES", limit)
    array = np.random.default_rng(0).normal(size=(5, 3, 2)).astype(np.float32)
    for view in (array, array.T, array[::2, :, 1], np.array(1.1, np.float32)):
        for dtype in (FLOAT, BFLOAT):
            file = io.BytesIO()
            regions.write_stored(file, view, dtype)
            assert file.getvalue() == view.astype(dtype).tobytes()


def test_slices_are_those_of_numpy():
    array = np.arange(20).reshape(4, 5)
    lazy = arrays.in_memory(array)
    for index in [(), (slice(1, 3),), (slice(-1, None), slice(None, -2)), (slice(3, 1),), (slice(9, 12), slice(1, 2))]:
        np.testing.assert_array_equal(lazy.read(index), array[index])
    lazy.read()[...] = 0
    assert array.any()
    for index in [(slice(0, 4, 2),), (slice(None),) * 3]:
        with pytest.raises(IndexError, match="one slice without step"):
            lazy.read(index)


def test_writers_take_what_they_were_told_of():
    waiting = arrays.Expected({"a": ArraySpec((2,), FLOAT), "b": ArraySpec((), np.dtype(np.int32))})
    for name, array, message in [
        ("c", np.zeros(2, np.float32), "array 'c' is not among the 2"),
        ("a", np.zeros(3, np.float32), r"array 'a' has shape \(3,\): expected \(2,\)"),
        ("a", np.zeros(2, np.int32), "array 'a' is int32: expected float32"),
        ("b", np.zeros((), np.int64), "array 'b' is int64: expected int32"),
    ]:
        with pytest.raises(ValueError, match=message):
            waiting.take(name, array)
    waiting.take("a", np.zeros(2, BFLOAT))
    with pytest.raises(ValueError, match="array 'a' is written a second time"):
        waiting.take("a", np.zeros(2, np.float32))
    with pytest.raises(ValueError, match="1 arrays were not written: b"):
        waiting.finish()
    waiting.take("b", np.zeros((), np.int32))
    waiting.finish()


def test_specs_cast_floats_alone():
    source = {"a": arrays.in_memory(np.zeros(2, np.float32)), "b": arrays.in_memory(np.zeros(2, np.int8))}
    assert arrays.specs_of(source, BFLOAT) == {"a": ((2,), BFLOAT), "b": ((2,), np.dtype(np.int8))}
    assert arrays.specs_of(source)["a"] == source["a"].spec
    assert source["a"].spec.nbytes == 8


def test_a_directory_appears_whole_or_not_at_all(tmp_path):
    directory = tmp_path / "new" / "model"
    with arrays.new_directory(directory) as partial:
        assert not directory.exists()
        (partial / "file").write_text("x")
    assert (directory / "file").read_text() == "x"
    with pytest.raises(KeyError), arrays.new_directory(tmp_path / "failed") as partial:
        (partial / "file").write_text("x")
        raise KeyError
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new"]


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "model").mkdir()
    with (
        pytest.raises(ValueError, match="model exists: nothing is overwritten"),
        arrays.new_directory(tmp_path / "model"),
    ):
        pass
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="link exists"), arrays.new_directory(tmp_path / "link"):
        pass
    with pytest.raises(ValueError, match="late exists"), arrays.new_directory(tmp_path / "late"):
        (tmp_path / "late").mkdir()
    assert not list(tmp_path.glob("*.partial-*"))


def test_a_short_file_is_named(tmp_path):
    (tmp_path / "short").write_bytes(b"12345")
    with (tmp_path / "short").open("rb") as file, pytest.raises(CheckpointFileError, match="short ends 3 bytes early"):
        regions.read_exactly(file, memoryview(bytearray(8)))
