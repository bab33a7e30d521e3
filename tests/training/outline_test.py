"""What stages say of themselves without data, against what they set up with it."""

import dataclasses

import jax
import numpy as np
import pytest
from tiny_runs import LENGTHS, MODEL, first_params, make_data, make_supervised

from clp_jax.models.conditioning import ParameterConditioning
from clp_jax.models.flops import Sizes, forward_flops, prompt_flops
from clp_jax.preferences import AlphaRange, Dirichlet
from clp_jax.rewards.programmatic import FunctionReward
from clp_jax.training.clp import ConditionalPolicy, WrittenPreference
from clp_jax.training.learner import Learner
from clp_jax.training.optimizers import AdamW
from clp_jax.training.reward_models import RewardModel
from clp_jax.training.schedules import Constant
from clp_jax.training.stage import DataShape
from clp_jax.training.supervised import Supervised

DATA = DataShape(LENGTHS["inputs"], LENGTHS["targets"], MODEL)


def long(prompts, completions, references):
    return [float(len(text)) for text in completions]


def even(prompts, completions, references):
    return [float(len(text) % 2) for text in completions]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    make_supervised(home / "sft", make_data(home / "data"))
    return home


def stages(home) -> dict:
    data = str(home / "data")
    return {
        "supervised": Supervised(MODEL, data, batch_size=4),
        "reward": RewardModel("r", data, MODEL, "preference", ["foreign"], batch_size=4),
        "clp": ConditionalPolicy(
            str(home / "sft"),
            data,
            [FunctionReward("long", long), FunctionReward("even", even)],
            Dirichlet(2, alpha=AlphaRange(0.1, 0.5)),
            ParameterConditioning("full", 2, 0.05),
            batch_size=4,
            num_samples=2,
            num_groups=2,
            num_chunks=2,
            max_length=3,
            statistics_prompts=4,
        ),
    }


def shapes(tree):
    return jax.tree.map(lambda x: (tuple(x.shape), str(x.dtype)), tree)


def shapes_of_leaves(tree):
    return [shapes(leaf) for leaf in jax.tree.leaves(tree)]


@pytest.mark.parametrize("name", ["supervised", "reward", "clp"])
def test_an_outline_is_what_is_set_up(home, tmp_path, name):
    stage = stages(home)[name]
    outline, setup = stage.outline(DATA), stage.setup(tmp_path, 0)
    assert shapes(outline.params) == shapes(jax.eval_shape(lambda: first_params(setup)))
    assert shapes(outline.frozen) == shapes(setup.frozen)
    assert outline.logical_axes == setup.logical_axes
    assert outline.frozen_logical_axes == setup.frozen_logical_axes
    assert outline.tokens_per_batch == setup.tokens_per_batch
    learner = Learner(outline.loss_fn, AdamW(Constant(1e-3)), logical_axes=outline.logical_axes)
    state = learner.init_state(setup.params, 0)
    batch, _ = setup.source.next(state, learner.place_frozen(setup.frozen))
    assert shapes_of_leaves(outline.batch) == shapes_of_leaves(batch)
    assert jax.tree.structure(outline.batch) == jax.tree.structure(batch)
    # And what it lowers to gives what an update gives.
    lowered = learner.lower(outline.params, outline.frozen, outline.batch)
    expected = jax.eval_shape(learner.update, state, setup.frozen, learner.place_batch(batch))
    assert shapes_of_leaves(lowered.out_info) == shapes_of_leaves(expected)


def test_the_programs_of_reinforcement_learning(home):
    outline = stages(home)["clp"].outline(DATA)
    chunk = Sizes(prompts=2, inputs=8, rows=4, targets=3)
    assert set(outline.programs) == {"prefill", "rollout"}
    assert outline.programs["prefill"].flops == prompt_flops(MODEL, chunk)
    assert outline.programs["rollout"].flops == 2 * forward_flops(MODEL, chunk)
    assert outline.programs["rollout"].tokens == 4 * 3 and outline.programs["rollout"].trips == 3
    assert [(name, program.runs) for name, program in outline.programs.items()] == [("prefill", 0), ("rollout", 2)]
    for program in outline.programs.values():
        made = jax.eval_shape(program.function, *program.arguments)
        assert all(np.prod(leaf.shape) > 0 for leaf in jax.tree.leaves(made) if leaf.shape)


def test_what_needs_data_says_so(home):
    stage = stages(home)["clp"]
    with pytest.raises(ValueError, match="give its model"):
        stage.outline(DataShape(8, 5))
    with pytest.raises(ValueError, match="need a vocabulary"):
        dataclasses.replace(stage, conditioning=WrittenPreference()).outline(DATA)


@pytest.mark.parametrize(("inputs", "targets"), [(-1, 4), (4, 0)])
def test_lengths_are_checked(inputs, targets):
    with pytest.raises(ValueError, match="DataShape"):
        DataShape(inputs, targets)
