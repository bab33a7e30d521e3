"""`clp sample` on a tiny run: what a repetition penalty counts, as in transformers."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_policies import varied_params
from tiny_runs import MODEL, VOCAB_SIZE, make_data, make_supervised

from clp_jax.models.config import MoEConfig, PaLMConfig
from clp_jax.models.policy import Policy
from clp_jax.nn.routing import ExpertChoice, TokenChoice
from clp_jax.sample import sample
from clp_jax.score import score

PENALTY, LENGTH = 3.0, 6
PROMPTS = [[27, 21, 17, 10, 11, 3], [4, 2, 7, 26, 21, 29], [30, 21, 27, 22, 23, 13]]
MODELS = {
    # A start token that is likely again.
    "encoder-decoder": dataclasses.replace(MODEL, start_id=28),
    "decoder-only": PaLMConfig.llama(
        vocab_size=VOCAB_SIZE, embed_dim=8, mlp_dim=12, num_heads=2, head_dim=4, num_layers=1
    ),
}


def penalised(model, logits, prompt: list[int], before: list[int]) -> list[int]:
    """The most probable tokens where those of `before` and those written have occurred, each from a pass over the whole."""
    written, seen = [], set(before)
    while len(written) < LENGTH and 1 not in written:
        shifted = [model.start_id, *written, *[0] * LENGTH][:LENGTH]
        scores = np.array(logits(jnp.asarray([prompt]), jnp.asarray([shifted]))[0, len(written)])
        for token in seen:
            scores[token] = scores[token] * PENALTY if scores[token] < 0 else scores[token] / PENALTY
        written.append(int(scores.argmax()))
        seen.add(written[-1])
    return written


# In training all rows of a batch share what room experts have, and some tokens find none.
SHARING = dataclasses.replace(
    MODEL,
    moe=MoEConfig(
        num_experts=4,
        router=ExpertChoice(group="batch"),
        decoder_router=TokenChoice(group="batch", eval_capacity=1.0),
    ),
)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A directory with the runs of an encoder-decoder, of a decoder, and of one with experts."""
    home = tmp_path_factory.mktemp("sample")
    data = make_data(home / "data")
    for kind, model in (MODELS | {"experts": SHARING}).items():
        make_supervised(home / kind, data, model)
    return home


def answered(function, home, kind, lines, **settings) -> list[dict]:
    """What a command writes for lines; it ends with 1 where it left some out."""
    source, target = home / "lines.jsonl", home / "answers.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    target.unlink(missing_ok=True)
    function(checkpoint=str(home / kind), input=str(source), output=str(target), **settings)
    return [json.loads(line) for line in target.read_text().splitlines()]


@pytest.mark.parametrize("kind", [*MODELS, "experts"])
def test_scores_do_not_depend_on_other_lines(kind, home):
    lines = [{"inputs": PROMPTS[i % 3], "targets": PROMPTS[i % 2][: 1 + i % 5], "id": f"n{i}"} for i in range(11)]
    whole = answered(score, home, kind, lines)
    assert [line["id"] for line in whole] == [line["id"] for line in lines]
    for count in (1, 5):
        assert answered(score, home, kind, lines[:count]) == whole[:count]
    assert answered(score, home, kind, lines[4:5]) == [whole[4] | {"line": 1}]


@pytest.mark.parametrize("kind", ["decoder-only", "experts"])
def test_beams_do_not_depend_on_other_lines(kind, home):
    """Neither on how many there are, nor on how long, nor on where a line stands."""
    lines = [{"inputs": PROMPTS[0]}, {"inputs": PROMPTS[1] * 7}, {"inputs": PROMPTS[2]}]
    settings = dict(strategy="beam", num_beams=2, num_samples=2, max_tokens=LENGTH, max_prompt=64)
    whole = answered(sample, home, kind, lines, **settings)
    for number in (0, 2):
        (alone,) = answered(sample, home, kind, lines[number : number + 1], **settings)
        assert alone == whole[number] | {"line": 1}


def test_a_line_with_its_own_seed_is_sampled_alike_wherever_it_is(home):
    lines = [{"inputs": prompt, "seed": 7 + i} for i, prompt in enumerate(PROMPTS)]
    first = answered(sample, home, "encoder-decoder", lines, max_tokens=LENGTH)
    again = answered(sample, home, "encoder-decoder", lines[::-1], max_tokens=LENGTH, seed=5)
    assert [(line["tokens"], line["logprobs"]) for line in first] == [
        (line["tokens"], line["logprobs"]) for line in again[::-1]
    ]


def test_a_run_that_left_lines_out_ends_with_one(home, capsys):
    lines = [{"inputs": PROMPTS[0]}, {"inputs": [3, 0]}, {"inputs": PROMPTS[1]}]
    with pytest.raises(SystemExit) as stop:
        answered(sample, home, "encoder-decoder", lines, strategy="greedy", max_tokens=2)
    assert stop.value.code == 1
    assert [json.loads(line)["line"] for line in (home / "answers.jsonl").read_text().splitlines()] == [1, 3]
    said = capsys.readouterr().err
    assert "line 2 was skipped: inputs has the token id 0, which is padding" in said
    assert "lines.jsonl: 1 line was skipped; the others have their answers." in said


@pytest.mark.parametrize(("function", "settings"), [(sample, dict(strategy="greedy", max_tokens=2)), (score, {})])
def test_policies_trained_here_read_prompts_of_their_training(function, settings, home, capsys):
    lines = [{"inputs": [3] * length, "targets": [4]} for length in (9, 8)]
    with pytest.raises(SystemExit):
        answered(function, home, "decoder-only", lines, **settings)
    expected = "line 1 was skipped: inputs has 9 tokens: expected at most 8; give a greater --max_prompt, or cut it"
    assert expected in capsys.readouterr().err
    assert [line["line"] for line in answered(score, home, "decoder-only", lines, max_prompt=9)] == [1, 2]


@pytest.mark.parametrize("settings", [dict(num_beams=4), dict(length_penalty=1.0)])
@pytest.mark.parametrize("strategy", ["sample", "greedy", "best_of_n"])
def test_settings_of_a_search_are_refused_without_one(settings, strategy):
    with pytest.raises(
        ValueError, match=f"num_beams and length_penalty do nothing with strategy={strategy}: leave them"
    ):
        sample(checkpoint="none", strategy=strategy, **settings)


def test_an_empty_stop_text_is_an_error():
    with pytest.raises(
        ValueError, match=r"stop is \('a', ''\): expected texts of one character at least; an empty one"
    ):
        sample(checkpoint="none", stop=("a", ""))


@pytest.mark.parametrize("kind", MODELS)
def test_a_repetition_penalty_counts_what_the_decoder_reads(kind, tmp_path):
    model = MODELS[kind]
    make_supervised(tmp_path / "run", make_data(tmp_path / "data"), model)
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"inputs": prompt}) + "\n" for prompt in PROMPTS))
    places = {name: str(tmp_path / place) for name, place in [("input", "in.jsonl"), ("output", "out.jsonl")]}
    settings = dict(strategy="greedy", max_tokens=LENGTH, repetition_penalty=PENALTY)
    sample(checkpoint=str(tmp_path / "run"), **places, **settings)
    found = [json.loads(line)["tokens"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]

    policy = Policy(model)
    params = varied_params(policy)
    logits = jax.jit(lambda inputs, tokens: policy.bind(params)(inputs, tokens))
    counted = {
        "encoder-decoder": lambda prompt: [model.start_id],
        "decoder-only": lambda prompt: prompt,
        "the last token": lambda prompt: prompt[-1:],
        "nothing": lambda prompt: [],
    }
    same = {
        name: found == [penalised(model, logits, prompt, before(prompt)) for prompt in PROMPTS]
        for name, before in counted.items()
    }
    assert same == {name: name == kind for name in counted}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("strategy", ["greedy", "beam"])
def test_no_token_twice_and_no_early_end(kind, strategy, home):
    lines = [{"inputs": prompt} for prompt in PROMPTS]
    settings = dict(strategy=strategy, max_tokens=LENGTH)
    plain = [line["tokens"] for line in answered(sample, home, kind, lines, **settings)]
    assert any(len(set(tokens)) < len(tokens) or len(tokens) < 4 for tokens in plain)
    found = answered(sample, home, kind, lines, no_repeat_ngram=1, min_tokens=4, **settings)
    for line in found:
        tokens, read = line["tokens"], line["inputs"] if kind == "decoder-only" else [MODELS[kind].start_id]
        assert len(set(tokens)) == len(tokens) and not set(tokens) & set(read)
        assert len(tokens) >= 5 and 1 not in tokens[:4]
