"""Long inputs take attention by blocks, and compute what short ones' masks and biases do."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_policies import tiny_config, varied_params

from clp_jax.models.config import PaLMConfig
from clp_jax.models.policy import Policy
from clp_jax.nn import attention

SIZES = dict(vocab_size=11, embed_dim=8, mlp_dim=12, num_heads=4, head_dim=4, num_layers=2)
POLICIES = {
    "t5": tiny_config(),
    "bias per layer": tiny_config(bias_per_layer=True),
    "gemma": PaLMConfig.gemma(**SIZES, num_kv_heads=2, window=5, window_pattern=(True, False), attention_cap=3.0),
    "t5 bias": PaLMConfig.llama(**SIZES, rope=None, num_buckets=8, max_distance=6),
    "prefix": PaLMConfig.llama(**SIZES, prefix_lm=True),
}
RNG = np.random.default_rng(0)
PROMPTS = np.where(np.arange(24) < np.asarray([[24], [9]]), RNG.integers(2, 11, (2, 24)), 0).astype(np.int32)
TARGETS = RNG.integers(0, 11, (4, 10)).astype(np.int32)


@pytest.mark.parametrize("name", POLICIES)
def test_blocks_are_the_whole(name, monkeypatch):
    """Two samples of each prompt; logits and gradients."""
    policy = Policy(POLICIES[name])
    params = varied_params(policy)

    def total(params):
        logits = policy.bind(params)(jnp.asarray(PROMPTS), jnp.asarray(TARGETS))
        return jnp.sum(jnp.sin(logits)), logits

    whole = jax.jit(jax.grad(total, has_aux=True))(params)
    monkeypatch.setattr(attention, "SHORT_PAIRS", 0)
    monkeypatch.setattr("clp_jax.nn.attention_kernels.SHORT_PAIRS", 0)
    blocked = jax.jit(jax.grad(lambda p: total(p), has_aux=True))(params)
    np.testing.assert_allclose(blocked[1], whole[1], rtol=0, atol=1e-5 * np.abs(whole[1]).max())
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(blocked[0]), jax.tree.leaves(whole[0]), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-4 * np.abs(b).max(), err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize("name", ["t5", "gemma"])
def test_no_array_of_all_pairs(name):
    """A forward pass of 2048 + 1024 tokens holds no array with both lengths, and no more memory than they need."""
    policy = Policy(dataclasses.replace(POLICIES[name], scan_unroll=1))
    sizes = {}
    for scale in (1, 2):
        shapes = [jax.ShapeDtypeStruct((1, scale * length), jnp.int32) for length in (2048, 1024)]
        lowered = jax.jit(lambda p, x, y: policy.bind(p).decode(y, policy.bind(p).encode(x)).hidden).lower(
            policy.abstract(), *shapes
        )
        compiled = lowered.compile()
        sizes[scale] = compiled.memory_analysis().temp_size_in_bytes
        for a in (2048 * scale, 1024 * scale):
            for b in (2048 * scale, 1024 * scale, 3072 * scale):
                assert f"{a},{b}]" not in compiled.as_text()
    assert sizes[2] < 2.2 * sizes[1]
