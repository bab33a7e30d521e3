"""Continuous batching writes what `generate` writes, whatever comes in when, in few programs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilations import counted
from shape_checker import unchecked
from slot_policies import HashDecoder, hash_table
from tiny_policies import MarkovDecoder

from clp_jax.sampling.beam_search import BeamConfig
from clp_jax.sampling.engine import Engine, EngineConfig, Request
from clp_jax.sampling.generate import SamplingConfig, generate, request_keys
from clp_jax.sampling.processors import ForcedLast, NoRepeatNGram, OccurrencePenalty
from clp_jax.sampling.slots import SlotDecoder
from clp_jax.sampling.strategies import Sampling

TABLE = hash_table()
PLAIN = SamplingConfig(10)
RICH = SamplingConfig(
    10,
    Sampling(temperature=0.9, top_k=6),
    processors=(NoRepeatNGram(3, "prompt"), OccurrencePenalty(0.2, 0.1), ForcedLast()),
    stop=((7, 3), (5,)),
    min_length=2,
)
RNG = np.random.default_rng(0)
REQUESTS = [
    Request(
        prompt=tuple(RNG.integers(1, 9, RNG.integers(1, 9)).tolist()),
        seed=int(RNG.integers(2**32)),
        num_samples=int(RNG.integers(1, 4)),
        max_tokens=(None, 4)[i % 2],
        stop=((4, 4), (6, 3), (8,)) if i % 3 == 0 else (),
    )
    for i in range(9)
]


@functools.partial(jax.jit, static_argnames=("config", "num_samples"))
def run(table, inputs, seeds, config, num_samples):
    return generate(
        HashDecoder(table), inputs, keys=request_keys(seeds, num_samples), config=config, num_samples=num_samples
    )


@functools.cache
def alone(request: Request, sampling: SamplingConfig) -> list[tuple[list[int], np.ndarray]]:
    """Its completions by `generate`, one request at a time, with its own stop sequences and limit."""
    config = SamplingConfig(
        request.max_tokens or sampling.max_length,
        sampling.strategy,
        sampling.processors,
        (*sampling.stop, *request.stop),
        min(sampling.min_length, request.max_tokens or sampling.max_length),
    )
    out = run(
        TABLE, jnp.asarray([request.prompt]), jnp.asarray([request.seed], jnp.uint32), config, request.num_samples
    )
    lengths = np.asarray(out.mask).sum(-1).astype(int)
    return [(out.tokens[i, :n].tolist(), np.asarray(out.log_probs[i, :n])) for i, n in enumerate(lengths)]


def check(results, sampling: SamplingConfig) -> None:
    for result in results:
        expected = alone(result.request, sampling)
        assert len(result.samples) == len(expected)
        for sample, (tokens, log_probs) in zip(result.samples, expected, strict=True):
            assert list(sample.tokens) == tokens
            np.testing.assert_allclose(sample.log_probs, log_probs, rtol=1e-6)


@pytest.mark.parametrize(
    ("sampling", "sizes"),
    [
        (PLAIN, dict(slots=1, chunk=1)),
        (PLAIN, dict(slots=3, chunk=4, num_samples=2)),
        (RICH, dict(slots=2, chunk=3)),
        (RICH, dict(slots=4, chunk=16, num_samples=3, prefill=3)),
    ],
    ids=["one", "pairs", "rich", "together"],
)
def test_completions_are_those_of_generate(sampling, sizes):
    """Any order of arrival; requests that come later than others began; in one program and one for each bucket."""
    engine = Engine(HashDecoder, TABLE, EngineConfig(sampling, buckets=(4, 8), **sizes))
    reasons = set()
    for order in (np.arange(9), np.random.default_rng(1).permutation(9)):
        waiting, results, numbers = list(order), [], []
        while waiting or not engine.is_idle:
            for _ in range(min(2, len(waiting))):
                numbers.append(engine.submit(REQUESTS[waiting.pop(0)]))
            results += engine.step()
        assert sorted(result.number for result in results) == sorted(numbers)
        assert {result.number: result.request for result in results} == {
            number: REQUESTS[i] for number, i in zip(numbers, order, strict=True)
        }
        check(results, sampling)
        reasons |= {sample.reason for result in results for sample in result.samples}
    # The last token of the rich ones is forced to be an end.
    assert reasons == ({"end", "stop", "length"} if sampling is PLAIN else {"end", "stop"})
    assert engine._decode._cache_size() == 1
    assert engine._fill._cache_size() == 2


def test_nothing_is_compiled_once_every_bucket_was_seen():
    engine = Engine(HashDecoder, TABLE, EngineConfig(PLAIN, buckets=(4, 8), slots=2, chunk=3, num_samples=2))
    for request in REQUESTS:
        engine.submit(request)
    assert {len(request.prompt) > 4 for request in REQUESTS} == {True, False}
    assert len(list(engine.run())) == 9
    with counted() as programs:
        for request in REQUESTS:
            engine.submit(request)
        assert len(list(engine.run())) == 9
    assert programs == []


@pytest.mark.parametrize("chunk", [1, 4])
def test_tokens_are_handed_out_in_order_as_they_are_written(chunk):
    seen: dict[tuple[int, int], list[tuple[int, ...]]] = {}
    order = []

    def on_tokens(number, sample, tokens):
        seen.setdefault((number, sample), []).append(tokens)
        order.append((number, sample))

    engine = Engine(HashDecoder, TABLE, EngineConfig(RICH, buckets=(8,), slots=3, chunk=chunk), on_tokens)
    for request in REQUESTS[:4]:
        engine.submit(request)
    first = engine.step()
    assert set(order) <= {(number, sample) for number in range(4) for sample in range(3)} and order == sorted(order)
    results = [*first, *engine.run()]
    check(results, RICH)
    for result in results:
        for number, sample in enumerate(result.samples):
            parts = seen.pop((result.number, number))
            assert sum(parts, ()) == sample.tokens
            assert all(1 <= len(part) <= chunk for part in parts)
            # Only the last part may be shorter than a chunk.
            assert {len(part) for part in parts[:-1]} <= {chunk}
    assert not seen


def test_results_come_as_soon_as_they_are_ready_and_slots_are_used_again():
    """A long request does not hold up the short ones behind it."""
    engine = Engine(HashDecoder, TABLE, EngineConfig(PLAIN, buckets=(8,), slots=2, chunk=1))
    long = next(i for i, r in enumerate(REQUESTS) if r.num_samples == 1 and len(alone(r, PLAIN)[0][0]) >= 5)
    engine.submit(REQUESTS[long])
    for seed in range(3):
        engine.submit(Request((3, 4), seed, max_tokens=1))
    steps = [[result.number for result in engine.step()] for _ in range(3)]
    assert steps == [[1], [2], [3]]
    assert [result.number for result in engine.run()] == [0]


def test_cancelled_requests_keep_what_they_have():
    engine = Engine(HashDecoder, TABLE, EngineConfig(PLAIN, buckets=(8,), slots=1, chunk=1))
    long = next(r for r in REQUESTS if max(len(tokens) for tokens, _ in alone(r, PLAIN)) >= 4)
    one = Request(long.prompt, long.seed, long.num_samples)
    running, waiting, other = engine.submit(one), engine.submit(one), engine.submit(REQUESTS[2])
    assert engine.step() == []
    engine.cancel(running)
    engine.cancel(waiting)
    engine.cancel(99)
    results = {result.number: result for result in engine.run()}
    assert {sample.reason for sample in results[running].samples} == {"cancelled"}
    assert list(results[running].samples[0].tokens) == alone(one, PLAIN)[0][0][:1]
    assert all(sample.tokens == () for sample in results[waiting].samples)
    check([results[other]], PLAIN)


def test_a_callback_may_cancel_and_submit():
    """As a server does that finds a stop string in the text, or answers with a request."""
    later = []

    def on_tokens(number, sample, tokens):
        if number == 0:
            engine.cancel(0)
            later.append(engine.submit(REQUESTS[1]))

    engine = Engine(HashDecoder, TABLE, EngineConfig(PLAIN, buckets=(8,), slots=2, chunk=1), on_tokens)
    engine.submit(Request((3, 4, 5), seed=2))
    results = list(engine.run())
    assert [result.number for result in results] == [0, *later] and len(later) == 1
    assert len(results[0].samples[0].tokens) == 1
    check(results[1:], PLAIN)


def test_new_parameters_are_used_from_the_next_step_on():
    engine = Engine(HashDecoder, TABLE, EngineConfig(PLAIN, buckets=(8,), slots=2))
    request = REQUESTS[4]
    engine.submit(request)
    check(engine.run(), PLAIN)
    engine.params = hash_table(seed=1)
    engine.submit(request)
    (result,) = engine.run()
    seeds = jnp.asarray([request.seed], jnp.uint32)
    out = run(
        engine.params, jnp.asarray([request.prompt]), seeds, SamplingConfig(10, stop=request.stop), request.num_samples
    )
    tokens = [tuple(row[: int(n)].tolist()) for row, n in zip(np.asarray(out.tokens), out.mask.sum(-1), strict=True)]
    assert [sample.tokens for sample in result.samples] == tokens != [tuple(t) for t, _ in alone(request, PLAIN)]


def test_a_decoder_of_slots_says_so():
    assert isinstance(HashDecoder(TABLE), SlotDecoder)
    assert not isinstance(MarkovDecoder(jnp.zeros((3, 3))), SlotDecoder)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EngineConfig(PLAIN, ()), r"EngineConfig\.buckets is \(\): expected ascending lengths"),
        (lambda: EngineConfig(PLAIN, (8, 4)), r"EngineConfig\.buckets is \(8, 4\): expected ascending"),
        (lambda: EngineConfig(PLAIN, (8,), slots=0), r"EngineConfig\.slots is 0: expected at least 1"),
        (lambda: EngineConfig(PLAIN, (8,), chunk=0), r"EngineConfig\.chunk is 0: expected at least 1"),
        (lambda: Request((3,), seed=-1), r"Request\.seed is -1: expected 0 to 2\^32 - 1"),
        (lambda: Request((3,), num_samples=0), r"Request\.num_samples is 0: expected at least 1"),
        (lambda: Request((3,), stop=((),)), r"Request\.stop has \(\): expected one or more token ids"),
    ],
)
def test_bad_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_search_is_refused():
    """What is not of its type gets as far as it does for users, whose types nobody checks."""
    with (
        unchecked(),
        pytest.raises(TypeError, match=r"EngineConfig\.sampling is a BeamConfig: expected a SamplingConfig"),
    ):
        EngineConfig(BeamConfig(4, num_beams=2), (8,))


def test_requests_that_cannot_be_served_are_refused():
    engine = Engine(HashDecoder, TABLE, EngineConfig(PLAIN, buckets=(2, 4), slots=1))
    with pytest.raises(
        ValueError, match=r"the prompt has 5 tokens: expected 1 to 4, the longest of the buckets; cut it"
    ):
        engine.submit(Request((3,) * 5))
    with pytest.raises(ValueError, match=r"the prompt has 0 tokens: expected 1 to 4"):
        engine.submit(Request(()))
    with pytest.raises(ValueError, match=r"the prompt ends with the padding token 0: expected no padding"):
        engine.submit(Request((3, 0)))
    with pytest.raises(ValueError, match=r"Request\.max_tokens is 11: expected 1 to the engine's maximum, 10"):
        engine.submit(Request((3,), max_tokens=11))
    assert engine.is_idle and engine.step() == []
