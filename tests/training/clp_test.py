"""The multi-objective stage on a tiny T5: resuming to the bit, what it stores, and refusals."""

import dataclasses
import json
import time

import jax
import numpy as np
import pytest
from compilations import before_each_batch, counted
from tiny_policies import tiny_config
from tiny_runs import LENGTHS, MODEL, first_params, make_data, make_supervised

from clp_jax.models.conditioning import ParameterConditioning, PromptConditioning, Unconditioned
from clp_jax.models.config import MoEConfig, PaLMConfig
from clp_jax.models.flops import Sizes
from clp_jax.models.policy import Policy
from clp_jax.models.serialization import from_json, to_json
from clp_jax.nn.routing import Dropless, ExpertChoice, TokenChoice
from clp_jax.preferences import AlphaRange, Dirichlet, corner_sampler, fixed
from clp_jax.rewards.normalisation import RewardStatistics
from clp_jax.rewards.programmatic import Brevity, ExtractiveCoverage, FunctionReward
from clp_jax.train import train
from clp_jax.training.checkpoints import Checkpoints
from clp_jax.training.clp import ConditionalPolicy, WrittenPreference, _check_experts
from clp_jax.training.estimators import LeaveOneOut, ValueBaseline
from clp_jax.training.experience import ExperienceSource
from clp_jax.training.learner import Learner
from clp_jax.training.metrics import TIMING_METRICS, read_metrics
from clp_jax.training.optimizers import Adafactor
from clp_jax.training.policies import load_policy
from clp_jax.training.saved_params import load_params, save_params

FULL = ParameterConditioning("full", 2)
SECONDS = 0.02


def letters(prompts, completions, references):
    time.sleep(SECONDS)
    return [len(text) for text in completions]


REWARDS = (Brevity(limit=4), FunctionReward("letters", letters))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    path = tmp_path_factory.mktemp("home")
    make_data(path / "data")
    make_supervised(path / "sft", path / "data")
    return path


def stage(home, **changes):
    settings = {
        "initial_checkpoint": str(home / "sft"),
        "data_dir": str(home / "data"),
        "rewards": REWARDS,
        "preferences": Dirichlet(2, alpha=0.1),
        "conditioning": FULL,
        "estimator": ValueBaseline(hidden_dim=4),
        "batch_size": 4,
        "num_samples": 2,
        "num_groups": 2,
        "num_chunks": 2,
        "max_length": 4,
        "statistics_prompts": 8,
    }
    return ConditionalPolicy(**settings | changes)


def run(path, home, num_steps, **changes):
    return train(
        run_dir=path,
        stage=stage(home, **changes),
        optimizer=Adafactor(0.05),
        num_steps=num_steps,
        log_every=1,
        checkpoint_every=2,
        seed=3,
    )


def lines(path):
    return [{k: v for k, v in r.items() if k not in TIMING_METRICS} for r in read_metrics(path / "metrics.jsonl")]


def last_state(path, home):
    """The whole state of the last checkpoint, optimizer and random key too, and the position in the data."""
    setup = stage(home).setup(path, seed=3)
    learner = Learner(setup.loss_fn, Adafactor(0.05), logical_axes=setup.logical_axes)
    with Checkpoints(path / "checkpoints") as checkpoints:
        return checkpoints.restore(learner.abstract_state(setup.params))


@pytest.fixture(scope="module")
def whole(home):
    run(home / "whole", home, 5)
    return home / "whole"


class Killed(Exception):
    pass


def test_the_ledger_tells_rollouts_from_learning(whole):
    last = read_metrics(whole / "metrics.jsonl")[-1]
    assert all(last[f"seconds/{name}"] > 0 for name in ("rollout", "step", "data", "save", "compile"))
    assert last["seconds/rollout"] >= 5 * SECONDS  # What a reward takes is no learning, and no reading of data.


def test_resumed_equals_uninterrupted_to_the_bit(tmp_path, home, whole, monkeypatch):
    plain, steps = ExperienceSource.next, []

    def killed_in_step_four(self, state, frozen):
        if int(state.step) == 3 and len(steps) == 3:
            raise Killed
        steps.append(int(state.step))
        return plain(self, state, frozen)

    monkeypatch.setattr(ExperienceSource, "next", killed_in_step_four)
    with pytest.raises(Killed):
        run(tmp_path, home, 5)
    run(tmp_path, home, 5)
    assert steps == [0, 1, 2, 2, 3, 4]  # Step 3 was made again, from the checkpoint of step 2.
    assert lines(tmp_path) == lines(whole)
    assert [r["step"] for r in lines(whole)] == [1, 2, 3, 4, 5]
    assert len({r["reward/brevity"] for r in lines(whole)}) > 1
    (state, position), (expected, expected_position) = last_state(tmp_path, home), last_state(whole, home)
    assert position == expected_position == {"examples": 20} and int(state.step) == 5
    jax.tree.map(np.testing.assert_array_equal, state, expected)
    for name in ("rewards.json", "description.json"):
        assert (tmp_path / name).read_bytes() == (whole / name).read_bytes()


def test_nothing_is_compiled_after_the_first_checkpoint(tmp_path, home, monkeypatch):
    with counted() as programs:
        seen = before_each_batch(monkeypatch, ExperienceSource, programs)
        run(tmp_path, home, 5)
        seen.append(len(programs))
    assert seen[1] > seen[0] > 0 and len(set(seen[3:])) == 1, seen  # Steps 4 and 5, with another checkpoint between.


def test_the_run_directory_rebuilds_the_policy_and_its_reference(home, whole):
    loaded, (sft, _, _) = load_policy(whole), load_params(home / "sft")
    assert loaded.step == 5 and loaded.conditioning == FULL and loaded.policy.config == MODEL
    assert loaded.objectives == ("brevity", "letters") and loaded.max_length == 4
    jax.tree.map(np.testing.assert_array_equal, loaded.reference, sft)
    # Every component learned, and they came apart.
    moved = jax.tree.map(lambda p, r: np.abs(p - r[None]).max(axis=tuple(range(1, p.ndim))), loaded.params, sft)
    assert np.all(sum(jax.tree.leaves(moved)) > 0)
    assert any(np.any(np.asarray(p[0]) != np.asarray(p[1])) for p in jax.tree.leaves(loaded.params))
    metrics = lines(whole)[-1]
    expected = {"loss", "kl", "objective", "reward/brevity", "reward/letters", "reward/weighted", "length", "finished"}
    assert expected | {"value_loss", "value_explained_variance"} <= metrics.keys()


def test_every_component_starts_as_the_supervised_policy(tmp_path, home):
    setup = stage(home).setup(tmp_path, seed=0)
    jax.tree.map(
        lambda p, r: np.testing.assert_array_equal(p, np.stack([r, r])),
        first_params(setup)["policy"],
        setup.frozen["reference"],
    )
    assert setup.tokens_per_batch == 4 * 2 * 4
    with pytest.raises(TypeError, match="FunctionReward can't be stored"):
        to_json(REWARDS[1])  # A run's description names rewards, it does not store them.
    assert from_json(json.loads(json.dumps(setup.describe()["conditioning"]))) == FULL


def test_statistics_are_fitted_once_on_the_reference_and_frozen(tmp_path, home):
    stage(home).setup(tmp_path, seed=0)
    fitted = RewardStatistics.load(tmp_path)
    assert fitted.count == 8 and fitted.names == ("brevity", "letters")
    changed = dataclasses.replace(fitted, mean=(5.0, 5.0))
    changed.save(tmp_path)
    setup = stage(home).setup(tmp_path, seed=1)
    assert setup.source._rewards._statistics == changed


def test_a_written_preference_becomes_tokens(tmp_path, home):
    setup = stage(home, conditioning=WrittenPreference(bins=3), num_groups=1).setup(tmp_path, seed=0)
    conditioning = setup.loss_fn.conditioning
    assert isinstance(conditioning, PromptConditioning) and conditioning.num_objectives == 2
    assert from_json(setup.describe()["conditioning"]) == conditioning


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"preferences": Dirichlet(3)}, r"draws 3 weights, but the rewards are 2 objectives: brevity, letters"),
        ({"preferences": fixed((1.0,))}, r"draws 1 weights, but the rewards are 2 objectives"),
        (
            {"rewards": (*REWARDS, ExtractiveCoverage())},
            r"draws 2 weights, but the rewards are 3 objectives: brevity, letters, coverage",
        ),
        (
            {"conditioning": ParameterConditioning("full", 3)},
            r"conditioning mixes 3 objectives, but the rewards are 2: brevity, letters",
        ),
        ({"preferences": corner_sampler(2), "num_groups": 1, "num_chunks": 1}, "draws all 2 rows in turn"),
        ({"rewards": ()}, "no rewards"),
        ({"rewards": (Brevity(), Brevity())}, "two rewards are called 'brevity'"),
    ],
)
def test_numbers_of_objectives_must_agree(tmp_path, home, changes, message):
    with pytest.raises(ValueError, match=message):
        stage(home, **changes).setup(tmp_path, seed=0)
    assert not any(tmp_path.iterdir())  # Nothing was written.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"num_samples": 0}, "num_samples is 0"),
        ({"num_groups": 3}, "a batch of 4 prompts does not divide into num_groups=3"),
        ({"num_chunks": 3}, "does not divide into num_chunks=3"),
        ({"num_groups": 2, "num_chunks": 4}, "num_groups=2 must be 1 or a multiple of num_chunks=4"),
    ],
)
def test_settings_are_checked_at_once(home, changes, message):
    with pytest.raises(ValueError, match=message):
        stage(home, **changes)


def test_leaving_one_out_needs_several_samples(tmp_path, home):
    with pytest.raises(ValueError, match="num_samples is 1, expected >= 2"):
        stage(home, estimator=LeaveOneOut(), num_samples=1).setup(tmp_path, seed=0)


@pytest.mark.parametrize("alpha", [0.05, AlphaRange(0.05, 1.0)], ids=["fixed", "range"])
def test_a_kl_weight_below_what_conditioning_reaches_is_refused(tmp_path, home, alpha):
    preferences = Dirichlet(2, alpha=alpha)
    conditioning = ParameterConditioning("full", 2, alpha_min=0.1)
    with pytest.raises(ValueError, match=r"alpha is 0.05: this policy is conditioned on KL weights from alpha_min=0.1"):
        stage(home, preferences=preferences, conditioning=conditioning).setup(tmp_path, seed=0)


def test_a_reward_that_never_varies_is_refused(tmp_path, home):
    flat = FunctionReward("flat", lambda p, completions, r: [1.0] * len(completions))
    with pytest.raises(ValueError, match="reward 'flat' has mean 1.0 and standard deviation 0.0"):
        stage(home, rewards=(REWARDS[0], flat)).setup(tmp_path, seed=0)


def test_another_vocabulary_is_refused(tmp_path, home):
    params, description, _ = load_params(home / "sft")
    save_params(tmp_path / "other", params, description | {"vocabulary": "another"})
    with pytest.raises(ValueError, match="trained with another vocabulary than .*data was prepared with"):
        stage(home, initial_checkpoint=str(tmp_path / "other")).setup(tmp_path / "run", seed=0)


def test_only_a_supervised_policy_may_be_the_reference(tmp_path, home, whole):
    with pytest.raises(ValueError, match="is a run of stage 'clp': expected a supervised or a converted policy"):
        stage(home, initial_checkpoint=str(whole)).setup(tmp_path, seed=0)


def test_an_unconditioned_policy_has_one_copy(tmp_path, home):
    setup = stage(home, conditioning=Unconditioned(), preferences=fixed((1.0, 0.0))).setup(tmp_path, seed=0)
    jax.tree.map(np.testing.assert_array_equal, first_params(setup)["policy"], setup.frozen["reference"])
    assert LENGTHS["targets"] == setup.source._data.manifest.lengths["targets"]


# Two prompts of eight tokens, three completions of sixteen.
SIZES = Sizes(prompts=2, inputs=8, rows=3, targets=16)


def test_experts_that_drop_tokens_are_refused():
    """A decoding step has room for every token; a whole forward has not: they would be two policies."""

    def check(router):
        moe = MoEConfig(num_experts=4, router=TokenChoice(), decoder_router=router)
        _check_experts(Policy(tiny_config(moe=moe)), SIZES)

    check(Dropless(2))
    check(TokenChoice(eval_capacity=4.0))
    check(TokenChoice(eval_capacity=4.0, group="batch"))
    check(TokenChoice(fixed_capacity=16))
    with pytest.raises(ValueError, match="room for 16 of 48 tokens"):
        check(TokenChoice(fixed_capacity=16, group="batch"))
    with pytest.raises(
        ValueError, match="room for 8 of 16 tokens.* eval_capacity of at least the number of experts, 4"
    ):
        check(TokenChoice(eval_capacity=2.0))
    _check_experts(Policy(tiny_config()), SIZES)


def test_prompts_that_share_experts_are_refused():
    """A rollout reads them in chunks, an update in micro-batches: other tokens would find room."""
    sizes = dict(vocab_size=11, embed_dim=8, mlp_dim=12, num_heads=2, head_dim=4, num_layers=1)
    batch = TokenChoice(eval_capacity=4.0, group="batch")

    def check(router, decoder_router=None):
        moe = MoEConfig(num_experts=4, router=router, decoder_router=decoder_router or batch)
        _check_experts(Policy(tiny_config(moe=moe)), SIZES)

    for fine in (ExpertChoice(), TokenChoice(eval_capacity=0.5), Dropless(2), ExpertChoice(eval_capacity=4.0, group=8)):
        check(fine)
    says = (
        "prompts have room for 8 of 16 tokens, and with group='batch' prompts share it: .* Use group='row', a Dropless"
    )
    with pytest.raises(ValueError, match=says):
        check(ExpertChoice(eval_capacity=2.0, group="batch"))
    with pytest.raises(ValueError, match="room for 4 of 8 tokens, and with group=9 prompts share it"):
        check(TokenChoice(eval_capacity=2.0, group=9))
    # A decoder's experts read prompts too, longer ones than completions here.
    decoder = MoEConfig(num_experts=4, router=TokenChoice(fixed_capacity=48, group="batch"))
    _check_experts(Policy(PaLMConfig.llama(**sizes, moe=decoder)), SIZES)
    with pytest.raises(ValueError, match="room for 48 of 80 tokens, and with group='batch'"):
        _check_experts(Policy(PaLMConfig.llama(**sizes, moe=decoder)), dataclasses.replace(SIZES, inputs=40))


def test_a_policy_gets_components_for_more_rewards(tmp_path, home, whole, capsys):
    trained, _, step = load_params(whole)
    more = FunctionReward("vowels", lambda p, c, r: [sum(letter in "aeiou" for letter in text) for text in c])
    three = {"conditioning": ParameterConditioning("full", 3), "preferences": Dirichlet(3, alpha=0.1)}
    changes = three | {"rewards": (*REWARDS, more), "initial_policy": str(whole)}
    params = first_params(stage(home, **changes).setup(tmp_path, seed=0))
    said = capsys.readouterr().err
    fresh = first_params(stage(home, **changes | {"initial_policy": None}).setup(tmp_path, seed=0))
    components = [jax.tree.map(lambda leaf, i=i: leaf[i], params["policy"]) for i in range(3)]
    for i in range(2):
        kept = jax.tree.map(lambda leaf, i=i: leaf[i], trained["policy"])
        jax.tree.map(np.testing.assert_array_equal, components[i], kept)
    jax.tree.map(np.testing.assert_array_equal, components[2], load_params(home / "sft")[0])
    jax.tree.map(np.testing.assert_array_equal, params["baseline"], fresh["baseline"])
    assert f"{whole}, step {step}: initialised " in said and "; grown " in said and "; ignored " in said
    (tmp_path / "other").mkdir()
    with pytest.raises(ValueError, match="with the rewards brevity, letters: they must come first, in that order"):
        stage(home, **changes | {"rewards": (*reversed(REWARDS), more)}).setup(tmp_path / "other", seed=0)
    with pytest.raises(ValueError, match="sft is no run of this stage with the supervised policy's model"):
        stage(home, **changes | {"initial_policy": str(home / "sft")}).setup(tmp_path, seed=0)
