"""Operations by formula against counting by hand, and against the compiler's count where nothing is causal or gated."""

import dataclasses

import pytest

from clp_jax.models.config import MoEConfig, PaLMConfig, T5Config
from clp_jax.models.flops import Sizes, encoder_flops, forward_flops, prompt_flops, target_flops, training_flops
from clp_jax.nn.routing import TokenChoice

D, F, N, H, V = 8, 32, 4, 2, 64
T5 = T5Config(vocab_size=V, embed_dim=D, mlp_dim=F, num_heads=N, head_dim=H, num_encoder_layers=3, num_decoder_layers=2)
PALM = PaLMConfig.palm(vocab_size=V, embed_dim=D, mlp_dim=F, num_heads=N, head_dim=H, num_layers=2)
SIZES = Sizes(prompts=2, inputs=6, rows=4, targets=10)


def test_an_encoder_decoder_by_hand():
    square, mlp = 2 * D * N * H, 2 * D * F * 3
    encoder = 3 * (12 * (4 * square + mlp) + 2 * 4 * 36 * N * H)
    assert encoder_flops(T5, 2, 6) == encoder
    # Keys and values of cross-attention come from the prompts, queries and the output from the targets.
    assert prompt_flops(T5, SIZES) == encoder + 2 * 12 * 2 * square
    pairs = 10 * 10 / 2 + 10 * 6
    decoder = 2 * (40 * (4 * square + 2 * square + mlp) + 4 * 4 * pairs * N * H)
    assert target_flops(T5, SIZES) == decoder + 2 * 40 * D * V
    assert training_flops(T5, SIZES) == 3 * forward_flops(T5, SIZES)


def test_a_decoder_counts_prompt_and_completion_as_one_sequence():
    whole = Sizes(prompts=4, inputs=0, rows=4, targets=16)
    split = Sizes(prompts=4, inputs=6, rows=4, targets=10)
    head = 2 * 4 * D * V
    assert forward_flops(PALM, whole) - 16 * head == forward_flops(PALM, split) - 10 * head
    layer = 2 * D * H * (2 * N + 2) + 2 * D * F * 3
    assert forward_flops(PALM, whole) == 2 * (64 * layer + 4 * 4 * 128 * N * H) + 16 * head


def test_samples_share_their_prompt():
    assert prompt_flops(PALM, SIZES) == prompt_flops(PALM, dataclasses.replace(SIZES, rows=400))


def test_a_window_hides_keys():
    narrow = dataclasses.replace(PALM, window=4)
    sizes = Sizes(1, 0, 1, 16)
    seen = 16 * 4 - 8  # The first queries see fewer.
    assert forward_flops(PALM, sizes) - forward_flops(narrow, sizes) == 2 * 4 * (128 - seen) * N * H


@pytest.mark.parametrize("k", [1, 2])
def test_a_token_visits_k_experts_and_the_router(k):
    moe = MoEConfig(num_experts=8, router=TokenChoice(k=k), mlp_dim=16)
    sparse = dataclasses.replace(PALM, moe=moe)
    sizes = Sizes(1, 0, 1, 10)
    block = k * 2 * D * 16 * 3 + 2 * D * 8
    assert forward_flops(sparse, sizes) - forward_flops(PALM, sizes) == 2 * 10 * (block - 2 * D * F * 3)
    twin = dataclasses.replace(sparse, moe=dataclasses.replace(moe, dense=True))
    assert forward_flops(sparse, sizes) - forward_flops(twin, sizes) == 2 * 10 * 2 * D * 8
