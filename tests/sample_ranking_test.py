"""`clp sample`: which of several samples is returned, what lines ask of their own, and whose rules a search follows."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_policies import varied_params
from tiny_runs import MODEL, make_data, make_steerable, make_supervised

from clp_jax.main import main
from clp_jax.models.policy import Policy
from clp_jax.rewards.programmatic import Brevity, ExtractiveCoverage, FunctionReward
from clp_jax.rewards.protocol import RewardInputs
from clp_jax.sample import sample
from clp_jax.sampling.beam_search import beam_search, t5x_beam_config
from clp_jax.sampling.decoder import CachedDecoder
from clp_jax.sampling.decoding import Decoding
from clp_jax.sampling.json_lines import pad_rows

# Those of `rewards/coverage_brevity.gin`.
REWARDS = (ExtractiveCoverage(), Brevity())
LINES = [{"inputs": "the quick fox"}, {"inputs": "a lazy dog"}, {"inputs": "five dozen jugs"}]
PROMPTS = [[27, 21, 17, 10, 11, 3], [4, 2, 7, 26, 21, 29], [30, 21, 27, 22, 23, 13]]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("ranking")
    make_supervised(home / "sft", make_data(home / "data"), MODEL)

    def differing(params, k):
        rng = np.random.default_rng(k)
        return jax.tree.map(lambda p: np.asarray(p + 0.3 * rng.normal(size=p.shape), np.float32), params)

    make_steerable(home, "run", differing, rewards=REWARDS)
    return home


def typed(home, lines, *words, run="run", code=0) -> list[dict]:
    (home / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (home / "out.jsonl").unlink(missing_ok=True)
    places = [f"--input={home / 'in.jsonl'}", f"--output={home / 'out.jsonl'}"]
    command = ["sample", f"--checkpoint={home / run}", *places, *words]
    if code:
        with pytest.raises(SystemExit) as stop:
            main(command)
        assert stop.value.code == code
    else:
        assert main(command) == 0
    return [json.loads(line) for line in (home / "out.jsonl").read_text().splitlines()]


def test_the_best_of_n_by_log_probability_and_by_its_mean(home):
    words = ["--num_samples=6", "--max_tokens=6", "--temperature=1.5"]
    every = typed(home, LINES, *words, run="sft")
    chosen = []
    for exponent in (0, 1):
        found = typed(home, LINES, *words, "--strategy=best_of_n", f"--length_penalty={exponent}", run="sft")
        for line, samples in zip(found, every, strict=True):
            scores = [sum(row) / len(row) ** exponent for row in samples["logprobs"]]
            best = int(np.argmax(scores))
            assert [line[name] for name in ("tokens", "text")] == [samples[name][best] for name in ("tokens", "text")]
        chosen.append([line["tokens"] for line in found])
    assert chosen[0] != chosen[1]
    assert [x["tokens"] for x in typed(home, LINES, *words, "--strategy=best_of_n", run="sft")] == chosen[0]


def test_the_best_of_n_by_the_rewards_of_the_run(home):
    rewards = ["--gin_file=rewards/coverage_brevity.gin", "--gin.sample.rewards=%REWARDS"]
    words = [*rewards, "--num_samples=6", "--max_tokens=16", "--max_prompt=32"]
    chosen = []
    for weights in ((0.9, 0.1), (0.1, 0.9)):
        steered = [*words, f"--weights={weights[0]},{weights[1]}"]
        every, found = (typed(home, LINES, *steered, *more) for more in ((), ("--strategy=best_of_n",)))
        for line, samples in zip(found, every, strict=True):
            texts = samples["text"]
            nothing = np.zeros((6, 1), np.int32)
            inputs = RewardInputs([line["inputs"]] * 6, texts, [""] * 6, nothing, nothing)
            raw = np.concatenate([reward(inputs) for reward in REWARDS], axis=1)
            # The run's statistics: means 0.5 and 2, deviations 0.25 and 1.5.
            expected = (raw - np.asarray([0.5, 2.0])) / np.asarray([0.25, 1.5])
            np.testing.assert_allclose(samples["rewards"], expected, rtol=1e-6)
            best = int(np.argmax(expected @ np.asarray(weights)))
            assert (line["text"], line["rewards"]) == (texts[best], samples["rewards"][best])
        chosen.append([int(np.argmax(np.asarray(line["rewards"]) @ weights)) for line in every])
    # Neither always the first, nor one that the log-probability chooses.
    plain = [int(np.argmax([sum(row) for row in line["logprobs"]])) for line in every]
    assert {*chosen[0], *chosen[1]} != {0} and chosen[1] != plain


def test_rewards_compare_with_the_targets_of_a_line(home, tmp_path):
    def letters(prompts, completions, references):
        seen.append((prompts, references))
        return [len(text) for text in completions]

    seen: list = []
    rewards = (FunctionReward("coverage", letters), Brevity())
    make_steerable(home, "letters", lambda params, k: params, rewards=rewards)
    lines = [{"inputs": "the fox", "targets": "fox"}, {"inputs": "a dog", "targets": [4, 2]}, {"inputs": "my box"}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    places = {"input": str(tmp_path / "in.jsonl"), "output": str(tmp_path / "output.jsonl")}
    decoding = Decoding(strategy="best_of_n", num_samples=2)
    sample(checkpoint=str(home / "letters"), rewards=rewards, decoding=decoding, batch_size=1, max_prompt=32, **places)
    two = " ".join(json.loads(line)["text"] for line in (tmp_path / "output.jsonl").read_text().splitlines())
    assert two and len(seen) == 3
    assert [prompts for prompts, _ in seen] == [["the fox"] * 2, ["a dog"] * 2, ["my box"] * 2]
    references = [references[0] for _, references in seen]
    assert references[0] == "fox" and references[1] and references[1] != "fox" and references[2] == ""


@pytest.mark.parametrize(
    ("run", "words", "message"),
    [
        ("sft", [], "was trained for no rewards (it is supervised); the rewards given are coverage, brevity"),
        ("run", ["--gin.programmatic.Brevity.limit=7"], "was trained with another reward 'brevity' than the one given"),
        ("run", ["--length_penalty=1"], "length_penalty does nothing where rewards say which sample is the best"),
    ],
)
def test_rewards_that_do_not_fit(home, run, words, message, capsys):
    rewards = ["--gin_file=rewards/coverage_brevity.gin", "--gin.sample.rewards=%REWARDS"]
    words = [*rewards, "--strategy=best_of_n", "--num_samples=2", *words]
    assert main(["sample", f"--checkpoint={home / run}", "--prompt=the fox", *words]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


def test_a_completion_is_printed_as_it_is(home, capsys, monkeypatch):
    """Whatever its length: what a pipe gets is not wrapped."""
    monkeypatch.setenv("COLUMNS", "80")
    words = ["--prompt=a fox", "--strategy=beam", "--num_samples=2", "--max_tokens=100", "--min_tokens=100"]
    assert main(["sample", f"--checkpoint={home / 'sft'}", *words]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) == 2 and all(len(line) > 80 for line in shown)


def test_lines_that_say_how_they_are_completed(home, capsys):
    plain = typed(home, [{"inputs": prompt} for prompt in PROMPTS], "--max_tokens=6", "--min_tokens=5", run="sft")
    tokens = [line["tokens"] for line in plain]
    wishes = [
        {"num_samples": 3, "note": "kept"},
        {"max_tokens": 9},
        {"max_tokens": 5, "seed": 7},
        {"stop": [tokens[0][1:3]]},
    ]
    lines = [{"inputs": PROMPTS[min(i, 2)]} | wish for i, wish in enumerate(wishes)]
    # The fourth is the first prompt again, with the first's seed.
    lines[3] |= {"inputs": PROMPTS[0], "seed": 1}
    lines[0] |= {"seed": 1}
    found = typed(home, lines, "--max_tokens=6", "--min_tokens=1", run="sft", code=1)
    assert "line 2 was skipped: max_tokens is 9: expected a whole number in [1, 6], from" in capsys.readouterr().err
    assert [line["line"] for line in found] == [1, 3, 4]
    several, shorter, stopped = found
    assert several["note"] == "kept" and len(several["tokens"]) == len(several["logprobs"]) == 3
    assert len(shorter["tokens"]) <= 5 and shorter["max_tokens"] == 5
    # All wrote the same until then: it is line 1's first sample, up to the two tokens that end it.
    assert several["tokens"][0][:3] == tokens[0][:3] == stopped["tokens"]
    assert stopped["stop"] == [tokens[0][1:3]] and stopped["text"] != several["text"][0]
    refused = typed(home, [lines[0], {"inputs": PROMPTS[0]}], "--strategy=beam", "--max_tokens=4", run="sft", code=1)
    assert [line["line"] for line in refused] == [2]
    assert "line 1 was skipped: it has num_samples, but a search completes all lines alike" in capsys.readouterr().err


def test_a_search_by_the_rules_of_t5x(home):
    lines = [{"inputs": prompt} for prompt in PROMPTS]
    words = ["--strategy=beam", "--num_beams=3", "--num_samples=2", "--batch_size=3", "--max_tokens=6"]
    found = typed(home, lines, *words, "--beam_rules=t5x", "--length_penalty=0.9", run="sft")
    policy = Policy(MODEL)
    inputs = jnp.asarray(pad_rows(PROMPTS, 3, 0))
    config = t5x_beam_config(6, 3, 0.9, num_returned=2)
    out = jax.jit(lambda p: beam_search(CachedDecoder(policy.bind(p)), inputs, config))(varied_params(policy))
    lengths = np.asarray(out.completions.mask).sum(-1).astype(int)
    tokens = [row[:n].tolist() for row, n in zip(np.asarray(out.completions.tokens), lengths, strict=True)]
    assert [line["tokens"] for line in found] == [tokens[i : i + 2] for i in range(0, 6, 2)]
    others = typed(home, lines, *words, "--length_penalty=0.9", run="sft")
    assert [line["tokens"] for line in others] != [line["tokens"] for line in found]
