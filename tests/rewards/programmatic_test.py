"""Programmatic rewards against their definitions, computed another way; functions of the user's, and their mistakes."""

import functools
import string

import numpy as np
import pytest
from rouge_score import rouge_scorer

from clp_jax.models.serialization import from_json, to_json
from clp_jax.rewards.programmatic import (
    Brevity,
    ExtractiveCoverage,
    FunctionReward,
    RougeL,
    coverage,
    extractive_fragments,
    words,
)
from clp_jax.rewards.protocol import RewardFunction, RewardInputs

TEXTS = [
    "",
    "...",
    "word",
    "The quick brown fox.",
    "the QUICK-brown, fox jumps_over it2 2 3.14",
    "fox brown quick the",
    "a a a b a b a",
    "naïve café 漢字",
]


def inputs(completions, prompts=None, references=None) -> RewardInputs:
    rows = len(completions)
    empty = [""] * rows
    return RewardInputs(prompts or empty, completions, references or empty, *[np.zeros((rows, 2), np.int32)] * 2)


def random_texts(seed, count, vocabulary="abcde", most=9):
    rng = np.random.default_rng(seed)
    return [list(rng.choice(list(vocabulary), rng.integers(0, most))) for _ in range(count)]


def longest_common_subsequence(a, b) -> int:
    """By the definition."""

    @functools.cache
    def best(i, j):
        if i == len(a) or j == len(b):
            return 0
        return 1 + best(i + 1, j + 1) if a[i] == b[j] else max(best(i + 1, j), best(i, j + 1))

    return best(0, 0)


def test_words_are_those_of_the_rouge_package():
    from rouge_score import tokenize

    for text in [*TEXTS, string.printable]:
        assert words(text) == tokenize.tokenize(text, None)


def test_rouge_l_is_that_of_the_package_and_of_the_definition():
    pairs = [(a, b) for a in TEXTS for b in TEXTS]
    pairs += [(" ".join(a), " ".join(b)) for a, b in zip(random_texts(0, 40), random_texts(1, 40), strict=True)]
    references, completions = ([pair[i] for pair in pairs] for i in (0, 1))
    rewards = RougeL()(inputs(completions, references=references))
    assert rewards.shape == (len(pairs), 1) and rewards.dtype == np.float32
    package = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=False)
    for (reference, completion), (reward,) in zip(pairs, rewards, strict=True):
        a, b = words(reference), words(completion)
        common = longest_common_subsequence(a, b)
        expected = 2 * common / (len(a) + len(b)) if a and b else 0.0
        np.testing.assert_allclose(reward, expected, rtol=1e-6)
        assert reward == np.float32(package.score(reference, completion)["rougeL"].fmeasure)


def test_rouge_l_by_hand():
    rewards = RougeL()(inputs(["a c d", "", "x"], references=["a b c d", "a", "y"]))
    np.testing.assert_allclose(rewards[:, 0], [6 / 7, 0, 0], rtol=1e-6)


@pytest.mark.parametrize("limit", [2, 5, 20])
def test_brevity_is_linear_in_the_words_up_to_the_limit(limit):
    rewards = Brevity(limit)(inputs([" ".join(["w"] * n) for n in range(30)]))
    expected = [0.0, *(max(0.0, 1 - n / limit) for n in range(1, 30))]
    np.testing.assert_allclose(rewards[:, 0], expected, rtol=1e-6)
    assert np.all(rewards >= 0) and rewards.max() == rewards[1, 0] == np.float32(1 - 1 / limit) < 1


def test_brevity_counts_words_and_not_marks():
    np.testing.assert_allclose(Brevity(4)(inputs(["", " ", "?!", "a-b.", "don't"]))[:, 0], [0, 0, 0, 0.5, 0.5])


def test_brevity_needs_a_limit():
    with pytest.raises(ValueError, match="Brevity.limit is 1: expected at least 2 words"):
        Brevity(limit=1)


def greedy_fragments(document, summary):
    """Figure 2 of Grusky et al. (2018), line by line."""
    fragments, i, j = [], 0, 0
    while i < len(summary):
        best = []
        while j < len(document):
            if summary[i] == document[j]:
                i2, j2 = i, j
                while i2 < len(summary) and j2 < len(document) and summary[i2] == document[j2]:
                    i2, j2 = i2 + 1, j2 + 1
                if len(best) < i2 - i:
                    best = summary[i:i2]
                j = j2
            else:
                j += 1
        i, j = i + max(len(best), 1), 0
        if best:
            fragments.append(best)
    return fragments


@pytest.mark.parametrize("seed", range(4))
def test_coverage_is_the_share_of_words_that_the_document_has(seed):
    for document, summary in zip(random_texts(seed, 60), random_texts(seed + 10, 60, "abcdefgh"), strict=True):
        fragments = extractive_fragments(document, summary)
        # Every shared word is at least a fragment of its own.
        expected = np.mean([word in document for word in summary]) if summary else 0.0
        assert coverage(document, summary) == pytest.approx(expected, abs=1e-12)
        text = "".join(document)
        assert all("".join(fragment) in text for fragment in fragments)
        rest = list(summary)
        for fragment in fragments:
            for word in fragment:
                rest.remove(word)
        assert not set(rest) & set(document)


def test_fragments_are_those_of_the_paper():
    # Where words repeat, the paper's search may skip a longer run that starts inside a shorter one; ours does not.
    for document, summary in zip(random_texts(5, 60, string.ascii_lowercase), random_texts(6, 60), strict=True):
        document = list(dict.fromkeys(document))
        assert extractive_fragments(document, summary) == greedy_fragments(document, summary)
    assert extractive_fragments("aaac", "aac") == ["aac"] and greedy_fragments("aaac", "aac") == ["aa", "c"]


def test_fragments_and_coverage_by_hand():
    document, summary = "the cat sat on the mat", "On the MAT, the cat lay."
    fragments = extractive_fragments(words(document), words(summary))
    assert fragments == [["on", "the", "mat"], ["the", "cat"]]
    reward = ExtractiveCoverage()(inputs([summary, "", "dog", "cat"], [document] * 4))
    np.testing.assert_allclose(reward[:, 0], [5 / 6, 0, 0, 1], rtol=1e-6)


@pytest.mark.parametrize("reward", [RougeL("a"), Brevity(7, "b"), ExtractiveCoverage("c")], ids=lambda r: r.name)
def test_they_are_rewards_with_names_and_are_stored_with_a_run(reward):
    assert isinstance(reward, RewardFunction)
    assert reward.names == (reward.name,)
    assert from_json(to_json(reward)) == reward
    values = reward(inputs(TEXTS, TEXTS[::-1], TEXTS))
    assert values.shape == (len(TEXTS), 1) and values.dtype == np.float32
    assert np.all((values >= 0) & (values <= 1)) and values[0] == 0


def test_a_function_of_the_users_is_a_reward():
    seen = []

    def function(prompts, completions, references):
        seen.append((prompts, completions, references))
        return [len(completion) - len(prompt) for prompt, completion in zip(prompts, completions, strict=True)]

    reward = FunctionReward("growth", function)
    assert isinstance(reward, RewardFunction) and reward.names == ("growth",)
    values = reward(inputs(("abc", ""), ("a", "b"), ("x", "y")))
    assert values.tolist() == [[2.0], [-1.0]] and values.dtype == np.float32
    assert seen == [(["a", "b"], ["abc", ""], ["x", "y"])]
    for kind in (np.asarray, tuple, lambda x: np.asarray(x, bool)):
        assert FunctionReward("k", lambda p, c, r, kind=kind: kind([1, 0]))(inputs(["a", "b"])).tolist() == [
            [1.0],
            [0.0],
        ]


@pytest.mark.parametrize(
    ("values", "got"),
    [
        ([1.0], r"list of shape \(1,\) for 2 completions: expected one"),
        ([[1.0], [2.0]], r"list of shape \(2, 1\) for 2"),
        (1.0, r"float of shape \(\) for 2"),
        (None, r"NoneType of shape"),
        (["good", "bad"], r"\['good', 'bad'\]: expected numbers"),
        ([[1.0], [2.0, 3.0]], r"\[\[1.0\], \[2.0, 3.0\]\]: expected numbers"),
        ({"a": 1.0}, "{'a': 1.0}: expected numbers"),
    ],
    ids=["few", "column", "number", "none", "text", "ragged", "dict"],
)
def test_a_function_that_does_not_give_a_number_each_is_named(values, got):
    with pytest.raises(ValueError, match=rf"reward 'mine': its function gave {got}"):
        FunctionReward("mine", lambda p, c, r: values)(inputs(["a", "b"]))


def test_a_function_of_other_arguments_is_refused_at_once():
    def score(completions):
        return [0.0 for _ in completions]

    message = (
        r"FunctionReward 'mine': score\(completions\) does not take .*expected \(prompts, completions, references\)"
    )
    with pytest.raises(ValueError, match=message):
        FunctionReward("mine", score)
    FunctionReward("mine", lambda *texts: [0.0])


def test_an_exception_of_the_function_keeps_its_kind_and_names_the_reward():
    def function(prompts, completions, references):
        return [completions[0][99]]

    with pytest.raises(IndexError, match="string index out of range") as caught:
        FunctionReward("mine", function)(inputs(["a"]))
    assert caught.value.__notes__ == ["This was raised by the function of the reward 'mine'."]
    assert caught.traceback[-1].name == "function"


def test_what_is_no_function_is_refused():
    reward = object.__new__(FunctionReward)  # Past the annotations, which are not checked where it is used.
    for field, value in {"name": "mine", "function": "len"}.items():
        object.__setattr__(reward, field, value)
    with pytest.raises(ValueError, match="FunctionReward 'mine': function is 'len', expected a function"):
        reward.__post_init__()


def test_columns_of_other_lengths_are_refused():
    with pytest.raises(ValueError, match=r"RewardInputs: columns of \[1, 2\] rows"):
        RewardInputs(["a"], ["b", "c"], ["d"], np.zeros((1, 2), np.int32), np.zeros((1, 2), np.int32))
