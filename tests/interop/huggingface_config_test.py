"""Settings of Hugging Face: those of published models, those that are refused, and which family a policy is written as."""

import dataclasses

import numpy as np
import pytest
from tiny_policies import varied_params

from clp_jax.interop import huggingface
from clp_jax.interop.hf_families import FAMILIES, canonical, config_json, differences, family_for, family_named, same
from clp_jax.models.config import MoEConfig, PaLMConfig, T5Config
from clp_jax.models.policy import Policy
from clp_jax.nn.rope import LinearScaling, Llama3Scaling, Rope, YarnScaling
from clp_jax.nn.routing import Dropless, TokenChoice

T5_SMALL = {
    "model_type": "t5",
    "d_model": 512,
    "d_kv": 64,
    "d_ff": 1024,
    "num_layers": 8,
    "num_decoder_layers": 8,
    "num_heads": 6,
    "relative_attention_num_buckets": 32,
    "dropout_rate": 0.1,
    "layer_norm_epsilon": 1e-06,
    "feed_forward_proj": "gated-gelu",
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
    "tie_word_embeddings": False,
    "vocab_size": 32128,
}
LLAMA = {
    "model_type": "llama",
    "attention_bias": False,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}
MISTRAL = {
    "model_type": "mistral",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
}
QWEN2 = {
    "model_type": "qwen2",
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "max_window_layers": 21,
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
GEMMA3 = {
    "model_type": "gemma3_text",
    "bos_token_id": 2,
    "eos_token_id": [1, 106],
    "pad_token_id": 0,
    "final_logit_softcapping": None,
    "attn_logit_softcapping": None,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 1152,
    "intermediate_size": 6912,
    "num_attention_heads": 4,
    "num_hidden_layers": 26,
    "num_key_value_heads": 1,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10000,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "vocab_size": 262144,
}
PUBLISHED = {
    "t5": (
        T5_SMALL,
        T5Config.t5_1_1(
            vocab_size=32128,
            embed_dim=512,
            mlp_dim=1024,
            num_heads=6,
            head_dim=64,
            num_encoder_layers=8,
            num_decoder_layers=8,
            dropout_rate=0.1,
        ),
    ),
    "llama": (
        LLAMA,
        PaLMConfig.llama(
            vocab_size=128256,
            embed_dim=2048,
            mlp_dim=8192,
            num_heads=32,
            head_dim=64,
            num_kv_heads=8,
            num_layers=16,
            tied_head=True,
            rope=Rope(500000.0, Llama3Scaling(32.0, 1.0, 4.0, 8192)),
            pad_id=-1,
            eos_ids=(128001, 128008, 128009),
            start_id=128000,
        ),
    ),
    "mistral": (
        MISTRAL,
        PaLMConfig.llama(
            vocab_size=32000,
            embed_dim=4096,
            mlp_dim=14336,
            num_heads=32,
            head_dim=128,
            num_kv_heads=8,
            num_layers=32,
            window=4096,
            pad_id=-1,
            eos_ids=(2,),
            start_id=1,
        ),
    ),
    "qwen2": (
        QWEN2,
        PaLMConfig(
            vocab_size=151936,
            embed_dim=896,
            mlp_dim=4864,
            num_heads=14,
            head_dim=64,
            num_kv_heads=2,
            num_layers=24,
            rope=Rope(1e6),
            qkv_bias=True,
            scale_tied_head=False,
            pad_id=-1,
            eos_ids=(151645, 151643),
            start_id=151643,
        ),
    ),
    "gemma3_text": (
        GEMMA3,
        PaLMConfig.gemma(
            vocab_size=262144,
            embed_dim=1152,
            mlp_dim=6912,
            num_heads=4,
            head_dim=256,
            num_kv_heads=1,
            num_layers=26,
            qk_norm=True,
            post_norm=True,
            rope=Rope(1e6),
            local_rope=Rope(1e4),
            window=512,
            window_pattern=(True, True, True, True, True, False),
            eos_ids=(1, 106),
            start_id=2,
        ),
    ),
}
GENERATION = {"qwen2": {"eos_token_id": [151645, 151643]}}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_settings(name):
    values, expected = PUBLISHED[name]
    generation = GENERATION.get(name, {})
    assert same(FAMILIES[name].config(values, generation), expected)
    # Written with its origin, nothing changes; what changed is written in the origin's terms.
    assert config_json(FAMILIES[name], expected, values, generation) == values
    written = config_json(FAMILIES[name], dataclasses.replace(expected, vocab_size=300000), values, generation)
    assert written == values | {"vocab_size": 300000}


@pytest.mark.parametrize("name", PUBLISHED)
def test_without_an_origin_the_policy_is_what_counts(name):
    expected = PUBLISHED[name][1]
    family = family_for(expected)
    written = config_json(family, expected)
    assert family.model_type == name
    assert written["model_type"] == name
    assert same(family.config(written), expected)


@pytest.mark.parametrize(
    ("scaling", "theta", "expected"),
    [
        ({"type": "linear", "factor": 4.0}, 10.0, Rope(10.0, LinearScaling(4.0))),
        ({"rope_type": "default"}, 10.0, Rope(10.0)),
        (
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
            1e6,
            Rope(1e6, YarnScaling(4.0, 32768)),
        ),
        (
            {
                "rope_type": "yarn",
                "factor": 40,
                "original_max_position_embeddings": 4096,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
            },
            1e4,
            Rope(1e4, YarnScaling(40.0, 4096, attention_factor=1.0)),
        ),
        (
            {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 32768},
            1e4,
            Rope(1e4, YarnScaling(4.0, 32768)),
        ),
    ],
)
def test_positions_in_older_and_newer_keys(scaling, theta, expected):
    older = LLAMA | {"rope_scaling": scaling, "rope_theta": theta}
    newer = {key: value for key, value in LLAMA.items() if not key.startswith("rope")}
    newer["rope_parameters"] = {key: value for key, value in scaling.items() if key != "type"} | {
        "rope_type": scaling.get("rope_type", scaling.get("type")),
        "rope_theta": theta,
    }
    config = FAMILIES["llama"].config(older)
    assert config.rope == expected
    assert FAMILIES["llama"].config(newer) == config
    # A changed base replaces the newer keys, which would come first.
    changed = dataclasses.replace(config, rope=dataclasses.replace(expected, theta=77.0))
    written = config_json(FAMILIES["llama"], changed, newer)
    assert "rope_parameters" not in written
    assert FAMILIES["llama"].config(written) == changed


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            LLAMA | {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
            "rope_scaling.rope_type is 'dynamic', .* linear, llama3, yarn",
        ),
        (LLAMA | {"rope_scaling": {"rope_type": "linear"}}, "of type 'linear' has no 'factor': add it"),
        (
            LLAMA | {"rope_scaling": {"rope_type": "default", "mrope_section": [1]}},
            r"mrope_section is \[1\], which is not supp",
        ),
        (LLAMA | {"rope_parameters": {"rope_type": "yarn", "factor": 2, "truncate": False}}, "truncate is False"),
        (
            LLAMA | {"hidden_act": "quick_gelu"},
            "hidden_act is 'quick_gelu', .* expected one of relu, relu2, gelu_pytorch",
        ),
        (LLAMA | {"quantization_config": {"bits": 4}}, "quantization_config is {'bits': 4}, which is not supported"),
        (LLAMA | {"eos_token_id": None}, "have no eos_token_id"),
        ({"model_type": "llama"}, "config.json has no 'num_attention_heads'"),
        (GEMMA3 | {"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
        (GEMMA3 | {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0"),
        (GEMMA3 | {"layer_types": ["chunked_attention"] * 26}, "layer_types is 'chunked_attention'"),
        (GEMMA3 | {"layer_types": ["full_attention"]}, "layer_types has 1 layers, num_hidden_layers is 26"),
        (T5_SMALL | {"feed_forward_proj": "swiglu"}, "feed_forward_proj is 'swiglu', which is not supported"),
        (
            T5_SMALL | {"relative_attention_num_buckets": 0},
            "relative_attention_num_buckets is 0: expected an even number of at least 4",
        ),
        (
            T5_SMALL | {"feed_forward_proj": "half-gelu"},
            "feed_forward_proj is 'half-gelu': expected 'NAME' or 'gated-NAME'",
        ),
        ({"model_type": "llama4"}, r"model_type is 'llama4' \(did you mean 'llama'\?\), which is not supported"),
        (
            T5_SMALL
            | {"model_type": "switch_transformers", "num_sparse_encoder_layers": 2, "num_sparse_decoder_layers": 4},
            r"the sparse layers are {'encoder': \[1, 5\], 'decoder': \[1, 3, 5, 7\]}",
        ),
    ],
)
def test_what_is_not_supported_is_told(values, message):
    with pytest.raises(ValueError, match=message):
        family_named(values["model_type"]).config(values)


SMALL = dict(vocab_size=11, embed_dim=8, mlp_dim=12, num_heads=2, head_dim=4)
DEEP = SMALL | dict(num_layers=4, scale_tied_head=False)
STACKS = SMALL | dict(num_encoder_layers=4, num_decoder_layers=4)
MIXTRAL = MoEConfig(num_experts=4, router=Dropless(2))
SHARED = MoEConfig(
    num_experts=4, router=Dropless(1, renormalize=False), every=2, mlp_dim=16, shared_dim=5, shared_gate=True
)
SWITCH = MoEConfig(num_experts=4, router=TokenChoice(fixed_capacity=5), every=2, z_weight=0.1)
SURE_FIRST = TokenChoice(fixed_capacity=5, batch_prioritised=True)


EXPRESSIBLE = [
    (PaLMConfig(**DEEP), "llama"),
    (
        PaLMConfig(
            **DEEP, tied_head=False, qkv_bias=True, out_bias=True, mlp_bias=True, rope=Rope(9.0, LinearScaling(2.0))
        ),
        "llama",
    ),
    (
        PaLMConfig(**DEEP, activation="relu2", num_kv_heads=2, remat="full", dtype="bfloat16", dropout_rate=0.5),
        "llama",
    ),
    (PaLMConfig(**DEEP, pad_id=-1, start_id=1), "llama"),
    (PaLMConfig(**DEEP, pad_id=3, start_id=1, eos_ids=(1, 5)), "llama"),
    (PaLMConfig(**DEEP, window=3), "mistral"),
    (PaLMConfig(**DEEP, window=3, window_pattern=(False,)), "llama"),
    (PaLMConfig(**DEEP, qkv_bias=True), "qwen2"),
    (PaLMConfig(**DEEP, qkv_bias=True, window=3, window_pattern=(False, True, True, True)), "qwen2"),
    (PaLMConfig(**DEEP, qkv_bias=True, window=3, window_pattern=(True, False) * 2), "qwen2"),
    (PaLMConfig(**DEEP, qk_norm=True), "qwen3"),
    (PaLMConfig.gemma(**DEEP), "gemma"),
    (PaLMConfig.gemma(**DEEP, post_norm=True, attention_cap=5.0, logit_cap=3.0, query_scale=12**-0.5), "gemma2"),
    (
        PaLMConfig.gemma(
            **DEEP, post_norm=True, qk_norm=True, window=2, window_pattern=(True, False), local_rope=Rope(5.0)
        ),
        "gemma3_text",
    ),
    (PaLMConfig(**DEEP, moe=MIXTRAL), "mixtral"),
    (PaLMConfig(**DEEP, moe=dataclasses.replace(MIXTRAL, z_weight=0.1, balance_weight=0.0)), "mixtral"),
    (PaLMConfig(**DEEP, moe=SHARED, qkv_bias=True), "qwen2_moe"),
    (
        PaLMConfig(**DEEP, moe=dataclasses.replace(SHARED, shared_dim=0, shared_gate=False), qk_norm=True),
        "qwen3_moe",
    ),
    (T5Config(**STACKS), "t5"),
    (T5Config(**STACKS, activation="gelu_exact", tied_head=True, eos_ids=(1, 2)), "t5"),
    (T5Config(**STACKS, gated=False, tied_head=True, scale_tied_head=False), "t5"),
    (T5Config(**STACKS, bias_per_layer=True, tied_head=True), "umt5"),
    (T5Config(**STACKS, gated=False, activation="relu", tied_head=True, moe=SWITCH), "switch_transformers"),
    (T5Config(**STACKS, gated=False, activation="relu", moe=SWITCH), "switch_transformers"),
    (PaLMConfig.gemma(**DEEP, post_norm=True, qk_norm=True), "gemma3_text"),
    (
        T5Config(
            **STACKS,
            activation="relu",
            gated=False,
            tied_head=True,
            moe=dataclasses.replace(SWITCH, dense=True),
        ),
        "t5",
    ),
    (PaLMConfig(**DEEP, moe=dataclasses.replace(MIXTRAL, dense=True, shared_dim=3)), "llama"),
]


@pytest.mark.parametrize(("config", "family"), EXPRESSIBLE)
def test_the_first_family_that_can_express_a_policy(config, family):
    assert family_for(config).model_type == family
    written = config_json(FAMILIES[family], config)
    assert same(FAMILIES[family].config(written), config)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (PaLMConfig.palm(**DEEP), "no Hugging Face family can express PaLMConfig with parallel_block=True"),
        (PaLMConfig(**DEEP, prefix_lm=True), "no Hugging Face family .* prefix_lm=True"),
        (PaLMConfig(**SMALL, num_layers=2), "no Hugging Face family .* scale_tied_head=True"),
        (PaLMConfig(**DEEP, rope=None), "no Hugging Face family .* rope=None"),
        (PaLMConfig(**DEEP, rope=Rope(fraction=0.5)), "no Hugging Face family .* rope=Rope"),
        (
            PaLMConfig(**DEEP, qk_norm=True, logit_cap=3.0),
            "model_type 'qwen3' can't express PaLMConfig with logit_cap=3.0",
        ),
        (T5Config(**STACKS, qk_norm=True), "no Hugging Face family can express T5Config with qk_norm=True"),
        (T5Config(**STACKS, rope=Rope()), "no Hugging Face family .* rope=Rope"),
        (
            T5Config(**STACKS, moe=dataclasses.replace(SWITCH, router=TokenChoice(k=2))),
            "no Hugging Face family can express T5Config with moe=MoEConfig",
        ),
        (
            T5Config(
                **STACKS,
                activation="relu",
                gated=False,
                tied_head=True,
                moe=dataclasses.replace(SWITCH, router=SURE_FIRST, decoder_router=SWITCH.router),
            ),
            "no Hugging Face family can express T5Config with moe=MoEConfig",
        ),
        (
            PaLMConfig.gemma(**DEEP, post_norm=True, query_scale=0.3),
            "no Hugging Face family can express PaLMConfig with query_scale=0.3",
        ),
        (T5Config(**STACKS, num_buckets=0), "no Hugging Face family can express T5Config with num_buckets=0"),
        (
            PaLMConfig(**DEEP, moe=dataclasses.replace(MIXTRAL, dense=True, every=2)),
            "the dense twin has feed-forward blocks of the widths 12, 24: expected one width",
        ),
    ],
)
def test_what_no_family_can_express(config, message):
    with pytest.raises(ValueError, match=message):
        family_for(config)


def test_a_family_that_was_asked_for_is_the_only_one():
    config = PaLMConfig(**DEEP, qk_norm=True)
    assert family_for(config, "qwen3").model_type == "qwen3"
    with pytest.raises(ValueError, match="model_type 'llama' can't express PaLMConfig with qk_norm=True"):
        family_for(config, "llama")
    assert differences(FAMILIES["llama"], config) == ["qk_norm"]


def test_what_changes_how_and_not_what_is_free():
    config = PaLMConfig(**DEEP, window=3, window_pattern=(True, False, True, False), local_rope=Rope(5.0))
    assert same(
        config,
        dataclasses.replace(config, window_pattern=(True, False), remat="full", dropout_rate=0.2, num_kv_heads=2),
    )
    assert not same(config, dataclasses.replace(config, window_pattern=(False, True)))
    everywhere = dataclasses.replace(config, window_pattern=(True,))
    assert same(everywhere, dataclasses.replace(everywhere, rope=Rope(5.0), local_rope=None))
    assert canonical(canonical(config)) == canonical(config)


def test_the_capacity_factors_say_nothing_beside_a_fixed_capacity():
    def switch(**changes):
        router = TokenChoice(fixed_capacity=5, **changes)
        return T5Config(**STACKS, moe=dataclasses.replace(SWITCH, router=router, decoder_router=SWITCH.router))

    free = dict(train_capacity=3.0, eval_capacity=4.0, min_capacity=4, capacity_times_k=True)
    assert same(switch(), switch(**free))
    assert not same(switch(), switch(batch_prioritised=True)) and not same(switch(), switch(group="batch"))


def test_a_dense_twin_is_an_ordinary_model(tmp_path):
    """Its tensors are those of the model of the blocks' width, and it comes back as that."""
    twin = PaLMConfig(**DEEP, moe=dataclasses.replace(MIXTRAL, dense=True, shared_dim=3))
    plain = PaLMConfig(**DEEP | {"mlp_dim": 2 * SMALL["mlp_dim"] + 3})
    assert same(twin, plain)
    for name, config in (("twin", twin), ("plain", plain)):
        huggingface.write(tmp_path / name, config, varied_params(Policy(config)))
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "twin" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()


def test_transformers_runs_all_that_a_family_can_express(tmp_path):
    """Its own classes take the settings, find every tensor and no other, and compute."""
    transformers = pytest.importorskip("transformers", reason="needs the extra `hf`")
    import torch

    for number, (config, family) in enumerate(EXPRESSIBLE):
        config = dataclasses.replace(config, param_dtype="float32")
        directory = tmp_path / f"{number}_{family}"
        huggingface.write(directory, config, varied_params(Policy(config)))
        architecture = getattr(transformers, FAMILIES[family].architecture)
        model, found = architecture.from_pretrained(directory, output_loading_info=True)
        assert not any(found[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), (config, found)
        tokens = {"input_ids": torch.tensor([[3, 4, 5, 6]])}
        if isinstance(config, T5Config):
            tokens["decoder_input_ids"] = torch.tensor([[0, 7]])
        with torch.no_grad():
            theirs = model.eval()(**tokens).logits.numpy()
        assert np.isfinite(theirs).all() and theirs.shape[-1] == config.vocab_size, config
