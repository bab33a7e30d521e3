"""The reader: an order that is a function of seed and position, the same for any number of hosts and files."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clp_jax.data import packing, records
from clp_jax.data.batch import Batch, PromptBatch
from clp_jax.data.manifest import Manifest, Shard, Split, file_digest
from clp_jax.data.reader import DataSource, prompt_batch, sequence_batch
from clp_jax.data.vocabulary import Vocabulary, train_vocabulary
from clp_jax.training.learner import Learner
from clp_jax.training.optimizers import AdamW

LENGTHS = {"inputs": 6, "targets": 4}
ROOT = Path(__file__).parents[2]


def row(number: int, packed: bool = False) -> dict[str, np.ndarray]:
    """A record that says its number in its first token; packed ones hold two examples."""
    rng = np.random.default_rng(number)
    features = {}
    for name, length in LENGTHS.items():
        parts = [length // 2, length // 2 - 1] if packed else [int(rng.integers(2, length + 1))]
        tokens = np.concatenate([rng.integers(2, 50, size) for size in parts])
        tokens[0] = 100 + number
        features |= {name: tokens, f"{name}_ends": np.cumsum(parts)}
    return features


def write(directory: Path, shards: tuple[int, ...], packed: bool = False) -> Path:
    """A prepared directory with the same rows in files of these sizes."""
    from array_record.python.array_record_module import ArrayRecordWriter

    directory.mkdir(parents=True, exist_ok=True)
    written, first = [], 0
    for index, size in enumerate(shards):
        path = directory / f"train-{index:05d}.arrayrecord"
        writer = ArrayRecordWriter(str(path), "group_size:1")
        for number in range(first, first + size):
            writer.write(records.encode(row(number, packed)))
        writer.close()
        first += size
        written.append(Shard(path.name, size, path.stat().st_size, file_digest(path)))
    split = Split(examples=first, records=first, shards=tuple(written), statistics={})
    train_vocabulary(["the quick brown fox jumps over a lazy dog"], 30, directory / "vocabulary.model")
    fingerprint = Vocabulary.load(directory).fingerprint
    Manifest("toy", LENGTHS, packed, 200, fingerprint, {}, "f", {"train": split}).save(directory)
    return directory


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """23 rows in three files."""
    return write(tmp_path_factory.mktemp("data"), (10, 10, 3))


def source(directory, batch_size=4, converter=sequence_batch, **options) -> DataSource:
    return DataSource(directory, "train", batch_size=batch_size, converter=converter, **options)


def assert_equal(a, b):
    assert type(a) is type(b)
    for name in vars(a):
        one, other = getattr(a, name), getattr(b, name)
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other, err_msg=name)


def join(parts):
    """One global batch of the hosts' parts."""
    return type(parts[0])(**{k: np.concatenate([getattr(part, k) for part in parts]) for k in vars(parts[0])})


@pytest.mark.parametrize("size", [1, 2, 3, 23, 64, 100])
def test_every_epoch_has_every_record_once_in_an_order_of_its_own(tmp_path, size):
    data = source(write(tmp_path, (size,)), seed=5)
    epochs = data.example_ids(0, 6 * size).reshape(6, size)
    np.testing.assert_array_equal(np.sort(epochs, axis=1), np.broadcast_to(np.arange(size), (6, size)))
    if size > 20:
        assert len({tuple(order) for order in epochs.tolist()}) == 6
        assert not np.any(np.all(epochs == np.arange(size), axis=1))


def test_the_order_is_a_function_of_seed_and_position(data_dir):
    data = source(data_dir, seed=7)
    whole = data.example_ids(0, 120)
    for start in (0, 1, 22, 23, 24, 61, 119):
        np.testing.assert_array_equal(data.example_ids(start, 120 - start), whole[start:])
    np.testing.assert_array_equal(source(data_dir, seed=7, batch_size=8).example_ids(0, 120), whole)
    orders = {tuple(source(data_dir, seed=seed).example_ids(0, 23).tolist()) for seed in range(20)}
    assert len(orders) == 20


def test_batches_follow_the_order_across_epochs_and_files(data_dir):
    data = source(data_dir, seed=3, batch_size=6)
    ids = data.example_ids(0, 60)
    for index in range(10):
        batch = data.next()
        np.testing.assert_array_equal(batch.example_ids, ids[6 * index : 6 * index + 6])
        np.testing.assert_array_equal(batch.inputs[:, 0] - 100, batch.example_ids)
        np.testing.assert_array_equal(batch.targets[:, 0] - 100, batch.example_ids)
        assert data.position == 6 * (index + 1)


def test_a_batch_larger_than_the_split_goes_round(data_dir):
    ids = source(data_dir, batch_size=50).next().example_ids
    np.testing.assert_array_equal(np.bincount(ids[:46], minlength=23), 2)


@pytest.mark.parametrize("position", [0, 4, 20, 24, 44, 7])
def test_resuming_anywhere_is_bitwise(data_dir, position):
    uninterrupted = source(data_dir, seed=1)
    uninterrupted.seek(position % 4)
    for _ in range(position // 4):
        uninterrupted.next()
    resumed = source(data_dir, seed=1)
    resumed.seek(position)
    for _ in range(12):
        assert_equal(resumed.next(), uninterrupted.next())
    assert resumed.position == uninterrupted.position == position + 48


def shares(hosts, kind="blocks"):
    """The rows that each host reads: blocks, in turn, or blocks that two hosts share."""

    def rows(count, host):
        places = np.arange(count)
        if kind == "in turn":
            return places[places % hosts == host]
        if kind == "shared":
            return np.split(places, hosts // 2)[host // 2]
        return np.split(places, hosts)[host]

    return [functools.partial(rows, host=host) for host in range(hosts)]


@pytest.mark.parametrize("hosts", [2, 4, 8])
def test_hosts_together_read_the_global_batch(data_dir, hosts):
    alone = source(data_dir, batch_size=8, seed=2)
    together = [source(data_dir, batch_size=8, seed=2, rows=rows) for rows in shares(hosts)]
    for _ in range(7):
        assert_equal(join([data.next() for data in together]), alone.next())
    assert {data.position for data in together} == {alone.position}
    for parts in zip(alone.epoch_batches(), *(data.epoch_batches() for data in together), strict=True):
        assert_equal(join(parts[1:]), parts[0])


@functools.cache
def learner(accumulation, noted):
    """One that notes the ids of its micro-batches, in the order in which it takes them."""

    def loss_fn(params, frozen, batch, key):
        jax.debug.callback(lambda ids: noted.append(np.asarray(ids)), batch.example_ids, ordered=True)
        rows = jnp.asarray(batch.example_ids.shape[0], jnp.float32)
        return params["w"] * rows, rows, {}

    return Learner(loss_fn, AdamW(0.1), logical_axes=None, accumulation=accumulation)


class Noted(list):
    """Ids by micro-batch; hashed by identity."""

    __hash__ = object.__hash__


NOTED = Noted()


def trained_on(batch, accumulation):
    """The ids of a step of so many micro-batches, in the order of its program."""
    NOTED.clear()
    taught = learner(accumulation, NOTED)
    state, _ = taught.update(taught.init_state({"w": jnp.ones(())}, seed=0), {}, batch)
    jax.block_until_ready(state)
    jax.effects_barrier()
    assert [len(ids) for ids in NOTED] == [len(batch.example_ids) // accumulation] * accumulation
    return np.concatenate(NOTED)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("trial", range(6))
def test_every_schedule_of_hosts_accumulation_and_restarts_consumes_the_same_examples(tmp_path, packed, trial):
    """Order and multiset of what updates are made of, whatever the hosts and micro-batches, and wherever it goes back."""
    rng = np.random.default_rng(trial)
    directory = write(tmp_path, (9, 5), packed=packed)
    alone = source(directory, batch_size=8, seed=trial)
    whole = np.concatenate([alone.next().example_ids for _ in range(12)])
    consumed, saved, seen = {}, 0, set()
    while saved < len(whole):
        hosts, kind = int(rng.choice([1, 2, 4, 8])), str(rng.choice(["blocks", "in turn", "shared"]))
        kind, accumulation = "blocks" if hosts == 1 else kind, int(rng.choice([1, 2, 4, 8]))
        seen.add((hosts, accumulation))
        places = [rows(8) for rows in shares(hosts, kind)]
        together = [source(directory, batch_size=8, seed=trial, rows=rows) for rows in shares(hosts, kind)]
        for data in together:
            data.seek(saved)
        steps = int(rng.integers(1, 5))
        for step in range(steps):
            batch = put_together(places, [data.next() for data in together])
            for place, example in enumerate(trained_on(batch, accumulation)):
                # What was consumed after the last checkpoint is consumed again, the same.
                assert consumed.setdefault(saved + 8 * step + place, int(example)) == example
        saved += 8 * int(rng.integers(1 if steps == 1 else 0, steps + 1))
    found = [consumed[position] for position in range(len(whole))]
    np.testing.assert_array_equal(found, whole)
    assert len(seen) > 2


def put_together(places, parts):
    """The global batch of the rows that hosts have read, each at its place; rows of several hosts are the same in all."""
    filled = {}
    for name in vars(parts[0]):
        rows = [getattr(part, name) for part in parts]
        filled[name] = np.zeros((8, *rows[0].shape[1:]), rows[0].dtype)
        for at, part in zip(places, rows, strict=True):
            filled[name][at] = part
        for at, part in zip(places, rows, strict=True):
            np.testing.assert_array_equal(filled[name][at], part)
    return type(parts[0])(**filled)


def test_hosts_may_change_in_number_on_the_way(data_dir):
    alone = source(data_dir, batch_size=8)
    for _ in range(3):
        alone.next()
    together = [source(data_dir, batch_size=8, rows=rows) for rows in shares(4)]
    for data in together:
        data.seek(alone.position)
    assert_equal(join([data.next() for data in together]), alone.next())


@pytest.mark.parametrize("packed", [False, True])
def test_the_number_of_files_does_not_matter(tmp_path, packed):
    one, many = (source(write(tmp_path / name, s, packed)) for name, s in {"1": (11,), "5": (1, 4, 1, 2, 3)}.items())
    for _ in range(6):
        assert_equal(one.next(), many.next())


@pytest.mark.parametrize(("batch_size", "most"), [(4, None), (23, None), (64, None), (4, 9), (4, 8), (4, 100), (5, 1)])
def test_one_pass_has_every_record_once_and_fills_up_the_last_batch(data_dir, batch_size, most):
    data = source(data_dir, batch_size=batch_size, seed=9)
    data.seek(5)
    batches = list(data.epoch_batches(most))
    total = 23 if most is None else min(most, 23)
    assert all(len(batch.example_ids) == batch_size for batch in batches)
    ids = np.concatenate([batch.example_ids for batch in batches])
    np.testing.assert_array_equal(ids, [*range(total), *[-1] * (-total % batch_size)])
    for batch in batches:
        filler = batch.example_ids < 0
        for name in ("inputs", "input_segments", "targets", "target_segments", "decoder_inputs", "loss_weights"):
            assert not getattr(batch, name)[filler].any()
        assert batch.loss_weights[~filler].any(axis=1).all()
    assert data.position == 5  # Evaluation does not move training's place.


def test_without_shuffling_the_order_is_that_on_disk(data_dir):
    np.testing.assert_array_equal(source(data_dir, shuffle=False).example_ids(20, 6), [20, 21, 22, 0, 1, 2])


def test_a_sequence_batch_is_the_rows(data_dir):
    data = source(data_dir, batch_size=8)
    batch = data.next()
    assert isinstance(batch, Batch)
    for i, number in enumerate(batch.example_ids):
        original = row(int(number))
        for name, (tokens, segments, positions) in {
            "inputs": (batch.inputs, batch.input_segments, batch.input_positions),
            "targets": (batch.targets, batch.target_segments, batch.target_positions),
        }.items():
            expected = packing.lay_out([original[name]], LENGTHS[name])
            for got, want in zip((tokens[i], segments[i], positions[i]), expected, strict=True):
                np.testing.assert_array_equal(got, want)
        size = len(original["targets"])
        assert batch.decoder_inputs[i].tolist() == [0, *original["targets"][:-1], *[0] * (4 - size)]
        assert batch.loss_weights[i].tolist() == [1.0] * size + [0.0] * (4 - size)


def test_targets_are_decoded_from_the_policys_start(data_dir):
    converter = functools.partial(sequence_batch, start_id=9)
    batch, plain = (source(data_dir, converter=made).next() for made in (converter, sequence_batch))
    starts = plain.target_positions == 0
    np.testing.assert_array_equal(batch.decoder_inputs, np.where(starts, 9, plain.decoder_inputs))


def test_packed_rows_keep_their_examples_apart(tmp_path):
    batch = source(write(tmp_path, (3,), packed=True), batch_size=3, shuffle=False).next()
    np.testing.assert_array_equal(batch.input_segments, [[1, 1, 1, 2, 2, 0]] * 3)
    np.testing.assert_array_equal(batch.input_positions, [[0, 1, 2, 0, 1, 0]] * 3)
    np.testing.assert_array_equal(batch.target_segments, [[1, 1, 2, 0]] * 3)
    np.testing.assert_array_equal(batch.decoder_inputs, np.stack([[0, t[0], 0, 0] for t in batch.targets]))
    np.testing.assert_array_equal(batch.loss_weights, [[1, 1, 1, 0]] * 3)


def test_prompts_are_one_example_each(data_dir, tmp_path):
    batch = source(data_dir, converter=prompt_batch).next()
    assert isinstance(batch, PromptBatch)
    for i, number in enumerate(batch.example_ids):
        for name, length in LENGTHS.items():
            tokens = row(int(number))[name]
            assert getattr(batch, name)[i].tolist() == [*tokens, *[0] * (length - len(tokens))]
    (last,) = list(source(data_dir, batch_size=30, converter=prompt_batch).epoch_batches())
    assert not last.inputs[23:].any() and not last.targets[23:].any()
    with pytest.raises(ValueError, match="these prompts are packed: prepare the data with pack=False"):
        source(write(tmp_path, (4,), packed=True), converter=prompt_batch).next()


def test_what_cannot_be_read_is_said_before_reading(data_dir, tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a prepared data set"):
        source(tmp_path)
    with pytest.raises(ValueError, match="has no split 'dev': it has train"):
        DataSource(data_dir, "dev", batch_size=4, converter=sequence_batch)
    for batch_size in (0, -4):
        with pytest.raises(ValueError, match=f"batch_size is {batch_size}: expected at least 1"):
            source(data_dir, batch_size=batch_size)
    with pytest.raises(ValueError, match="position -1: expected a global example index"):
        source(data_dir).seek(-1)


def test_a_truncated_shard_is_named(tmp_path):
    write(tmp_path, (5, 5))
    path = tmp_path / "train-00001.arrayrecord"
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(ValueError, match=r"shard .*train-00001.arrayrecord has \d+ bytes, \d+ were written"):
        source(tmp_path)


def test_reading_imports_no_tensorflow(data_dir):
    script = f"""
import sys
from clp_jax.data.reader import DataSource, sequence_batch
batch = DataSource({str(data_dir)!r}, "train", batch_size=4, converter=sequence_batch).next()
print(batch.inputs.shape, sorted(set(sys.modules) & {{"tensorflow", "seqio", "tensorflow_datasets", "grain"}}))
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "(4, 6) ['grain']\n"


def test_another_vocabulary_is_named(tmp_path):
    directory = write(tmp_path, (4,))
    train_vocabulary(["pack my box with five dozen jugs of liquid"], 29, directory / "vocabulary.model")
    with pytest.raises(ValueError, match="is not the one the data was prepared with"):
        DataSource(directory, "train", batch_size=2, converter=prompt_batch)
