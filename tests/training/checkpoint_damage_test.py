"""Every file of a committed checkpoint, one at a time: a flipped byte, a shorter file, none. Nothing damaged is ever read."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clp_jax.training.checkpoint_items import CheckpointError
from clp_jax.training.checkpoint_manifest import DamagedError, Manifest
from clp_jax.training.checkpoint_steps import as_path
from clp_jax.training.checkpoints import Checkpoints
from clp_jax.training.guards import Guards
from clp_jax.training.saved_params import find_intact, load_params
from clp_jax.training.train_state import TrainState

DESCRIPTION = {"stage": "toy", "model": {}}


def flip(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def truncate(file):
    file.write_bytes(file.read_bytes()[:-1])


def delete(file):
    file.unlink()


def state_of(step):
    params = {"a": {"kernel": jnp.arange(12.0).reshape(3, 4) * step}, "bias": jnp.full((4,), step, jnp.bfloat16)}
    slots = {"slot": jnp.ones((3, 4)) * step}
    return TrainState(
        jnp.int32(step), params, slots, jax.tree.map(jnp.copy, params), jnp.zeros(2, jnp.uint32), Guards().init()
    )


@pytest.fixture(scope="module")
def committed(tmp_path_factory):
    """Two steps, which no test changes."""
    directory = tmp_path_factory.mktemp("committed") / "checkpoints"
    with Checkpoints(directory) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, state_of(step), {"examples": step}, DESCRIPTION, {"loss": 0.5})
    return directory


@pytest.fixture
def directory(committed, tmp_path):
    return shutil.copytree(committed, tmp_path / "checkpoints")


def files(step):
    return sorted(file.relative_to(step) for file in step.rglob("*") if file.is_file())


def assert_is_step(state, position, step):
    assert position == {"examples": step}
    jax.tree.map(np.testing.assert_array_equal, dataclasses.asdict(state), dataclasses.asdict(state_of(step)))


@pytest.mark.parametrize("damage", [flip, truncate, delete])
def test_training_goes_on_from_the_step_before_whatever_file_is_damaged(directory, damage, capsys):
    assert len(files(directory / "2")) > 20
    for file in files(directory / "2"):
        whole = (directory / "2" / file).read_bytes()
        damage(directory / "2" / file)
        damaged = {f: (directory / "2" / f).read_bytes() for f in files(directory / "2")}
        with Checkpoints(directory) as checkpoints:
            state, position = checkpoints.restore(state_of(0))
            assert checkpoints.latest_step() == 1
        assert_is_step(state, position, 1)
        said = capsys.readouterr().err
        assert f"{directory}/2 is damaged: " in said and "It was kept as 2.damaged, the reason beside it" in said
        reason = (directory / "2.damaged.txt").read_text()
        assert file.name in reason and reason.strip() in said
        # Nothing of it is lost.
        kept = directory / "2.damaged"
        assert {f: (kept / f).read_bytes() for f in files(kept)} == damaged
        (kept / file).write_bytes(whole)
        kept.rename(directory / "2")
        (directory / "2.damaged.txt").unlink()
    with Checkpoints(directory) as checkpoints:
        assert_is_step(*checkpoints.restore(state_of(0)), 2)


@pytest.mark.parametrize("damage", [flip, truncate, delete])
def test_parameters_are_read_from_the_step_before_and_nothing_is_renamed(directory, damage, capsys):
    for file in files(directory / "2"):
        whole = (directory / "2" / file).read_bytes()
        damage(directory / "2" / file)
        params, _, step = load_params(directory)
        serves = file.parts[0] in ("ema", "run.json", "manifest.json")  # The others are not read.
        assert step == (1 if serves else 2)
        np.testing.assert_array_equal(params["a"]["kernel"], state_of(step).params["a"]["kernel"])
        assert find_intact(directory) == directory / str(step)
        # A step without a manifest is not complete, which is nothing to speak of: it may be from a run that goes on.
        assert ("is damaged" in capsys.readouterr().err) == (
            serves and (file.name, damage) != ("manifest.json", delete)
        )
        if serves:
            with pytest.raises(CheckpointError, match="2 is damaged: |no complete checkpoint at .*/2: "):
                load_params(directory / "2")
        (directory / "2" / file).write_bytes(whole)
    assert sorted(entry.name for entry in directory.iterdir()) == ["1", "2"]


def test_every_byte_of_the_manifest_counts(committed, tmp_path):
    text = (committed / "2" / "manifest.json").read_bytes()
    for place in [*range(0, len(text), 41), len(text) - 1]:
        for mask in (1, 32):  # Another letter, another case: hexadecimal digits must not be read in either.
            (tmp_path / "manifest.json").write_bytes(text[:place] + bytes([text[place] ^ mask]) + text[place + 1 :])
            with pytest.raises(DamagedError, match=r"manifest.json is damaged"):
                Manifest.read(as_path(tmp_path))


def test_without_an_intact_step_nothing_is_begun_again(directory):
    flip(directory / "1" / "run.json")
    truncate(directory / "2" / "run.json")
    message = (
        r"no intact checkpoint, only damaged ones:\n  1.damaged: run.json has another .*\n  2.damaged: run.json has \d+"
    )
    with Checkpoints(directory) as checkpoints, pytest.raises(CheckpointError, match=message):
        checkpoints.restore(state_of(0))
    for _ in range(2):  # However often the command is run.
        with pytest.raises(CheckpointError, match=message):
            Checkpoints(directory)
    (directory / "2.damaged").rename(directory / "2.damaged.1")
    with pytest.raises(CheckpointError, match="2.damaged.1: no reason is written beside it"):
        Checkpoints(directory)


def test_what_was_set_aside_before_is_not_overwritten(directory):
    for number in range(3):
        with Checkpoints(directory) as checkpoints:
            checkpoints.save(3, state_of(3), {"examples": 3}, DESCRIPTION, {})
        (directory / "3" / "mark").write_text(str(number))
        flip(directory / "3" / "run.json")
        with Checkpoints(directory) as checkpoints:
            checkpoints.restore(state_of(0))
    assert [(directory / name / "mark").read_text() for name in ("3.damaged", "3.damaged.1", "3.damaged.2")] == list(
        "012"
    )
    assert all((directory / f"{name}.txt").is_file() for name in ("3.damaged", "3.damaged.1", "3.damaged.2"))


def test_arrays_that_were_written_wrong_are_found_after_reading(directory):
    """The files are what was written, but not what was to be written: a bit that fell between the device and the disk."""
    place = as_path(directory / "2")
    manifest = Manifest.read(place)
    kernel = dataclasses.replace(manifest.arrays["params"]["a/kernel"], shards={"0:3,0:4": "0" * 64})
    arrays = manifest.arrays | {"params": manifest.arrays["params"] | {"a/kernel": kernel}}
    dataclasses.replace(manifest, arrays=arrays).write(place)
    with Checkpoints(directory) as checkpoints:
        assert_is_step(*checkpoints.restore(state_of(0)), 1)
    assert "array params/a/kernel [0:3,0:4] has another SHA-256" in (directory / "2.damaged.txt").read_text()


def test_an_older_checkpoint_without_a_manifest_is_read_with_a_note(directory, capsys):
    """As they were written before there were manifests."""
    for step in (1, 2):
        (directory / str(step) / "manifest.json").unlink()
        (directory / str(step) / "run").mkdir()
        (directory / str(step) / "run.json").rename(directory / str(step) / "run" / "metadata")
    with Checkpoints(directory) as checkpoints:
        assert_is_step(*checkpoints.restore(state_of(0)), 2)
        checkpoints.save(3, state_of(3), {"examples": 3}, DESCRIPTION, {})
    assert "2 was written before checkpoints had manifests: it is read unverified" in capsys.readouterr().err
    assert load_params(directory)[2] == 3
    assert sorted(entry.name for entry in directory.iterdir()) == ["2", "3"]
