"""Decoders made of others: against the mixture of one shape, by hand, and through every way of decoding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from slot_policies import HashDecoder, hash_table
from tiny_policies import PROMPTS, MarkovDecoder, stacked_params, tiny_config, varied_params

from clp_jax.models.policy import Policy
from clp_jax.sampling.beam_search import BeamConfig, beam_search
from clp_jax.sampling.decoder import CachedDecoder
from clp_jax.sampling.decoder_mixing import ContrastiveDecoder, ProductDecoder
from clp_jax.sampling.engine import Engine, EngineConfig, Request
from clp_jax.sampling.generate import SamplingConfig, generate, request_keys, row_keys
from clp_jax.sampling.logit_mixing import MixtureDecoder

POLICY = Policy(tiny_config(num_encoder_layers=1, num_decoder_layers=1))
PARAMS = stacked_params(POLICY, range(2))
SMALL = Policy(tiny_config(num_encoder_layers=1, num_decoder_layers=1, embed_dim=6, num_heads=1))
CONFIG = SamplingConfig(max_length=6)
RNG = np.random.default_rng(0)


def log_softmax(x):
    x = np.asarray(x, np.float64)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def test_the_product_of_one_shape_is_the_mixture():
    inputs, keys, coefficients = jnp.asarray(PROMPTS), row_keys(jax.random.key(0), 8), jnp.asarray([0.7, 0.5])

    @jax.jit
    def both(params):
        halves = (jax.tree.map(lambda x: x[0], params), jax.tree.map(lambda x: x[1], params))
        experts = tuple(CachedDecoder(POLICY.bind(half)) for half in halves)
        ours = generate(ProductDecoder(experts, coefficients), inputs, keys=keys, config=CONFIG, num_samples=2)
        mixture = MixtureDecoder(POLICY, params, coefficients)
        return ours, generate(mixture, inputs, keys=keys, config=CONFIG, num_samples=2)

    ours, theirs = both(PARAMS)
    np.testing.assert_array_equal(ours.tokens, theirs.tokens)
    np.testing.assert_allclose(ours.log_probs, theirs.log_probs, rtol=1e-5, atol=1e-6)


def test_policies_of_different_shapes():
    """With all weight on one it is that one, whichever runs beside it; beam search reorders both."""
    inputs, keys = jnp.asarray(PROMPTS), row_keys(jax.random.key(0), 4)

    @jax.jit
    def run(large, small):
        decoders = (CachedDecoder(POLICY.bind(large)), CachedDecoder(SMALL.bind(small)))
        mixed = ProductDecoder(decoders, jnp.asarray([0.0, 1.0]))
        beams = [beam_search(decoder, inputs, BeamConfig(5, 3, 2)) for decoder in (mixed, decoders[1])]
        return [generate(decoder, inputs, keys=keys, config=CONFIG) for decoder in (mixed, decoders[1])], beams

    (ours, theirs), beams = run(varied_params(POLICY), varied_params(SMALL, seed=3))
    np.testing.assert_array_equal(ours.tokens, theirs.tokens)
    np.testing.assert_allclose(ours.log_probs, theirs.log_probs, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(beams[0].completions.tokens, beams[1].completions.tokens)
    np.testing.assert_allclose(beams[0].scores, beams[1].scores, rtol=1e-5)


@pytest.mark.parametrize(
    "settings", [{}, dict(plausibility=0.5, strength=0.3, amateur_temperature=0.5), dict(plausibility=1.0)]
)
def test_contrast_by_hand(settings):
    expert, amateur = RNG.normal(size=(2, 6, 7)).astype(np.float32) * 2
    decoder = ContrastiveDecoder(MarkovDecoder(jnp.zeros((7, 7))), MarkovDecoder(jnp.zeros((7, 7))), **settings)
    ours = np.asarray(decoder.contrast(jax.nn.log_softmax(expert), jax.nn.log_softmax(amateur)))
    probs = np.exp(log_softmax(expert))
    plausible = probs >= settings.get("plausibility", 0.1) * probs.max(-1, keepdims=True)
    weak = log_softmax(log_softmax(amateur) / settings.get("amateur_temperature", 1.0))
    expected = np.where(plausible, log_softmax(expert) - settings.get("strength", 1.0) * weak, -np.inf)
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)
    assert 0 < np.isinf(ours).sum() < ours.size


def test_what_the_amateur_rules_out_is_a_number():
    decoder = ContrastiveDecoder(MarkovDecoder(jnp.zeros((4, 4))), MarkovDecoder(jnp.zeros((4, 4))))
    amateur = jax.nn.log_softmax(jnp.asarray([[-jnp.inf, -jnp.inf, 0.0, 0.0]]))
    out = decoder.contrast(jax.nn.log_softmax(jnp.asarray([[0.0, 1.0, 2.0, -9.0]])), amateur)
    assert np.all(np.isfinite(np.asarray(out)[0, :3])) and np.argmax(out) == 1 and np.isneginf(out[0, 3])


def mixed(tables):
    return ProductDecoder((HashDecoder(tables[0]), HashDecoder(tables[1])), jnp.asarray([0.5, 0.8]))


def contrasted(tables):
    return ContrastiveDecoder(HashDecoder(tables[0]), HashDecoder(tables[1]), plausibility=0.05)


@pytest.mark.parametrize("bind", [mixed, contrasted])
def test_in_slots(bind):
    tables = (hash_table(), hash_table(seed=1))
    engine = Engine(bind, tables, EngineConfig(CONFIG, buckets=(2, 4), slots=2, chunk=2, num_samples=2))
    prompts = [(3, 4), (5,), (6, 7, 8, 4)]
    for seed, prompt in enumerate(prompts):
        engine.submit(Request(prompt, seed, num_samples=2))
    results = sorted(engine.run(), key=lambda result: result.number)

    @functools.partial(jax.jit, static_argnames="seed")
    def alone(tables, inputs, seed):
        keys = request_keys(jnp.asarray([seed], jnp.uint32), 2)
        return generate(bind(tables), inputs, keys=keys, config=CONFIG, num_samples=2)

    for seed, (prompt, result) in enumerate(zip(prompts, results, strict=True)):
        out = alone(tables, jnp.asarray([prompt]), seed)
        for row, sample in enumerate(result.samples):
            assert list(sample.tokens) == out.tokens[row, : int(out.mask[row].sum())].tolist()


def test_slots_need_decoders_with_slots():
    chain = MarkovDecoder(jnp.zeros((3, 3)))
    with pytest.raises(TypeError, match=r"MarkovDecoder has no slots: expected decoders with `empty` and `insert`"):
        ContrastiveDecoder(chain, chain).empty(1, 2, 3, 1)


def test_decoders_that_do_not_fit_are_refused():
    chain, other = MarkovDecoder(jnp.zeros((3, 3))), MarkovDecoder(jnp.zeros((4, 4)))
    ended = MarkovDecoder(jnp.zeros((3, 3)), eos_ids=(1, 2))
    with pytest.raises(
        ValueError, match=r"padding and end tokens are \[\(0, \(1,\)\), \(0, \(1, 2\)\)\]: expected the same"
    ):
        ContrastiveDecoder(chain, ended)
    with pytest.raises(
        ValueError, match=r"ProductDecoder\.coefficients has shape \(3,\): expected one for each of the 2"
    ):
        ProductDecoder((chain, chain), jnp.ones((3,)))
    mixed = ProductDecoder((chain, other), jnp.ones((2,)))
    tokens, state = mixed.start(jnp.zeros((1, 1), jnp.int32), 2, 1)
    with pytest.raises(ValueError, match=r"vocabularies have \[3, 4\] tokens: expected one size"):
        mixed.step(tokens, state)
    for settings, message in (
        (dict(plausibility=0.0), r"plausibility is 0\.0: expected a number in \(0, 1\]"),
        (dict(strength=-1.0), r"strength is -1\.0: expected 0 or more"),
        (dict(amateur_temperature=0.0), r"amateur_temperature is 0\.0: expected a positive number"),
    ):
        with pytest.raises(ValueError, match=message):
            ContrastiveDecoder(chain, chain, **settings)
