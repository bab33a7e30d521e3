"""The reward vector: names, order, shapes, numbers that are not finite, and work in the background."""

import re
import threading

import numpy as np
import pytest

from clp_jax.rewards.normalisation import RewardStatistics
from clp_jax.rewards.programmatic import Brevity, FunctionReward
from clp_jax.rewards.protocol import RewardInputs
from clp_jax.rewards.stack import RewardStack, fingerprint, objective_names

TOKENS = np.zeros((3, 2), np.int32)
INPUTS = RewardInputs(["p"] * 3, ["a", "b c", "d e f"], ["r"] * 3, TOKENS, TOKENS)


class Given:
    """Several objectives at once, as they are given."""

    def __init__(self, names, values):
        self.names, self.values = names, values

    def __call__(self, inputs):
        return self.values


def constant(name, *values):
    return FunctionReward(name, lambda p, c, r: list(values))


def test_columns_stand_in_the_order_of_the_functions():
    pair = Given(("x", "y"), np.asarray([[1, 10], [2, 20], [3, 30]], np.float64))
    stack = RewardStack([constant("first", 7, 8, 9), pair, Brevity(4)])
    assert stack.names == ("first", "x", "y", "brevity")
    expected = np.asarray([[7, 1, 10, 0.75], [8, 2, 20, 0.5], [9, 3, 30, 0.25]], np.float32)
    for rewards in (stack.raw(INPUTS), stack(INPUTS), stack.submit(INPUTS).result()):
        assert rewards.dtype == np.float32
        np.testing.assert_array_equal(rewards, expected)


def test_statistics_standardise_the_call_and_leave_the_raw_rewards():
    statistics = RewardStatistics(("a", "b"), (1.0, -2.0), (0.5, 4.0), 9)
    stack = RewardStack([constant("a", 1, 2, 3), constant("b", -2, 2, 0)], statistics)
    np.testing.assert_array_equal(stack(INPUTS), [[0, 0], [2, 1], [4, 0.5]])
    np.testing.assert_array_equal(stack.raw(INPUTS), [[1, -2], [2, 2], [3, 0]])


@pytest.mark.parametrize("names", [("b", "a"), ("a",), ("a", "b", "c"), ("a", "c")])
def test_statistics_of_other_rewards_are_refused(names):
    statistics = RewardStatistics(names, (0.0,) * len(names), (1.0,) * len(names), 9)
    with pytest.raises(ValueError, match=f"the rewards are a, b, but their statistics are of {', '.join(names)}"):
        RewardStack([constant("a", 1), constant("b", 1)], statistics)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_named_with_its_completion(value):
    stack = RewardStack([constant("fine", 1, 2, 3), constant("broken", 1, value, np.nan)])
    with pytest.raises(ValueError, match=rf"reward broken is \[ *{value}\] for the completion 'b c': not finite"):
        stack(INPUTS)


@pytest.mark.parametrize("shape", [(3,), (3, 1), (2, 2), (3, 3), ()])
def test_another_shape_is_named(shape):
    stack = RewardStack([Given(("x", "y"), np.zeros(shape))])
    expected = f"reward x, y has shape {shape}: expected (3, 2), completions by objectives."
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
        stack.raw(INPUTS)


def test_names_are_there_and_differ():
    with pytest.raises(ValueError, match="no rewards: expected at least one reward function"):
        RewardStack([])
    with pytest.raises(ValueError, match="two rewards are called 'b': give each its own name"):
        RewardStack([Given(("a", "b"), None), constant("b", 1)])
    assert objective_names([Given(("a", "b"), None), constant("c", 1)]) == ("a", "b", "c")


def test_rewards_are_computed_in_the_background_one_batch_at_a_time():
    release, threads = threading.Event(), []

    def waits(prompts, completions, references):
        threads.append(threading.current_thread())
        assert release.wait(timeout=30)
        return [1.0, 2.0, 3.0]

    stack = RewardStack([FunctionReward("slow", waits)])
    futures = [stack.submit(INPUTS) for _ in range(3)]
    assert not any(future.done() for future in futures)
    release.set()
    for future in futures:
        np.testing.assert_array_equal(future.result(), [[1], [2], [3]])
    assert len(threads) == 3 and len(set(threads)) == 1 and threads[0] is not threading.main_thread()


def test_a_mistake_in_the_background_is_raised_where_the_result_is_asked_for():
    future = RewardStack([constant("broken", 1, 2)]).submit(INPUTS)
    with pytest.raises(ValueError, match="reward 'broken': its function gave list"):
        future.result()


def test_a_fingerprint_tells_settings_and_code_apart():
    def short(prompts, completions, references):
        return [1.0 / (1 + len(text)) for text in completions]

    def long(prompts, completions, references):
        return [float(len(text)) for text in completions]

    known = [Brevity(), Brevity(limit=9), FunctionReward("f", short), FunctionReward("f", long)]
    assert len({fingerprint(reward) for reward in known}) == 4
    assert fingerprint(Brevity(limit=9)) == fingerprint(known[1])
    assert fingerprint(FunctionReward("f", short)) == fingerprint(known[2])
