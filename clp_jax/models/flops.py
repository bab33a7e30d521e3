"""Floating-point operations of a policy by formula: what a step must do, however it is computed.

A product of ``m×k`` by ``k×n`` counts ``2mkn``. Causal attention counts the pairs that are seen, so half of a square. What is
recomputed or padded is not counted (PaLM, arXiv 2204.02311, appendix B, with attention at half). Of a token's experts as many
are, as the capacity of training leaves room for (`clp_jax.nn.routing.TokenChoice.experts_per_token`), full or not; what moves
tokens to experts is not.
"""

import dataclasses

from clp_jax.models.config import LayerKind, ModelConfig, PaLMConfig, T5Config

# A backward pass multiplies twice for every product of the forward pass: for the inputs and for the parameters.
BACKWARD = 2


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of the arrays that a policy reads and writes.

    Attributes:
        prompts: ``B``, rows of inputs.
        inputs: ``S``, positions of each.
        rows: ``R``, rows of targets, the samples of the prompts.
        targets: ``T``, positions of each.
    """

    prompts: int
    inputs: int
    rows: int
    targets: int


def forward_flops(config: ModelConfig, sizes: Sizes) -> float:
    """Operations of reading the inputs and predicting the targets, given whole or one after another with a cache.

    Args:
        config: the policy.
        sizes: of inputs and targets.
    """
    return prompt_flops(config, sizes) + target_flops(config, sizes)


def training_flops(config: ModelConfig, sizes: Sizes) -> float:
    """Operations of a forward and a backward pass."""
    return (1 + BACKWARD) * forward_flops(config, sizes)


def prompt_flops(config: ModelConfig, sizes: Sizes) -> float:
    """Operations of reading the inputs: what filling a cache costs."""
    tokens = sizes.prompts * sizes.inputs
    if isinstance(config, T5Config):
        # Keys and values of cross-attention are made of the prompt, once for all its samples.
        cross = 2 * config.embed_dim * 2 * config.kv_heads * config.head_dim * tokens * config.num_decoder_layers
        return encoder_flops(config, sizes.prompts, sizes.inputs) + cross
    assert isinstance(config, PaLMConfig)
    return sum(
        tokens * _layer_flops(config, kind, causal=True)
        + sizes.prompts * _attention_flops(config, _pairs(sizes.inputs, not config.prefix_lm, kind.window))
        for kind in config.layer_kinds(config.num_layers)
    )


def encoder_flops(config: T5Config, rows: int, length: int) -> float:
    """Operations of an encoder."""
    return sum(
        rows * length * _layer_flops(config, kind, causal=False)
        + rows * _attention_flops(config, _pairs(length, False, kind.window))
        for kind in config.layer_kinds(config.num_encoder_layers, causal=False)
    )


def target_flops(config: ModelConfig, sizes: Sizes) -> float:
    """Operations of predicting the targets, the head among them."""
    depth = config.num_decoder_layers if isinstance(config, T5Config) else config.num_layers  # type: ignore[attr-defined]
    tokens = sizes.rows * sizes.targets
    total = 2.0 * tokens * config.embed_dim * config.vocab_size
    for kind in config.layer_kinds(depth):
        total += tokens * _layer_flops(config, kind, causal=True)
        if isinstance(config, T5Config):
            pairs = _pairs(sizes.targets, True, kind.window) + sizes.targets * sizes.inputs
            total += tokens * 2 * config.embed_dim * 2 * config.num_heads * config.head_dim
        else:
            pairs = _pairs(sizes.inputs + sizes.targets, True, kind.window) - _pairs(sizes.inputs, True, kind.window)
        total += sizes.rows * _attention_flops(config, pairs)
    return total


def _layer_flops(config: ModelConfig, kind: LayerKind, *, causal: bool) -> float:
    """Products with parameters for one token: self-attention's projections and the feed-forward block."""
    heads = 2 * config.num_heads + 2 * config.kv_heads
    projections = 2 * config.embed_dim * heads * config.head_dim
    if not kind.sparse:
        return projections + _mlp_flops(config, kind.mlp_dim)
    moe = config.moe
    assert moe is not None
    experts = moe.router_of(causal).experts_per_token * _mlp_flops(config, moe.mlp_dim or config.mlp_dim)
    shared = _mlp_flops(config, moe.shared_dim) + (_mlp_flops(config, config.mlp_dim) if moe.extra_mlp else 0)
    gates = 2 * config.embed_dim * (moe.num_experts + moe.shared_gate)
    return projections + gates + experts + shared


def _mlp_flops(config: ModelConfig, width: int) -> float:
    return 2 * config.embed_dim * width * (3 if config.gated else 2)


def _attention_flops(config: ModelConfig, pairs: float) -> float:
    """Logits and mean of the values."""
    return 2 * 2 * pairs * config.num_heads * config.head_dim


def _pairs(length: int, causal: bool, window: int | None) -> float:
    """Pairs of a query and a key that it sees, in one row of `length`; a causal square is counted at half."""
    seen = length if window is None else min(window, length)
    return length * seen - seen * seen / 2 if causal else float(length * seen)
