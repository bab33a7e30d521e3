"""What users ask of decoding: every word of theirs becomes the engine's or the search's, or is refused."""

import dataclasses

import pytest
from tiny_policies import tiny_config

from clp_jax.data.vocabulary import TokenIds
from clp_jax.models.config import PaLMConfig
from clp_jax.sampling.beam_policies import BrevityPenalty, CurrentBound, FirstFinished, PowerPenalty, ReachableBound
from clp_jax.sampling.beam_search import BeamConfig, t5x_beam_config
from clp_jax.sampling.decoding import Decoding
from clp_jax.sampling.generate import SamplingConfig
from clp_jax.sampling.processors import (
    BannedSequences,
    ForcedFirst,
    ForcedLast,
    NoRepeatNGram,
    OccurrencePenalty,
    RepetitionPenalty,
)
from clp_jax.sampling.strategies import Greedy, Sampling

T5 = tiny_config()
PALM = PaLMConfig.llama(vocab_size=11, embed_dim=8, mlp_dim=12, num_heads=2, head_dim=4, num_layers=1)
IDS = TokenIds(11, 0, (1,))


class Words(TokenIds):
    """A vocabulary whose words have other tokens inside words."""

    def encode(self, text):
        return {"fox": [3, 4], " fox": [5], "box": [6], " box": [6], "?": []}.get(text, [])


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (dict(), SamplingConfig(64, Sampling())),
        (dict(temperature=0.5, top_k=3, top_p=0.9, min_p=0.1), SamplingConfig(64, Sampling(0.5, 3, 0.9, 0.1))),
        (dict(strategy="best_of_n", top_k=3, num_samples=4, max_tokens=5), SamplingConfig(5, Sampling(top_k=3))),
        (dict(temperature=0.0), SamplingConfig(64, Greedy())),
        (dict(strategy="greedy", min_tokens=3, stop_ids=(7, 8)), SamplingConfig(64, Greedy(), (), ((7,), (8,)), 3)),
        (dict(strategy="beam"), BeamConfig(64)),
        (dict(strategy="beam", beam_rules="transformers"), BeamConfig(64)),
        (dict(strategy="beam", beam_rules="t5x", num_beams=3, num_samples=2), t5x_beam_config(64, 3, num_returned=2)),
        (
            dict(strategy="beam", beam_rules="t5x", length_penalty=1.0, num_groups=2, diversity_penalty=0.5, stop_ids=(5,)),
            dataclasses.replace(
                t5x_beam_config(64), length_penalty=BrevityPenalty(1.0), num_groups=2, diversity=0.5, stop=((5,),)
            ),
        ),
        (dict(strategy="beam", early_stopping=True), BeamConfig(64, stopping=FirstFinished())),
        (dict(strategy="beam", early_stopping=False), BeamConfig(64, stopping=CurrentBound())),
        (dict(strategy="beam", early_stopping="never"), BeamConfig(64, stopping=ReachableBound())),
        (
            dict(
                strategy="beam",
                num_samples=2,
                num_beams=6,
                num_groups=3,
                diversity_penalty=0.5,
                length_penalty=0.7,
                early_stopping=True,
                patience=2.0,
                max_tokens=9,
                min_tokens=2,
                stop_ids=(5,),
            ),
            BeamConfig(9, 6, 2, PowerPenalty(0.7), FirstFinished(2.0), stop=((5,),), min_length=2, num_groups=3, diversity=0.5),
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)  # fmt: skip
def test_words_become_settings(asked, expected):
    assert Decoding(**asked).config(64, T5, IDS) == expected


@pytest.mark.parametrize("model", [T5, PALM], ids=["t5", "palm"])
@pytest.mark.parametrize("strategy", ["sample", "beam"])
def test_rules_of_tokens(model, strategy):
    """In one order, whatever chooses the tokens; what a decoder reads has occurred."""
    asked = Decoding(
        strategy=strategy,
        repetition_penalty=1.5,
        presence_penalty=0.2,
        frequency_penalty=0.1,
        no_repeat_ngram=3,
        banned=("fox", "box"),
        banned_ids=(9,),
        forced_first=2,
        forced_last=True,
    )
    before = "prompt" if model is PALM else "start"
    assert asked.config(64, model, Words(11, 0, (1,))).processors == (
        RepetitionPenalty(1.5, before),
        OccurrencePenalty(0.2, 0.1),
        NoRepeatNGram(3, before),
        BannedSequences(((9,), (3, 4), (5,), (6,)), before),
        ForcedFirst(2),
        ForcedLast(),
    )


@pytest.mark.parametrize(
    ("asked", "penalty"),
    [
        (dict(strategy="best_of_n", num_samples=2), PowerPenalty(0.0)),
        (dict(strategy="best_of_n", num_samples=2, length_penalty=1.0), PowerPenalty(1.0)),
        (dict(strategy="sample"), None),
        (dict(strategy="beam", length_penalty=1.0), None),
    ],
    ids=str,
)
def test_what_ranks_samples(asked, penalty):
    assert Decoding(**asked).best == penalty


SEARCH = dict(
    num_beams=2, num_groups=2, diversity_penalty=0.5, beam_rules="t5x", early_stopping=True, patience=2.0
)  # fmt: skip


@pytest.mark.parametrize("strategy", ["sample", "greedy"])
def test_a_length_penalty_is_refused_where_nothing_is_ranked(strategy):
    with pytest.raises(ValueError, match=f"^length_penalty does nothing with strategy={strategy}: leave it out.$"):
        Decoding(strategy=strategy, length_penalty=1.0)


@pytest.mark.parametrize("name", SEARCH)
@pytest.mark.parametrize("strategy", ["sample", "greedy", "best_of_n"])
def test_words_of_a_search_are_refused_without_one(name, strategy):
    with pytest.raises(ValueError, match=f"^{name} does nothing with strategy={strategy}: leave it out.$"):
        Decoding(strategy=strategy, num_samples=2, **{name: SEARCH[name]})


@pytest.mark.parametrize("name", ["temperature", "top_k", "top_p", "min_p"])
@pytest.mark.parametrize("strategy", ["greedy", "beam"])
def test_words_of_samples_are_refused_without_them(name, strategy):
    with pytest.raises(ValueError, match=f"^{name} does nothing with strategy={strategy}: leave it out.$"):
        Decoding(strategy=strategy, **{name: 1})


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (dict(strategy="greedy", top_k=1, num_beams=2), "top_k and num_beams do nothing with strategy=greedy: leave them"),
        (dict(num_samples=0), "num_samples is 0: expected at least 1"),
        (dict(strategy="best_of_n"), "num_samples is 1 with strategy=best_of_n: expected at least 2"),
        (dict(max_tokens=2**31), r"max_tokens is 2147483648: expected at least 1, and less than 2\*\*31"),
        (dict(no_repeat_ngram=-1), "no_repeat_ngram is -1"),
        (dict(stop=("a", "")), r"stop is \('a', ''\): expected texts of one character at least; an empty one"),
        (dict(banned=("",)), r"banned is \('',\): expected texts of one character at least"),
        (dict(temperature=0, top_k=3), "top_k and top_p do nothing at temperature 0"),
        (dict(strategy="beam", stop=("x",)), "stop does not go with strategy=beam, .* give stop_ids, or another strategy"),
        (dict(strategy="beam", num_samples=5), "num_beams is 4: expected at least num_samples, 5"),
        (dict(strategy="beam", num_beams=0), "num_beams is 0"),
        (dict(strategy="beam", num_groups=3), "num_groups is 3: expected a divisor of num_beams, 4"),
        (dict(strategy="beam", num_groups=0), "num_groups is 0: expected a divisor"),
        (dict(strategy="beam", diversity_penalty=0.5), "diversity_penalty is 0.5 for num_groups 1: expected"),
        (dict(strategy="beam", beam_rules="t5x", early_stopping=True), "early_stopping does nothing with beam_rules=t5x"),
        (dict(strategy="beam", beam_rules="t5x", early_stopping="never"), "early_stopping does nothing with beam_rules=t5x"),
        (dict(strategy="beam", beam_rules="t5x", patience=2.0), "patience is 2: expected a positive number, and early"),
        (dict(strategy="beam", patience=2.0), "patience is 2: expected a positive number, and early_stopping"),
        (dict(strategy="beam", patience=0.0, early_stopping=True), "patience is 0: expected a positive number"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)  # fmt: skip
def test_what_is_refused_at_once(asked, message):
    with pytest.raises(ValueError, match=message):
        Decoding(**asked)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (dict(min_tokens=65), "min_tokens is 65: expected 0 to max_tokens, 64"),
        (dict(min_tokens=-1), "min_tokens is -1: expected 0 to max_tokens, 64"),
        (dict(stop_ids=(11,)), "stop_ids has the token id 11: expected 0 to 10"),
        (dict(banned_ids=(-1,)), "banned_ids has the token id -1: expected 0 to 10"),
        (dict(forced_first=12), "forced_first has the token id 12: expected 0 to 10"),
        (dict(banned=("?",)), r"banned has '\?': the vocabulary has no token for it"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_a_policy_can_not_be_asked(asked, message):
    with pytest.raises(ValueError, match=message):
        Decoding(**asked).config(64, T5, Words(11, 0, (1,)))
