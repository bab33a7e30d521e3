"""The supervised stage on a prepared data set of 24 rows and a tiny T5."""

import dataclasses
import functools
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilations import before_each_batch, counted
from tiny_policies import varied_params
from tiny_runs import first_params

from clp_jax.data import records
from clp_jax.data.manifest import Manifest, Shard, Split, file_digest
from clp_jax.data.reader import DataSource, sequence_batch
from clp_jax.data.vocabulary import Vocabulary, train_vocabulary
from clp_jax.models.config import MoEConfig, PaLMConfig, T5Config
from clp_jax.models.policy import Policy
from clp_jax.models.serialization import from_json
from clp_jax.nn.routing import TokenChoice
from clp_jax.score import score
from clp_jax.train import train
from clp_jax.training.metrics import TIMING_METRICS, read_metrics
from clp_jax.training.optimizers import Adafactor
from clp_jax.training.run_directory import RunDirectoryError
from clp_jax.training.saved_params import load_params
from clp_jax.training.stage import DataBatches
from clp_jax.training.supervised import Supervised, SupervisedLoss
from clp_jax.training.transfer import Transfer

SIZES = {"embed_dim": 8, "mlp_dim": 16, "num_heads": 2, "head_dim": 4, "num_encoder_layers": 1, "num_decoder_layers": 1}
MODEL = T5Config.t5_1_1(vocab_size=40, dropout_rate=0.1, **SIZES)
LENGTHS = {"inputs": 6, "targets": 4}
TEXTS = ["the quick brown fox jumps over a lazy dog", "pack my box with five dozen jugs of liquid"]


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> Path:
    from array_record.python.array_record_module import ArrayRecordWriter

    directory = tmp_path_factory.mktemp("data")
    train_vocabulary(TEXTS, 30, directory / "vocabulary.model")
    rng = np.random.default_rng(0)
    splits = {}
    for split, rows in (("train", 24), ("validation", 10)):
        path = directory / f"{split}-00000.arrayrecord"
        writer = ArrayRecordWriter(str(path), "group_size:1")
        for _ in range(rows):
            row = {name: rng.integers(2, 30, rng.integers(2, n + 1)) for name, n in LENGTHS.items()}
            writer.write(records.encode(row | {f"{name}_ends": np.asarray([len(ids)]) for name, ids in row.items()}))
        writer.close()
        shard = Shard(path.name, rows, path.stat().st_size, file_digest(path))
        splits[split] = Split(examples=rows, records=rows, shards=(shard,), statistics={})
    vocabulary = Vocabulary.load(directory)
    Manifest("toy", LENGTHS, False, vocabulary.size, vocabulary.fingerprint, {}, "0", splits).save(directory)
    return directory


def stage(data_dir, **changes):
    return Supervised(**{"model": MODEL, "data_dir": str(data_dir), "batch_size": 4, "z_loss": 1e-3} | changes)


def run(path, data_dir, num_steps, **changes):
    settings = {"optimizer": Adafactor(0.05), "log_every": 1, "evaluate_every": 3, "checkpoint_every": 2, "seed": 3}
    return train(run_dir=path, stage=stage(data_dir, **changes), num_steps=num_steps, **settings)


def lines(path):
    return [{k: v for k, v in r.items() if k not in TIMING_METRICS} for r in read_metrics(path / "metrics.jsonl")]


def test_resumed_equals_uninterrupted_to_the_bit(tmp_path, data_dir, monkeypatch):
    consumed = []
    plain = DataBatches.next

    def recording(self, state, frozen):
        batch, metrics = plain(self, state, frozen)
        consumed.extend(batch.example_ids.tolist())
        return batch, metrics

    monkeypatch.setattr(DataBatches, "next", recording)
    run(tmp_path / "whole", data_dir, 8)
    whole, consumed[:] = list(consumed), []

    def killed(self, state, frozen):
        if len(consumed) == 5 * 4:
            raise InterruptedError
        return recording(self, state, frozen)

    monkeypatch.setattr(DataBatches, "next", killed)
    with pytest.raises(InterruptedError):
        run(tmp_path / "parts", data_dir, 8)
    assert consumed == whole[: 5 * 4]
    monkeypatch.setattr(DataBatches, "next", recording)
    del consumed[4 * 4 :]  # The checkpoint of step 4 is where it goes on.
    run(tmp_path / "parts", data_dir, 8)
    assert consumed == whole and sorted(whole[:24]) == list(range(24))
    assert lines(tmp_path / "parts") == lines(tmp_path / "whole")
    assert [r["step"] for r in lines(tmp_path / "whole")] == list(range(1, 9))
    loaded = [load_params(tmp_path / name)[0] for name in ("whole", "parts")]
    jax.tree.map(np.testing.assert_array_equal, *loaded)


def test_nothing_is_compiled_after_the_first_evaluation(tmp_path, data_dir, monkeypatch):
    with counted() as programs:
        seen = before_each_batch(monkeypatch, DataBatches, programs)
        run(tmp_path, data_dir, 8)
        seen.append(len(programs))
    # Evaluations after steps 3, 6 and 8, checkpoints after every second.
    assert seen[3] > seen[0] and len(set(seen[3:])) == 1, seen


def test_other_data_under_a_run_is_refused(tmp_path, data_dir):
    copy = shutil.copytree(data_dir, tmp_path / "data")
    run(tmp_path / "run", copy, 2)
    manifest = Manifest.load(copy)
    dataclasses.replace(manifest, fingerprint="1").save(copy)
    with pytest.raises(RunDirectoryError, match="holds a run with another data: it was 0, now it is 1"):
        run(tmp_path / "run", copy, 4)


def test_a_damaged_record_is_named(tmp_path, data_dir):
    copy = shutil.copytree(data_dir, tmp_path / "data")
    shard = copy / "train-00000.arrayrecord"
    content = bytearray(shard.read_bytes())
    content[100:3000] = bytes(byte ^ 0xFF for byte in content[100:3000])
    shard.write_bytes(content)
    with pytest.raises(ValueError, match=r"split 'train' in .*data has records that can't be read"):
        run(tmp_path / "run", copy, 8)


def test_a_validation_split_smaller_than_a_batch_is_evaluated_whole(tmp_path, data_dir):
    small = run(tmp_path / "whole", data_dir, 1, batch_size=16, evaluation_batches=1).metrics
    parts = run(tmp_path / "parts", data_dir, 1, batch_size=16, evaluation_batches=9).metrics
    names = [name for name in small if name.startswith("evaluation/")]
    assert names and [small[name] for name in names] == [parts[name] for name in names]


def test_a_run_directory_rebuilds_the_policy(tmp_path, data_dir):
    result = run(tmp_path, data_dir, 2)
    params, description, step = load_params(tmp_path)
    assert step == 2 and from_json(description["model"]) == MODEL
    Policy(from_json(description["model"])).bind(params)
    vocabulary = Vocabulary.load(tmp_path)
    assert vocabulary.fingerprint == description["vocabulary"] == Vocabulary.load(data_dir).fingerprint
    assert {"evaluation/cross_entropy", "evaluation/accuracy", "evaluation/perplexity"} <= result.metrics.keys()


def test_the_loss_is_that_of_each_row_alone(data_dir):
    policy = Policy(MODEL)
    params = policy.init(jax.random.key(0))
    batch = DataSource(data_dir, "train", batch_size=4, converter=sequence_batch).next()
    total, tokens, metrics = SupervisedLoss(policy, z_loss=0.01)(params, {}, batch, jax.random.key(0))
    plain = SupervisedLoss(policy, z_loss=0.01).sums(params, batch, None)
    assert float(total) != float(plain[0])  # The model has dropout.
    expected = 0.0
    model = policy.bind(params)
    for row in range(4):
        targets = batch.targets[row][batch.targets[row] > 0]
        inputs = batch.inputs[row][batch.inputs[row] > 0]
        logits = model(jnp.asarray(inputs)[None], jnp.asarray([[0, *targets[:-1]]]))[0]
        log_z = jax.nn.logsumexp(logits, axis=-1)
        expected += float((log_z - logits[np.arange(len(targets)), targets] + 0.01 * log_z**2).sum())
    np.testing.assert_allclose(plain[0], expected, rtol=1e-5)
    assert float(tokens) == float(plain[1]) == batch.loss_weights.sum() == (batch.targets > 0).sum()
    assert 0 <= float(metrics["accuracy"]) <= 1


def evaluated(evaluation):
    """How often an evaluation could have been left, and what it found."""
    batches = 0
    while True:
        try:
            next(evaluation)
        except StopIteration as end:
            return batches, end.value
        batches += 1


# Half the tokens have no room, and which ones depends on those around, of all rows in training.
CROWDED = dataclasses.replace(MODEL, moe=MoEConfig(num_experts=2, router=TokenChoice(eval_capacity=0.5, group="batch")))


@pytest.mark.parametrize("model", [MODEL, CROWDED], ids=["dense", "crowded experts"])
def test_evaluation_is_the_mean_over_every_token_of_the_split(tmp_path, data_dir, model):
    setup = stage(data_dir, model=model).setup(tmp_path, seed=0)
    params = setup.params()
    whole = stage(data_dir, model=model, batch_size=10).setup(tmp_path, seed=0)
    (batches, found), (one, expected) = (evaluated(s.evaluate(params)) for s in (setup, whole))
    assert (batches, one) == (3, 1)  # Of 4, 4 and 2 rows against one of 10.
    assert ("router/dropped" in found) == (model is CROWDED)
    for name in expected:
        if not name.startswith("router/"):  # Means over the rows of each batch.
            np.testing.assert_allclose(found[name], expected[name], rtol=1e-6)
    np.testing.assert_allclose(found["perplexity"], np.exp(found["cross_entropy"]), rtol=1e-6)


CROWDED_DECODER = PaLMConfig.llama(
    vocab_size=40,
    num_layers=2,
    moe=CROWDED.moe,
    **{name: SIZES[name] for name in ("embed_dim", "mlp_dim", "num_heads", "head_dim")},
)


@pytest.mark.parametrize("model", [CROWDED, CROWDED_DECODER], ids=["encoder-decoder", "decoder"])
def test_what_is_measured_does_not_depend_on_what_is_packed_with_what(model):
    rng = np.random.default_rng(0)

    def example():
        return {name: rng.integers(2, 30, rng.integers(2, n + 1)).astype(np.int32) for name, n in LENGTHS.items()}

    def batch_of(rows):
        joined = [{name: np.concatenate([one[name] for one in row]) for name in LENGTHS} for row in rows]
        ends = [{f"{name}_ends": np.cumsum([len(one[name]) for one in row]) for name in LENGTHS} for row in rows]
        widths = {name: max(map(len, rows)) * n for name, n in LENGTHS.items()}
        records_ = [row | where for row, where in zip(joined, ends, strict=True)]
        return sequence_batch(records_, np.arange(len(rows), dtype=np.int32), widths)

    examples = [example() for _ in range(6)]
    policy = Policy(model)
    params = varied_params(policy)
    loss = SupervisedLoss(policy.served())
    measured = [
        jax.jit(loss.measured)(params, batch_of(rows))
        for rows in ([[one] for one in examples], [examples[:3], examples[3:5], examples[5:]])
    ]
    (apart, expected), (together, found) = measured
    assert float(apart) == float(together) == sum(len(one["targets"]) for one in examples)
    for name in ("cross_entropy", "accuracy"):
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-5, err_msg=name)
    # Read in one pass, examples of a row would take each other's room.
    sharing = loss.sums(params, batch_of([examples[:3], examples[3:5], examples[5:]]), None)[2]
    assert abs(float(sharing["cross_entropy"]) / float(expected["cross_entropy"]) - 1) > 1e-3


def test_the_scorer_says_what_the_log_says(tmp_path, data_dir):
    """Of experts too whose room training shares over a batch."""
    run(tmp_path / "run", data_dir, 2, model=CROWDED)
    data = DataSource(data_dir, "validation", batch_size=4, converter=sequence_batch)
    (tmp_path / "rows.jsonl").write_text(
        "".join(
            json.dumps({"inputs": x[x > 0].tolist(), "targets": y[y > 0].tolist()}) + "\n"
            for batch in data.epoch_batches(10)
            for x, y, real in zip(batch.inputs, batch.targets, batch.example_ids >= 0, strict=True)
            if real
        )
    )
    score(checkpoint=str(tmp_path / "run"), input=str(tmp_path / "rows.jsonl"), output=str(tmp_path / "scores.jsonl"))
    found = [json.loads(line)["logprobs"] for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    assert len(found) == 10
    told = lines(tmp_path / "run")[-1]["evaluation/cross_entropy"]
    np.testing.assert_allclose(-np.mean(np.concatenate(found)), told, rtol=1e-6)


def test_starting_from_a_checkpoint(tmp_path, data_dir):
    run(tmp_path / "first", data_dir, 2)
    start = functools.partial(stage, data_dir, initial_checkpoint=str(tmp_path / "first"))
    first, _, _ = load_params(tmp_path / "first")
    given = first_params(start(model=dataclasses.replace(MODEL, dropout_rate=0.0, remat="full")).setup(tmp_path, 0))
    jax.tree.map(np.testing.assert_array_equal, given, first)
    with pytest.raises(ValueError, match="another model: its mlp_dim is 16, model has 32"):
        start(model=dataclasses.replace(MODEL, mlp_dim=32)).setup(tmp_path, 0)
    with pytest.raises(ValueError, match="another model: its activation is gelu, model has relu"):
        start(model=dataclasses.replace(MODEL, activation="relu")).setup(tmp_path, 0)
    own = start(model=None).setup(tmp_path, 0)
    jax.tree.map(np.testing.assert_array_equal, first_params(own), first)
    with pytest.raises(ValueError, match="Supervised.model is None: expected a model, or an initial_checkpoint"):
        stage(data_dir, model=None)
    sparse = dataclasses.replace(MODEL, moe=MoEConfig(num_experts=2))
    with pytest.raises(ValueError, match="another model: its moe is None.* set upcycle=True"):
        start(model=sparse).setup(tmp_path, 0)
    grown = first_params(start(model=sparse, upcycle=True).setup(tmp_path, 0))
    experts = grown["encoder"]["layers"]["mlp"]["experts"]["wo"]["kernel"]
    dense = first["encoder"]["layers"]["mlp"]["wo"]["kernel"]
    np.testing.assert_array_equal(experts, np.stack([dense, dense], axis=1))


def test_starting_from_another_model_by_rules(tmp_path, data_dir, capsys):
    run(tmp_path / "first", data_dir, 2)
    capsys.readouterr()
    first, _, _ = load_params(tmp_path / "first")
    rules = Transfer({".*/mlp/.*": None}, init=(".*/mlp/.*",))
    start = functools.partial(stage, data_dir, initial_checkpoint=str(tmp_path / "first"), transfer=rules)
    wider = dataclasses.replace(MODEL, mlp_dim=32)
    params = first_params(start(model=wider).setup(tmp_path, 0))
    fresh = jax.jit(Policy(wider).init)(jax.random.key(0))
    for side in ("encoder", "decoder"):
        layers = params[side]["layers"]
        jax.tree.map(np.testing.assert_array_equal, layers.pop("mlp"), fresh[side]["layers"]["mlp"])
        stored = first[side]["layers"]
        del stored["mlp"]
        jax.tree.map(np.testing.assert_array_equal, layers, stored)
    said = capsys.readouterr().err
    assert f"{tmp_path / 'first'}, step 2: loaded " in said and "initialised 6 arrays (decoder 3, encoder 3)" in said
    assert "ignored 6 arrays (decoder 3, encoder 3)" in said
    with pytest.raises(ValueError, match="Supervised.transfer says where an initial_checkpoint's parameters go"):
        stage(data_dir, transfer=rules)


def test_bad_settings(tmp_path, data_dir):
    with pytest.raises(
        ValueError, match=r"the model has 20 tokens, the vocabulary of .* 30: set vocab_size to at least 30"
    ):
        stage(data_dir, model=dataclasses.replace(MODEL, vocab_size=20)).setup(tmp_path, 0)
    with pytest.raises(
        ValueError, match=r"ends with tokens \(5,\) and is padded with 0, the vocabulary of .*EOS_IDS, PAD_ID"
    ):
        stage(data_dir, model=dataclasses.replace(MODEL, eos_ids=(5,))).setup(tmp_path, 0)
    with pytest.raises(ValueError, match="Supervised.batch_size is 0: expected at least 1"):
        stage(data_dir, batch_size=0)
    with pytest.raises(FileNotFoundError, match="vocabulary"):
        stage(tmp_path / "nowhere").setup(tmp_path, 0)
