"""Mixtures of predictions: products of powers, the experts at the corners, extrapolation beyond them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_policies import PROMPTS, stacked_params, tiny_config

from clp_jax.models.policy import Policy
from clp_jax.sampling.decoder import CachedDecoder
from clp_jax.sampling.generate import SamplingConfig, generate, row_keys
from clp_jax.sampling.logit_mixing import MixtureDecoder, mix_log_probs

POLICY = Policy(tiny_config(num_encoder_layers=1, num_decoder_layers=1))
PARAMS = stacked_params(POLICY, range(3))
CONFIG = SamplingConfig(max_length=6)
KEYS = row_keys(jax.random.key(0), 8)
LOG_PROBS = np.asarray(jax.nn.log_softmax(jax.random.normal(jax.random.key(1), (3, 2, 5)), axis=-1))


def expert(number: int):
    return jax.tree.map(lambda x: x[number], PARAMS)


@jax.jit
def sample_mixture(params, coefficients):
    return generate(
        MixtureDecoder(POLICY, params, coefficients), jnp.asarray(PROMPTS), keys=KEYS, config=CONFIG, num_samples=2
    )


@jax.jit
def sample_one(params):
    return generate(CachedDecoder(POLICY.bind(params)), jnp.asarray(PROMPTS), keys=KEYS, config=CONFIG, num_samples=2)


@functools.partial(jax.jit, static_argnames="samples")
def forward(params, tokens, samples=2):
    inputs = jnp.repeat(jnp.asarray(PROMPTS), samples, axis=0)
    shifted = jnp.pad(tokens[:, :-1], ((0, 0), (1, 0)))
    return jax.vmap(lambda p: POLICY.bind(p)(inputs, shifted))(params)


@pytest.mark.parametrize("coefficients", [(0.2, 0.3, 0.5), (1.0, 0.0, 0.0), (1.7, -0.7, 0.0), (0.5, 0.5, 0.5)])
def test_the_mixture_is_the_product_of_powers(coefficients):
    mixed = jax.nn.softmax(mix_log_probs(jnp.asarray(LOG_PROBS), jnp.asarray(coefficients)), axis=-1)
    product = np.prod(np.exp(LOG_PROBS.astype(np.float64)) ** np.asarray(coefficients)[:, None, None], axis=0)
    np.testing.assert_allclose(mixed, product / product.sum(-1, keepdims=True), rtol=1e-5)


def test_a_coefficient_of_zero_takes_a_policy_out():
    impossible = LOG_PROBS.copy()
    impossible[1, :, 2] = -np.inf
    mixed = mix_log_probs(jnp.asarray(impossible), jnp.asarray([1.0, 0.0, 0.0]))
    np.testing.assert_array_equal(mixed, LOG_PROBS[0])
    # With a positive coefficient what one policy forbids stays forbidden.
    mixed = mix_log_probs(jnp.asarray(impossible), jnp.asarray([0.9, 0.1, 0.0]))
    np.testing.assert_array_equal(np.isneginf(mixed), np.isneginf(impossible[1]))


@pytest.mark.parametrize("number", range(3))
def test_a_corner_is_the_expert(number):
    mixed, alone = sample_mixture(PARAMS, jnp.eye(3)[number]), sample_one(expert(number))
    np.testing.assert_array_equal(mixed.tokens, alone.tokens)
    np.testing.assert_allclose(mixed.log_probs, alone.log_probs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("coefficients", [(0.2, 0.3, 0.5), (-0.5, 1.5, 0.0)])
def test_log_probs_are_the_normalised_mixtures(coefficients):
    out = sample_mixture(PARAMS, jnp.asarray(coefficients))
    log_probs = np.asarray(jax.nn.log_softmax(forward(PARAMS, out.tokens), axis=-1), np.float64)
    mixed = np.einsum("m,mrtv->rtv", np.asarray(coefficients), log_probs)
    mixed -= np.log(np.exp(mixed).sum(-1, keepdims=True))
    expected = np.take_along_axis(mixed, np.asarray(out.tokens)[..., None], -1)[..., 0] * np.asarray(out.mask)
    np.testing.assert_allclose(out.log_probs, expected, rtol=1e-5, atol=1e-5)


def test_equal_policies_are_one():
    params = jax.tree.map(lambda x: jnp.stack([x[0]] * 3), PARAMS)
    mixed, alone = sample_mixture(params, jnp.asarray([0.2, 0.3, 0.5])), sample_one(expert(0))
    np.testing.assert_array_equal(mixed.tokens, alone.tokens)
    np.testing.assert_allclose(mixed.log_probs, alone.log_probs, rtol=1e-5, atol=1e-5)
