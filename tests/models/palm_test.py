"""Decoder-only policies against themselves: decoding step by step, prompts apart, packing, samples, windows, eight bits."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_policies import varied_params

from clp_jax.data.packing import pack
from clp_jax.data.reader import sequence_batch
from clp_jax.models.config import PaLMConfig
from clp_jax.models.policy import Policy
from clp_jax.nn.rope import Rope
from clp_jax.sampling.decoder import CachedDecoder
from clp_jax.training.supervised import SupervisedLoss

RNG = np.random.default_rng(0)
SIZES = dict(vocab_size=13, embed_dim=8, mlp_dim=12, num_heads=4, head_dim=4, num_layers=3)
PROMPTS = np.asarray([[3, 4, 5, 6, 7, 1], [8, 9, 10, 3, 0, 0], [5, 0, 0, 0, 0, 0]], np.int32)
COMPLETIONS = RNG.integers(0, 13, (3, 7)).astype(np.int32)
FAMILIES = {
    "llama": PaLMConfig.llama(**SIZES, num_kv_heads=2, qkv_bias=True, out_bias=True, mlp_bias=True),
    "palm": PaLMConfig.palm(**SIZES),
    # Three layers of a pattern of two: a period and a rest.
    "gemma 2": PaLMConfig.gemma(
        **SIZES,
        num_kv_heads=2,
        window=3,
        window_pattern=(True, False),
        post_norm=True,
        attention_cap=3.0,
        logit_cap=2.0,
        query_scale=0.3,
    ),
    "gemma 3": PaLMConfig.gemma(
        **SIZES, window=2, window_pattern=(True, True, False), qk_norm=True, local_rope=Rope(100.0), post_norm=True
    ),
    "deep": PaLMConfig.llama(**(SIZES | dict(num_layers=5)), window=4, scan_unroll=2),
    "t5 bias": PaLMConfig.llama(**SIZES, rope=None, num_buckets=8, max_distance=6),
    "bias per layer": PaLMConfig.llama(**SIZES, rope=None, num_buckets=8, max_distance=6, bias_per_layer=True),
    "no positions": PaLMConfig.llama(**SIZES, rope=None),
    "prefix": PaLMConfig.llama(**SIZES, prefix_lm=True, activation="relu2", gated=False),
    "post norms alone": PaLMConfig.llama(**SIZES, pre_norm=False, post_norm=True),
}


@functools.partial(jax.jit, static_argnames="policy")
def forward(policy, params, inputs, decoder_inputs):
    return policy.bind(params)(inputs, decoder_inputs)


@functools.partial(jax.jit, static_argnames=("policy", "num_samples", "int8"))
def step_by_step(policy, params, inputs, decoder_inputs, num_samples=1, int8=False):
    """The logits of `forward`, one token at a time, and the cache that is left."""
    decoder = CachedDecoder(policy.bind(params), int8)
    first, cache = decoder.start(inputs, decoder_inputs.shape[1], num_samples)

    def step(cache, tokens):
        logits, cache = decoder.step(tokens, cache)
        return cache, logits

    cache, logits = jax.lax.scan(step, cache, decoder_inputs.at[:, 0].set(first).T)
    return logits.swapaxes(0, 1), cache


@pytest.fixture(scope="module", params=FAMILIES.values(), ids=FAMILIES)
def policy(request):
    return Policy(request.param)


@pytest.fixture(scope="module")
def whole(policy):
    return forward(policy, varied_params(policy), PROMPTS, COMPLETIONS)


def test_decoding_step_by_step_is_the_whole_forward(policy, whole):
    logits, cache = step_by_step(policy, varied_params(policy), PROMPTS, jnp.asarray(COMPLETIONS))
    assert whole.shape == (3, 7, 13) and whole.dtype == jnp.float32
    np.testing.assert_allclose(logits, whole, rtol=1e-4, atol=1e-5)
    window = policy.config.window
    lengths = {layer.keys.shape[-2] for stack in cache.stacks for layer in stack}
    assert lengths == ({7} if window is None else {window} if all(policy.config.window_pattern) else {7, window})


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "prefix"])
def test_where_the_prompt_ends_changes_nothing(name):
    """A causal policy reads prompt and completion as one sequence."""
    policy = Policy(FAMILIES[name])
    params = varied_params(policy)
    sequence = RNG.integers(1, 13, (2, 9)).astype(np.int32)
    started = Policy(dataclasses.replace(policy.config, start_id=int(sequence[0, 0])))
    none = forward(started, params, sequence[:1, :0], sequence[:1])
    for length in (1, 4):
        decoder_inputs = np.concatenate([[[0]], sequence[:1, length:]], axis=1)
        parts = forward(policy, params, sequence[:1, :length], decoder_inputs)
        np.testing.assert_allclose(parts, none[:, length - 1 :], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("positions", "same"), [(dict(rope=None), True), (dict(), False)])
def test_without_positions_a_layer_reads_a_bag_of_tokens(positions, same):
    """Of one layer; of several, the mask tells those after the first how far they are."""
    policy = Policy(PaLMConfig.llama(**(SIZES | dict(num_layers=1)), **positions))
    sequence = np.asarray([[0, 3, 7, 5, 9, 2]], np.int32)
    shuffled = sequence[:, [0, 3, 1, 4, 2, 5]]
    last, other = (forward(policy, varied_params(policy), PROMPTS[:1, :0], x)[0, -1] for x in (sequence, shuffled))
    assert np.allclose(last, other, rtol=1e-5, atol=1e-6) == same


def test_what_is_behind_the_padding_does_not_matter(policy, whole):
    params = varied_params(policy)
    longer = np.pad(PROMPTS, ((0, 0), (0, 3)))
    np.testing.assert_allclose(forward(policy, params, longer, COMPLETIONS), whole, rtol=1e-4, atol=1e-5)


def test_a_token_is_predicted_from_the_tokens_before_it(policy, whole):
    changed = COMPLETIONS.copy()
    changed[:, 4] = (changed[:, 4] + 1) % 13
    after = forward(policy, varied_params(policy), PROMPTS, changed)
    np.testing.assert_array_equal(after[:, :4], whole[:, :4])
    assert np.all(np.any(after[:, 4] != whole[:, 4], axis=-1))


def test_the_first_decoder_input_is_the_prompts_last_token(policy, whole):
    other = COMPLETIONS.copy()
    other[:, 0] = 9
    np.testing.assert_array_equal(forward(policy, varied_params(policy), PROMPTS, other), whole)


@pytest.mark.parametrize("name", ["gemma 2", "t5 bias"])
def test_samples_of_a_prompt_share_its_keys(name):
    policy = Policy(FAMILIES[name])
    params = varied_params(policy)
    completions = RNG.integers(0, 13, (6, 5)).astype(np.int32)
    apart = forward(policy, params, np.repeat(PROMPTS, 2, axis=0), completions)
    np.testing.assert_allclose(forward(policy, params, PROMPTS, completions), apart, rtol=1e-4, atol=1e-5)
    logits, cache = step_by_step(policy, params, PROMPTS, jnp.asarray(completions), num_samples=2)
    np.testing.assert_allclose(logits, apart, rtol=1e-4, atol=1e-5)
    for layer in (layer for stack in cache.stacks for layer in stack):
        assert layer.prompt_keys.shape[-4] == 3 and layer.keys.shape[-4] == 6


def test_a_prefix_sees_itself_in_both_directions():
    both = Policy(FAMILIES["prefix"])
    params = varied_params(both)
    causal = Policy(dataclasses.replace(both.config, prefix_lm=False))
    # A prompt of one token has nothing behind it; longer ones do.
    same = [
        np.allclose(
            forward(both, params, PROMPTS, COMPLETIONS)[row], forward(causal, params, PROMPTS, COMPLETIONS)[row]
        )
        for row in range(3)
    ]
    assert same == [False, False, True]


def test_eight_bits_move_the_logits_little():
    policy = Policy(FAMILIES["llama"])
    params = varied_params(policy)
    exact, _ = step_by_step(policy, params, PROMPTS, jnp.asarray(COMPLETIONS))
    rounded, cache = step_by_step(policy, params, PROMPTS, jnp.asarray(COMPLETIONS), int8=True)
    assert cache.stacks[0][0].keys.values.dtype == jnp.int8
    error = np.abs(rounded - exact).max() / np.abs(exact).max()
    assert 0 < error < 0.03


@pytest.mark.parametrize("name", ["llama", "gemma 2", "t5 bias"])
def test_packed_and_unpacked_losses_and_gradients_agree(name):
    policy = Policy(FAMILIES[name])
    params, loss = varied_params(policy), SupervisedLoss(policy, z_loss=1e-2)
    sizes = [(5, 3), (4, 6), (9, 2), (3, 3), (2, 5), (12, 9), (1, 1)]
    examples = [{"inputs": RNG.integers(2, 13, s), "targets": RNG.integers(2, 13, t)} for s, t in sizes]
    lengths = {"inputs": 12, "targets": 10}
    groups = list(pack(examples, lengths))
    assert len(groups) < len(examples) and max(map(len, groups)) >= 3

    def rows(groups):
        return [
            {
                key: value
                for feature in ("inputs", "targets")
                for key, value in (
                    (feature, np.concatenate([example[feature] for example in group])),
                    (f"{feature}_ends", np.cumsum([len(example[feature]) for example in group])),
                )
            }
            for group in groups
        ]

    @jax.jit
    def run(params, batch):
        return jax.value_and_grad(lambda p: loss.sums(p, batch, None)[0])(params)

    packed, apart = (
        run(params, sequence_batch(rows(part), np.arange(len(part), dtype=np.int32), lengths))
        for part in (groups, [[example] for example in examples])
    )
    np.testing.assert_allclose(packed[0], apart[0], rtol=1e-5)
    for a, b in zip(*map(jax.tree.leaves, (packed[1], apart[1])), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(b).max())
