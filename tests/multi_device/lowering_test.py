"""One train step of every kind of shipped gin file lowers, at full size, for eight devices: nothing is made or compiled."""

import jax
import jaxtyping
import pytest

from clp_jax import compile as compiling
from clp_jax import train
from clp_jax.gin_utils.configuration import configure
from clp_jax.gin_utils.files import shipped_files
from clp_jax.models.config import T5Config
from clp_jax.training.stage import DataShape

SUPERVISED = ("algorithms/adafactor.gin", "runs/supervised.gin")
# Learned rewards are read from checkpoints when they are built: others stand for as many of them.
TWO = ("rewards/coverage_brevity.gin",)
RL = "examples/pydoc_rl.gin"
EXAMPLES = {
    "examples/pydoc_sft.gin": ((), ()),
    "examples/pydoc_preference.gin": ((), ()),
    "examples/pydoc_clp_full.gin": (TWO, ()),
    "examples/pydoc_clp_kl.gin": (TWO, ()),
}
# A table, and a model that shows it: together they have every kind of layer but those of `FAMILIES`.
TABLES = {
    "single": "t5_1_1_small",
    "data_parallel": "t5_1_0_base",
    "tensor_parallel": "palm_62b",
    "fsdp": "palm_540b",
    "fsdp_tensor": "llama3_1_405b",
    "expert": "switch_base_64",
    "fsdp_expert": "qwen3_235b_a22b",
    "context": "palm_8b",
    "multislice": "t5_1_1_xxl",
    "pipeline": "palm_62b",
}
# `pipeline` has no layers to share in the embeddings, `expert` no experts outside of them; a slice of two holds everything.
SHARES = {"tensor_parallel": 0.51, "expert": 0.3, "multislice": 0.26, "pipeline": 0.14}
WHOLE = ("single", "data_parallel")
# One size stands for a family: what differs between sizes are numbers, and layers run in one loop.
FAMILIES = ("ec_base", "gemma3_27b", "gshard_base", "mixtral_8x22b", "qwen2_5_72b", "st_moe_32b")
LENGTHS = DataShape(
    64,
    64,
    T5Config.t5_1_1(
        vocab_size=64, embed_dim=8, mlp_dim=8, num_heads=2, head_dim=4, num_encoder_layers=1, num_decoder_layers=1
    ),
)


@pytest.fixture(autouse=True, scope="module")
def _shapes_unchecked():
    """Shapes in place of arrays are no arrays; what is traced is checked where the same losses are tested."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def _lowered(files, bindings):
    """The lowered update, and of the state before it the bytes of a device and those of all parameters and slots."""
    given = configure(
        compiling.compile,
        gin_files=files,
        gin_bindings=bindings,
        arguments={"topology": "v5e:2x4"},
        borrowed={"training": train.train},
    ).build()
    job = compiling.Job.of(given["training"]())
    outline = job.stage.outline(LENGTHS)
    learner = job.learner(outline)
    state = learner.abstract_state(outline.params)
    leaves = jax.tree.leaves((state.params, state.opt_state))
    mine = sum(leaf.dtype.itemsize * _size(leaf.sharding.shard_shape(leaf.shape)) for leaf in leaves)
    whole = sum(leaf.dtype.itemsize * leaf.size for leaf in leaves)
    return learner.lower(outline.params, outline.frozen, outline.batch), mine / whole


def _size(shape):
    size = 1
    for dimension in shape:
        size *= dimension
    return size


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_lowers(name):
    files, bindings = EXAMPLES[name]
    program, share = _lowered((name, *files), bindings)
    assert "func.func public @main" in program.as_text() and share == 1


@pytest.mark.parametrize("table", TABLES)
def test_a_table_lowers_at_full_size(table):
    files = (f"models/{TABLES[table]}.gin", *SUPERVISED, f"sharding/{table}.gin")
    program, share = _lowered(files, ("RUN_DIR='r'", "DATA_DIR='d'"))
    assert "sharding_constraint" in program.as_text()
    # An eighth, half and a quarter, but for what is small and has no dimension of the table.
    assert share == 1 if table in WHOLE else share < SHARES.get(table, 0.13), share


@pytest.mark.parametrize("model", FAMILIES)
def test_a_family_lowers(model):
    files = (f"models/{model}.gin", *SUPERVISED, "sharding/fsdp_tensor.gin")
    program, share = _lowered(files, ("RUN_DIR='r'", "DATA_DIR='d'"))
    assert "sharding_constraint" in program.as_text() and share < 0.13


def test_every_table_is_here():
    tables = {path.stem for path in (shipped_files() / "sharding").glob("*.gin")}
    assert tables == {*TABLES, "rollouts"}  # That one comes on top of another.
