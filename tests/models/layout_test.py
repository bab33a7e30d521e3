"""Layers as a list and as stacks; and mixtures of experts that start as the dense policy they come from."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_policies import PROMPTS, tiny_config, varied_params

from clp_jax.models.config import LayerKind, MoEConfig, PaLMConfig, period_of
from clp_jax.models.layout import RUNS, place_of, restacked, stacks_of, unstacked, upcycled
from clp_jax.models.policy import Policy
from clp_jax.nn.routing import Dropless, TokenChoice


def kinds_of(letters: str) -> tuple[LayerKind, ...]:
    """One kind for each letter."""
    return tuple(LayerKind(window=None, rope=None, sparse=False, mlp_dim=ord(letter)) for letter in letters)


SIZES = dict(vocab_size=11, embed_dim=8, mlp_dim=12, num_heads=2, head_dim=4)


@pytest.mark.parametrize(
    ("pattern", "period"), [("aaaa", 1), ("abab", 2), ("ababa", 2), ("aab", 3), ("a", 1), ("abca", 3)]
)
def test_the_shortest_pattern_that_repeats(pattern, period):
    assert period_of(kinds_of(pattern)) == period


def test_places_count_every_layer_once():
    kinds = kinds_of("aabaabaa")
    assert [place_of(i, kinds) for i in range(8)] == [
        *((("layers", f"layer_{place}"), index) for index in (0, 1) for place in range(3)),
        (("rest", "layer_0"), 0),
        (("rest", "layer_1"), 0),
    ]
    assert [place_of(i, kinds_of("aaa")) for i in range(3)] == [(("layers",), i) for i in range(3)]
    assert place_of(4, kinds_of("ababa")) == (("rest",), 0)


def test_restacked_is_the_inverse_of_unstacked():
    config = PaLMConfig.gemma(**SIZES, num_layers=5, window=2, window_pattern=(True, False))
    stack = varied_params(Policy(config))["decoder"]
    again = restacked(unstacked(stack, config.layer_kinds(5)), config.layer_kinds(5))
    layers = {name: tree for name, tree in stack.items() if name in RUNS}
    assert set(layers) == {"layers", "rest"}
    jax.tree.map(np.testing.assert_array_equal, again, layers)


ENCODER_DECODER = tiny_config(num_encoder_layers=3, num_decoder_layers=4)
DECODER = PaLMConfig.llama(**SIZES, num_layers=3)


@pytest.mark.parametrize(
    ("dense", "router", "every"),
    [
        (ENCODER_DECODER, Dropless(2, renormalize=True), 1),
        (ENCODER_DECODER, Dropless(2, renormalize=True), 2),
        (DECODER, Dropless(2, renormalize=True), 1),
        # With room for every token: as if it were dropless.
        (DECODER, TokenChoice(2, renormalize=True, train_capacity=4.0, eval_capacity=4.0), 2),
    ],
)
def test_an_upcycled_policy_is_the_dense_one(dense, router, every):
    """Copies of one block, weighed to one: nothing has changed yet."""
    moe = MoEConfig(num_experts=4, router=router, every=every)
    sparse = dataclasses.replace(dense, moe=moe)
    params = varied_params(Policy(dense))
    grown = upcycled(params, dense, sparse, jax.random.key(0))
    targets = np.random.default_rng(0).integers(0, 11, (4, 5)).astype(np.int32)

    @jax.jit
    def run(params, grown, prompts, targets):
        return Policy(dense).bind(params)(prompts, targets), Policy(sparse).bind(grown)(prompts, targets)

    before, after = run(params, grown, PROMPTS, targets)
    np.testing.assert_allclose(after, before, rtol=0, atol=1e-5 * np.abs(before).max())
    assert Policy(sparse).num_params() > Policy(dense).num_params()


def test_an_upcycled_switch_is_not_the_dense_policy():
    """One expert's raw probability scales what it returns."""
    sparse = dataclasses.replace(
        DECODER, moe=MoEConfig(num_experts=4, router=TokenChoice(1, train_capacity=4.0, eval_capacity=4.0))
    )
    params = varied_params(Policy(DECODER))
    grown = upcycled(params, DECODER, sparse, jax.random.key(0))
    targets = np.random.default_rng(0).integers(0, 11, (4, 5)).astype(np.int32)
    before, after = (
        jax.jit(lambda p, policy=policy: policy.bind(p)(jnp.asarray(PROMPTS), jnp.asarray(targets)))(p)
        for policy, p in ((Policy(DECODER), params), (Policy(sparse), grown))
    )
    assert np.abs(after - before).max() > 1e-2 * np.abs(before).max()


def test_what_can_not_be_upcycled():
    dense = tiny_config()
    sparse = dataclasses.replace(dense, moe=MoEConfig(num_experts=2, mlp_dim=6))
    params, key = varied_params(Policy(dense)), jax.random.key(0)
    with pytest.raises(ValueError, match="experts of width 6 can't be copies of blocks of width 12"):
        upcycled(params, dense, sparse, key)
    with pytest.raises(ValueError, match="upcycling goes from a dense policy to one with experts"):
        upcycled(params, dense, dense, key)


@pytest.mark.parametrize(
    ("moe", "width"),
    [
        (MoEConfig(num_experts=8), 12),
        (MoEConfig(num_experts=8, router=TokenChoice(k=2, capacity_times_k=True), mlp_dim=5), 10),
        # To the nearest whole number.
        (MoEConfig(num_experts=8, router=TokenChoice(k=2), mlp_dim=5), 6),
        (MoEConfig(num_experts=8, router=TokenChoice(k=2), mlp_dim=8, extra_mlp=True), 22),
        (MoEConfig(num_experts=8, router=Dropless(2), shared_dim=3), 27),
    ],
)
def test_the_twin_is_as_wide_as_what_a_token_visits(moe, width):
    config = tiny_config(num_encoder_layers=2, moe=dataclasses.replace(moe, every=2, dense=True))
    shapes = Policy(config).abstract()
    assert set(stacks_of(config)) == {"encoder", "decoder"}
    assert not any("experts" in jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(shapes))
    kinds = config.layer_kinds(2)
    assert [kind.mlp_dim for kind in kinds] == [12, width]
    assert jnp.all(jnp.asarray([not kind.sparse for kind in kinds]))
