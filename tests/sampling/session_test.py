"""A policy that serves prompts: stops cut text and tokens alike, the best of n is the most probable, tokens are streamed.

Prompts may say how they are completed, whoever shares the batch.
"""

import dataclasses

import jax
import numpy as np
import pytest
from tiny_policies import varied_params

from clp_jax.data.vocabulary import TokenIds
from clp_jax.models.conditioning import Unconditioned
from clp_jax.models.config import PaLMConfig
from clp_jax.models.policy import Policy
from clp_jax.preferences import Preference
from clp_jax.sampling import memory
from clp_jax.sampling.beam_policies import BrevityPenalty, PowerPenalty
from clp_jax.sampling.beam_search import BeamConfig
from clp_jax.sampling.engine import Engine
from clp_jax.sampling.ensemble import Ensemble
from clp_jax.sampling.generate import SamplingConfig
from clp_jax.sampling.processors import BannedSequences
from clp_jax.sampling.session import Server, ServingConfig, most_probable
from clp_jax.sampling.strategies import Greedy
from clp_jax.sampling.text import Completion, Prompt

POLICY = Policy(
    PaLMConfig.llama(vocab_size=31, embed_dim=8, mlp_dim=12, num_heads=2, head_dim=4, num_layers=1, start_id=1)
)
PARAMS = varied_params(POLICY)
IDS = TokenIds(31, 0, (1,))
PROMPTS = [Prompt((3, 4, 5), 0), Prompt((9,) * 40, 1), Prompt((7,), 2)]


def server_of(generation=SamplingConfig(12), on_tokens=None, slots=2, **settings):
    """Tokens are their own text."""
    config = ServingConfig(generation, slots=slots, **settings)
    shown = [] if on_tokens is None else on_tokens
    return Server(Ensemble((POLICY,)), Unconditioned(), IDS, config, lambda *event: shown.append(event))


def ask(server, prompts=PROMPTS):
    """Completions by prompt."""
    return dict(server.complete((PARAMS,), Preference.of([1.0], 0.0), prompts))


def words_of(completions):
    return [(completion.text, completion.tokens) for completion in completions]


def serve(**settings):
    return ask(server_of(**settings))


@pytest.fixture(scope="module")
def plain():
    return serve()


def test_every_prompt_is_answered_and_streamed(plain):
    events = []
    found = serve(on_tokens=events)
    assert found == plain and set(found) == {0, 1, 2}
    for number, (completion,) in found.items():
        streamed = tuple(token for prompt, _, tokens in events if prompt == number for token in tokens)
        assert streamed == completion.tokens == tuple(map(int, completion.text.split()))


def test_beams_are_handed_out_whole():
    """Once each, when their search has ended: no token is final before."""
    events = []
    found = serve(generation=BeamConfig(12, num_beams=3, num_returned=2), on_tokens=events)
    expected = {(number, i, beam.tokens) for number, beams in found.items() for i, beam in enumerate(beams)}
    assert len(events) == len(expected) == 2 * len(PROMPTS) and set(events) == expected


def test_a_stop_cuts_text_tokens_and_log_probabilities(plain):
    (whole,) = plain[1]
    token = whole.tokens[4]
    first = whole.tokens.index(token)
    (cut,) = serve(stop=(f" {token} ",))[1]
    # The stop is complete when the token behind it is written.
    assert cut.tokens == whole.tokens[: first + 2]
    np.testing.assert_array_equal(cut.log_probs, whole.log_probs[: first + 2])
    assert cut.text == " ".join(map(str, whole.tokens[:first]))


def test_the_best_of_n_is_the_most_probable(plain):
    several = serve(num_samples=5)
    found = []
    for exponent in (0.0, 1.0, 2.0):
        best = serve(num_samples=5, best=PowerPenalty(exponent))
        for number, samples in several.items():
            assert samples[0].tokens == plain[number][0].tokens
            scores = [sum(map(float, c.log_probs)) / len(c.tokens) ** exponent for c in samples]
            assert best[number] == [samples[int(np.argmax(scores))]]
        found.append(best)
    # Lengths differ, or the exponent would never matter.
    assert found[0] != found[1] != found[2] != found[0]


def test_ranking_by_hand():
    """Sums -2, -3, -3 of one, three and three tokens: -2, -1, -1 by the mean, of which the first; GNMT's are -2, -2.25, -2.25."""
    rows = [Completion("", (5,) * len(row), row) for row in ((-2.0,), (-1.0, -1.0, -1.0), (0.0, -3.0, 0.0))]
    found = [most_probable(rows, p) for p in (PowerPenalty(0.0), PowerPenalty(1.0), BrevityPenalty(1.0))]
    assert found == [rows[0], rows[1], rows[0]]
    nothing = Completion("", (5,), (float("nan"),))
    assert most_probable([nothing, rows[0]], PowerPenalty(1.0)) == rows[0]


@pytest.mark.parametrize("num_samples", [1, 2])
def test_tokens_are_handed_out_a_chunk_at_a_time(plain, num_samples):
    """One by one where that is asked for, those of every sample in their order, and the same tokens as ever."""
    for chunk in (1, 3):
        events = []
        found = serve(num_samples=num_samples, chunk=chunk, on_tokens=events)
        # Another program: the numbers may be rounded otherwise.
        assert [rows[0].tokens for rows in found.values()] == [plain[number][0].tokens for number in found]
        for number, samples in found.items():
            for i, completion in enumerate(samples):
                parts = [tokens for prompt, sample, tokens in events if (prompt, sample) == (number, i)]
                whole = completion.tokens
                assert parts == [whole[at : at + chunk] for at in range(0, len(whole), chunk)]
    assert max(len(samples[0].tokens) for samples in found.values()) > 3


def test_a_single_slot_hands_out_every_token_at_once_and_more_hand_out_eight():
    sizes = []
    for slots in (1, 2):
        events = []
        serve(generation=SamplingConfig(12, min_length=11), slots=slots, on_tokens=events)
        sizes.append({len(tokens) for _, _, tokens in events})
    assert sizes == [{1}, {8, 4}]


def test_prompts_that_say_how_they_are_completed(plain):
    """Each as if all had been asked so, and its neighbours as ever."""
    (whole,) = plain[1]
    stop = whole.tokens[3:5]
    (word,) = {*map(str, whole.tokens[5:6])}
    wishes = {
        "tokens": (dict(max_tokens=2), dict(generation=SamplingConfig(2))),
        "samples": (dict(num_samples=5), dict(num_samples=5)),
        "sequence": (dict(stop=(stop,)), dict(generation=SamplingConfig(12, stop=(stop,)))),
        "text": (dict(stop=(f" {word}",)), dict(stop=(f" {word}",))),
    }
    for own, all_alike in wishes.values():
        prompts = [PROMPTS[0], dataclasses.replace(PROMPTS[1], **own), PROMPTS[2]]
        assert prompts[1].has_wishes and not prompts[0].has_wishes
        found = ask(server_of(), prompts)
        asked = found.pop(1)
        assert found == {0: plain[0], 2: plain[2]}
        # Other programs: numbers may be rounded otherwise.
        assert words_of(asked) == words_of(serve(**all_alike)[1]) != words_of(plain[1])
    cut = ask(server_of(), [PROMPTS[0], dataclasses.replace(PROMPTS[1], stop=("no text", stop)), PROMPTS[2]])[1][0]
    assert cut.tokens == whole.tokens[:5] and cut.text == " ".join(map(str, whole.tokens[:3]))


def test_a_stop_of_a_prompt_joins_those_of_all(plain):
    (whole,) = plain[1]
    first, later = (f" {whole.tokens[place]}" for place in (2, 4))
    found = ask(server_of(stop=(first,)), [PROMPTS[0], dataclasses.replace(PROMPTS[1], stop=(later,))])
    assert found[1] == serve(stop=(first,))[1]
    found = ask(server_of(stop=(later,)), [PROMPTS[0], dataclasses.replace(PROMPTS[1], stop=(first,))])
    assert found[1] == serve(stop=(first,))[1] != serve(stop=(later,))[1]


def test_a_search_completes_all_prompts_alike():
    with pytest.raises(ValueError, match="^a search completes all prompts alike: expected no num_samples, max_tokens"):
        ask(server_of(BeamConfig(12)), [dataclasses.replace(PROMPTS[0], max_tokens=3)])


def test_every_sample_ends_at_its_own_stop():
    """The engine writes no further: what comes after a stop is no longer computed, whichever sample it is."""
    long = SamplingConfig(40, processors=(BannedSequences(((1,),)),))
    several = serve(generation=long, num_samples=3)
    stop = f" {several[1][1].tokens[9]} "
    assert any(len(set(row.tokens)) > 1 for row in several[1])
    events = []
    found = serve(generation=long, num_samples=3, stop=(stop,), on_tokens=events)
    ended = 0
    for number, samples in found.items():
        for i, (cut, whole) in enumerate(zip(samples, several[number], strict=True)):
            written = sum(len(tokens) for prompt, sample, tokens in events if (prompt, sample) == (number, i))
            assert cut.tokens == whole.tokens[: len(cut.tokens)]
            # Tokens come eight at a time.
            assert len(cut.tokens) <= written < len(cut.tokens) + 8
            ended += len(cut.tokens) < 32
    assert ended >= 2


def test_prompts_are_read_together(monkeypatch):
    """Four at a time where they share a bucket, whoever stands between them; each is answered to the bit as in other company."""
    prompts = [Prompt((3 + i,) * (40 if i % 2 else 3), i) for i in range(8)]
    server = server_of(slots=8)
    reads = []
    whole = Engine._arrivals

    def counted(engine, bucket, slots, tickets):
        reads.append((bucket, len(tickets)))
        return whole(engine, bucket, slots, tickets)

    monkeypatch.setattr(Engine, "_arrivals", counted)
    together = ask(server, prompts)
    assert reads == [(32, 4), (64, 4)]
    for numbers in (range(7, -1, -1), [6]):
        found = ask(server_of(slots=8), [prompts[number] for number in numbers])
        assert [found[place] for place in range(len(numbers))] == [together[number] for number in numbers]


@pytest.mark.parametrize("generation", [SamplingConfig(10**9), BeamConfig(10**9)], ids=["samples", "beams"])
@pytest.mark.parametrize("is_known", [True, False], ids=["known before", "found out"])
def test_memory_that_is_not_there(generation, is_known, monkeypatch):
    """Told in a line, with what makes it so much; also where the device says so."""
    if not is_known:
        monkeypatch.setattr(memory, "available", lambda: 2**62)
    rows = "num_beams 4" if isinstance(generation, BeamConfig) else "num_samples 1"
    settings = f"max_tokens is 1000000000, prompts have up to [0-9]+ tokens .max_prompt., batch_size is 2, {rows}: give smaller"
    start = "" if is_known else "memory ran out; "
    with pytest.raises(
        ValueError, match=f"^{start}keys and values would take [0-9,.]+ GiB of .* GiB of memory: {settings}"
    ):
        serve(generation=generation)


def test_the_bytes_are_those_of_the_arrays():
    server = server_of()
    ask(server)
    assert list(server._sizes.values()) == [sum(x.nbytes for x in jax.tree.leaves(server._engine._device))]


def test_texts_do_not_end_a_search():
    with pytest.raises(
        ValueError, match=r"ServingConfig.stop is \('x',\) for a search: expected sequences in BeamConfig"
    ):
        ServingConfig(BeamConfig(4), stop=("x",))


@pytest.mark.parametrize("generation", [SamplingConfig(12, Greedy()), BeamConfig(12)], ids=["samples", "beams"])
def test_a_stop_token_is_left_out_of_the_text(generation):
    (whole, *_) = serve(generation=generation)[1]
    stop = whole.tokens[2]
    (cut, *_) = serve(generation=dataclasses.replace(generation, stop=((stop,),)))[1]
    assert cut.tokens[-1] == stop and len(cut.tokens) <= 3
    assert cut.text == " ".join(map(str, cut.tokens[:-1]))


def test_a_server_goes_on_after_an_answer_that_nobody_waited_for(plain):
    server = server_of()
    next(server.complete((PARAMS,), Preference.of([1.0], 0.0), PROMPTS))
    assert ask(server) == plain
