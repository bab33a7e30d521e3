"""`clp sample` on a tiny run: what a repetition penalty counts, as in transformers."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_policies import varied_params
from tiny_runs import MODEL, VOCAB_SIZE, make_data, make_supervised

from clp_jax.main import main
from clp_jax.models.config import MoEConfig, PaLMConfig
from clp_jax.models.policy import Policy
from clp_jax.nn.routing import ExpertChoice, TokenChoice
from clp_jax.sample import sample
from clp_jax.sampling.beam_policies import FirstFinished
from clp_jax.sampling.beam_search import BeamConfig, beam_search
from clp_jax.sampling.decoder import CachedDecoder
from clp_jax.sampling.decoding import Decoding
from clp_jax.sampling.generate import SamplingConfig, generate, row_keys
from clp_jax.sampling.json_lines import pad_rows
from clp_jax.sampling.session import Server
from clp_jax.sampling.strategies import Greedy
from clp_jax.score import score
from clp_jax.training.partners import Partners

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


# A smaller policy of the same vocabulary.
OTHER = dataclasses.replace(MODELS["encoder-decoder"], embed_dim=6, mlp_dim=10)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A directory with the runs of an encoder-decoder, of a decoder, and of one with experts."""
    home = tmp_path_factory.mktemp("sample")
    data = make_data(home / "data")
    for kind, model in (MODELS | {"experts": SHARING}).items():
        make_supervised(home / kind, data, model)
    make_supervised(home / "other", data, OTHER, seed=1)
    make_supervised(home / "elsewhere", make_data(home / "more", more=("another", "bag")), MODEL)
    return home


def answered(function, home, kind, lines, **settings) -> list[dict]:
    """What a command writes for lines; it ends with 1 where it left some out."""
    source, target = home / "lines.jsonl", home / "answers.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    target.unlink(missing_ok=True)
    if function is sample:
        fields = {field.name for field in dataclasses.fields(Decoding)} & set(settings)
        settings |= {"decoding": Decoding(**{name: settings.pop(name) for name in fields})}
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


@pytest.mark.parametrize("kind", MODELS)
def test_a_repetition_penalty_counts_what_the_decoder_reads(kind, tmp_path):
    model = MODELS[kind]
    make_supervised(tmp_path / "run", make_data(tmp_path / "data"), model)
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"inputs": prompt}) + "\n" for prompt in PROMPTS))
    places = {name: str(tmp_path / place) for name, place in [("input", "in.jsonl"), ("output", "out.jsonl")]}
    decoding = Decoding(strategy="greedy", max_tokens=LENGTH, repetition_penalty=PENALTY)
    sample(checkpoint=str(tmp_path / "run"), **places, decoding=decoding)
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


def typed(home, *words) -> list[dict]:
    """What `clp sample` writes for the prompts, with these words."""
    (home / "in.jsonl").write_text("".join(json.dumps({"inputs": prompt}) + "\n" for prompt in PROMPTS))
    (home / "out.jsonl").unlink(missing_ok=True)
    places = [f"--input={home / 'in.jsonl'}", f"--output={home / 'out.jsonl'}", f"--max_tokens={LENGTH}"]
    assert main(["sample", f"--checkpoint={home / 'encoder-decoder'}", *places, *words]) == 0
    return [json.loads(line) for line in (home / "out.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def both():
    """Log-probabilities of what follows some tokens, by a pass over the whole, of the policy and of the other one."""
    policies = (Policy(MODELS["encoder-decoder"]), 0), (Policy(OTHER), 1)

    def run(policy, params):
        return jax.jit(lambda inputs, tokens: jax.nn.log_softmax(policy.bind(params)(inputs, tokens)))

    runs = [run(policy, varied_params(policy, seed)) for policy, seed in policies]

    def after(prompt, written):
        shifted = [28, *written, *[0] * LENGTH][:LENGTH]
        found = [np.asarray(run(jnp.asarray([prompt]), jnp.asarray([shifted]))[0, len(written)]) for run in runs]
        return [log_probs.astype(np.float64) for log_probs in found]

    return after


def contrast(expert, amateur):
    amateur = np.log(np.exp(amateur / 2) / np.exp(amateur / 2).sum())
    return np.where(expert >= expert.max() + np.log(0.01), expert - 0.7 * amateur, -np.inf)


@pytest.mark.parametrize(
    ("words", "joined"),
    [
        (["--mix={other}=0.4"], lambda own, other: 0.6 * own + 0.4 * other),
        (["--mix={other}=1"], lambda own, other: other),
        (
            ["--amateur={other}", "--plausibility=0.01", "--amateur_strength=0.7", "--amateur_temperature=2"],
            contrast,
        ),
    ],
    ids=["mix", "all of the other", "amateur"],
)
def test_policies_that_decode_together(words, joined, home, both):
    found = typed(home, "--strategy=greedy", *(word.format(other=home / "other") for word in words))
    differs = False
    for line in found:
        written = []
        while len(written) < LENGTH and 1 not in written:
            own, other = both(line["inputs"], written)
            written.append(int(joined(own, other).argmax()))
            differs = differs or written[-1] != own.argmax()
        assert line["tokens"] == written
    assert differs


def test_eight_bits_as_they_are_typed(home):
    """The flag reaches the cache: the log-probabilities are those of one in eight bits, and not the exact ones."""
    exact, found = typed(home, "--strategy=greedy"), typed(home, "--strategy=greedy", "--int8")
    policy, config = Policy(MODELS["encoder-decoder"]), SamplingConfig(LENGTH, Greedy())
    inputs = jnp.asarray(pad_rows(PROMPTS, 3, 0))

    @jax.jit
    def run(params):
        decoder = CachedDecoder(policy.bind(params), int8=True)
        return generate(decoder, inputs, keys=row_keys(jax.random.key(0), 3), config=config)

    out = run(varied_params(policy))
    assert found != exact
    for number, line in enumerate(found):
        length = int(out.mask[number].sum())
        assert line["tokens"] == out.tokens[number, :length].tolist()
        np.testing.assert_allclose(line["logprobs"], out.log_probs[number, :length], rtol=1e-5)


def test_a_search_as_it_is_typed(home):
    words = ["--strategy=beam", "--num_beams=4", "--num_groups=2", "--diversity_penalty=0.7", "--early_stopping"]
    found = typed(home, *words, "--patience=1.5", "--num_samples=3", "--batch_size=3", "--stop_ids=28")
    config = BeamConfig(
        LENGTH, 4, 3, stopping=FirstFinished(1.5), stop=((28,),), num_groups=2, diversity=0.7
    )  # fmt: skip
    policy = Policy(MODELS["encoder-decoder"])
    inputs = jnp.asarray(pad_rows(PROMPTS, 3, 0))
    out = jax.jit(lambda p: beam_search(CachedDecoder(policy.bind(p)), inputs, config))(varied_params(policy))
    lengths = np.asarray(out.completions.mask).sum(-1).astype(int)
    tokens = [row[:n].tolist() for row, n in zip(np.asarray(out.completions.tokens), lengths, strict=True)]
    assert [line["tokens"] for line in found] == [tokens[i : i + 3] for i in range(0, 9, 3)]
    assert any(row[-1] == 28 and len(row) < LENGTH for row in tokens), tokens


def test_tokens_as_they_are_typed(home, capsys):
    plain = typed(home, "--strategy=greedy")
    banned = {token for line in plain for token in line["tokens"]} - {1, 17}
    words = ["--banned_ids", ",".join(map(str, banned)), "--forced_first=17", "--forced_last"]
    found = typed(home, "--strategy=greedy", *words, "--stop_ids=22", "--banned=fox")
    for line, before in zip(found, plain, strict=True):
        assert line["tokens"][0] == 17 and banned and not banned & set(line["tokens"])
        assert line["tokens"][-1] in (1, 22) and before["tokens"] != line["tokens"]
    capsys.readouterr()
    prompt = ["--prompt=the quick fox", "--strategy=greedy", "--max_tokens=3", "--forced_first=17", "--stop_ids=17"]
    assert main(["sample", f"--checkpoint={home / 'encoder-decoder'}", *prompt]) == 0
    assert capsys.readouterr().out == "(empty)\n"


def test_samples_take_no_more_room_than_there_are_lines(home, monkeypatch):
    """Nor than `--batch_size` says; a search is always as large, so that its sums are taken in one order."""
    rooms = []
    whole = Server.complete

    def complete(server, params, preference, prompts):
        rooms.append(server.config.slots)
        return whole(server, params, preference, prompts)

    monkeypatch.setattr(Server, "complete", complete)
    first = typed(home, "--strategy=greedy")
    again = typed(home, "--strategy=greedy", "--batch_size=2")
    assert rooms == [3, 2] and [line["tokens"] for line in first] == [line["tokens"] for line in again]


def test_more_memory_than_there_is(home, capsys):
    words = ["--max_tokens=1000000000", "--max_prompt=16", "--prompt=the quick fox"]
    assert main(["sample", f"--checkpoint={home / 'encoder-decoder'}", *words]) == 2
    said = capsys.readouterr().err
    assert said.startswith("clp sample: error: keys and values would take ") and said.count("\n") == 1
    assert "max_tokens is 1000000000, prompts have up to 32 tokens (max_prompt), batch_size is 1" in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--mix=other=0.5", "--amateur=other"], "mix and amateur were given: expected one of them"),
        (["--plausibility=0.2"], "plausibility does nothing without an amateur: leave it out"),
        (["--amateur=other", "--plausibility=0"], "plausibility is 0.0: expected a number in (0, 1]"),
        (["--amateur=other", "--amateur_strength=-1"], "amateur_strength is -1.0: expected 0 or more"),
        (["--amateur=other", "--amateur_temperature=0"], "amateur_temperature is 0.0: expected a positive number"),
        (["--mix=elsewhere=0.5"], "elsewhere has another vocabulary than"),
        (["--batch_size=0"], "batch_size is 0: expected at least 1"),
        (["--batch_size=4"], "batch_size is for the lines of an input: give one, or leave it out"),
        (["--strategy=beams"], "--strategy is 'beams': expected Literal['sample', 'greedy', 'beam', 'best_of_n']"),
        (["--strategy=beam", "--stop=x"], "stop does not go with strategy=beam"),
        (["--num_groups=2"], "num_groups does nothing with strategy=sample: leave it out"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_what_does_not_go_together(words, message, home, capsys, monkeypatch):
    monkeypatch.chdir(home)
    assert main(["sample", "--checkpoint=encoder-decoder", "--prompt=the fox", *words]) == 2
    said = capsys.readouterr().err
    assert said.startswith("clp sample: error: ") and message in said and said.count("\n") == 1


def test_help_tells_every_flag(capsys):
    assert main(["sample", "--help"]) == 0
    told = capsys.readouterr().out
    flags = [field.name for kind in (Decoding, Partners) for field in dataclasses.fields(kind)]
    assert len(flags) > 25 and not [name for name in flags if not re.search(rf"--{name}  .*\n      \S", told)]
