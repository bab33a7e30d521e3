"""Steps in object stores: complete with a manifest alone, on whatever mesh they were saved, whatever interrupts."""

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from object_stores import running

from clp_jax.checkpoints import checkpoints as look_after
from clp_jax.interop.object_store import StoreError, StorePath
from clp_jax.training import array_store, store_steps
from clp_jax.training.checkpoint_items import CheckpointError
from clp_jax.training.checkpoint_manifest import Manifest
from clp_jax.training.checkpoint_steps import (
    complete_steps,
    damaged_steps,
    is_complete,
    numbered_steps,
    remove,
    set_aside,
    unfinished_steps,
)
from clp_jax.training.checkpoint_writer import StepWriter
from clp_jax.training.saved_params import load_params, save_params

RUN = {"step": 6, "position": {}, "description": {"stage": "toy"}, "metrics": {"loss": 0.5}}
TREE = {
    "layer": {"kernel": np.arange(24, dtype=np.float32).reshape(4, 6), "bias": np.float16([1, 2, 3])},
    "half": jax.numpy.arange(5, dtype=jax.numpy.bfloat16) / 3,
    "step": np.int32(7),
    "mask": np.array([True, False]),
    "none": np.zeros((0, 3), np.uint8),
}


@pytest.fixture(params=["gs", "disk"])
def folder(request):
    return StorePath.parse(running(request.param)) / request.node.originalname / "checkpoints"


def write(path, tree=TREE, **settings):
    StepWriter(path, {"params": tree}, RUN | {"step": int(path.name)}, **settings).wait()


def assert_same(found, wanted):
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape and np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_a_tree_comes_back_to_the_bit(folder, monkeypatch):
    monkeypatch.setattr(store_steps, "_CHUNK_BYTES", 32)  # Arrays are cut, at equal parts.
    write(folder / "6")
    assert complete_steps(folder) == [6] and unfinished_steps(folder) == []
    assert_same(array_store.read_to_host(folder / "6" / "params"), TREE)
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), TREE)
    assert_same(array_store.read(folder / "6" / "params", abstract), TREE)
    manifest = Manifest.read(folder / "6")
    found = {folder.relative(file) for file in folder.files()}
    assert found == {f"6/{name}" for name in manifest.files} | {"6/manifest.json"}
    assert sum("/layer.kernel/" in name for name in found) == 5  # Four of six numbers, and .zarray.
    manifest.verify_files(folder / "6")
    assert_same(load_params(folder.parent)[0], TREE)


def test_orbax_reads_what_was_copied_from_a_store(folder, tmp_path):
    import orbax.checkpoint as ocp

    write(folder / "6")
    for file in folder.files():
        path = tmp_path / folder.relative(file)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(file.read_bytes())
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), TREE)
    restored = ocp.PyTreeCheckpointHandler().restore(
        tmp_path / "6" / "params", args=ocp.args.PyTreeRestore(restore_args=as_numpy)
    )
    assert_same(restored, TREE)
    assert_same(load_params(tmp_path / "6")[0], TREE)


def test_shards_of_devices_are_written_and_read_apart(folder):
    mesh = jax.make_mesh((1,), ("data",))
    spread = NamedSharding(mesh, PartitionSpec("data"))
    write(folder / "6", {"w": jax.device_put(TREE["layer"]["kernel"], spread)})
    abstract = {"w": jax.ShapeDtypeStruct((4, 6), np.float32, sharding=spread)}
    found = array_store.read(folder / "6" / "params", abstract)["w"]
    assert found.sharding == spread
    np.testing.assert_array_equal(found, TREE["layer"]["kernel"])


def test_every_object_of_a_step_counts(folder):
    write(folder / "6", {"layer": TREE["layer"]})
    for file in (folder / "6").files():
        data = file.read_bytes()
        for other in (bytes([data[0] ^ 1, *data[1:]]), None):
            file.unlink() if other is None else file.write_bytes(other)
            with pytest.raises(CheckpointError, match="damaged|no complete checkpoint"):
                load_params(folder / "6")
        file.write_bytes(data)
    load_params(folder / "6")


def test_what_was_interrupted_is_no_step(folder):
    write(folder / "3")
    for at in range(1, 40):
        asked = iter(range(at))

        def plug(data, asked=asked, plain=StorePath.write_bytes):
            if next(asked, None) is None:
                raise StoreError("the store is gone")
            return plain

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(StorePath, "write_bytes", lambda place, data: plug(data)(place, data))
            # What is half written stays, as it does where the process ends.
            patch.setattr(store_steps, "remove", lambda path: None)
            try:
                write(folder / "6")
            except StoreError:
                assert complete_steps(folder) == [3] and unfinished_steps(folder) in ([], ["6.unfinished"])
                assert numbered_steps(folder) == [3]
                continue
        break
    assert complete_steps(folder) == [3, 6] and at == 18  # 17 objects, marks included.
    assert_same(load_params(folder.parent)[0], TREE)


def test_removing_begins_with_the_manifest_and_is_finished_later(folder, monkeypatch):
    write(folder / "6")
    with monkeypatch.context() as patch:
        patch.setattr(StorePath, "rmtree", lambda place: (_ for _ in ()).throw(StoreError("gone")))
        with pytest.raises(StoreError):
            remove(folder / "6")
    assert not is_complete(folder / "6") and complete_steps(folder) == numbered_steps(folder) == []
    assert unfinished_steps(folder) == ["6.removing"]
    remove(folder / "6.removing")
    assert folder.files() == []


def test_a_damaged_step_stays_until_it_is_made_again(folder):
    write(folder / "6")
    before = folder.files()
    assert set_aside(folder / "6", "a byte") == folder / "6"
    assert damaged_steps(folder) == {"6.damaged": "a byte"} and complete_steps(folder) == numbered_steps(folder) == []
    assert set(before) < set(folder.files())
    write(folder / "6")
    assert complete_steps(folder) == [6] and damaged_steps(folder) == {} and folder.files() == before


def test_a_start_that_lost_the_run_touches_nothing(folder):
    write(folder / "6")
    before = folder.files()

    def lost():
        raise StoreError("another start owns it")

    for step in ("6", "9"):
        with pytest.raises(StoreError, match="another start owns it"):
            write(folder / step, check=lost)
    asked = iter([None])
    with pytest.raises(StoreError, match="another start owns it"):  # It is lost while the step is written.
        write(folder / "9", check=lambda: next(asked, 0) is None or lost())
    assert complete_steps(folder) == [6] and set(before) < set(folder.files())
    assert unfinished_steps(folder) == ["9.unfinished"]  # The new owner may be writing it.


def test_parameters_are_saved_once(folder):
    place = folder.parent / "reference"
    (folder.parent / "reference.unfinished").write_text("of a process that died")
    (place / "params" / "old").write_text("half")
    save_params(place, TREE, {"stage": "toy"})
    before = [(file, file.read_bytes()) for file in place.files()]
    save_params(place, TREE, {"stage": "toy"})
    assert [(file, file.read_bytes()) for file in place.files()] == before
    with pytest.raises(CheckpointError, match="reference holds the parameters of another model"):
        save_params(place, TREE, {"stage": "other"})
    assert_same(load_params(place)[0], TREE)


def test_the_command_looks_after_steps_in_a_store(folder, capsys):
    for step in (3, 6, 9, 12):
        write(folder / str(step))
    set_aside(folder / "9", "a byte")
    (folder / "15.unfinished").write_text("unfinished")
    look_after("list", str(folder.parent))
    said = capsys.readouterr().out
    assert "complete" in said and "15.unfinished" in said and "a byte" in said
    look_after("verify", str(folder.parent))
    look_after("diff", str(folder / "3"), str(folder / "12"))
    assert "6 arrays are the same to the bit, 1 differences" in capsys.readouterr().out  # The step.
    look_after("gc", str(folder.parent), keep_checkpoints=1, dry_run=True)
    assert complete_steps(folder) == [3, 6, 12]
    look_after("gc", str(folder.parent), keep_checkpoints=1)
    said = capsys.readouterr().out
    assert "left 15.unfinished" in said and "removed 6" in said
    assert complete_steps(folder) == [12] and damaged_steps(folder) == {"9.damaged": "a byte"}
    look_after("gc", str(folder.parent), keep_checkpoints=1, damaged=True)
    assert damaged_steps(folder) == {} and not (folder / "9").exists()
    file = next(f for f in (folder / "12").files() if f.name == "0.0")
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="1 of 1 checkpoints are damaged: 12"):
        look_after("verify", str(folder.parent))
