"""Layers as a list, and as the stacks that they are kept in; and dense layers made sparse."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from clp_jax.array_types import Params, PRNGKeyArray
from clp_jax.models.config import LayerKind, ModelConfig, PaLMConfig, T5Config, period_of
from clp_jax.models.policy import Policy

# What a stack holds besides its layers stands beside these.
RUNS = ("layers", "rest")


def place_of(layer: int, kinds: Sequence[LayerKind]) -> tuple[tuple[str, ...], int]:
    """Where a layer lies in its stack: the path of its parameters, and its number on their leading axis."""
    period = period_of(kinds)
    whole = len(kinds) // period
    if layer < whole * period:
        run, place, size, index = RUNS[0], layer % period, period, layer // period
    else:
        run, place, size, index = RUNS[1], layer - whole * period, len(kinds) - whole * period, 0
    return ((run,) if size == 1 else (run, f"layer_{place}")), index


def unstacked(stack: Params, kinds: Sequence[LayerKind]) -> list[Params]:
    """The parameters of a stack's layers, first to last, without a leading axis."""
    layers = []
    for layer in range(len(kinds)):
        path, index = place_of(layer, kinds)
        tree = stack
        for name in path:
            tree = tree[name]
        layers.append(jax.tree.map(lambda x, index=index: x[index], tree))
    return layers


def restacked(layers: Sequence[Params], kinds: Sequence[LayerKind]) -> Params:
    """The other way: ``layers``, and ``rest`` where the pattern does not come out even."""
    members: dict[tuple[str, ...], list[Params]] = {}
    for number, layer in enumerate(layers):
        members.setdefault(place_of(number, kinds)[0], []).append(layer)
    stack: dict[str, Any] = {}
    for path, same in members.items():
        tree = jax.tree.map(lambda *leaves: jnp.stack(leaves), *same)
        if len(path) == 1:
            stack[path[0]] = tree
        else:
            stack.setdefault(path[0], {})[path[1]] = tree
    return stack


def stacks_of(config: ModelConfig) -> dict[str, int]:
    """The stacks of a policy and their layers."""
    if isinstance(config, T5Config):
        return {"encoder": config.num_encoder_layers, "decoder": config.num_decoder_layers}
    assert isinstance(config, PaLMConfig)
    return {"decoder": config.num_layers}


def upcycled(dense: Params, dense_config: ModelConfig, config: ModelConfig, key: PRNGKeyArray) -> Params:
    """Parameters of a mixture of experts that starts from a dense policy (arXiv 2212.05055): every expert is a copy.

    Routers, shared experts and extra blocks, which the dense policy has not, are drawn anew.

    Args:
        dense: parameters of the dense policy.
        dense_config: the dense policy.
        config: the same with experts, of the dense blocks' width.
        key: of what is drawn.

    Raises:
        ValueError: when the experts' width is not the dense blocks'.
    """
    moe = config.moe
    if moe is None or moe.dense or dense_config.moe is not None:
        raise ValueError("upcycling goes from a dense policy to one with experts: expected moe in the new model alone.")
    if (moe.mlp_dim or config.mlp_dim) != dense_config.mlp_dim:
        raise ValueError(
            f"experts of width {moe.mlp_dim or config.mlp_dim} can't be copies of blocks of width {dense_config.mlp_dim}: "
            "set MoEConfig.mlp_dim."
        )
    fresh = Policy(config).init(key)
    out = {name: tree for name, tree in dense.items() if name not in stacks_of(config)}
    for name, num_layers in stacks_of(config).items():
        kinds, dense_kinds = config.layer_kinds(num_layers), dense_config.layer_kinds(num_layers)
        pairs = zip(unstacked(dense[name], dense_kinds), unstacked(fresh[name], kinds), kinds, strict=True)
        layers = [_sparse(old, new) if kind.sparse else old for old, new, kind in pairs]
        rest = {other: tree for other, tree in dense[name].items() if other not in RUNS}
        out[name] = rest | restacked(layers, kinds)
    return out


def _sparse(dense: Params, fresh: Params) -> Params:
    """One layer."""
    experts = jax.tree.map(lambda old, new: jnp.broadcast_to(old, new.shape), dense["mlp"], fresh["mlp"]["experts"])
    return fresh | dense | {"mlp": fresh["mlp"] | {"experts": experts}}
