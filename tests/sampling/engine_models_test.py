"""Continuous batching of real policies: the tokens of `generate`, whenever and wherever a request comes in."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_policies import tiny_config, varied_params

from clp_jax.models.config import MoEConfig, PaLMConfig
from clp_jax.models.policy import Policy
from clp_jax.nn.routing import Dropless
from clp_jax.sampling.decoder import CachedDecoder
from clp_jax.sampling.engine import Engine, EngineConfig, Request
from clp_jax.sampling.generate import SamplingConfig, generate, request_keys

SIZES = dict(vocab_size=11, embed_dim=8, mlp_dim=12, num_heads=2, head_dim=4)
POLICIES = {
    "encoder-decoder": tiny_config(),
    "windows": PaLMConfig.llama(**SIZES, num_layers=3, num_kv_heads=1, window=3, window_pattern=(True, False)),
    "experts": PaLMConfig.llama(**SIZES, num_layers=5, moe=MoEConfig(num_experts=4, router=Dropless())),
}
RNG = np.random.default_rng(0)
PROMPTS = [tuple(int(t) for t in RNG.integers(2, 11, size)) for size in (3, 7, 1, 12, 5, 2, 9)]
SAMPLING = SamplingConfig(max_length=8)


@pytest.fixture(scope="module", params=POLICIES.values(), ids=POLICIES)
def served(request):
    policy = Policy(request.param)
    params = varied_params(policy)

    def bind(params):
        return CachedDecoder(policy.bind(params))

    config = EngineConfig(SAMPLING, buckets=(8, 16), slots=3, num_samples=2, chunk=3)
    return policy, params, Engine(bind, params, config)


@pytest.fixture(scope="module")
def expected(served):
    """Every request alone."""
    policy, params, _ = served

    @jax.jit
    def run(params, inputs, seeds):
        keys = request_keys(seeds, 2)
        return generate(CachedDecoder(policy.bind(params)), inputs, keys=keys, config=SAMPLING, num_samples=2)

    inputs = np.zeros((len(PROMPTS), 16), np.int32)
    for row, prompt in zip(inputs, PROMPTS, strict=True):
        row[: len(prompt)] = prompt
    out = run(params, jnp.asarray(inputs), jnp.arange(len(PROMPTS), dtype=jnp.uint32))
    lengths = np.asarray(out.mask).sum(-1).astype(int)
    tokens, log_probs = np.asarray(out.tokens), np.asarray(out.log_probs)
    return [
        [(tuple(tokens[r, : lengths[r]].tolist()), log_probs[r, : lengths[r]]) for r in (2 * i, 2 * i + 1)]
        for i in range(len(PROMPTS))
    ]


@pytest.mark.parametrize("order", [(0, 1, 2, 3, 4, 5, 6), (6, 3, 0, 5, 1, 4, 2)])
def test_requests_are_served_as_if_alone(served, expected, order):
    """Clocks go on from the requests before: slots are filled at any time, rings go round."""
    _, _, engine = served
    numbers = {engine.submit(Request(PROMPTS[i], seed=i, num_samples=2)): i for i in order}
    found = {numbers[result.number]: result.samples for result in engine.run()}
    assert set(found) == set(range(len(PROMPTS)))
    for i, samples in found.items():
        for sample, (tokens, log_probs) in zip(samples, expected[i], strict=True):
            assert sample.tokens == tokens
            np.testing.assert_allclose(sample.log_probs, log_probs, rtol=1e-4, atol=1e-5)


def test_the_newest_parameters_are_used(served):
    policy, params, engine = served
    engine.params = varied_params(policy, 1)
    engine.submit(Request(PROMPTS[3], seed=3, num_samples=1))
    (other,) = list(engine.run())
    engine.params = params
    engine.submit(Request(PROMPTS[3], seed=3, num_samples=1))
    (own,) = list(engine.run())
    assert own.samples[0].log_probs != other.samples[0].log_probs
