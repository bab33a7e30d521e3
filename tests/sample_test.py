"""`clp sample` on a tiny run: what a repetition penalty counts, as in transformers."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_policies import varied_params
from tiny_runs import MODEL, VOCAB_SIZE, make_data, make_supervised

from clp_jax.models.config import PaLMConfig
from clp_jax.models.policy import Policy
from clp_jax.sample import sample

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
