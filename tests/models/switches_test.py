"""Every switch of the configuration that is accepted does something: no parameter is idle, and the prompt always counts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_policies import tiny_config, varied_params

from clp_jax.models.config import ModelConfig, MoEConfig, PaLMConfig, T5Config
from clp_jax.models.policy import Policy
from clp_jax.nn.rope import Rope
from clp_jax.nn.routing import Dropless, ExpertChoice, TokenChoice

SIZES = dict(vocab_size=11, embed_dim=8, mlp_dim=12, num_heads=4, head_dim=4, num_layers=1)
ONE = dict(num_encoder_layers=1, num_decoder_layers=1)
CAPS = dict(attention_cap=3.0, logit_cap=4.0)
NEAR = dict(window=2, window_pattern=(True, False), local_rope=Rope(100.0))
BUCKETS = dict(rope=None, num_buckets=8, max_distance=6, bias_per_layer=True)
BIASES = dict(qkv_bias=True, out_bias=True)
SHARED = MoEConfig(num_experts=4, router=Dropless(2), mlp_dim=6, shared_dim=6, shared_gate=True, dropout_rate=0.1)
EXTRA = MoEConfig(num_experts=2, router=ExpertChoice(), decoder_router=TokenChoice(k=2), extra_mlp=True)
CASES: dict[str, ModelConfig] = {
    "llama": PaLMConfig.llama(**SIZES, **BIASES, mlp_bias=True, num_kv_heads=2, dropout_rate=0.1),
    "palm": PaLMConfig.palm(**SIZES, prefix_lm=True),
    "gemma": PaLMConfig.gemma(
        **(SIZES | dict(num_layers=2)), **NEAR, **CAPS, qk_norm=True, post_norm=True, query_scale=0.3
    ),
    "post norms": PaLMConfig(**SIZES, **BUCKETS, pre_norm=False, post_norm=True, activation="relu2", gated=False),
    "shared expert": PaLMConfig.llama(**SIZES, **BIASES, moe=SHARED),
    "extra block": PaLMConfig.llama(**(SIZES | dict(num_layers=2)), moe=dataclasses.replace(EXTRA, every=2)),
    "parallel twin": PaLMConfig.palm(**SIZES, moe=dataclasses.replace(SHARED, dense=True), mlp_bias=True),
    "T5 1.0": tiny_config(**ONE, bias_per_layer=True, tied_head=True, gated=False, activation="relu", dropout_rate=0.1),
    "T5 with all norms": tiny_config(**ONE, **CAPS, **BIASES, mlp_bias=True, qk_norm=True, post_norm=True),
    "T5 with post norms": tiny_config(
        **ONE, **NEAR, num_buckets=0, rope=Rope(), pre_norm=False, post_norm=True, num_kv_heads=1, query_scale=None
    ),
    "T5 of experts": tiny_config(**ONE, moe=EXTRA),
    "T5 with a shared expert": tiny_config(**ONE, moe=SHARED, norm_offset=True, scale_embeddings=True),
}
# Sizes, token ids, types, and what changes how a result is computed, or how training finds it.
NO_SWITCHES = {
    *("vocab_size", "embed_dim", "mlp_dim", "num_heads", "head_dim", "num_layers", "num_encoder_layers"),
    *("num_decoder_layers", "pad_id", "eos_ids", "start_id", "dtype", "param_dtype", "remat", "scan_unroll"),
    *("norm_eps", "num_experts", "balance_weight", "balance_by", "z_weight", "dispatch", "scale_tied_head"),
}
# Two prompts as long that end alike, and a short one; one completion.
PROMPTS = np.asarray([[3, 4, 5, 6, 7, 1], [8, 9, 5, 6, 7, 1], [7, 1, 0, 0, 0, 0]], np.int32)
COMPLETION = np.asarray([0, 4, 4, 9, 2], np.int32)


@pytest.mark.parametrize("kind", [PaLMConfig, T5Config, MoEConfig])
def test_every_switch_is_in_a_case(kind):
    configs = [*CASES.values(), *(config.moe for config in CASES.values() if config.moe is not None)]
    for field in dataclasses.fields(kind):
        values = {getattr(config, field.name) for config in configs if isinstance(config, kind)}
        left_out = field.name in NO_SWITCHES or (kind is T5Config and field.name == "parallel_block")
        assert left_out or values - {field.default}, f"{kind.__name__}.{field.name} is in no case."


@pytest.mark.parametrize(("pre_norm", "post_norm"), [(True, False), (False, True), (True, True)])
def test_every_block_of_a_layer_has_the_norms_that_are_asked_for(pre_norm, post_norm):
    policy = Policy(tiny_config(**ONE, pre_norm=pre_norm, post_norm=post_norm))
    for stack, blocks in (
        ("encoder", ("self_attention", "mlp")),
        ("decoder", ("self_attention", "cross_attention", "mlp")),
    ):
        norms = {name for name in policy.abstract()[stack]["layers"] if name.endswith("norm")}
        before, after = ({f"{block}_{name}" for block in blocks} for name in ("norm", "post_norm"))
        assert norms == (before if pre_norm else set()) | (after if post_norm else set())


@pytest.mark.parametrize("name", CASES)
def test_every_parameter_has_a_gradient_and_the_prompt_counts(name):
    policy = Policy(CASES[name])
    params = varied_params(policy)
    completions = np.repeat(COMPLETION[None], 3, axis=0)
    weights = np.random.default_rng(1).normal(size=(*completions.shape, SIZES["vocab_size"])).astype(np.float32)

    @jax.jit
    def run(params):
        def loss(params):
            logits = policy.bind(params)(jnp.asarray(PROMPTS), jnp.asarray(completions))
            return (logits * weights).sum(), logits

        return jax.grad(loss, has_aux=True)(params)

    gradients, logits = run(params)
    largest = {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.abs(leaf).max()
        for path, leaf in jax.tree_util.tree_leaves_with_path(gradients)
    }
    assert {path: size for path, size in largest.items() if not 1e-4 < size < 1e4} == {}
    for other in (1, 2):
        assert np.all(np.abs(logits[0] - logits[other]).max(-1) > 1e-4)
