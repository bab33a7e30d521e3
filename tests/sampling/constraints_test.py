"""Ends, stop sequences, minimum lengths, processors and seeds in generation, against a sampler in plain Python."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from slot_policies import STATES, HashDecoder, hash_table
from tiny_policies import MarkovDecoder

from clp_jax.sampling.generate import SamplingConfig, generate, request_keys, row_keys
from clp_jax.sampling.processors import BannedSequences, ForcedFirst, ForcedLast, NoRepeatNGram, RepetitionPenalty
from clp_jax.sampling.strategies import Greedy, Sampling

VOCAB, LENGTH = 6, 8
TABLE = jnp.asarray(np.random.default_rng(0).normal(size=(VOCAB, VOCAB)), jnp.float32)
PROMPTS = np.asarray([[3, 4, 5, 0], [6, 7, 0, 0], [8, 3, 4, 7], [5, 0, 0, 0]], np.int32)
SEEDS = np.asarray([7, 2**32 - 1, 0, 7], np.uint32)


@functools.partial(jax.jit, static_argnames=("config", "ends", "pad_id"))
def run_chain(keys, config, ends=(1,), pad_id=0):
    decoder = MarkovDecoder(TABLE, pad_id=pad_id, eos_ids=ends)
    return generate(decoder, jnp.zeros((keys.shape[0], 1), jnp.int32), keys=keys, config=config)


@functools.partial(jax.jit, static_argnames=("config", "num_samples"))
def run_hash(inputs, seeds, config, num_samples):
    decoder = HashDecoder(hash_table())
    keys = request_keys(seeds, num_samples)
    return generate(decoder, inputs, keys=keys, config=config, num_samples=num_samples)


def cut(tokens: np.ndarray, ends, stop, least: int) -> int:
    """Where a completion that went on ends."""
    for n in range(1, len(tokens) + 1):
        stopped = n >= least and any(tuple(tokens[max(n - len(s), 0) : n]) == s for s in stop)
        if tokens[n - 1] in ends or stopped:
            return n
    return len(tokens)


@pytest.mark.parametrize(
    ("ends", "stop", "least", "pad_id"),
    [
        ((1, 4), (), 0, 0),
        ((), (), 0, 0),
        ((1,), ((2, 3), (5,)), 0, 0),
        ((1,), ((2, 3), (5,)), 4, 3),
        ((), ((0, 0), (3, 3, 3), (1, 2, 3, 4, 5, 0, 1, 2, 3)), 0, 5),
    ],
)
def test_completions_end_where_they_should(ends, stop, least, pad_id):
    """The same keys without an end go on; what comes before the end is the same."""
    keys = row_keys(jax.random.key(1), 64)
    # Ends stay forbidden while a completion is short, with or without effect.
    processors = tuple(BannedSequences(((end,),)) for end in ends) if least else ()
    config = SamplingConfig(LENGTH, stop=stop, min_length=least, processors=processors)
    out = run_chain(keys, config, ends, pad_id)
    whole = run_chain(keys, SamplingConfig(LENGTH, processors=processors), (), pad_id)
    tokens, log_probs = np.array(whole.tokens), np.array(whole.log_probs)
    lengths = [cut(row, ends, stop, least) for row in tokens]
    assert len(set(lengths)) > 3 or not (ends or stop)
    mask = np.arange(LENGTH) < np.asarray(lengths)[:, None]
    np.testing.assert_array_equal(out.mask, mask)
    np.testing.assert_array_equal(out.tokens, np.where(mask, tokens, pad_id))
    np.testing.assert_array_equal(out.log_probs, np.where(mask, log_probs, 0))
    np.testing.assert_array_equal(whole.mask, np.ones_like(tokens))


def test_a_completion_has_its_minimum_before_its_end():
    out = run_chain(row_keys(jax.random.key(2), 256), SamplingConfig(LENGTH, min_length=3), ends=(1, 4))
    lengths = np.asarray(out.mask).sum(-1)
    assert lengths.min() == 4
    ended = np.isin(np.asarray(out.tokens)[:, 3], (1, 4))
    np.testing.assert_array_equal(ended, lengths == 4)


def test_processors_see_what_was_written():
    """Greedy choices, one by one in plain Python; the log-probabilities stay the decoder's own."""
    processors = (
        RepetitionPenalty(1.5),
        NoRepeatNGram(2),
        BannedSequences(((2, 3),)),
        ForcedFirst(3),
        ForcedLast((5,)),
    )
    config = SamplingConfig(LENGTH, Greedy(), processors)
    out = run_chain(row_keys(jax.random.key(0), 1), config, ends=())
    table, seen = np.asarray(TABLE), [0]
    own = np.asarray(jax.nn.log_softmax(TABLE))
    for place in range(LENGTH):
        logits = table[seen[-1]].copy()
        for token in set(seen):
            logits[token] *= 1.5 if logits[token] < 0 else 1 / 1.5
        for a, b in itertools.pairwise(seen):
            if a == seen[-1]:
                logits[b] = -np.inf
        if seen[-1] == 2:
            logits[3] = -np.inf
        chosen = {0: 3, LENGTH - 1: 5}.get(place, int(np.argmax(logits)))
        np.testing.assert_allclose(out.log_probs[0, place], own[seen[-1], chosen], rtol=1e-6)
        seen.append(chosen)
    assert out.tokens[0].tolist() == seen[1:]
    plain = run_chain(row_keys(jax.random.key(0), 1), SamplingConfig(LENGTH, Greedy()), ends=())
    assert plain.tokens[0].tolist() != seen[1:]


def test_a_completion_depends_on_its_prompt_seed_and_number_alone():
    """Other batches, other orders, other numbers of samples, more padding: the same bits."""
    config = SamplingConfig(LENGTH, Sampling(temperature=1.3), processors=(NoRepeatNGram(2, "prompt"),), stop=((4, 4),))
    tokens = np.asarray(run_hash(PROMPTS, SEEDS, config, 3).tokens).reshape(4, 3, LENGTH)
    assert len({tuple(row) for row in tokens.reshape(-1, LENGTH).tolist()}) == 12
    order = np.asarray([2, 0, 3, 1])
    moved = run_hash(np.pad(PROMPTS, ((0, 0), (0, 2)))[order], SEEDS[order], config, 3).tokens
    np.testing.assert_array_equal(moved.reshape(4, 3, LENGTH), tokens[order])
    for size, samples in ((1, 3), (2, 1), (1, 5)):
        part = np.asarray(run_hash(PROMPTS[1 : 1 + size], SEEDS[1 : 1 + size], config, samples).tokens)
        part = part.reshape(size, samples, LENGTH)
        np.testing.assert_array_equal(part[:, : min(samples, 3)], tokens[1 : 1 + size, :samples])


def test_keys_of_requests():
    keys = request_keys(jnp.asarray(SEEDS), 3)
    expected = [jax.random.fold_in(jax.random.key(seed), sample) for seed in SEEDS for sample in range(3)]
    np.testing.assert_array_equal(jax.random.key_data(keys), [jax.random.key_data(key) for key in expected])
    assert request_keys(jnp.asarray(SEEDS)).shape == (4,)


def test_configurations_are_static_arguments():
    config = SamplingConfig(3, processors=(NoRepeatNGram(2), BannedSequences(((2, 3),))), stop=((4, 4),), min_length=1)
    assert hash(config) == hash(dataclasses.replace(config)) and config != dataclasses.replace(config, stop=())
    assert hash_table().shape[0] == STATES


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SamplingConfig(3, min_length=4), r"SamplingConfig\.min_length is 4: expected 0 to max_length, 3"),
        (lambda: SamplingConfig(3, min_length=-1), r"SamplingConfig\.min_length is -1: expected 0"),
        (lambda: SamplingConfig(3, stop=((),)), r"SamplingConfig\.stop has \(\): expected one or more token ids"),
    ],
)
def test_bad_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
