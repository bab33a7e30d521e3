"""T5X checkpoints that are damaged, unfinished, incomplete, or not the one asked for: one clear line each, and nothing wrong read."""

import json
import shutil
import tarfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import tensorstore as ts
from flax import serialization

from clp_jax.interop import mesh_tensorflow, t5x_files, t5x_legacy, zarr_files
from clp_jax.interop.arrays import ArraySpec
from clp_jax.interop.regions import CheckpointFileError

ARCHIVE = Path(__file__).parents[1] / "fixtures" / "t5x_nano.tar.xz"
EMBEDDING = "token_embedder/embedding"


@pytest.fixture(scope="module")
def nano(tmp_path_factory):
    directory = tmp_path_factory.mktemp("nano")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(directory, filter="data")
    return directory


@pytest.fixture
def damaged(nano, tmp_path):
    """Copies one form to where it can be damaged."""

    def copy(form):
        shutil.copytree(nano / form, tmp_path / form)
        return tmp_path / form if form == "mtf" else tmp_path / form / "checkpoint_2"

    return copy


def small_legacy(directory, step=3, weights=None, **state):
    """A checkpoint of one array; `weights` may be anything that stands for it."""
    directory.mkdir(parents=True, exist_ok=True)
    weights = np.ones(2, np.float32) if weights is None else weights
    tree = {"version": 3, "optimizer": {"target": {"w": weights}, "state": {"step": np.int32(step)}, **state}}
    (directory / "checkpoint").write_bytes(serialization.msgpack_serialize(tree))
    return directory


def test_the_newest_or_the_step_asked_for(tmp_path):
    for step in (9, 10, 100):
        small_legacy(tmp_path / f"checkpoint_{step}", step)
    (tmp_path / "checkpoint_200.tmp-1234").mkdir()
    (tmp_path / "checkpoint_300.orbax-checkpoint-tmp").mkdir()
    (tmp_path / "train").mkdir()
    assert t5x_files.read(tmp_path).step == 100
    assert t5x_files.read(tmp_path, step=9).step == 9
    assert t5x_files.read(tmp_path / "checkpoint_10", step=10).step == 10
    with pytest.raises(FileNotFoundError, match="holds no step 11: it has 9, 10, 100"):
        t5x_files.read(tmp_path, step=11)
    with pytest.raises(CheckpointFileError, match="checkpoint_10 is of step 10: step 9 was asked for"):
        t5x_files.read(tmp_path / "checkpoint_10", step=9)
    small_legacy(tmp_path / "checkpoint_100", 101)
    assert t5x_files.read(tmp_path).step == 101
    with pytest.raises(CheckpointFileError, match="checkpoint_100 is of step 101: step 100 was asked for"):
        t5x_files.read(tmp_path, step=100)


@pytest.mark.parametrize(
    "suffix", [".tmp-1234", ".orbax-checkpoint-tmp", ".orbax-checkpoint-tmp-12", ".partial-0123abcd"]
)
def test_unfinished_checkpoints(tmp_path, suffix):
    directory = small_legacy(tmp_path / f"checkpoint_3{suffix}")
    with pytest.raises(CheckpointFileError, match=r"checkpoint_3\S* was not finished"):
        t5x_files.read(directory)
    with pytest.raises(FileNotFoundError, match=rf"holds no checkpoint: .* checkpoint_3{suffix} was not finished"):
        t5x_files.read(tmp_path)


@pytest.mark.parametrize("part", ["", "state", "dataset"])
def test_an_orbax_checkpoint_without_its_mark(damaged, part):
    directory = damaged("orbax")
    (directory / part / "commit_success.txt").unlink()
    with pytest.raises(CheckpointFileError, match=r"commit_success.txt is missing: the checkpoint was not finished"):
        t5x_files.read(directory)


def test_where_directories_are_renamed_there_is_no_mark(damaged):
    directory = damaged("orbax")
    for part in ("", "state", "dataset"):
        (directory / part / "commit_success.txt").unlink()
    assert t5x_files.read(directory).step == 2


def test_nothing_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist: expected a directory checkpoint_STEP"):
        t5x_files.read(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="holds no checkpoint: expected directories checkpoint_STEP"):
        t5x_files.read(tmp_path)
    (tmp_path / "checkpoint_3").mkdir()
    with pytest.raises(FileNotFoundError, match="checkpoint_3 holds neither a file 'checkpoint' nor Orbax's"):
        t5x_files.read(tmp_path)


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("state/_METADATA", FileNotFoundError, "_METADATA is missing: it names the arrays"),
        ("state/manifest.ocdbt", FileNotFoundError, "manifest.ocdbt is missing: .*_METADATA says that it is there"),
        ("state/d", FileNotFoundError, "array '.*' is missing, or part of it"),
    ],
)
def test_an_orbax_checkpoint_without_a_part(damaged, name, error, message):
    directory = damaged("orbax")
    path = directory / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(error, match=message):
        t5x_files.read(directory)


def test_an_orbax_store_that_is_damaged(damaged):
    directory = damaged("orbax")
    for path in (directory / "state" / "ocdbt.process_0" / "d").iterdir():
        path.write_bytes(path.read_bytes()[:9])
    array = t5x_files.read(directory).parameters[EMBEDDING]
    with pytest.raises(CheckpointFileError, match=rf"{directory}/state: array 'target/{EMBEDDING}' can't be read"):
        array.read()


def changed(path, change):
    tree = json.loads(path.read_text())
    change(tree)
    path.write_text(json.dumps(tree))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tree: tree.pop("tree_metadata"), "_METADATA does not name arrays: KeyError"),
        (lambda tree: tree.update(tree_metadata=[]), "it is no dictionary with tree_metadata"),
        (lambda tree: tree["tree_metadata"].update(x={}), "does not describe its arrays"),
        (lambda tree: tree["tree_metadata"].update(x=3), "does not describe its arrays"),
        (
            lambda tree: tree["tree_metadata"]["('target', 'token_embedder', 'embedding')"]["value_metadata"].update(write_shape=[3]),
            r"array 'target/token_embedder/embedding' has shape \(64, 16\): _METADATA says that it was written in parts of \(3,\)",
        ),
        (lambda tree: tree["tree_metadata"].pop("('state', 'step')"), "has no step: expected a whole number 'state/step'"),
    ],
)  # fmt: skip
def test_orbax_metadata_that_is_wrong(damaged, change, message):
    directory = damaged("orbax")
    changed(directory / "state" / "_METADATA", change)
    with pytest.raises(CheckpointFileError, match=message):
        t5x_files.read(directory)


def test_folders_and_chunks_that_are_missing(damaged):
    directory = damaged("legacy_chunked")
    (directory / "target.token_embedder.embedding" / "2.0").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"embedding/2.0 is missing: \(64, 16\) in chunks of \(16, 16\) needs it"
    ):
        t5x_files.read(directory)
    shutil.rmtree(directory / "target.token_embedder.embedding")
    with pytest.raises(
        FileNotFoundError, match=r"embedding/.zarray is missing: copy the folder target.token_embedder.embedding"
    ):
        t5x_files.read(directory)


def test_every_truncation_of_a_chunk_is_found(tmp_path):
    array = np.random.default_rng(0).normal(size=(4, 5)).astype(np.float32)
    zarr_files.write(tmp_path / "array", array, array.dtype, (4, 5))
    read = zarr_files.read(tmp_path / "array")
    path = tmp_path / "array" / "0.0"
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointFileError, match=str(path)):
            read.read()
    for at in range(10, len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(CheckpointFileError, match=str(path)):
            read.read()
    zarr_files.write(tmp_path / "longer", np.zeros((5, 5), np.float32), array.dtype, (5, 5))
    path.write_bytes((tmp_path / "longer" / "0.0").read_bytes())
    with pytest.raises(CheckpointFileError, match=r"holds more than a chunk of \(4, 5\)"):
        read.read()


@pytest.mark.parametrize("compressor", ["zlib", "zstd"])
def test_truncations_of_other_chunks_are_found(tmp_path, compressor):
    metadata = {"shape": [50], "chunks": [50], "compressor": {"id": compressor, "level": 1}}
    kvstore = {"driver": "file", "path": f"{tmp_path}/"}
    store = ts.open(
        {"driver": "zarr", "kvstore": kvstore, "metadata": metadata, "dtype": "int32"}, create=True
    ).result()
    store.write(np.arange(50, dtype=np.int32)).result()
    read = zarr_files.read(tmp_path)
    whole = (tmp_path / "0").read_bytes()
    for size in range(0, len(whole), 7):
        (tmp_path / "0").write_bytes(whole[:size])
        with pytest.raises(CheckpointFileError, match=str(tmp_path)):
            read.read()
    (tmp_path / "0").unlink()
    with pytest.raises((FileNotFoundError, CheckpointFileError), match=str(tmp_path)):
        read.read()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda array: array.update(zarr_format=3), "does not describe an array"),
        (lambda array: array.update(chunks=[0]), "does not describe an array"),
        (lambda array: array.update(chunks=[1, 1]), "does not describe an array"),
        (lambda array: array.update(shape=[-1]), "does not describe an array"),
        (lambda array: array.update(shape=3), "does not describe an array"),
        (lambda array: array.pop("dtype"), "does not describe an array"),
        (lambda array: array.update(dimension_separator="../"), "does not describe an array"),
        (lambda array: array.update(dtype=">f4"), r"says dtype '>f4': expected one of bfloat16"),
        (lambda array: array.update(dtype="|O"), r"says dtype '\|O'"),
        (lambda array: array.update(compressor="gzip"), "does not describe an array"),
    ],
)
def test_zarr_metadata_that_is_wrong(tmp_path, change, message):
    zarr_files.write(tmp_path / "array", np.zeros(2, np.float32), np.dtype(np.float32), (2,))
    changed(tmp_path / "array" / ".zarray", change)
    with pytest.raises(CheckpointFileError, match=f"array/.zarray {message}"):
        zarr_files.read(tmp_path / "array")
    (tmp_path / "array" / ".zarray").write_text("{")
    with pytest.raises(CheckpointFileError, match="does not describe an array"):
        zarr_files.read(tmp_path / "array")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"kvstore": {"path": "a/.."}}, "is said to be at 'a/..', which names no folder"),
        ({"kvstore": {"path": "/"}}, "is said to be at '/'"),
        ({"kvstore": {"path": "."}}, "is said to be at '.'"),
        ({"kvstore": {"path": "a\0b"}}, ".* which names no folder"),
        ({"kvstore": {"driver": "gcs"}}, "does not say where it is"),
        ({"kvstore": {"path": 3}}, "does not say where it is"),
        ({"driver": "n5", "kvstore": {"path": "x"}}, "has driver 'n5': expected 'zarr'"),
        ({"kvstore": {"path": "target.w/"}, "metadata": {"shape": [3]}}, r"has shape \(3,\), and its folder \(2,\)"),
    ],
)
def test_specifications_that_are_wrong(tmp_path, spec, message):
    directory = small_legacy(tmp_path / "checkpoint_3", weights={"driver": "zarr", "metadata": {}, **spec})
    zarr_files.write(directory / "target.w", np.zeros(2, np.float32), np.dtype(np.float32), (2,))
    with pytest.raises(CheckpointFileError, match=f"checkpoint: array 'target/w' {message}"):
        t5x_files.read(directory)


def test_a_path_does_not_lead_out(tmp_path):
    zarr_files.write(tmp_path / "target.w", np.zeros(2, np.float32), np.dtype(np.float32), (2,))
    outside = str(tmp_path / "target.w")
    for path in (outside, "../target.w"):
        spec = {"driver": "zarr", "metadata": {}, "kvstore": {"driver": "file", "path": path}}
        directory = small_legacy(tmp_path / "checkpoint_3", weights=spec)
        with pytest.raises(FileNotFoundError, match=r"checkpoint_3/target.w/.zarray is missing"):
            t5x_files.read(directory)
    small_legacy(directory, weights="PLACEHOLDER://..")
    with pytest.raises(CheckpointFileError, match="names no folder"):
        t5x_files.read(directory)


def test_every_truncation_of_the_file_is_found(tmp_path):
    tree = {"w": np.ones(5, np.float32), "x" * 40: "text" * 10, "y": [1.5, 2**40, np.ones(2)], "z": {}}
    directory = small_legacy(tmp_path / "checkpoint_3", weights=tree)
    path = directory / "checkpoint"
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointFileError, match=str(path)):
            t5x_legacy.read(directory)
    path.write_bytes(whole + b"\0")
    with pytest.raises(CheckpointFileError, match="1 bytes follow its end"):
        t5x_files.read(directory)


def test_a_damaged_file_raises_our_errors_alone(tmp_path):
    spec = {"driver": "zarr", "metadata": {"shape": [2]}, "kvstore": {"driver": "file", "path": "target.w/"}}
    directory = small_legacy(tmp_path / "checkpoint_3", weights=spec)
    zarr_files.write(directory / "target.w", np.zeros(2, np.float32), np.dtype(np.float32), (2,))
    path = directory / "checkpoint"
    whole = path.read_bytes()
    messages = []
    for at in range(len(whole)):
        for flip in (0x01, 0x55, 0x80):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ flip]) + whole[at + 1 :])
            try:
                t5x_files.read(directory)
            except (CheckpointFileError, FileNotFoundError) as error:
                messages.append(str(error))
    assert len(messages) > len(whole)
    assert all(str(directory) in message for message in messages)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\xc1", "byte 0 is 0xc1, which begins nothing"),
        (b"\x81\x01\x02", "key 1 before byte 2 is no string"),
        (b"\x82\xa1a\x01\xa1a\x02", "key 'a' before byte 6 is no string, or is there twice"),
        (b"\x91" * 100 + b"\x01", "more than 64 deep"),
        (b"\xdf\xff\xff\xff\xff", "4294967295 more are to follow"),
        (b"\xc7\x00\x05", "extension type before byte 3 is 5"),
        (b"\xa1\xff", "can't decode byte 0xff"),
        (b"\x81\xb9__msgpack_chunked_array__\xc3", "KeyError|'shape'"),
        (b"\x01", "holds a int: expected the state of a T5X training"),
        (b"\x81\xa7version\x09", "has version 9: expected at most 3"),
        (b"\x81\xa9optimizer\x09", "holds no state under 'optimizer'"),
        (b"\x80", "has no parameters below 'target': it holds nothing"),
    ],
)
def test_files_that_are_something_else(tmp_path, data, message):
    (tmp_path / "checkpoint").write_bytes(data)
    with pytest.raises(CheckpointFileError, match=f"{tmp_path}/checkpoint .*({message})"):
        t5x_files.read(tmp_path)


@pytest.mark.parametrize(
    ("shape", "name", "data", "message"),
    [
        ((2,), "float32", b"1234567", r"does not hold what its shape \(2,\) needs"),
        ((-1,), "float32", b"", r"an array's shape is \[-1\]"),
        (2, "float32", b"", "an array's shape is 2"),
        ((2,), "object", b"", "dtype is 'object', which is not known"),
        ((2,), 3, b"", "dtype is '\\?', which is not known"),
        ((0,), "float32", 3, "does not hold what its shape"),
    ],
)
def test_arrays_that_are_wrong(tmp_path, shape, name, data, message):
    import msgpack

    array = msgpack.ExtType(1, msgpack.packb((shape, name, data)))
    (tmp_path / "checkpoint").write_bytes(msgpack.packb({"target": {"w": array}, "state": {"step": 1}}))
    with pytest.raises(CheckpointFileError, match=message):
        t5x_files.read(tmp_path)


def test_a_bundle_without_its_data(damaged):
    directory = damaged("mtf")
    data = directory / "model.ckpt-2.data-00000-of-00001"
    whole = data.read_bytes()
    data.write_bytes(whole[:-1])
    with pytest.raises(
        CheckpointFileError, match=rf"{data.name}: tensor '.*' of shape .* is at bytes .* the file is truncated"
    ):
        t5x_files.read(directory)
    data.unlink()
    with pytest.raises(FileNotFoundError, match=f"{data.name} is missing: model.ckpt-2.index says it holds"):
        t5x_files.read(directory)


def test_a_damaged_index_is_never_read_wrong(damaged):
    directory = damaged("mtf")
    path = directory / "model.ckpt-2.index"
    whole = path.read_bytes()
    specs = {name: array.spec for name, array in mesh_tensorflow.read_bundle(path).items()}
    messages = []
    for at in [*range(0, len(whole) - 60, 97), *range(len(whole) - 60, len(whole), 3)]:
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x10]) + whole[at + 1 :])
        try:
            # The footer has padding, and a part that leads to nothing we read.
            assert {name: array.spec for name, array in mesh_tensorflow.read_bundle(path).items()} == specs
        except CheckpointFileError as error:
            messages.append(str(error))
    assert len(messages) > 40
    assert all(str(path) in message for message in messages)
    for size in range(0, len(whole), 197):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointFileError, match="does not end as a table does"):
            mesh_tensorflow.read_bundle(path)


def test_crc32c_of_the_standard():
    # RFC 3720, B.4.
    assert mesh_tensorflow.crc32c(b"\0" * 32) == 0x8A9136AA
    assert mesh_tensorflow.crc32c(bytes(range(32))) == 0x46DD794E


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"form": "zarr"}, "form is 'zarr': expected one of legacy, orbax"),
        ({"step": -1}, "step is -1: expected 0 or more"),
        ({"save_dtype": np.dtype(np.int8)}, "save_dtype is int8: expected a float"),
        ({"chunk_bytes": 0}, "chunk_bytes is 0: expected at least 1"),
        ({"slots": {"x/v": ArraySpec((1,), np.dtype(np.float32))}}, "1 slots are of no parameter: x/v"),
        ({}, "1 arrays were not written: target/w"),
        (
            {"parameters": {name: ArraySpec((), np.dtype(np.float32)) for name in ("w", "w/x")}},
            "'target/w/x' is inside of another",
        ),
    ],
)
@pytest.mark.parametrize("form", t5x_files.FORMS)
def test_what_can_not_be_written(tmp_path, form, settings, message):
    settings = {"step": 1, "parameters": {"w": ArraySpec((2,), np.dtype(ml_dtypes.bfloat16))}, "form": form} | settings
    with pytest.raises(ValueError, match=message), t5x_files.open_writer(tmp_path, **settings):
        pass
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_is_not_overwritten(nano):
    files = {path: path.stat().st_mtime_ns for path in (nano / "legacy").rglob("*")}
    checkpoint = t5x_files.read(nano / "legacy")
    with pytest.raises(ValueError, match="checkpoint_2 exists: nothing is overwritten"):
        t5x_files.write(checkpoint, nano / "legacy")
    assert {path: path.stat().st_mtime_ns for path in (nano / "legacy").rglob("*")} == files
