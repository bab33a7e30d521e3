"""Configurations: what makes another run, what only another layout, and what nothing at all."""

import pytest
from run_configurations import CONFIG

from clp_jax.gin_utils.configuration import configure
from clp_jax.train import train
from clp_jax.training.configurations import bindings, changes, first_difference

GIVEN = ("models/t5_1_1_tiny.gin", "algorithms/adamw.gin", "runs/supervised.gin")
RL = ("examples/pydoc_clp_full.gin",)


def text(files, *words):
    return configure(train, gin_files=files, gin_bindings=("RUN_DIR='r'", *words)).text


def supervised(*files, words=()):
    return text((*GIVEN, *files), "DATA_DIR='d'", *words)


def test_bindings_of_a_gin_file():
    assert bindings(CONFIG) == {
        "import clp_jax.train": "",
        "train.num_steps": "100",
        "train.optimizer": "@Adafactor()",
        "Adafactor.learning_rate": "0.001",
        "T5Config.table": "{ 'a': 1, 'b': 2, }",
    }
    assert bindings("a.b = \\\n    ('x',\n     'y')\nc = 1") == {"a.b": "('x', 'y')", "c": "1"}


@pytest.mark.parametrize(
    "name",
    [None, "data_parallel", "single", "fsdp_tensor", "multislice", "pipeline", "context", "expert"],
)
def test_any_layout_may_follow_any_other(name):
    fsdp, other = supervised("sharding/fsdp.gin"), supervised(*([f"sharding/{name}.gin"] if name else []))
    for old, new in ((fsdp, other), (other, fsdp)):
        found = changes(old, new)
        assert not found.refused
        assert any(line.startswith("clp_jax.partitioning.Rules.table: ") for line in found.layout)
        assert not any(line.startswith("import") for line in found.layout)


def test_micro_batches_and_what_is_recomputed_are_of_the_layout():
    old, new = supervised(), supervised(words=("REMAT='full'", "train.accumulation=4", "NUM_STEPS=7"))
    assert changes(old, new).refused == ()
    assert changes(old, new).layout == ("REMAT: 'none' -> 'full'", "clp_jax.train.train.accumulation: 1 -> 4")


def test_rollouts_may_move():
    old, new = text((*RL, "sharding/fsdp.gin")), text((*RL, "sharding/data_parallel.gin", "sharding/rollouts.gin"))
    found = changes(old, new)
    assert not found.refused
    assert any(
        line.startswith("clp_jax.training.clp.ConditionalPolicy.rollout_rules: None -> @") for line in found.layout
    )
    assert any(line.startswith("rollouts/clp_jax.partitioning.Rules.table: unset -> [(") for line in found.layout)


@pytest.mark.parametrize("words", [("BATCH_SIZE=32",), ("SEED=1",), ("VOCAB_SIZE=64",), ("DTYPE='bfloat16'",)])
def test_another_computation_is_refused_beside_another_layout(words):
    found = changes(supervised("sharding/fsdp.gin"), supervised("sharding/data_parallel.gin", words=words))
    assert [line.split(":")[0] for line in found.refused] == [words[0].split("=")[0]]


def test_what_a_layout_shares_with_the_computation_is_refused():
    old = "WIDE = 2\nmake_mesh.tensor = %WIDE\ntrain.mesh = @make_mesh()\nModel.heads = %WIDE\n"
    assert changes(old, old.replace("WIDE = 2", "WIDE = 4")).refused == ("WIDE: 2 -> 4",)
    mine = "train.stage = @Stage()\nStage.rules = {}\nStage.mesh = 3\n"
    assert changes(mine.format("'a'"), mine.format("'b'")).refused == ("Stage.rules: 'a' -> 'b'",)


def test_the_way_of_keeping_the_best_is_free():
    old = supervised()
    new = (
        old.replace("train.keep_best = None", "train.keep_best = @KeepBest()") + "KeepBest.metric = 'evaluation/loss'\n"
    )
    assert changes(old, new) == changes(new, old) == changes(old, old)


def test_descriptions_may_differ_in_their_layout():
    old = {"model": {"trunk": {"remat": "none", "size": 2}}}
    assert first_difference(old, {"model": {"trunk": {"remat": "full", "size": 2}}}) is None
    assert first_difference(old, {"model": {"trunk": {"remat": "full", "size": 3}}}) == ("model.trunk.size", 2, 3)
