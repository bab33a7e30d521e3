"""The figures of a sweep from its samples, `results.json`, and a sweep of a tiny policy."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from sweeps import NAMES, make_samples, make_sweep
from tiny_runs import MODEL, REWARDS, make_data, make_steerable, make_supervised

from clp_jax.evaluate import evaluate
from clp_jax.evaluation.pareto import hypervolume, non_dominated
from clp_jax.evaluation.statistics import bootstrap
from clp_jax.evaluation.sweep import REFERENCE_POINT, Sweep
from clp_jax.models.config import MoEConfig
from clp_jax.nn.routing import TokenChoice
from clp_jax.rewards.programmatic import Brevity, ExtractiveCoverage


@pytest.mark.parametrize("names", [NAMES, ("a", "b", "c")])
def test_the_figures_are_those_of_the_samples(names):
    samples, sweep = make_samples(names), make_sweep(names)
    means = np.asarray([s.rewards.mean(0) for s in samples])
    np.testing.assert_allclose(sweep.means(), means, rtol=1e-12)
    assert sweep.hypervolume == hypervolume(means, np.full(len(names), REFERENCE_POINT))
    for point, s, kept in zip(sweep.points, samples, non_dominated(means), strict=True):
        assert point.weights == s.weights and point.non_dominated == kept
        assert point.kl == bootstrap(s.kl) and point.length == bootstrap(s.length)
        for k, name in enumerate(names):
            assert point.rewards[name] == bootstrap(s.rewards[:, k])
            np.testing.assert_allclose(
                point.raw_rewards[name], 0.5 + k + 0.25 * (k + 1) * s.rewards[:, k].mean(), rtol=1e-12
            )
        value = (s.rewards @ s.weights * 0.9 - 0.1 * s.kl).mean()
        np.testing.assert_allclose(point.value, value, rtol=1e-12)
    np.testing.assert_allclose(sweep.mean_value, np.mean([p.value for p in sweep.points]), rtol=1e-12)
    for k, name in enumerate(names):
        assert sweep.steerability[name].rank_correlation > 0.9
        np.testing.assert_allclose(sweep.steerability[name].range, np.ptp(means[:, k]), rtol=1e-12)
    assert sweep.num_prompts == 20 and [e.completions[0] for e in sweep.examples] == [
        f"completion {i} at {samples[0].weights[0]:.2f}" for i in range(3)
    ]


def test_a_policy_that_does_not_move_has_no_steerability():
    samples = [dataclasses.replace(s, rewards=np.ones((20, 2))) for s in make_samples()]
    sweep = make_sweep(samples=samples)
    assert [dataclasses.astuple(s) for s in sweep.steerability.values()] == [(0.0, 0.0)] * 2
    assert all(p.non_dominated for p in sweep.points)
    assert sweep.hypervolume == (1 - REFERENCE_POINT) ** 2


def test_results_come_back_as_they_were(tmp_path):
    sweep = make_sweep(settings={"seed": 1, "weights": [[0.1, 0.9]]})
    sweep.save(tmp_path / "results.json")
    assert Sweep.load(tmp_path) == Sweep.load(tmp_path / "results.json") == sweep
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]  # Nothing half-written beside it.


def test_the_schema(tmp_path):
    make_sweep().save(tmp_path / "results.json")
    content = json.loads((tmp_path / "results.json").read_text())
    assert content.keys() == {
        *("version", "method", "objectives", "alpha", "reference_mean", "reference_std", "points", "hypervolume"),
        *("mean_value", "steerability", "examples", "num_prompts", "decode_calls_per_token", "settings"),
    }
    point = content["points"][0]
    assert point.keys() == {"weights", "rewards", "raw_rewards", "kl", "length", "value", "non_dominated"}
    assert point["rewards"].keys() == point["raw_rewards"].keys() == content["steerability"].keys() == set(NAMES)
    interval = {"mean", "low", "high"}
    assert point["kl"].keys() == point["length"].keys() == point["rewards"]["brief"].keys() == interval
    assert content["steerability"]["brief"].keys() == {"rank_correlation", "range"}
    assert content["examples"][0].keys() == {"prompt", "reference", "completions"}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[1]",
        "{}",
        '{"version": 2}',
        '{"version": 1}',
        '{"version": 1, "points": [{}]}',
        '{"version": 1, "points": 3}',
    ],
)
def test_damaged_results_are_named(tmp_path, text):
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(ValueError, match=r"results.json is not a results file of `clp evaluate`"):
        Sweep.load(tmp_path)


def test_missing_results_say_what_to_run(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no results at .*results.json: run `clp evaluate` first"):
        Sweep.load(tmp_path)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    path = tmp_path_factory.mktemp("home")
    make_data(path / "data")
    make_supervised(path / "sft", path / "data", MODEL)
    return path


def sweep_of(path, home, **changes):
    settings = dict(data_dir=str(home / "data"), rewards=REWARDS, num_prompts=6, batch_size=4, resolution=4, seed=5)
    return evaluate(checkpoint=str(path), **settings | changes)


def test_equal_components_write_the_same_at_every_weight(home):
    """Random numbers are common: only the weights differ between points, and here they can't matter."""
    sweep = sweep_of(make_steerable(home, "equal", lambda params, k: params), home)
    assert [p.weights for p in sweep.points] == [(0.0, 1.0), (0.25, 0.75), (0.5, 0.5), (0.75, 0.25), (1.0, 0.0)]
    for example in sweep.examples:
        assert len(set(example.completions)) == 1
    assert len({example.completions[0] for example in sweep.examples}) > 1
    first = sweep.points[0]
    assert all(
        (p.rewards, p.raw_rewards, p.length) == (first.rewards, first.raw_rewards, first.length) for p in sweep.points
    )
    # The policy is its reference.
    np.testing.assert_allclose([p.kl.mean for p in sweep.points], 0, atol=1e-5)
    assert all(s.range == 0 and s.rank_correlation == 0 for s in sweep.steerability.values())


def test_a_sweep_of_a_tiny_policy(home, capsys):
    def differing(params, k):
        rng = np.random.default_rng(k)
        return jax.tree.map(lambda p: np.asarray(p + 0.3 * rng.normal(size=p.shape), np.float32), params)

    path = make_steerable(home, "differing", differing)
    sweep = sweep_of(path, home)
    assert Sweep.load(path) == sweep and sweep.method == "differing" and sweep.num_prompts == 6
    assert len(sweep.points) == 5 and len(sweep.examples) == 6
    assert any(len(set(example.completions)) > 1 for example in sweep.examples)
    for point in sweep.points:
        assert 1 <= point.length.mean <= 4 and np.isfinite(point.kl.mean)
        np.testing.assert_allclose(point.raw_rewards["letters"], 2.0 + 1.5 * point.rewards["letters"].mean, rtol=1e-6)
    np.testing.assert_allclose(sweep.hypervolume, hypervolume(sweep.means(), np.full(2, REFERENCE_POINT)), rtol=1e-12)
    written = (path / "results.json").stat().st_mtime_ns
    assert sweep_of(path, home) == sweep and (path / "results.json").stat().st_mtime_ns == written
    assert "nothing to do" in capsys.readouterr().err


def test_a_prompt_is_evaluated_alone(home):
    """Whatever fills its batch up, where training shared the room of experts over a batch too."""
    router = TokenChoice(train_capacity=2.0, eval_capacity=0.5, group="batch")
    model = dataclasses.replace(MODEL, moe=MoEConfig(num_experts=2, router=router))
    make_supervised(home / "crowded_sft", home / "data", model)
    found = []
    for batch_size in (6, 8):
        path = make_steerable(home, f"crowded{batch_size}", lambda params, k: params, "crowded_sft")
        found.append(sweep_of(path, home, batch_size=batch_size, weights=[[0.5, 0.5]]).points[0])
    assert found[0].kl.mean != 0  # Something is dropped.
    np.testing.assert_allclose(found[0].kl.mean, found[1].kl.mean, rtol=1e-5)
    assert found[0].raw_rewards == found[1].raw_rewards


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"rewards": (*REWARDS, ExtractiveCoverage())},
            "was trained for brevity, letters; the rewards given are brevity, letters, coverage",
        ),
        ({"rewards": REWARDS[::-1]}, "the rewards given are letters, brevity: give the run's, in its order"),
        ({"rewards": (Brevity(limit=5), REWARDS[1])}, "trained with another reward 'brevity' than the one given"),
        ({"alpha": 1.5}, "alpha"),
        ({"weights": [[0.2, 0.3, 0.5]]}, "3 numbers: expected 2, one per objective"),
        ({"weights": [[0.2, 0.3]]}, "sum to 0.5: expected 1"),
        ({"method": "soups"}, "unknown method 'soups'"),
        ({"num_prompts": 0}, "num_prompts=0"),
    ],
)
def test_a_sweep_of_other_objectives_is_refused(home, changes, message):
    path = (
        home / "refused" if (home / "refused").exists() else make_steerable(home, "refused", lambda params, k: params)
    )
    with pytest.raises(ValueError, match=message):
        sweep_of(path, home, **changes)
    assert not (path / "results.json").exists()
