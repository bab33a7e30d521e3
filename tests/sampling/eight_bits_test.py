"""Caches in eight bits, in every place that holds keys: finer levels make them the exact ones, eight bits come near."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_policies import PROMPTS, tiny_config, varied_params

from clp_jax.models import incremental
from clp_jax.models.config import MoEConfig, PaLMConfig
from clp_jax.models.policy import Policy
from clp_jax.nn.attention_dense import Quantized, quantize
from clp_jax.nn.routing import Dropless
from clp_jax.sampling.beam_search import BeamConfig, beam_search
from clp_jax.sampling.decoder import CachedDecoder
from clp_jax.sampling.engine import Engine, EngineConfig, Request
from clp_jax.sampling.generate import SamplingConfig, generate, request_keys

SIZES = dict(vocab_size=11, embed_dim=8, mlp_dim=12, num_heads=2, head_dim=4)
EXPERTS = MoEConfig(num_experts=4, router=Dropless(2), every=2)
POLICIES = {
    "encoder-decoder": tiny_config(num_encoder_layers=1),
    "windows": PaLMConfig.llama(**SIZES, num_layers=3, num_kv_heads=1, window=3, window_pattern=(True, False)),
    "experts": PaLMConfig.llama(**SIZES, num_layers=2, moe=EXPERTS),
}
TOKENS = jnp.asarray(np.random.default_rng(0).integers(1, 11, (4, 7)), jnp.int32)


def finely(x):
    """`quantize`, to a million levels."""
    scale = jnp.max(jnp.abs(x), axis=-1, keepdims=True) / 2**20
    return Quantized(jnp.round(x / jnp.where(scale > 0, scale, 1.0)).astype(jnp.int32), scale)


@pytest.fixture(params=POLICIES.values(), ids=POLICIES)
def policy(request):
    return Policy(request.param)


def near(found, expected) -> None:
    """Within a hundred thousandth of the largest."""
    found, expected = np.asarray(found), np.asarray(expected)
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


def test_logits_step_by_step(policy, monkeypatch):
    params = varied_params(policy)

    def run(int8):
        @jax.jit
        def run(params):
            decoder = CachedDecoder(policy.bind(params), int8)
            first, cache = decoder.start(jnp.asarray(PROMPTS), 7, 1)
            tokens = TOKENS.at[:, 0].set(first).T
            return jax.lax.scan(lambda cache, x: decoder.step(x, cache)[::-1], cache, tokens)

        return run(params)

    _, exact = run(int8=False)
    cache, rounded = run(int8=True)
    kept = [array for stack in cache.stacks for layer in stack for array in vars(layer).values()]
    assert {array.values.dtype for array in kept} == {jnp.dtype("int8")}
    error = np.abs(rounded - exact).max() / np.abs(exact).max()
    assert 1e-4 < error < 0.05
    monkeypatch.setattr(incremental, "quantize", finely)
    near(run(int8=True)[1], exact)


def test_beams_take_their_levels_along(policy, monkeypatch):
    """Rows are reordered at every step; each keeps the scales of the keys that it goes on from."""
    params, config = varied_params(policy), BeamConfig(6, 3, 3)

    def search(int8):
        run = jax.jit(lambda p: beam_search(CachedDecoder(policy.bind(p), int8), jnp.asarray(PROMPTS), config))
        return run(params)

    exact = search(int8=False)
    monkeypatch.setattr(incremental, "quantize", finely)
    found = search(int8=True)
    np.testing.assert_array_equal(found.completions.tokens, exact.completions.tokens)
    near(found.completions.log_probs, exact.completions.log_probs)


def test_slots_are_filled_with_levels(policy, monkeypatch):
    """Requests that come in at any time, into rings that others have used: as each alone."""
    params, sampling = varied_params(policy), SamplingConfig(6)
    keys = request_keys(jnp.arange(4, dtype=jnp.uint32))
    run = jax.jit(lambda p: generate(CachedDecoder(policy.bind(p)), jnp.asarray(PROMPTS), keys=keys, config=sampling))
    exact = run(params)
    monkeypatch.setattr(incremental, "quantize", finely)
    config = EngineConfig(sampling, buckets=(8,), slots=2, chunk=2)
    engine = Engine(lambda p: CachedDecoder(policy.bind(p), True), params, config)
    for seed, row in enumerate(PROMPTS):
        engine.submit(Request(tuple(row[row != 0].tolist()), seed=seed))
    for result in engine.run():
        length = int(exact.mask[result.number].sum())
        assert list(result.samples[0].tokens) == exact.tokens[result.number, :length].tolist()
        near(result.samples[0].log_probs, exact.log_probs[result.number, :length])


def test_a_million_levels_are_as_eight_bits_in_all_else():
    x = jnp.asarray(np.random.default_rng(1).normal(size=(3, 5, 4)), jnp.float32)
    coarse, fine = quantize(x), finely(x)
    np.testing.assert_allclose(coarse.scale / fine.scale, 2**20 / 127, rtol=1e-6)
    assert np.abs(coarse.values * coarse.scale - fine.values * fine.scale).max() <= coarse.scale.max() / 2 * 1.001
