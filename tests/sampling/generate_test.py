"""Generation against enumeration, against the scorer, and against the whole forward."""

import dataclasses
import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_policies import PROMPTS, MarkovDecoder, tiny_config, varied_params

from clp_jax.data.vocabulary import EOS_ID
from clp_jax.models.config import MoEConfig
from clp_jax.models.policy import Policy
from clp_jax.nn.routing import Dropless, TokenChoice
from clp_jax.sampling.decoder import CachedDecoder
from clp_jax.sampling.generate import SamplingConfig, generate, row_keys
from clp_jax.sampling.score import score
from clp_jax.sampling.strategies import Greedy, Sampling

POLICY = Policy(tiny_config(num_encoder_layers=1, num_decoder_layers=2))
PARAMS = varied_params(POLICY)
STRATEGIES = [
    Sampling(),
    Sampling(temperature=0.6, top_k=3),
    Sampling(temperature=1.4, top_p=0.8, min_p=0.02),
    Greedy(),
]


@functools.partial(jax.jit, static_argnames=("policy", "config", "num_samples"))
def run(policy, params, inputs, keys, config, num_samples=1):
    """Completions, and what the scorer says about them."""
    model = policy.bind(params)
    out = generate(CachedDecoder(model), inputs, keys=keys, config=config, num_samples=num_samples)
    return out, score(model, inputs, out.tokens)


@functools.partial(jax.jit, static_argnames="config")
def run_chain(table, keys, config):
    return generate(MarkovDecoder(table), jnp.zeros((keys.shape[0], 1), jnp.int32), keys=keys, config=config)


def sequences(vocab_size: int, length: int) -> np.ndarray:
    """All completions: up to the end of sequence, or `length` tokens without one."""
    others = [token for token in range(vocab_size) if token != EOS_ID]
    out = [
        (*prefix, EOS_ID, *[0] * (length - 1 - ended))
        for ended in range(length)
        for prefix in itertools.product(others, repeat=ended)
    ]
    return np.asarray(out + list(itertools.product(others, repeat=length)), np.int32)


def check_frequencies(tokens: np.ndarray, every: np.ndarray, probs: np.ndarray) -> None:
    """Five standard errors for each completion, and no other completion."""
    counts = {tuple(row): 0 for row in every.tolist()}
    for row in np.asarray(tokens).tolist():
        counts[tuple(row)] += 1
    frequencies = np.asarray(list(counts.values())) / len(tokens)
    assert np.all(np.abs(frequencies - probs) <= 5 * np.sqrt(probs * (1 - probs) / len(tokens)) + 1e-12)


@pytest.mark.parametrize("strategy", STRATEGIES, ids=repr)
def test_log_probs_are_the_scorers_whatever_the_strategy(strategy):
    """They are the policy's own, at temperature 1 and unfiltered: what training needs."""
    config = SamplingConfig(max_length=8, strategy=strategy)
    out, scored = run(POLICY, PARAMS, PROMPTS, row_keys(jax.random.key(0), 8), config, num_samples=2)
    assert out.tokens.shape == out.log_probs.shape == out.mask.shape == (8, 8)
    np.testing.assert_allclose(out.log_probs, scored, rtol=1e-5, atol=1e-5)
    assert np.all(np.asarray(out.log_probs)[np.asarray(out.mask) == 1] < 0)


def test_a_completion_does_not_depend_on_its_batch():
    config, keys = SamplingConfig(max_length=8), row_keys(jax.random.key(3), 8)
    whole, _ = run(POLICY, PARAMS, PROMPTS, keys, config, num_samples=2)
    # A prompt alone, and one beside other prompts, in another place, behind more padding.
    alone, _ = run(POLICY, PARAMS, PROMPTS[2:3], keys[4:6], config, num_samples=2)
    moved, _ = run(POLICY, PARAMS, np.pad(PROMPTS[::-1], ((0, 0), (0, 2))), keys[jnp.asarray([6, 4, 2, 0])], config)
    np.testing.assert_array_equal(alone.tokens, whole.tokens[4:6])
    np.testing.assert_allclose(alone.log_probs, whole.log_probs[4:6], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(moved.tokens, whole.tokens[::-1][1::2])
    np.testing.assert_array_equal(run(POLICY, PARAMS, PROMPTS, keys, config, num_samples=2)[0].tokens, whole.tokens)


def test_experts_serve_a_row_as_if_it_were_alone():
    """Whatever shares a capacity in whole forwards, rows that are decoded share none, and nothing is dropped."""
    moe = MoEConfig(
        num_experts=2,
        router=Dropless(1, renormalize=False),
        decoder_router=TokenChoice(group="batch", eval_capacity=0.5),
    )
    policy = Policy(tiny_config(num_encoder_layers=1, num_decoder_layers=2, moe=moe))
    roomy = dataclasses.replace(moe, decoder_router=Dropless(1, renormalize=False))
    config, keys = SamplingConfig(max_length=8), row_keys(jax.random.key(3), 4)
    params = varied_params(policy)
    whole, scored = run(policy, params, PROMPTS, keys, config)
    assert np.any(np.abs(scored - whole.log_probs) > 1e-3)  # Of all tokens at once, some are dropped.
    for row in range(4):
        alone, _ = run(policy, params, PROMPTS[row : row + 1], keys[row : row + 1], config)
        np.testing.assert_array_equal(alone.tokens[0], whole.tokens[row])
        np.testing.assert_allclose(alone.log_probs[0], whole.log_probs[row], rtol=1e-5, atol=1e-5)
    policy = Policy(dataclasses.replace(policy.config, moe=roomy))
    now, scored = run(policy, params, PROMPTS, keys, config)
    np.testing.assert_array_equal(now.tokens, whole.tokens)
    np.testing.assert_allclose(scored, whole.log_probs, rtol=1e-5, atol=1e-5)


def test_greedy_is_the_argmax_of_the_whole_forward():
    config = SamplingConfig(max_length=6, strategy=Greedy())
    out, _ = run(POLICY, PARAMS, PROMPTS, row_keys(jax.random.key(0), 4), config)

    @jax.jit
    def forward(inputs, decoder_inputs):
        return POLICY.bind(PARAMS)(inputs, decoder_inputs)

    tokens, done = np.zeros((4, 7), np.int32), np.zeros(4, bool)
    for t in range(6):
        best = np.argmax(np.asarray(forward(PROMPTS, tokens[:, :6]))[:, t], axis=-1)
        tokens[:, t + 1] = np.where(done, 0, best)
        done |= best == EOS_ID
    np.testing.assert_array_equal(out.tokens, tokens[:, 1:])


def test_samples_follow_the_policys_distribution_over_whole_completions():
    policy = Policy(tiny_config(vocab_size=4, num_encoder_layers=1, num_decoder_layers=1))
    params, prompt = varied_params(policy, seed=1), np.asarray([[3, 2, 1]], np.int32)
    every = sequences(4, 3)
    log_probs = jax.jit(lambda p, x, y: score(policy.bind(p), x, y))(params, prompt, every)
    probs = np.exp(np.asarray(log_probs, np.float64).sum(-1))
    np.testing.assert_allclose(probs.sum(), 1, rtol=1e-5)
    out, _ = run(
        policy, params, prompt, row_keys(jax.random.key(0), 4096), SamplingConfig(max_length=3), num_samples=4096
    )
    check_frequencies(out.tokens, every, probs)


@pytest.mark.parametrize("strategy", [Sampling(), Sampling(temperature=0.5, top_k=3)], ids=repr)
def test_samples_of_a_chain_follow_the_products_of_its_transitions(strategy):
    table = jnp.asarray(np.random.default_rng(0).normal(size=(4, 4)), jnp.float32)
    every = sequences(4, 3)
    out = run_chain(table, row_keys(jax.random.key(5), 8192), SamplingConfig(max_length=3, strategy=strategy))

    def products(logits):
        transitions = np.asarray(jax.nn.softmax(logits, axis=-1), np.float64)
        probs = np.ones(len(every))
        for i, row in enumerate(every):
            last = 0
            for token in row:
                probs[i] *= transitions[last, token]
                last = token
                if token == EOS_ID:
                    break
        return probs

    check_frequencies(out.tokens, every, products(strategy.filter(table)))
    recorded = dict(zip(map(tuple, np.asarray(out.tokens).tolist()), np.asarray(out.log_probs).sum(-1), strict=True))
    exact = dict(zip(map(tuple, every.tolist()), np.log(products(table)), strict=True))
    np.testing.assert_allclose(list(recorded.values()), [exact[row] for row in recorded], rtol=1e-5)


def chain(*next_tokens: int) -> jax.Array:
    """A table that goes from token i to ``next_tokens[i]``, almost surely."""
    return jnp.asarray(50.0 * np.eye(len(next_tokens))[list(next_tokens)], jnp.float32)


def test_after_the_end_of_sequence_comes_nothing():
    """Token 2 ends, token 3 goes on for ever, and after the end the chain itself would go on."""
    table = chain(0, 2, EOS_ID, 3).at[0].set(jnp.asarray([-50.0, -50.0, 0.0, 0.0]))
    out = run_chain(table, row_keys(jax.random.key(0), 16), SamplingConfig(max_length=6))
    ended = np.asarray(out.tokens)[:, 0] == 2
    assert 0 < ended.sum() < 16
    np.testing.assert_array_equal(out.tokens, np.where(ended[:, None], [2, EOS_ID, 0, 0, 0, 0], 3))
    np.testing.assert_array_equal(out.mask, np.where(ended[:, None], [1, 1, 0, 0, 0, 0], 1))
    np.testing.assert_array_equal(np.asarray(out.log_probs)[ended, 2:], 0)
    np.testing.assert_allclose(out.log_probs[:, 0], np.log(0.5), rtol=1e-6)


def test_without_an_end_of_sequence_all_tokens_count_padding_too():
    """Token 0 is a token like others until the end: a policy that writes it is scored on it."""
    out = run_chain(chain(2, 0, 0, 0), row_keys(jax.random.key(0), 1), SamplingConfig(max_length=5))
    np.testing.assert_array_equal(out.tokens, [[2, 0, 2, 0, 2]])
    np.testing.assert_array_equal(out.mask, np.ones((1, 5)))


@pytest.mark.parametrize(("table", "steps"), [(chain(2, 0, EOS_ID), 2), (chain(2, 0, 2), 7), (chain(EOS_ID, 0, 0), 1)])
def test_the_loop_ends_with_the_last_row(table, steps):
    calls = []

    class Counting(MarkovDecoder):
        def step(self, tokens, state):
            jax.debug.callback(lambda: calls.append(1))
            return super().step(tokens, state)

    config = SamplingConfig(max_length=7)
    generate(Counting(table), jnp.zeros((3, 1), jnp.int32), keys=row_keys(jax.random.key(0), 3), config=config)
    jax.effects_barrier()
    assert len(calls) == steps


def test_a_length_below_one_is_refused():
    with pytest.raises(ValueError, match=r"SamplingConfig\.max_length is 0: expected at least 1"):
        SamplingConfig(max_length=0)


def test_a_loop_over_tokens_writes_its_cache_in_place():
    """No program inside the whole one, of which the loop is one, copies what the policy wrote so far."""

    @jax.jit
    def cached(params, inputs, keys):
        return generate(CachedDecoder(POLICY.bind(params)), inputs, keys=keys, config=SamplingConfig(13))

    text = cached.lower(PARAMS, PROMPTS, row_keys(jax.random.key(0), 4)).compile().as_text()
    inner = text[: text.index("\nENTRY ")]
    assert "[4,2,13,4]" in inner and " while(" in text
    assert not re.findall(r"= \w+\[(?:1,)?4,2,13,4\]\S* copy\(", inner)
