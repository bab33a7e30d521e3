"""Checkpoints: exact round trips, retention, refusals, damage, and writes that fail."""

import dataclasses
import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from failing_disks import no_file_longer_than

from clp_jax.training.checkpoint_items import CheckpointError
from clp_jax.training.checkpoint_steps import KeepBest, Retention
from clp_jax.training.checkpoints import Checkpoints
from clp_jax.training.learner import Learner
from clp_jax.training.optimizers import Adafactor, AdamW
from clp_jax.training.saved_params import find_checkpoint, load_params, save_params

DESCRIPTION = {"stage": "toy", "model": {"type": "Toy", "sizes": [1, 2], "rate": 0.1}}
BATCH = {"x": np.ones((2, 3), np.float32)}


def toy_loss(params, frozen, batch, key):
    y = batch["x"] @ params["layer"]["kernel"] + params["bias"][None]
    return jnp.sum(y**2), jnp.float32(2), {}


def toy_params(width=4):
    return {
        "layer": {"kernel": jnp.arange(3 * width, dtype=jnp.float32).reshape(3, width) / 7, "unused": {}},
        "bias": jnp.ones((width,), jnp.bfloat16),
    }


def learner(optimizer=Adafactor(0.1), **settings):
    return Learner(toy_loss, optimizer, **settings)


def after_steps(n, **settings):
    made = learner(**settings)
    state = made.init_state(toy_params(), seed=5)
    for _ in range(n):
        state, _ = made.update(state, {}, BATCH)
    return made, state


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x, np.float32), np.asarray(y, np.float32))


def save(directory, step, state, metrics=None):
    with Checkpoints(directory) as checkpoints:
        checkpoints.save(step, state, {"examples": 17}, DESCRIPTION, {})


@pytest.mark.parametrize("optimizer", [Adafactor(0.1), AdamW(0.1, weight_decay=0.1)])
@pytest.mark.parametrize("ema_decay", [None, 0.9])
def test_a_state_comes_back_to_the_bit(tmp_path, optimizer, ema_decay):
    made, state = after_steps(2, optimizer=optimizer, ema_decay=ema_decay)
    save(tmp_path / "checkpoints", 2, state)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        restored, position = checkpoints.restore(made.abstract_state(toy_params()))
    assert_same(restored, state)
    assert position == {"examples": 17}
    for path in (tmp_path, tmp_path / "checkpoints", tmp_path / "checkpoints" / "2"):
        params, description, step = load_params(path)
        assert_same(params, state.averaged_params)
        assert description == DESCRIPTION and step == 2
    assert_same(load_params(tmp_path, average=False)[0], state.params)


def test_a_saved_state_may_be_donated_at_once(tmp_path):
    made, state = after_steps(1)
    before = jax.tree.map(np.array, state.params)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {}, DESCRIPTION, {})
        for _ in range(20):
            state, _ = made.update(state, {}, BATCH)
    assert_same(load_params(tmp_path)[0], before)


def test_the_last_and_the_best_are_kept(tmp_path):
    _, state = after_steps(0)
    with Checkpoints(tmp_path, Retention(2, best=KeepBest("evaluation/loss"))) as checkpoints:
        for step, loss in enumerate([3.0, 1.0, 2.0, None, 4.0, 5.0], 1):
            metrics = {} if loss is None else {"evaluation/loss": loss}
            checkpoints.save(step, state, {}, DESCRIPTION, metrics)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["2", "5", "6"]
    with Checkpoints(tmp_path, Retention(1, best=KeepBest("evaluation/loss"))) as checkpoints:
        assert checkpoints.latest_step() == 6
        checkpoints.save(7, state, {}, DESCRIPTION, {})
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["2", "7"]


def test_without_best_only_the_last_are_kept(tmp_path):
    _, state = after_steps(0)
    with Checkpoints(tmp_path, Retention(1)) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, state, {}, DESCRIPTION, {"evaluation/loss": 1.0})
    assert [entry.name for entry in tmp_path.iterdir()] == ["3"]


def test_an_interrupted_save_is_not_a_checkpoint(tmp_path):
    _, state = after_steps(1)
    save(tmp_path / "checkpoints", 1, state)
    half = tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp"
    (half / "params").mkdir(parents=True)
    assert load_params(tmp_path)[2] == 1
    (tmp_path / "checkpoints" / "3" / "params").mkdir(parents=True)  # No Orbax: somebody deleted half of it.
    assert load_params(tmp_path)[2] == 1
    with pytest.raises(CheckpointError, match="no complete checkpoint at .*: 2.orbax-checkpoint-tmp was not finished"):
        load_params(half)
    with pytest.raises(CheckpointError, match="no complete checkpoint at .*/3: 3 was not finished"):
        load_params(tmp_path / "checkpoints" / "3")


def test_no_checkpoint_is_said_clearly(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint at .*/nowhere: it does not exist. Give a run directory"):
        load_params(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="the directory is empty"):
        load_params(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="it is a file"):
        load_params(tmp_path / "file")
    with pytest.raises(CheckpointError, match="it holds none"):
        find_checkpoint(tmp_path)


def test_a_checkpoint_of_another_model_names_the_first_difference(tmp_path):
    _, state = after_steps(1)
    save(tmp_path / "checkpoints", 1, state)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        with pytest.raises(
            CheckpointError, match=r"another model: parameter 'bias' has shape \(4,\), the model's has \(5,\)"
        ):
            checkpoints.restore(learner().abstract_state(toy_params(width=5)))
        with pytest.raises(CheckpointError, match="another optimizer: parameter 'opt_state/.*mu.*' is missing"):
            checkpoints.restore(learner(AdamW(0.1)).abstract_state(toy_params()))
        with pytest.raises(CheckpointError, match="keeps no moving average .*ema_decay was changed"):
            checkpoints.restore(learner(ema_decay=0.5).abstract_state(toy_params()))
    with pytest.raises(CheckpointError, match="parameter 'extra' is missing"):
        load_params(tmp_path, expected=toy_params() | {"extra": jnp.ones(1)})
    load_params(tmp_path, expected=toy_params())


def test_damage_is_said_clearly(tmp_path):
    _, state = after_steps(1)
    save(tmp_path, 1, state)
    for file in (tmp_path / "1" / "params").rglob("*"):
        if file.is_file() and file.name not in ("_METADATA", "_sharding"):
            file.write_bytes(b"")
    with pytest.raises(
        CheckpointError, match=r"the checkpoint .*/1 is damaged: params/.* has 0 bytes, [\d,]+ were written"
    ):
        load_params(tmp_path)


def test_save_params_is_read_by_load_params_and_never_overwrites(tmp_path):
    params = toy_params()
    save_params(tmp_path / "reference", params, DESCRIPTION, step=3)
    loaded, description, step = load_params(tmp_path / "reference")
    assert_same(loaded, params)
    assert description == DESCRIPTION and step == 3
    save_params(tmp_path / "reference", params, DESCRIPTION)  # The same again, as a resumed run does.
    assert load_params(tmp_path / "reference")[2] == 3
    with pytest.raises(CheckpointError, match="another model: it was not overwritten"):
        save_params(tmp_path / "reference", params, DESCRIPTION | {"stage": "other"})
    with pytest.raises(CheckpointError, match="parameter 'bias' has shape"):
        save_params(tmp_path / "reference", toy_params(width=5), DESCRIPTION)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "diary.txt").write_text("dear diary")
    with pytest.raises(CheckpointError, match="is not a checkpoint: it was not overwritten"):
        save_params(tmp_path / "notes", params, DESCRIPTION)
    assert (tmp_path / "notes" / "diary.txt").read_text() == "dear diary"


def test_a_write_that_fails_in_the_background_surfaces_at_the_next_step(tmp_path):
    _, state = after_steps(1)
    incompressible = jax.random.normal(jax.random.key(0), (512, 512))
    large = dataclasses.replace(state, params=state.params | {"large": incompressible})
    with Checkpoints(tmp_path, Retention(3)) as checkpoints:
        checkpoints.save(1, state, {}, DESCRIPTION, {})
        checkpoints.wait()
        with no_file_longer_than(1 << 19):
            checkpoints.save(2, large, {}, DESCRIPTION, {})
            with pytest.raises(CheckpointError, match=r"checkpoint of step 2 .*File too large.*Step 1 is intact"):
                for _ in range(1000):
                    checkpoints.raise_if_failed()
                    time.sleep(0.01)
        assert [entry.name for entry in tmp_path.iterdir()] == ["1"]  # No half step takes room.
        checkpoints.save(2, large, {}, DESCRIPTION, {})
    assert load_params(tmp_path)[2] == 2


def test_settings_are_checked(tmp_path):
    with pytest.raises(ValueError, match="keep_checkpoints is 0"):
        Checkpoints(tmp_path, Retention(0))


def test_what_is_written_is_json_and_arrays(tmp_path):
    _, state = after_steps(1)
    save(tmp_path, 1, state)
    run = json.loads((tmp_path / "1" / "run.json").read_text())
    assert run == {"step": 1, "position": {"examples": 17}, "description": DESCRIPTION, "metrics": {}}
    assert not [f for f in (tmp_path / "1").rglob("*") if f.suffix in (".pkl", ".pickle")]
