"""A bad configuration is refused before anything is built: the message names the field, the value and what to do."""

import dataclasses

import pytest
from flax import nnx
from tiny_policies import tiny_config

from clp_jax.models.config import MoEConfig, PaLMConfig, T5Config
from clp_jax.models.t5 import T5
from clp_jax.nn.rope import Rope
from clp_jax.nn.routing import Dropless, ExpertChoice, TokenChoice


@pytest.mark.parametrize(
    "name",
    [
        "vocab_size",
        "embed_dim",
        "mlp_dim",
        "num_heads",
        "head_dim",
        "num_encoder_layers",
        "num_decoder_layers",
        "max_distance",
        "scan_unroll",
    ],
)
def test_sizes_are_positive(name):
    with pytest.raises(ValueError, match=rf"T5Config\.{name} is 0: expected at least 1"):
        tiny_config(**{name: 0})


@pytest.mark.parametrize("buckets", [2, 7, -8])
def test_buckets_halve_twice(buckets):
    with pytest.raises(ValueError, match=rf"num_buckets is {buckets}: expected an even number, at least 4"):
        tiny_config(num_buckets=buckets)


@pytest.mark.parametrize("distance", [1, 15, 16])
def test_distances_go_beyond_the_exact_buckets(distance):
    says = rf"T5Config\.max_distance is {distance}: expected more than 16, the distances .* num_buckets=32"
    with pytest.raises(ValueError, match=says):
        tiny_config(num_buckets=32, max_distance=distance)
    assert tiny_config(num_buckets=32, max_distance=17).max_distance == 17
    assert tiny_config(num_buckets=0, max_distance=distance).max_distance == distance


@pytest.mark.parametrize("rate", [-0.1, 1.0, float("nan")])
def test_dropout_rate_is_below_one(rate):
    with pytest.raises(ValueError, match=rf"dropout_rate is {rate}: expected a number in \[0, 1\)"):
        tiny_config(dropout_rate=rate)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("activation", "relo", r"'relo' \(did you mean 'relu'\?\): expected one of relu, relu2, gelu"),
        ("remat", "ful", r"'ful' \(did you mean 'full'\?\): expected one of none, minimal, full"),
        ("dtype", "float16", r"'float16' \(did you mean '(b)?float(16|32)'\?\): expected one of float32, bfloat16"),
        ("param_dtype", "x", r"'x': expected one of float32, bfloat16"),
    ],
)
def test_choices_name_the_nearest(name, value, message):
    with pytest.raises(ValueError, match=rf"T5Config\.{name} is {message}"):
        tiny_config(**{name: value})


def test_a_config_is_frozen_hashable_and_builds_its_model():
    config = tiny_config()
    assert config == tiny_config() and hash(config) == hash(tiny_config()) and config != tiny_config(head_dim=3)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.head_dim = 3
    assert isinstance(nnx.eval_shape(lambda: config.build(nnx.Rngs(0))), T5)


def test_experts_that_choose_are_refused_in_causal_stacks():
    """An expert that picks among all tokens of a sequence would look ahead."""
    sizes = dict(vocab_size=11, embed_dim=8, mlp_dim=12, num_heads=2, head_dim=4)
    choosing = MoEConfig(num_experts=2, router=ExpertChoice())
    with pytest.raises(ValueError, match="ExpertChoice in a causal stack.* leaks the future"):
        PaLMConfig.llama(**sizes, num_layers=1, moe=choosing)
    with pytest.raises(ValueError, match="leaks the future"):
        T5Config.t5_1_1(**sizes, num_encoder_layers=1, num_decoder_layers=1, moe=choosing)
    decoder = dataclasses.replace(choosing, decoder_router=TokenChoice(k=2))
    assert T5Config.t5_1_1(**sizes, num_encoder_layers=1, num_decoder_layers=1, moe=decoder).is_stochastic
    with pytest.raises(ValueError, match="k is 3"):
        PaLMConfig.llama(**sizes, num_layers=1, moe=MoEConfig(num_experts=2, router=TokenChoice(k=3)))


@pytest.mark.parametrize(
    "changes",
    [dict(dispatch="hash"), dict(router=Dropless()), dict(router=ExpertChoice(), decoder_router=Dropless())],
)
def test_what_does_not_bring_tokens_to_experts(changes):
    with pytest.raises(
        ValueError, match="MoE dispatch is '(hash|einsum)' with (TokenChoice|Dropless): expected 'sort'"
    ):
        MoEConfig(num_experts=2, **(dict(dispatch="einsum") | changes))


def test_experts_are_balanced_by_layer_stack_or_model():
    with pytest.raises(ValueError, match="MoEConfig.balance_by is 'token': expected 'layer', 'stack' or 'model'"):
        MoEConfig(num_experts=2, balance_by="token")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (dict(num_kv_heads=3), "num_kv_heads is 3: expected a divisor of num_heads=2"),
        (dict(rope=Rope(fraction=0.25)), "expected an even number"),
        (dict(attention_cap=-1.0), "attention_cap is -1.0: expected a positive number"),
        (dict(local_rope=Rope(fraction=0.25)), "expected an even number"),
        (dict(pre_norm=False), "expected norms before or after each block"),
        (dict(window=0), "window is 0: expected at least 1"),
        (dict(eos_ids=(11,)), "eos_ids is .11,.: expected one or more token ids of the vocabulary"),
        (dict(num_layers=0), "num_layers is 0: expected at least 1"),
    ],
)
def test_settings_that_can_not_be(changes, says):
    sizes = dict(vocab_size=11, embed_dim=8, mlp_dim=12, num_heads=2, head_dim=4, num_layers=1)
    with pytest.raises(ValueError, match=says):
        PaLMConfig.llama(**(sizes | changes))


EXPERTS = MoEConfig(num_experts=2, router=Dropless(1))
EXTRA = dataclasses.replace(EXPERTS, extra_mlp=True)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (dict(mlp_bias=True, moe=EXPERTS), "mlp_bias is True: expected False beside experts, which have no biases"),
        (dict(parallel_block=True, moe=EXTRA), "extra_mlp is True with parallel_block=True: expected"),
        (dict(post_norm=True, moe=EXTRA), "extra_mlp is True with post_norm=True: expected"),
        (dict(pre_norm=False, post_norm=True, moe=EXTRA), "extra_mlp is True with pre_norm=False: expected"),
    ],
)
@pytest.mark.parametrize("kind", ["encoder-decoder", "decoder"])
def test_settings_that_no_layer_has_together(kind, changes, says):
    sizes = dict(vocab_size=11, embed_dim=8, mlp_dim=12, num_heads=2, head_dim=4, num_layers=1)
    make = tiny_config if kind == "encoder-decoder" else lambda **given: PaLMConfig.llama(**sizes, **given)
    if kind == "encoder-decoder" and "parallel_block" in changes:
        says = "parallel_block is True: expected False"
    with pytest.raises(ValueError, match=says):
        make(**changes)


def test_the_blocks_of_an_encoder_decoder_are_in_sequence():
    says = r"T5Config\.parallel_block is True: expected False: .* attention to the encoder.* Use PaLMConfig"
    with pytest.raises(ValueError, match=says):
        tiny_config(parallel_block=True)


def test_rows_are_routed_alone():
    """What is served does not depend on other rows; nothing but the group changes."""
    encoder, decoder = ExpertChoice(group=4096, eval_capacity=2.0), TokenChoice(k=2, group="batch")
    moe = MoEConfig(num_experts=2, router=encoder, decoder_router=decoder)
    alone = tiny_config(moe=moe).routed_by_row()
    rows = dataclasses.replace(encoder, group="row"), dataclasses.replace(decoder, group="row")
    assert alone == tiny_config(moe=dataclasses.replace(moe, router=rows[0], decoder_router=rows[1]))
    for same in (tiny_config(), tiny_config(moe=EXPERTS), alone):
        assert same.routed_by_row() == same
