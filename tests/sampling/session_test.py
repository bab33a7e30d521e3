"""A policy that serves prompts: stops cut text and tokens alike, the best of n is the most probable, tokens are streamed."""

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
from clp_jax.sampling.beam_search import BeamConfig
from clp_jax.sampling.engine import Engine
from clp_jax.sampling.ensemble import Ensemble
from clp_jax.sampling.generate import SamplingConfig
from clp_jax.sampling.processors import BannedSequences
from clp_jax.sampling.session import Server, ServingConfig
from clp_jax.sampling.strategies import Greedy

POLICY = Policy(
    PaLMConfig.llama(vocab_size=31, embed_dim=8, mlp_dim=12, num_heads=2, head_dim=4, num_layers=1, start_id=1)
)
PARAMS = varied_params(POLICY)
IDS = TokenIds(31, 0, (1,))
PROMPTS = [((3, 4, 5), 0), ((9,) * 40, 1), ((7,), 2)]


def server_of(generation=SamplingConfig(12), on_tokens=None, slots=2, **settings):
    """Tokens are their own text."""
    config = ServingConfig(generation, slots=slots, **settings)
    shown = [] if on_tokens is None else on_tokens
    return Server(Ensemble((POLICY,)), Unconditioned(), IDS, config, lambda *event: shown.append(event))


def ask(server, prompts=PROMPTS):
    """Completions by prompt."""
    return dict(server.complete((PARAMS,), Preference.of([1.0], 0.0), prompts))


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
    several = serve(num_samples=3)
    best = serve(num_samples=3, best=True)
    for number, samples in several.items():
        assert samples[0].tokens == plain[number][0].tokens
        assert best[number] == [max(samples, key=lambda c: float(np.sum(c.log_probs, dtype=np.float64)))]


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
    prompts = [((3 + i,) * (40 if i % 2 else 3), i) for i in range(8)]
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
