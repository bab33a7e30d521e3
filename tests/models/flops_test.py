"""Operations by formula against counting by hand and against the compiler's count; mixtures of experts against their twins."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from clp_jax.models.config import MoEConfig, PaLMConfig, T5Config
from clp_jax.models.flops import Sizes, encoder_flops, forward_flops, prompt_flops, target_flops, training_flops
from clp_jax.models.policy import Policy
from clp_jax.nn.routing import Dropless, ExpertChoice, TokenChoice

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


# Routers, and how many experts a token visits on average in training, at most.
ROUTERS = {
    "Switch": (TokenChoice(), 1),
    "Switch with half the room": (TokenChoice(train_capacity=0.5), 0.5),
    "ST-MoE": (TokenChoice(k=2), 1.25),
    "two, room for more": (TokenChoice(k=2, train_capacity=3.0), 2),
    "GShard": (TokenChoice(k=2, train_capacity=1.0, capacity_times_k=True), 2),
    "GShard with three quarters of the room": (TokenChoice(k=2, train_capacity=0.75, capacity_times_k=True), 1.5),
    "as many as a sequence is long": (TokenChoice(k=2, train_capacity=0.5, fixed_capacity=3), 2),
    "surest first": (TokenChoice(k=2, batch_prioritised=True), 1.25),
    "expert choice": (ExpertChoice(), 1),
    "expert choice of two": (ExpertChoice(train_capacity=2.0), 2),
    "dropless": (Dropless(k=3), 3),
}
E = 8
WIDE = dataclasses.replace(T5, num_encoder_layers=5, num_decoder_layers=4)
BESIDE = {
    "experts alone": MoEConfig(num_experts=E, mlp_dim=16),
    "every other layer, as wide as the others": MoEConfig(num_experts=E, every=2),
    "shared expert": MoEConfig(num_experts=E, mlp_dim=16, shared_dim=12),
    "shared expert with a gate": MoEConfig(num_experts=E, mlp_dim=16, shared_dim=12, shared_gate=True),
    "extra block": MoEConfig(num_experts=E, mlp_dim=16, every=3, extra_mlp=True),
}


@pytest.mark.parametrize("beside", BESIDE)
@pytest.mark.parametrize("name", ROUTERS)
def test_a_token_visits_its_experts_and_the_router_and_the_twin_costs_the_same(name, beside):
    router, visits = ROUTERS[name]
    encoders_only = isinstance(router, ExpertChoice) or getattr(router, "batch_prioritised", False)
    own, own_visits = (Dropless(k=1), 1) if encoders_only else (None, visits)
    moe = dataclasses.replace(BESIDE[beside], router=router, decoder_router=own)
    sparse, twin = (dataclasses.replace(WIDE, moe=dataclasses.replace(moe, dense=dense)) for dense in (False, True))
    one = 2 * D * 3  # Operations of a token for each column of a feed-forward block.
    added = moe.shared_dim + (F if moe.extra_mlp else 0)
    tokens = {"encoder": 5 // moe.every * SIZES.prompts * SIZES.inputs, "decoder": 4 // moe.every * 40}
    blocks = tokens["encoder"] * one * (visits * (moe.mlp_dim or F) + added - F)
    blocks += tokens["decoder"] * one * (own_visits * (moe.mlp_dim or F) + added - F)
    assert forward_flops(twin, SIZES) == forward_flops(WIDE, SIZES) + blocks
    gates = sum(tokens.values()) * 2 * D * (E + moe.shared_gate)
    assert forward_flops(sparse, SIZES) == forward_flops(twin, SIZES) + gates
    assert training_flops(sparse, SIZES) == 3 * forward_flops(sparse, SIZES)


@pytest.mark.parametrize("name", [name for name in ROUTERS if "surest" not in name and "expert" not in name])
def test_a_decoder_and_its_twin_cost_the_same(name):
    router, visits = ROUTERS[name]
    moe = MoEConfig(num_experts=E, router=router, mlp_dim=16)
    sparse, twin = (dataclasses.replace(PALM, moe=dataclasses.replace(moe, dense=dense)) for dense in (False, True))
    sizes = Sizes(1, 0, 1, 10)
    assert forward_flops(twin, sizes) - forward_flops(PALM, sizes) == 2 * 10 * 2 * D * 3 * (visits * 16 - F)
    assert forward_flops(sparse, sizes) - forward_flops(twin, sizes) == 2 * 10 * 2 * D * E


# Layers wide enough for the products to be nearly all. Whole groups fill the capacity: what is reserved is what is counted.
COMPILED = T5Config(
    vocab_size=512,
    embed_dim=512,
    mlp_dim=1024,
    num_heads=4,
    head_dim=64,
    num_encoder_layers=2,
    num_decoder_layers=2,
    activation="relu",
)
FULL = {
    "no experts": None,
    "Switch": MoEConfig(num_experts=E, router=TokenChoice(train_capacity=1.0), every=2),
    "ST-MoE": MoEConfig(num_experts=E, router=TokenChoice(k=2), every=2, extra_mlp=True),
    "GShard": MoEConfig(num_experts=E, router=TokenChoice(k=2, train_capacity=1.0, capacity_times_k=True)),
    "expert choice": MoEConfig(
        num_experts=E,
        router=ExpertChoice(train_capacity=2.0),
        decoder_router=TokenChoice(train_capacity=0.5),
        shared_dim=256,
        shared_gate=True,
    ),
}


def compiled_flops(config: T5Config, rows: int, length: int) -> float:
    """What XLA counts in the compiled forward pass of training, no dropout."""
    policy = Policy(config)

    def forward(params, inputs, targets):
        model = policy.bind(params)
        encoded = model.encode(inputs, dropout_key=jax.random.key(0))
        return model.logits(model.decode(targets, encoded, dropout_key=jax.random.key(1)).hidden)

    tokens = jax.ShapeDtypeStruct((rows, length), jnp.int32)
    return jax.jit(forward).lower(policy.abstract(), tokens, tokens).compile().cost_analysis()["flops"]


@pytest.mark.parametrize(
    ("name", "changes"),
    [("no experts", None), *((name, change) for name in list(FULL)[1:] for change in ("dense", "sort", "einsum"))],
)
def test_the_compiler_counts_as_many(name, changes):
    """What is no product (norms, ReLU, softmax, sorting) is three in a thousand at most: no product is missing or too many."""
    moe, rows, length = FULL[name], 4, 32
    if moe is not None:
        moe = dataclasses.replace(moe, **({"dense": True} if changes == "dense" else {"dispatch": changes}))
    config = dataclasses.replace(COMPILED, moe=moe)
    # The half of causal squares that is hidden is multiplied all the same.
    counted = 2 * rows * 4 * (length * length / 2) * 4 * 64
    if changes == "einsum":  # There and back: all of the experts' rows with all tokens of their group.
        visits = sum(moe.router_of(causal).experts_per_token for causal in (False, True))
        counted += 2 // moe.every * 2 * (2 * rows * visits * length * length * 512)
    counted += forward_flops(config, Sizes(rows, length, rows, length))
    assert counted < compiled_flops(config, rows, length) < 1.003 * counted
