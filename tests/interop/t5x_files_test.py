"""T5X's checkpoints: one state that T5X itself wrote in every form, read, written again and compared file by file.

`tests/fixtures/t5x_nano.tar.xz` is a T5 1.1 of two and two layers after two steps of Adafactor: `legacy`, `legacy_bf16`
(``save_dtype``), `legacy_chunked`, `orbax`, and `mtf` (Mesh TensorFlow's bundle of the same numbers).
"""

import base64
import gzip
import json
import shutil
import tarfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import tensorstore as ts
from flax import serialization

from clp_jax.interop import arrays, mesh_tensorflow, msgpack_files, regions, t5x_files, t5x_legacy, zarr_files
from clp_jax.interop.arrays import ArraySpec

ARCHIVE = Path(__file__).parents[1] / "fixtures" / "t5x_nano.tar.xz"
BFLOAT = np.dtype(ml_dtypes.bfloat16)
EMBEDDING = "token_embedder/embedding"
LEGACY = ("legacy", "legacy_bf16", "legacy_chunked")
FORMS = (*LEGACY, "orbax", "mtf")


@pytest.fixture(scope="module")
def nano(tmp_path_factory):
    """The unpacked checkpoints, which tests leave as they are."""
    directory = tmp_path_factory.mktemp("nano")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(directory, filter="data")
    return directory


@pytest.fixture
def copied(nano, tmp_path):
    """Copies one form to where it can be damaged."""

    def copy(form):
        shutil.copytree(nano / form, tmp_path / form)
        return tmp_path / form / ("" if form == "mtf" else "checkpoint_2")

    return copy


def contents(checkpoint):
    """Everything a checkpoint holds, as bytes."""
    return checkpoint.step, *(
        {name: (array.shape, array.dtype, array.read().tobytes()) for name, array in source.items()}
        for source in (checkpoint.parameters, checkpoint.slots)
    )


def same(found, expected) -> bool:
    return found.dtype == expected.dtype and found.shape == expected.shape and found.tobytes() == expected.tobytes()


def files(directory) -> list[str]:
    return sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())


def reference_legacy(directory):
    """The state as flax and TensorStore read it."""
    tree = serialization.msgpack_restore((directory / "checkpoint").read_bytes())["optimizer"]

    def load(node, path):
        if isinstance(node, dict) and "kvstore" in node:
            spec = {"driver": "zarr", "kvstore": {"driver": "file", "path": f"{directory / node['kvstore']['path']}/"}}
            return {path: np.asarray(ts.open(spec, open=True).result().read().result())}
        if isinstance(node, dict):
            leaves = [load(value, f"{path}/{key}" if path else key) for key, value in node.items()]
            return {key: value for leaf in leaves for key, value in leaf.items()}
        return {path: np.asarray(node)}

    return load(tree, "")


@pytest.mark.parametrize("form", LEGACY)
def test_legacy_is_what_flax_and_tensorstore_read(nano, form):
    checkpoint = t5x_files.read(nano / form)
    reference = reference_legacy(nano / form / "checkpoint_2")
    found = {f"target/{name}": array.read() for name, array in checkpoint.parameters.items()}
    found |= {f"state/param_states/{name}": array.read() for name, array in checkpoint.slots.items()}
    assert reference.pop("state/step") == checkpoint.step == 2
    assert checkpoint.form == "legacy"
    assert found.keys() == reference.keys()
    assert len(checkpoint.parameters) == 52
    assert len(checkpoint.slots) == 4 * 52
    assert all(same(found[name], array) for name, array in reference.items())


def test_all_forms_hold_one_state(nano):
    read = {form: t5x_files.read(nano / form) for form in FORMS}
    state = contents(read["legacy"])
    assert contents(read["legacy_chunked"]) == state
    assert contents(read["orbax"]) == state
    assert read["orbax"].form == "orbax"
    rounded = read["legacy_bf16"].parameters
    for name, array in read["legacy"].parameters.items():
        assert same(rounded[name].read(), array.read().astype(BFLOAT)), name
    assert contents(read["legacy_bf16"])[2] == state[2]


def test_mesh_tensorflow_has_the_same_state_under_our_names(nano):
    read, legacy = t5x_files.read(nano / "mtf"), t5x_files.read(nano / "legacy")
    step, parameters, slots = contents(legacy)
    used = {name: slot for name, slot in slots.items() if slot[0] != (1,)}
    assert read.form == "mesh_tensorflow"
    assert contents(read) == (step, parameters, used)
    for path in ("model.ckpt-2", "model.ckpt-2.index", "checkpoint"):
        assert contents(t5x_files.read(nano / "mtf" / path, step=2)) == contents(read)


@pytest.mark.parametrize(
    ("name", "parameter", "slot"),
    [
        ("encoder/block_011/layer_000/SelfAttention/q_slot_vr", "encoder/layers_11/attention/query/kernel", "v_row"),
        ("decoder/block_003/layer_000/SelfAttention/o", "decoder/layers_3/self_attention/out/kernel", None),
        ("decoder/block_003/layer_001/EncDecAttention/k_slot_vc", "decoder/layers_3/encoder_decoder_attention/key/kernel", "v_col"),
        ("encoder/block_000/layer_001/DenseReluDense/wi/kernel", "encoder/layers_0/mlp/wi/kernel", None),
        ("decoder/block_000/layer_002/layer_norm/scale_slot_v", "decoder/layers_0/pre_mlp_layer_norm/scale", "v"),
        ("decoder/block_000/layer_001/rms_norm/scale", "decoder/layers_0/pre_cross_attention_layer_norm/scale", None),
        ("encoder/block_000/layer_000/rms_norm/scale", "encoder/layers_0/pre_attention_layer_norm/scale", None),
        ("decoder/final_layer_norm/scale_slot_m", "decoder/decoder_norm/scale", "m"),
        ("decoder/logits/kernel", "decoder/logits_dense/kernel", None),
        ("decoder/block_001/layer_000/SelfAttention/relative_attention_bias",) * 2 + (None,),
        ("encoder/block_000/layer_000/SelfAttention/r",) * 2 + (None,),
        ("something/else", "something/else", None),
    ],
)  # fmt: skip
def test_names_of_mesh_tensorflow(name, parameter, slot):
    assert mesh_tensorflow.translated(name) == (parameter, slot)


@pytest.mark.parametrize(
    ("source", "fixture", "settings"),
    [
        ("orbax", "legacy", {}),
        ("legacy", "legacy_chunked", {"chunk_bytes": 1024}),
        ("legacy_chunked", "legacy_bf16", {"save_dtype": BFLOAT}),
        ("legacy_bf16", "legacy_bf16", {}),
        # Mesh TensorFlow keeps no slots that are unused: they are made.
        ("mtf", "legacy", {}),
    ],
)
def test_legacy_is_written_file_by_file_as_t5x_does(nano, tmp_path, source, fixture, settings):
    written = t5x_files.write(t5x_files.read(nano / source), tmp_path, **settings)
    expected = nano / fixture / "checkpoint_2"
    assert written == tmp_path / "checkpoint_2"
    assert files(written) == files(expected)
    for name in files(expected):
        unpack = gzip.decompress if Path(name).name[0].isdigit() else bytes
        assert unpack((written / name).read_bytes()) == unpack((expected / name).read_bytes()), name


def stored(item) -> dict[str, bytes]:
    """Keys and values of an OCDBT store."""
    store = ts.KvStore.open({"driver": "ocdbt", "base": {"driver": "file", "path": f"{item}/"}}).result()
    return {key.decode(): store.read(key).result().value for key in store.list().result()}


@pytest.fixture(scope="module")
def written_orbax(nano, tmp_path_factory):
    return t5x_files.write(t5x_files.read(nano / "legacy_chunked"), tmp_path_factory.mktemp("orbax"), form="orbax")


def test_orbax_is_written_as_t5x_does(nano, written_orbax):
    expected = nano / "orbax" / "checkpoint_2"
    inside = ("state/d/", "state/ocdbt.process_0/")
    outside = [[name for name in files(place) if not name.startswith(inside)] for place in (expected, written_orbax)]
    assert outside[0] == outside[1]
    for name in ("state/_METADATA", "state/array_metadatas/process_0"):
        assert (written_orbax / name).read_text() == (expected / name).read_text()
    shardings = [json.loads((place / "state/_sharding").read_text()) for place in (expected, written_orbax)]
    assert shardings[0].keys() == shardings[1].keys()
    step = base64.b64encode(b"state.step").decode()
    assert shardings[0][step] == shardings[1][step]
    about = [json.loads((place / "_CHECKPOINT_METADATA").read_text()) for place in (expected, written_orbax)]
    assert {**about[0], **{key: value for key, value in about[1].items() if "timestamp" in key}} == about[1]
    assert (written_orbax / "commit_success.txt").read_text().endswith(str(written_orbax))
    assert stored(written_orbax / "state") == stored(expected / "state")


# Orbax says so of every array whose place is not given.
@pytest.mark.filterwarnings("ignore:Sharding info not provided when restoring")
def test_orbax_restores_what_is_written(nano, written_orbax):
    import jax
    import orbax.checkpoint as ocp

    expected = ocp.PyTreeCheckpointer().restore(nano / "orbax" / "checkpoint_2" / "state")
    with ocp.StandardCheckpointer() as standard:
        for restored in (
            ocp.PyTreeCheckpointer().restore(written_orbax / "state"),
            standard.restore(written_orbax / "state"),
        ):
            assert jax.tree.structure(restored) == jax.tree.structure(expected)
            assert restored["state"]["step"] == 2
            for found, array in zip(jax.tree.leaves(restored), jax.tree.leaves(expected), strict=True):
                assert same(np.asarray(found), np.asarray(array))


@pytest.mark.parametrize("form", t5x_files.FORMS)
@pytest.mark.parametrize("source", FORMS)
def test_round_trips_are_exact(nano, tmp_path, source, form):
    first = t5x_files.read(nano / source)
    second = t5x_files.read(t5x_files.write(first, tmp_path, form=form, chunk_bytes=1024))
    step, parameters, slots = contents(first)
    unused = {name: ((1,), np.dtype(np.float32), b"\0" * 4) for name in second.slots}
    assert second.form == form
    assert contents(second) == (step, parameters, unused | slots)


def test_a_checkpoint_without_an_optimizer(nano, tmp_path):
    parameters = t5x_files.read(nano / "legacy").parameters
    with t5x_files.open_writer(tmp_path, 7, arrays.specs_of(parameters)) as writer:
        arrays.copy(parameters, writer)
    read = t5x_files.read(tmp_path)
    assert (read.step, dict(read.slots)) == (7, {})
    tree = serialization.msgpack_restore((tmp_path / "checkpoint_7" / "checkpoint").read_bytes())
    assert tree["optimizer"]["state"] == {"step": 7}


def test_scanned_layers_are_read_in_parts(tmp_path):
    array = np.random.default_rng(0).normal(size=(5, 7, 3)).astype(np.float32)
    spec = {"decoder/decoder/mlp/wi_0/kernel": ArraySpec(array.shape, BFLOAT)}
    for form in t5x_files.FORMS:
        with t5x_files.open_writer(tmp_path / form, 0, spec, form=form, chunk_bytes=8) as writer:
            writer.write(*spec, array)
        (read,) = t5x_files.read(tmp_path / form).parameters.values()
        for index in [
            (),
            (slice(2, 4),),
            (slice(None), slice(3, 4)),
            (slice(1, 5), slice(0, 0)),
            (slice(4, 5), slice(2, 6), slice(1, 3)),
        ]:
            assert same(read.read(index), array.astype(BFLOAT)[index])


@pytest.mark.parametrize("chunks", [(3, 5), (2, 2), (1, 4), (3, 1), (7, 9)])
@pytest.mark.parametrize("limit", [1, 12, 10_000])
def test_zarr_is_tensorstores(tmp_path, monkeypatch, chunks, limit):
    monkeypatch.setattr(regions, "BLOCK_BYTES", limit)
    array = np.arange(15, dtype=np.float32).reshape(3, 5)
    zarr_files.write(tmp_path / "ours", array.T.copy().T, array.dtype, chunks)
    metadata = {"shape": [3, 5], "chunks": chunks, "compressor": {"id": "gzip", "level": 1}}
    kvstore = {"driver": "file", "path": f"{tmp_path / 'theirs'}/"}
    store = ts.open(
        {"driver": "zarr", "kvstore": kvstore, "metadata": metadata, "dtype": "float32"}, create=True
    ).result()
    store.write(array).result()
    assert files(tmp_path / "ours") == files(tmp_path / "theirs")
    for name in files(tmp_path / "ours"):
        unpack = bytes if name == ".zarray" else gzip.decompress
        assert unpack((tmp_path / "ours" / name).read_bytes()) == unpack((tmp_path / "theirs" / name).read_bytes())
    read = zarr_files.read(tmp_path / "theirs")
    assert same(read.read(), array)
    assert same(read.read((slice(1, 3), slice(1, 4))), array[1:3, 1:4])


@pytest.mark.parametrize(
    "settings",
    [
        {"compressor": None},
        {"compressor": {"id": "zlib", "level": 2}},
        {"compressor": {"id": "zstd", "level": 1}},
        {"compressor": {"id": "blosc"}},
        {"order": "F"},
        {"dimension_separator": "/"},
        {"fill_value": 3.0},
        {"fill_value": 3.0, "compressor": {"id": "zstd", "level": 1}},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_zarr_of_other_settings_is_read(tmp_path, settings, dtype):
    array = np.arange(35).reshape(5, 7).astype(np.dtype(getattr(ml_dtypes, dtype, dtype)))
    stored_dtype = {"float32": "<f4"}.get(dtype, dtype)
    metadata = {"shape": [5, 7], "chunks": [2, 3], "dtype": stored_dtype, **settings}
    kvstore = {"driver": "file", "path": f"{tmp_path / 'array'}/"}
    if "fill_value" in settings:
        array[2:4, :3] = 3.0  # TensorStore leaves the chunk out.
    ts.open({"driver": "zarr", "kvstore": kvstore, "metadata": metadata}, create=True).result().write(array).result()
    assert (tmp_path / "array" / "1.0").exists() == (
        "fill_value" not in settings and "dimension_separator" not in settings
    )
    read = zarr_files.read(tmp_path / "array")
    assert same(read.read(), array)
    assert same(read.read((slice(1, 4), slice(5, 7))), array[1:4, 5:7])


@pytest.mark.parametrize(
    ("shape", "limit", "chunks"),
    [((), 1, ()), ((64, 16), 256, (16, 16)), ((16, 32), 256, (16, 16)), ((2, 32), 256, (2, 32)), ((9, 7), 20, (3, 1)), ((0, 4), 1, (1, 1)), ((49999, 4), 16384, (3125, 4)), ((49999,), 1, (1,))],
)  # fmt: skip
def test_chunks_divide_the_largest_size_first(shape, limit, chunks):
    assert zarr_files.chunk_shape(shape, 1, limit) == chunks


def write_tree(directory, tree):
    directory.mkdir(exist_ok=True)
    (directory / "checkpoint").write_bytes(serialization.msgpack_serialize(tree))
    return directory


def small_state(weights):
    return {
        "target": {"w": weights},
        "state": {"step": np.int32(3), "param_states": {"w": {"v": np.ones(2, np.float32)}}},
    }


@pytest.mark.parametrize("versioned", [True, False])
def test_every_array_may_be_inline(tmp_path, versioned):
    weights = np.arange(6).reshape(2, 3).astype(BFLOAT)
    state = small_state({"x": weights, "none": None, "empty": {}, "flag": np.array([True])})
    state["flax_mutables"] = {"stats": {"mean": np.zeros(3)}}
    directory = tmp_path / "checkpoint_3"
    write_tree(directory, {"version": 3, "optimizer": state} if versioned else state)
    for path in (directory, directory / "checkpoint", tmp_path):
        read = t5x_files.read(path)
        assert read.step == 3
        assert set(read.parameters) == {"w/x", "w/flag"}
        assert same(read.parameters["w/x"].read(), weights)
        assert same(read.parameters["w/x"].read((slice(1, 2), slice(1, 3))), weights[1:, 1:])
        assert same(read.slots["w/v"].read(), np.ones(2, np.float32))
        assert same(read.mutables["stats/mean"].read(), np.zeros(3))


def test_arrays_in_pieces_are_joined(tmp_path, monkeypatch):
    monkeypatch.setattr(serialization, "MAX_CHUNK_SIZE", 20)
    weights = np.arange(35, dtype=np.float32).reshape(5, 7)
    read = t5x_files.read(write_tree(tmp_path, {"version": 3, "optimizer": small_state(weights)}))
    assert b"__msgpack_chunked_array__" in (tmp_path / "checkpoint").read_bytes()
    assert same(read.parameters["w"].read(), weights)
    for limit in (1, 30):
        monkeypatch.setattr(regions, "BLOCK_BYTES", limit)
        assert same(read.parameters["w"].read((slice(1, 4), slice(2, 5))), weights[1:4, 2:5])


def test_packed_trees_are_flaxs():
    tree = {
        "version": 3,
        "a": {"b": np.arange(70000, dtype=np.int16).reshape(2, -1), "c": np.array(2.5)},
        "d": "text" * 20,
    }
    assert msgpack_files.pack(tree) == serialization.msgpack_serialize(tree, in_place=True)
    with pytest.raises(TypeError, match="object .* in a msgpack tree: expected arrays and plain values"):
        msgpack_files.pack({"x": object()})


def test_plain_values_of_msgpack_are_read(tmp_path):
    values = [
        0,
        127,
        128,
        2**16,
        2**32,
        2**63,
        -1,
        -32,
        -33,
        -129,
        -(2**15) - 1,
        -(2**40),
        1.5,
        True,
        False,
        None,
        "x" * 40,
    ]
    tree = {
        "a": values,
        "b": "y" * 300,
        "c": ["z" * 70000, {str(i): i for i in range(40)}],
        "d": list(range(20)),
        "e": {},
    }
    path = tmp_path / "file"
    path.write_bytes(serialization.msgpack_serialize(tree))
    assert msgpack_files.read(path) == tree


@pytest.mark.parametrize(
    ("kvstore", "top"),
    [
        ({"driver": "gcs", "bucket": "t5-data", "path": "pretrained/t5x/target.w/"}, {}),
        ({"driver": "gfile", "path": "/cns/somewhere/checkpoint_3/target.w"}, {}),
        ({"driver": "file", "path": "../../elsewhere/target.w"}, {}),
        ({"driver": "gcs", "bucket": "t5-data"}, {"path": "target.w"}),
    ],
    ids=["gcs", "gfile", "file", "top"],
)
@pytest.mark.parametrize("version", [2, 3])
def test_arrays_are_beside_the_file_wherever_they_were(tmp_path, kvstore, top, version):
    weights = np.arange(6).reshape(2, 3).astype(BFLOAT)
    # Before version 3, bfloat16 was stored as words of 16 bits.
    words = weights.view(np.uint16) if version == 2 else weights
    metadata = {"shape": [2, 3], "chunks": [1, 3], "compressor": {"id": "gzip"}}
    spec = {"driver": "zarr", "dtype": str(words.dtype), "kvstore": kvstore, "metadata": metadata, **top}
    directory = write_tree(tmp_path / "checkpoint_3", {"version": version, "optimizer": small_state(spec)})
    zarr_files.write(directory / "target.w", words, words.dtype, (1, 3))
    path = directory / "target.w" / ".zarray"
    described = json.loads(path.read_text())
    del described["dimension_separator"]
    path.write_text(json.dumps(described))
    read = t5x_files.read(directory).parameters["w"]
    assert same(read.read(), weights)
    assert same(read.read((slice(0, 2), slice(2, 3))), weights[:, 2:])


def test_numbers_of_version_3_stay_what_they_are(tmp_path):
    zarr_files.write(tmp_path / "target.w", np.arange(3, dtype=np.uint16), np.dtype(np.uint16), (3,))
    spec = {"driver": "zarr", "kvstore": {"path": "target.w/"}, "metadata": {"shape": [3]}}
    write_tree(tmp_path, {"version": 3, "optimizer": small_state(spec)})
    assert t5x_files.read(tmp_path).parameters["w"].dtype == np.uint16


@pytest.mark.parametrize("inside", ["", "state"])
@pytest.mark.parametrize("in_store", [False, True])
def test_the_form_with_placeholders(tmp_path, inside, in_store):
    weights = np.arange(6, dtype=np.float32).reshape(2, 3)
    state = small_state("PLACEHOLDER://target.w")
    directory = tmp_path / "checkpoint_3" / inside
    directory.mkdir(parents=True)
    write_tree(directory, state)
    metadata = {"shape": [2, 3], "chunks": [2, 3], "compressor": {"id": "zstd", "level": 1}}
    kvstore = {"driver": "file", "path": f"{directory / 'target.w'}/"}
    if in_store:
        kvstore = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{directory}/"}, "path": "target.w/"}
        (directory / "_METADATA").write_text("{}")
    ts.open(
        {"driver": "zarr", "kvstore": kvstore, "metadata": metadata, "dtype": "float32"}, create=True
    ).result().write(weights).result()
    read = t5x_files.read(tmp_path)
    assert (read.form, read.step) == ("placeholder", 3)
    assert same(read.parameters["w"].read(), weights)


@pytest.mark.parametrize(
    "settings", [{"use_ocdbt": False}, {"use_zarr3": True}, {"use_ocdbt": False, "use_zarr3": True}], ids=str
)
def test_orbax_in_other_settings(tmp_path, settings):
    import orbax.checkpoint as ocp

    weights = np.arange(6, dtype=np.float32).reshape(2, 3)
    tree = {
        "target": {"w": weights, "none": None},
        "state": {"step": np.array(3), "param_states": {"w": {"v": weights[0]}}},
    }
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(**settings)) as checkpointer:
        checkpointer.save(tmp_path / "checkpoint_3", tree)
    read = t5x_files.read(tmp_path)
    assert (read.step, set(read.parameters), set(read.slots)) == (3, {"w"}, {"w/v"})
    assert same(read.parameters["w"].read(), weights)
    assert same(read.slots["w/v"].read((slice(1, 3),)), weights[0, 1:])
    assert t5x_legacy.CHUNK_BYTES == 64 * 2**20
