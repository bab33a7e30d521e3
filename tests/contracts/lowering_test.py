"""One train step of every shipped gin file lowers for TPUs, at full size, on a mesh of no devices: nothing is made or compiled.

Of reinforcement learning the rollout and what it begins with, too. Files that say what slice they are for have a mesh of its size
and their own lengths; the others eight chips and short rows, models with their layers and experts split among them.
"""

import dataclasses
import math

import jax
import pytest
from gin_uses import COMPLETE, use
from jax.sharding import AbstractDevice, AbstractMesh
from shape_checker import unchecked
from tiny_policies import tiny_config, varied_params
from tiny_runs import WORDS

from clp_jax import compile as compiling
from clp_jax import train
from clp_jax.compilation.topology import Topology
from clp_jax.data.vocabulary import Vocabulary, train_vocabulary
from clp_jax.gin_utils.configuration import configure
from clp_jax.gin_utils.files import shipped_files
from clp_jax.models.config import T5Config
from clp_jax.models.heads import ScorerConfig
from clp_jax.models.policy import Policy
from clp_jax.models.serialization import to_json
from clp_jax.partitioning import make_mesh, use_devices
from clp_jax.rewards.stack import objective_names
from clp_jax.training.clp import WrittenPreference
from clp_jax.training.learner import Learner, learner_settings
from clp_jax.training.saved_params import save_params
from clp_jax.training.stage import DataShape

TRAINED = [name for name in COMPLETE if use(name)[0] == "train"]
SUPERVISED = ("algorithms/adafactor.gin", "runs/supervised.gin")
REWARDS = ("preference", "faithfulness")
# A table, and a model that shows it.
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
INITIAL = T5Config.t5_1_1(
    vocab_size=64, embed_dim=8, mlp_dim=8, num_heads=2, head_dim=4, num_encoder_layers=1, num_decoder_layers=1
)
SHORT = DataShape(64, 64, INITIAL)
EIGHT = "v5e:2x4"


@pytest.fixture(autouse=True, scope="module")
def _shapes_unchecked():
    """Shapes in place of arrays are no arrays; what is traced is checked where the same losses are tested."""
    with unchecked():
        yield


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Reward models, which are read when a configuration is built, and a vocabulary."""
    home = tmp_path_factory.mktemp("home")
    train_vocabulary([" ".join(WORDS), " ".join(reversed(WORDS))], 32, home / "vocabulary.model")
    scorer = ScorerConfig(tiny_config(vocab_size=32, num_encoder_layers=1, num_decoder_layers=1))
    for name in REWARDS:
        description = {"stage": f"reward_{name}", "name": name, "model": to_json(scorer), "document_length": 8}
        description |= {"vocabulary": Vocabulary.load(home).fingerprint}
        save_params(home / name / "checkpoints" / "1", varied_params(Policy(scorer)), description, step=1)
    return home


def configured(files, bindings, home):
    """Of `clp compile`, with the arguments of `clp train`."""
    macros = configure(train.train, gin_files=files, gin_bindings=bindings).text
    learned = [f"{name.upper()}_DIR={str(home / name)!r}" for name in REWARDS if f"\n{name.upper()}_DIR = " in macros]
    arguments = {} if files[0].startswith("scale/") else {"topology": EIGHT}
    return configure(
        compiling.compile,
        gin_files=files,
        gin_bindings=(*bindings, *learned),
        arguments=arguments,
        borrowed={"training": train.train},
    )


def outlined(configuration, home):
    """The stage as shapes, and its learner on a mesh of no devices, which was made of stand-ins for those of its slices."""
    given = configuration.build()
    topology = Topology.parse(given["topology"], given.get("num_slices", 1))
    with use_devices(topology.stand_ins()):
        training = given["training"]()
        place = training.get("mesh") or make_mesh()
    stage = training["stage"]
    if isinstance(getattr(stage, "conditioning", None), WrittenPreference):
        tokenised = stage.conditioning.tokenise(objective_names(stage.rewards), Vocabulary.load(home), INITIAL.pad_id)
        stage = dataclasses.replace(stage, conditioning=tokenised)
    data = SHORT if given["topology"] == EIGHT else DataShape(given["inputs"], given["targets"], given["model"])
    outline = stage.outline(data)
    device = AbstractDevice(topology.chip.name, 1, "tpu")
    mesh = AbstractMesh(
        tuple(place.shape.values()), place.axis_names, axis_types=place.axis_types, abstract_device=device
    )
    return outline, Learner.for_stage(outline, **learner_settings(training) | {"mesh": mesh})


def lower_all(outline, learner):
    """The programs of a step, lowered for TPUs: of reinforcement learning rollouts, too."""
    traced = {"update": learner.trace(outline.params, outline.frozen, outline.batch)}
    with learner.activate():
        for name, program in outline.programs.items():
            arguments = [learner.abstract(*pair) for pair in zip(program.arguments, program.logical_axes, strict=True)]
            traced[name] = jax.jit(program.function).trace(*arguments)
    return {name: program.lower(lowering_platforms=("tpu",)).as_text() for name, program in traced.items()}


def share(outline, learner):
    """Of the bytes of all parameters and slots, those of one device."""
    state = learner.abstract_state(outline.params)
    leaves = jax.tree.leaves((state.params, state.opt_state))
    mine = sum(leaf.dtype.itemsize * math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in leaves)
    return mine / sum(leaf.dtype.itemsize * leaf.size for leaf in leaves)


@pytest.fixture(scope="module")
def lowered(home):
    """By configuration, since several files show the same one at work: devices, the share of one, and programs."""
    found = {}

    def once(files, bindings):
        configuration = configured(files, bindings, home)
        if configuration.text not in found:
            outline, learner = outlined(configuration, home)
            found[configuration.text] = learner.mesh.size, share(outline, learner), lower_all(outline, learner)
        return found[configuration.text]

    return once


@pytest.mark.parametrize("name", TRAINED)
def test_it_lowers(name, lowered):
    _, files, bindings = use(name)
    if name.startswith("models/"):
        files = (*files, "sharding/fsdp_tensor.gin")
    devices, part, programs = lowered(files, bindings)
    assert part < 0.13 or not name.startswith("models/")  # An eighth, but for what is small and does not divide.
    for program, text in programs.items():
        assert "@main" in text and (devices == 1 or "sharding" in text), program


@pytest.mark.parametrize("table", TABLES)
def test_a_table_shares_parameters_and_slots_evenly(table, home):
    """An eighth, half and a quarter, but for what is small and has no dimension of the table."""
    files = (f"models/{TABLES[table]}.gin", *SUPERVISED, f"sharding/{table}.gin")
    outline, learner = outlined(configured(files, ("RUN_DIR='r'", "DATA_DIR='d'"), home), home)
    found = share(outline, learner)
    assert found == 1 if table in WHOLE else found < SHARES.get(table, 0.13), found


def test_every_table_is_here():
    tables = {path.stem for path in (shipped_files() / "sharding").glob("*.gin")}
    assert tables == {*TABLES, "rollouts"}  # That one comes on top of another.
