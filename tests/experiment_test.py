"""What an experiment plans and measures; its runs are in `tests/end_to_end/pipeline_test.py`."""

import jax.numpy as jnp
import numpy as np
import pytest

from clp_jax.experiment import Conditioned, Experts, PerWeight, component_separation, experiment
from clp_jax.models.conditioning import ParameterConditioning, Unconditioned
from clp_jax.preferences import Dirichlet
from clp_jax.rewards.programmatic import Brevity, RougeL
from clp_jax.training.clp import ConditionalPolicy
from clp_jax.training.optimizers import AdamW

STAGE = ConditionalPolicy("sft", "data", [RougeL(), Brevity()], Dirichlet(2, 1.0, 0.25))


@pytest.mark.parametrize("method", [Conditioned("full", ParameterConditioning("full", 2)), Experts(), PerWeight(3)])
def test_every_method_spends_the_budget(method):
    assert sum(run.num_steps for run in method.runs(STAGE, 120)) == 120


@pytest.mark.parametrize("methods", [(), ("soup", "dera"), ("sop",)])
def test_experts_are_combined_as_soups_or_mixtures(methods):
    with pytest.raises(ValueError, match=r"Experts.methods are .*: expected 'soup' or 'mod', or both"):
        Experts(methods)


def test_an_experiment_needs_a_seed(tmp_path):
    with pytest.raises(ValueError, match="num_seeds is 0"):
        experiment(output_dir=str(tmp_path), stage=STAGE, optimizer=AdamW(0.1), methods=[], num_steps=2, num_seeds=0)


def test_experts_are_ordinary_policies_at_the_corners():
    runs = Experts().runs(STAGE, 10)
    assert [run.stage.preferences.weights for run in runs] == [((1.0, 0.0),), ((0.0, 1.0),)]
    assert {run.stage.preferences.alpha for run in runs} == {0.25}
    assert {run.stage.conditioning for run in runs} == {Unconditioned()}


def test_one_policy_for_each_weight_of_the_lattice():
    method = PerWeight(2)
    rows = method.sweeps(2)["per_weight"]["weights"]
    assert (
        [list(run.stage.preferences.weights[0]) for run in method.runs(STAGE, 9)]
        == rows
        == [[0, 1], [0.5, 0.5], [1, 0]]
    )


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [((1.0, 0.0), (1.0, 0.0), 0.0), ((1.0, 0.0), (0.0, 1.0), np.sqrt(2)), ((1.0, 0.0), (-1.0, 0.0), 2.0)],
)
def test_separation(first, second, expected):
    reference = {"mixed": jnp.asarray([3.0, 4.0]), "shared": jnp.asarray([1.0])}
    components = {"mixed": jnp.asarray([first, second]) + reference["mixed"][None], "shared": jnp.asarray([7.0])}
    assert component_separation(components, reference) == pytest.approx(expected, abs=1e-6)


def test_no_separation_before_anything_moved():
    reference = {"w": jnp.ones(3)}
    assert component_separation({"w": jnp.ones((2, 3))}, reference) == 0
