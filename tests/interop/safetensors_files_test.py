"""Safetensors against the library that defines them, to the byte; and files that are damaged, or are pickles."""

import json

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from clp_jax.interop import arrays, safetensors_files
from clp_jax.interop.arrays import ArraySpec
from clp_jax.interop.regions import CheckpointFileError
from clp_jax.interop.safetensors_files import INDEX_FILE, SINGLE_FILE

EXTENDED = ("bfloat16", "float8_e4m3fn", "float8_e5m2")
PLAIN = (
    "bool",
    "uint8",
    "int8",
    "int16",
    "uint16",
    "float16",
    "int32",
    "uint32",
    "float32",
    "float64",
    "int64",
    "uint64",
)
DTYPES = {name: np.dtype(getattr(ml_dtypes, name, name)) for name in (*PLAIN, *EXTENDED)}


def some_tensors() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {"b.matrix": (3, 5), "a.vector": (7,), "c.scalar": (), "d.nothing": (0, 3), "ß.cube": (2, 3, 4)}
    return {
        f"{name}.{dtype}": np.asarray(rng.uniform(0, 100, size=shape) // (50 if dtype == "bool" else 1), DTYPES[dtype])
        for name, shape in shapes.items()
        for dtype in DTYPES
    }


def numpy_tensors() -> dict[str, np.ndarray]:
    """Those the library loads into numpy: it only saves floats of 8 bits from there."""
    return {name: array for name, array in some_tensors().items() if "float8" not in name}


def write(directory, tensors, **settings):
    source = {name: arrays.in_memory(array) for name, array in tensors.items()}
    with safetensors_files.open_writer(directory, arrays.specs_of(source), **settings) as writer:
        arrays.copy(source, writer)
    return directory


def same(found, expected) -> bool:
    return found.dtype == expected.dtype and found.shape == expected.shape and found.tobytes() == expected.tobytes()


@pytest.fixture(scope="module")
def library_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("library") / SINGLE_FILE
    safetensors.numpy.save_file(some_tensors(), path, metadata={"format": "pt"})
    return path


def test_what_the_library_wrote_is_read(library_file):
    tensors = some_tensors()
    found = safetensors_files.read(library_file.parent)
    assert set(found) == set(tensors)
    assert all(same(found[name].read(), array) and found[name].shape == array.shape for name, array in tensors.items())
    assert safetensors_files.read(library_file).keys() == found.keys()
    cube = "ß.cube.bfloat16"
    part = (slice(1, 2), slice(None), slice(1, 3))
    assert same(found[cube].read(part), tensors[cube][part])


def test_what_is_rewritten_is_the_same_file(library_file, tmp_path):
    read = safetensors_files.read(library_file)
    backwards = dict(reversed(read.items()))
    with safetensors_files.open_writer(tmp_path / "copy", arrays.specs_of(backwards)) as writer:
        arrays.copy(read, writer)
    assert [path.name for path in (tmp_path / "copy").iterdir()] == [SINGLE_FILE]
    assert (tmp_path / "copy" / SINGLE_FILE).read_bytes() == library_file.read_bytes()


def test_the_library_reads_what_is_written(tmp_path):
    tensors = numpy_tensors()
    path = write(tmp_path / "model", tensors) / SINGLE_FILE
    found = safetensors.numpy.load_file(path)
    assert set(found) == set(tensors)
    assert all(same(found[name], array) for name, array in tensors.items())
    with safetensors.safe_open(path, "numpy") as opened:
        assert opened.metadata() == {"format": "pt"}


def test_torch_reads_what_is_written(tmp_path):
    torch = pytest.importorskip("torch", reason="torch is not installed here")
    from safetensors.torch import load_file

    tensors = {name: array for name, array in some_tensors().items() if "float" in name}
    found = load_file(write(tmp_path / "model", tensors) / SINGLE_FILE)
    for name, array in tensors.items():
        assert tuple(found[name].shape) == array.shape
        assert str(found[name].dtype) == f"torch.{array.dtype}"
        assert found[name].reshape(-1).view(torch.uint8).numpy().tobytes() == array.tobytes()


def test_floats_are_rounded_and_views_written(tmp_path):
    array = np.random.default_rng(1).normal(size=(4, 3)).astype(np.float32)
    specs = {"w": ArraySpec((3, 4), DTYPES["bfloat16"]), "n": ArraySpec((), DTYPES["int64"])}
    with safetensors_files.open_writer(tmp_path / "model", specs) as writer:
        writer.write("n", np.array(3))
        (writer.directory / "config.json").write_text("{}")
        writer.write("w", array.T)
    found = safetensors.numpy.load_file(tmp_path / "model" / SINGLE_FILE)
    assert same(found["w"], array.T.astype(DTYPES["bfloat16"]).copy())
    assert found["n"] == 3
    assert (tmp_path / "model" / "config.json").is_file()


def test_shards_are_filled_in_order():
    specs = {
        name: ArraySpec((size,), DTYPES["uint8"]) for name, size in zip("abcdef", (4, 6, 1, 25, 3, 7), strict=True)
    }
    plan = safetensors_files.plan_shards(specs, 10)
    assert plan == {
        "model-00001-of-00004.safetensors": ["a", "b"],
        "model-00002-of-00004.safetensors": ["c"],
        "model-00003-of-00004.safetensors": ["d"],
        "model-00004-of-00004.safetensors": ["e", "f"],
    }
    assert safetensors_files.plan_shards(specs, 46) == {SINGLE_FILE: list("abcdef")}
    assert safetensors_files.plan_shards({}, 1) == {SINGLE_FILE: []}
    with pytest.raises(ValueError, match="max_shard_bytes is 0: expected at least 1"):
        safetensors_files.plan_shards(specs, 0)


def test_shards_are_the_librarys(tmp_path):
    tensors = numpy_tensors()
    directory = write(tmp_path / "model", tensors, max_shard_bytes=300)
    index = json.loads((directory / INDEX_FILE).read_text("utf-8"))
    assert index["metadata"] == {"total_size": sum(array.nbytes for array in tensors.values())}
    assert set(index["weight_map"]) == set(tensors)
    files = sorted({*index["weight_map"].values()})
    assert len(files) > 3
    assert sorted(path.name for path in directory.iterdir()) == sorted([*files, INDEX_FILE])
    found = {}
    for file in files:
        shard = safetensors.numpy.load_file(directory / file)
        assert set(shard) == {name for name, place in index["weight_map"].items() if place == file}
        assert sum(array.nbytes for array in shard.values()) <= 300
        again = tmp_path / "again"
        safetensors.numpy.save_file(shard, again, metadata={"format": "pt"})
        assert again.read_bytes() == (directory / file).read_bytes()
        found |= shard
    assert all(same(found[name], array) for name, array in tensors.items())
    read = safetensors_files.read(directory)
    assert set(read) == set(tensors)
    assert all(same(read[name].read(), array) for name, array in tensors.items())


def test_what_can_not_be_written_is_refused(tmp_path):
    for specs, message in [
        ({"__metadata__": ArraySpec((), DTYPES["float32"])}, "'__metadata__' can't have this name"),
        ({"x": ArraySpec((), np.dtype(np.complex64))}, "'x' is complex64: safetensors holds uint64"),
    ]:
        with pytest.raises(ValueError, match=message), safetensors_files.open_writer(tmp_path / "model", specs):
            pass
    with (
        pytest.raises(ValueError, match="1 arrays were not written: x"),
        safetensors_files.open_writer(tmp_path / "model", {"x": ArraySpec((), DTYPES["float32"])}),
    ):
        pass
    assert not list(tmp_path.iterdir())
    write(tmp_path / "model", {})
    with pytest.raises(ValueError, match="model exists"):
        write(tmp_path / "model", {})


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "a.pt", "a.pth", "a.ckpt", "a.pkl", "pytorch_model.bin.index.json"]
)
def test_pickles_are_never_opened(tmp_path, name):
    marker = tmp_path / "marker"
    (tmp_path / name).write_bytes(f"cpathlib\nPosixPath.touch\n(cpathlib\nPosixPath\n(S'{marker}'\ntRtR.".encode())
    for path in (tmp_path / name, tmp_path):
        with pytest.raises(CheckpointFileError, match=rf"{name} is a pickle.*safe_serialization=True"):
            safetensors_files.read(path)
    with pytest.raises(CheckpointFileError, match="is a pickle"):
        safetensors_files.read_file(tmp_path / name)
    assert not marker.exists()


def test_one_file_of_any_name_is_found(tmp_path):
    with pytest.raises(FileNotFoundError, match="none does not exist"):
        safetensors_files.read(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="holds 0 safetensors files"):
        safetensors_files.read(tmp_path)
    safetensors.numpy.save_file({"x": np.ones(2)}, tmp_path / "other.safetensors")
    assert set(safetensors_files.read(tmp_path)) == {"x"}
    safetensors.numpy.save_file({"x": np.ones(2)}, tmp_path / "third.safetensors")
    with pytest.raises(FileNotFoundError, match="holds 2 safetensors files and none of model.safetensors"):
        safetensors_files.read(tmp_path)


def test_every_truncation_is_found(tmp_path):
    path = tmp_path / SINGLE_FILE
    safetensors.numpy.save_file({"x": np.arange(3, dtype=np.float32), "y": np.ones(2, np.int8)}, path)
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointFileError, match=str(path)):
            safetensors_files.read(path)
    path.write_bytes(whole + b"?")
    with pytest.raises(CheckpointFileError, match="holds 15 bytes of tensors: its header says 14"):
        safetensors_files.read(path)


def entry(dtype="F32", shape=(2,), offsets=(0, 8), **more):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets), **more}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"x": entry("F4")}, "tensor 'x' is described as .*: expected a dtype among U64"),
        ({"x": entry(["F32"])}, "expected a dtype among"),
        ({"x": entry(shape=(3,))}, "its shape needs 12 bytes"),
        ({"x": entry(shape=(-2,), offsets=(8, 0))}, "sizes of 0 or more and two offsets"),
        ({"x": entry(shape=(2.0,))}, "sizes of 0 or more"),
        ({"x": entry(shape=(True, 2))}, "sizes of 0 or more"),
        ({"x": entry(offsets=(0, 4, 8))}, "two offsets"),
        ({"x": entry(more=1)}, "expected dtype, shape and data_offsets"),
        ({"x": 3}, "expected dtype, shape and data_offsets"),
        ({"x": entry(shape=(2**62, 2**62))}, "its shape needs"),
        ({"x": entry(), "y": entry(shape=(1,), offsets=(4, 8))}, "tensor 'y' is at bytes 4:8 and overlaps"),
        ({"x": entry(shape=(1,), offsets=(4, 8))}, "tensor 'x' is at bytes 4:8 and leaves a hole"),
        ({"x": entry(offsets=(0, 8)), "y": entry(offsets=(8, 16))}, "holds 8 bytes of tensors: its header says 16"),
        (b'{"x":1,"x":2}', "a name is there twice"),
        (b"[]", "it is no object"),
        (b"{", "its JSON can't be read"),
        (b"\xff{}", "its JSON can't be read"),
        (b"[" * 100_000, "its JSON can't be read"),
    ],
)
def test_bad_headers_are_found(tmp_path, header, message):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = tmp_path / SINGLE_FILE
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"\0" * 8)
    with pytest.raises(CheckpointFileError, match=message):
        safetensors_files.read(path)


def test_headers_are_limited(tmp_path, monkeypatch):
    path = tmp_path / SINGLE_FILE
    path.write_bytes((2**63).to_bytes(8, "little") + b"{}")
    with pytest.raises(CheckpointFileError, match=f"said to have {2**63} bytes, and the file has 10"):
        safetensors_files.read(path)
    monkeypatch.setattr(safetensors_files, "_MAX_HEADER_BYTES", 1)
    path.write_bytes((2).to_bytes(8, "little") + b"{}")
    with pytest.raises(CheckpointFileError, match="its header has 2 bytes: expected at most 1"):
        safetensors_files.read(path)


def test_bad_indices_are_found(tmp_path):
    directory = write(tmp_path / "model", {"a": np.ones(4), "b": np.ones(4)}, max_shard_bytes=32)
    path = directory / INDEX_FILE
    first, second = (f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
    for weight_map, error, message in [
        ({"a": second, "b": second}, CheckpointFileError, f"{second} has no 'a': {INDEX_FILE} says it does"),
        ({"a": "third.safetensors"}, FileNotFoundError, "third.safetensors is missing"),
        ({"a": f"../model/{first}"}, CheckpointFileError, "expected a file name without a directory"),
        ({"a": str(directory / first)}, CheckpointFileError, "expected a file name without a directory"),
        ({"a": "pytorch_model.bin"}, FileNotFoundError, "pytorch_model.bin is missing"),
        ({"a": 3}, CheckpointFileError, "has no weight_map"),
        (None, CheckpointFileError, "has no weight_map"),
    ]:
        path.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(error, match=message):
            safetensors_files.read(directory)
    path.write_text("{")
    with pytest.raises(CheckpointFileError, match="its JSON can't be read"):
        safetensors_files.read(path)
